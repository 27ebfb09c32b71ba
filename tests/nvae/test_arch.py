"""The configuration: what follows from it and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest

from nvae.arch import ARCHITECTURES, DATA_SETS, INVERTED_RESIDUALS, RESIDUALS, ModelConfig


def test_importing_the_package_and_the_configuration_does_not_import_torch() -> None:
    code = "import sys, nvae, nvae.arch; nvae.ModelConfig(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_latents_of_three_scales_go_from_the_top_down() -> None:
    config = ModelConfig(
        dataset="celeba_64",
        num_latent_scales=3,
        num_groups_per_scale=20,
        ada_groups=True,
        num_preprocess_blocks=1,
        num_postprocess_blocks=1,
    )
    assert config.groups_per_scale == [20, 10, 5]
    assert config.latent_shapes == [(20, 8, 8)] * 5 + [(20, 16, 16)] * 10 + [(20, 32, 32)] * 20
    assert config.levels_of_groups == [3] * 5 + [2] * 10 + [1] * 20


def test_digits_have_seventeen_levels_and_three_channels_per_mixture_component() -> None:
    config = ModelConfig(dataset="digits", num_preprocess_blocks=1, num_postprocess_blocks=1)
    assert config.image_shape == (1, 8, 8)
    assert config.levels == 17
    assert config.output_channels == 30
    assert config.data.num_output == 64


def test_bit_depth_sets_the_levels_of_colour_images_only() -> None:
    assert ModelConfig(dataset="cifar10", num_x_bits=5).levels == 32
    assert ModelConfig(dataset="mnist", num_x_bits=5).levels == 2


def test_a_single_group_is_the_vanilla_model() -> None:
    assert ModelConfig(num_groups_per_scale=1).vanilla
    assert not ModelConfig(num_groups_per_scale=2).vanilla
    assert not ModelConfig(num_groups_per_scale=1, num_latent_scales=2).vanilla


def test_every_architecture_but_one_names_known_primitives() -> None:
    known = {"", *INVERTED_RESIDUALS, *RESIDUALS}
    unknown = {
        name
        for name, cells in ARCHITECTURES.items()
        if not all(known.issuperset(ops) for ops in cells.values())
    }
    assert unknown == {"res_mbconv9"}


def test_the_configuration_is_frozen_and_goes_through_its_arguments() -> None:
    config = ModelConfig(dataset="cifar10", use_se=True, num_nf=2)
    assert ModelConfig.from_args({**asdict(config), "seed": 1}) == config
    assert hash(config) == hash(ModelConfig.from_args(asdict(config)))
    with pytest.raises(FrozenInstanceError):
        config.num_nf = 3  # type: ignore[misc]


def test_old_arguments_are_filled_in() -> None:
    args = asdict(ModelConfig(ada_groups=True, min_groups_per_scale=4, num_mixture_dec=3))
    for name in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        del args[name]
    config = ModelConfig.from_args(args)
    assert (config.ada_groups, config.min_groups_per_scale, config.num_mixture_dec) == (
        False,
        1,
        10,
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_nf": -1}, "num_nf: got -1, expected 0 to"),
        ({"num_x_bits": 9}, "num_x_bits: got 9, expected 1 to 8"),
        ({"num_channels_dec": 2.0}, "num_channels_dec: got 2.0, expected a value of type int"),
        ({"dataset": "imagenet_128"}, "dataset: got 'imagenet_128', expected one of mnist"),
        ({"arch_instance": "res_mbconv9"}, "mconv_e3k9g0, mconv_e6k9g0 were never defined"),
        ({"num_postprocess_blocks": 1}, "num_postprocess_blocks: got 1, expected 2"),
        ({"num_latent_scales": 5}, "32 pixels wide and cannot be halved 6 times"),
        ({"num_groups_per_scale": 1, "num_channels_enc": 8}, "one group in one scale needs"),
        ({"arch_instance": "mbconv_den", "num_channels_enc": 12}, "num_channels_enc must be"),
        ({"num_channels_enc": 20000}, "80000 channels at its top"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        ModelConfig(**values)
    assert words in str(error.value)


def test_every_data_set_has_a_model() -> None:
    for name in DATA_SETS:
        blocks = 1 if name == "digits" else 2
        config = ModelConfig(
            dataset=name, num_preprocess_blocks=blocks, num_postprocess_blocks=blocks
        )
        assert config.image_size % (1 << config.top_level) == 0

"""Names, shapes and order of the state dict of every full-size model, without allocating one."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.arch import ModelConfig
from nvae.layers import Conv2d
from nvae.model import AutoEncoder
from tests.conftest import GOLDEN

MANIFESTS = sorted((GOLDEN / "nvae" / "manifests").glob("*.json.gz"))


def test_there_are_ten_manifests() -> None:
    assert len(MANIFESTS) == 10


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name.split(".")[0])
def test_the_full_size_state_dict_is_upstreams(path: Path) -> None:
    manifest: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    config = ModelConfig.from_args(manifest["args"])
    with torch.device("meta"):
        model = AutoEncoder(config)
    state = model.state_dict()
    entries = [
        [key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in state.items()
    ]
    assert entries == manifest["state_dict_entries"]
    lines = "\n".join(f"{key} {'x'.join(map(str, shape))} {kind}" for key, shape, kind in entries)
    assert (
        hashlib.sha256(lines.encode()).hexdigest()
        == (manifest["state_dict_sha256_of_key_shape_lines"])
    )
    for second, first in manifest["aliased_keys"]:
        assert model.get_parameter(second) is model.get_parameter(first)
    parameters = list(model.parameters())
    convs = model.conv_layers()
    assert len(parameters) == manifest["parameter_tensors"]
    assert sum(p.numel() for p in parameters) == manifest["parameter_count"]
    assert (
        sum(b.numel() for n, b in state.items() if "running" in n or "num_batches" in n)
        == (manifest["buffer_elements"])
    )
    assert len(convs) == manifest["conv_layers"]
    assert sum(isinstance(m, Conv2d) for m in convs) == manifest["weight_norm_conv_layers"]
    assert len(model.batch_norms()) == manifest["bn_layers"]
    assert config.groups_per_scale == manifest["groups_per_scale_high_to_low_resolution"]
    assert config.num_groups == manifest["total_groups"]
    assert [list(s) for s in config.latent_shapes] == manifest["latent_shapes_top_to_bottom"]
    assert list(model.prior_ftr0.shape) == manifest["prior_ftr0_shape"]
    assert config.output_channels == manifest["image_conditional_out_channels"]
    for name, count in manifest["number_of_cells"].items():
        assert len(getattr(model, name)) == count, name

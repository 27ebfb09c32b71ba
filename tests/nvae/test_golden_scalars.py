"""Recorded tables of upstream: schedules, losses, distributions, single layers, first cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvae import arch, losses
from nvae.arch import ModelConfig
from nvae.distributions import Bernoulli, MixtureOfLogistics, Normal, NormalDecoder, soft_clamp
from nvae.layers import Conv2d, DataInitConv2d, autoregressive_mask, bilinear_x2
from nvae.model import AutoEncoder
from tests.conftest import GOLDEN

TABLES: dict[str, Any] = json.loads((GOLDEN / "nvae" / "scalars.json").read_text())


def close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    """max |a - b| / max |b| is at most `rtol`."""
    a, b = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (got, expected))
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


def test_golden_groups_per_scale() -> None:
    for row in TABLES["groups_per_scale"]:
        config = ModelConfig(
            dataset="celeba_256",
            num_latent_scales=row["num_scales"],
            num_groups_per_scale=row["groups"],
            ada_groups=row["ada"],
            min_groups_per_scale=row["minimum"],
        )
        assert config.groups_per_scale == row["result"]


def test_golden_architecture_instances() -> None:
    assert TABLES["arch_instances"] == arch.ARCHITECTURES


def test_golden_data_sets() -> None:
    for name, row in TABLES["data_sets"].items():
        # Of lsun_tower_64 upstream knows the size, but no output: ours has one, like all colours.
        if isinstance(row["num_output"], int):
            data = arch.DATA_SETS[name]
            assert (data.image_size, data.num_output) == (row["input_size"], row["num_output"])
            close(1 / (np.log(2) * data.num_output), row["bits_per_dim_coefficient"])


def test_golden_kl_coefficient() -> None:
    for row in TABLES["kl_coeff"]:
        got = [
            losses.kl_coefficient(
                step,
                row["num_total_iter"],
                row["kl_anneal_portion"],
                row["kl_const_portion"],
                row["kl_const_coeff"],
            )
            for step in row["steps"]
        ]
        close(got, row["values"], 1e-12)


def test_golden_kl_alpha() -> None:
    for row in TABLES["kl_balancer_alpha"]:
        close(losses.kl_alpha(row["groups_per_scale"], row["fun"]), row["alpha"])


def test_golden_kl_balance() -> None:
    for row in TABLES["kl_balancer"]:
        alpha = torch.tensor(row["alpha"]) if row["kl_balance"] else None
        kl = losses.balance_kl(
            torch.tensor(row["kl_all_group_by_batch"]).unbind(), row["kl_coeff"], alpha
        )
        close(kl.total, row["balanced_kl_per_sample"])
        close(kl.weights, row["coefficients"])
        close(kl.values, row["kl_values"])


def test_golden_annealed_norm_coefficient() -> None:
    for row in TABLES["weight_decay_norm_anneal"]:
        got = losses.norm_coefficient(row["kl_coeff"], row["final"], row["init"])
        close(got, row["value"], 1e-12)


def test_golden_learning_rate_schedule() -> None:
    for row in TABLES["lr_schedule"]:
        iterations = row["iterations_per_epoch"]

        def rate(step: int, row: dict[str, Any] = row) -> float:
            return losses.learning_rate(
                step,
                iterations_per_epoch=row["iterations_per_epoch"],
                epochs=row["epochs"],
                warmup_epochs=row["warmup_epochs"],
                peak=row["learning_rate"],
                floor=row["learning_rate_min"],
            )

        if "lr_used_by_epoch_and_iteration" in row:
            steps = range(row["epochs"] * iterations)
            expected = np.ravel(row["lr_used_by_epoch_and_iteration"])
            close([rate(step) for step in steps], expected, 1e-12)
        for epoch, (first, last) in row.get("lr_of_first_and_last_iteration", {}).items():
            start = int(epoch) * iterations
            close([rate(start), rate(start + iterations - 1)], [first, last], 1e-12)


@pytest.mark.parametrize("row", TABLES["adamax"], ids=lambda row: f"{row['kind']}")
def test_golden_adamax_of_the_library_is_upstreams(row: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.tensor(value)) for value in row["initial"]]
    optimizer = torch.optim.Adamax(
        params,
        lr=row["lr"],
        betas=tuple(row["betas"]),
        eps=row["eps"],
        weight_decay=row["weight_decay"],
    )
    for grads, after in zip(row["grads"], row["after_each_step"], strict=True):
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad)
        optimizer.step()
        for i, param in enumerate(params):
            close(param, after["params"][i], 1e-6)
            close(optimizer.state[param]["exp_avg"], after["exp_avg"][i], 1e-6)
            close(optimizer.state[param]["exp_inf"], after["exp_inf"][i], 1e-6)


def test_golden_bit_depth_reduction() -> None:
    images = torch.arange(256) / 255
    for bits, values in TABLES["bit_depth_reduction"].items():
        levels = losses.reduce_bits(images, int(bits)) * (2 ** int(bits) - 1)
        close(levels, values)


def test_golden_soft_clamp() -> None:
    close(soft_clamp(torch.tensor(TABLES["soft_clamp"]["x"])), TABLES["soft_clamp"]["y"])


def test_golden_normal() -> None:
    for row in TABLES["normal"]:
        q = Normal.from_raw(
            torch.tensor(row["mu_in"]), torch.tensor(row["log_sigma_in"]), row["temp"]
        )
        p = Normal.from_raw(
            torch.tensor(row["other_mu_in"]), torch.tensor(row["other_log_sigma_in"])
        )
        x = torch.tensor(row["sample"])
        close(q.mean, row["mu"])
        close(q.std, row["sigma"])
        close(q.log_prob(x), row["log_p"])
        close(q.standardise(x), row["u_of_sample"])
        close(q.kl(p), row["kl_to_other"])


def test_golden_weight_norm() -> None:
    row = TABLES["weight_norm"]
    weight = torch.tensor(row["weight"])
    conv = Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
    with torch.no_grad():
        conv.weight.copy_(weight)
        close(conv.initial_log_norm().flatten(), row["initial_log_weight_norm"])
        conv.log_weight_norm.copy_(torch.tensor(row["log_weight_norm"]).view(-1, 1, 1, 1))
    close(conv.effective_weight(), row["result"])


def test_golden_autoregressive_masks() -> None:
    for row in TABLES["autoregressive_masks"]:
        mask = autoregressive_mask(
            row["kernel"],
            row["c_in"],
            row["c_out"],
            row["groups"],
            zero_diag=row["zero_diag"],
            mirror=row["mirror"],
        )
        assert mask.int().tolist() == row["mask"]


def test_golden_mixture_of_logistics() -> None:
    for row in TABLES["mixture_of_logistics"]:
        mixture = MixtureOfLogistics(torch.tensor(row["parameters"]), 2 ** row["num_bits"])
        close(mixture.log_prob(torch.tensor(row["x"])), row["log_prob"])
        close(mixture.mean(), row["mean"])


def test_golden_gaussian_decoder() -> None:
    row = {name: torch.tensor(value) for name, value in TABLES["gaussian_decoder"].items()}
    decoder = NormalDecoder(row["logits"])
    close(decoder.log_prob(row["x"]), row["log_prob"])
    close(decoder.log_prob(row["x"], min_log_std=-2), row["vaebm_log_prob"])
    close(decoder.sample(noise=row["pixel_noise"]), row["sample"])
    close(decoder.mean(), row["mean_image"])


def test_golden_bernoulli_counts_the_centre_only() -> None:
    with np.load(GOLDEN / "nvae" / "bernoulli.npz") as arrays:
        row = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    output, x = Bernoulli(row["eval_logits"]), row["x_uint8"].float()
    close(output.log_prob(x), row["eval_log_prob"])
    close(losses.reconstruction_loss(output, x, border=2), row["eval_recon_loss"])
    close(output.mean(), row["eval_image"])


def test_golden_bilinear_upsampling() -> None:
    row = TABLES["upsample_bilinear_align_corners"]
    close(bilinear_x2()(torch.tensor(row["x"])), row["y"])


def first_cells(file: Path) -> tuple[AutoEncoder, dict[str, torch.Tensor], torch.Tensor]:
    """A model with the file's weights in its first cells, the recorded arrays, the images."""
    with np.load(file) as arrays:
        flags = json.loads(str(arrays["training_flags"]))
        row = {n: torch.from_numpy(arrays[n]) for n in arrays.files if n != "training_flags"}
    args: dict[str, Any] = {}
    for i, flag in enumerate(flags):
        if flag.startswith("--"):
            value = flags[i + 1] if i + 1 < len(flags) else "--"
            args[flag[2:]] = True if value.startswith("--") else value
    known = ModelConfig().__dict__
    config = ModelConfig(**{n: type(known[n])(v) for n, v in args.items() if n in known})
    model = AutoEncoder(config).eval()
    missing, unexpected = model.load_state_dict(
        {n: v for n, v in row.items() if n.startswith(("stem.", "pre_process."))}, strict=False
    )
    assert missing
    assert not unexpected
    return model, row, row["x_uint8"].float() / 255


def run_first_cells(model: AutoEncoder, x: torch.Tensor) -> list[torch.Tensor]:
    outputs = [model.stem(2 * x - 1)]
    for cell in model.pre_process:
        outputs.append(cell(outputs[-1]))
    return outputs


@pytest.mark.parametrize("name", ["res_elu", "res_bnelu"])
def test_golden_first_cells(name: str) -> None:
    model, row, x = first_cells(GOLDEN / "nvae" / f"first_cells_{name}.npz")
    with torch.no_grad():
        outputs = [out.double() for out in run_first_cells(model, x)]
        trace = torch.stack(
            [
                torch.stack([o.mean(), o.std(), o.norm(), o.flatten()[o.numel() // 3]])
                for o in outputs
            ]
        )
        for got, expected in zip(trace.T, row["trace"].T, strict=True):
            close(got, expected)
        if name == "res_bnelu":
            run_first_cells(model.train(), x)
            layers = [m for n, m in model.batch_norms() if n.startswith("pre_process")]
            close(torch.cat([m.running_mean for m in layers]), row["train_bn_running_mean"])
            close(torch.cat([m.running_var for m in layers]), row["train_bn_running_var"])
        else:
            convs = [m for m in model.pre_process.modules() if isinstance(m, DataInitConv2d)]
            for conv in convs:
                conv.initialised = False
            run_first_cells(model, x)
            norms = torch.cat([m.log_weight_norm.flatten() for m in convs])
            close(norms, row["datainit_log_weight_norm"])
            close(torch.cat([m.bias for m in convs]), row["datainit_bias"])

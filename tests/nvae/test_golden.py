"""Recorded numbers of upstream: one test per golden folder, every array of it."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvae import batchnorm, checkpoint, losses
from nvae.distributions import Normal, NormalDecoder
from nvae.layers import DataInitConv2d
from nvae.model import AutoEncoder
from tests.conftest import nvae_cases

Arrays = dict[str, np.ndarray]


class Case:
    """A golden folder: its inputs by recipe, its expected arrays, a model from its file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: dict[str, Any] = json.loads((folder / "case.json").read_text())
        with np.load(folder / "io.npz") as arrays:
            self.expected: Arrays = {name: arrays[name] for name in arrays.files}
        self.config = checkpoint.read(folder / "checkpoint.pt").config
        self.batch: int = self.info["batch"]

    def model(self) -> AutoEncoder:
        return checkpoint.load(self.folder / "checkpoint.pt")

    def normals(self, name: str, batch: int | None = None, times: int = 1) -> list[torch.Tensor]:
        draw = np.random.RandomState(self.info["random_inputs"][name]["seed"])
        shapes = [(batch or self.batch, *shape) for shape in self.config.latent_shapes] * times
        return [
            torch.from_numpy(draw.standard_normal(shape).astype(np.float32)) for shape in shapes
        ]

    def pixel_noise(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        draw = np.random.RandomState(self.info["random_inputs"]["pixel"]["seed"])
        size, mixtures = (self.config.image_size,) * 2, self.config.num_mixture_dec
        if mixtures == 1:
            noise = draw.standard_normal((self.batch, 3, *size))
            return torch.from_numpy(noise.astype(np.float32))
        shapes = (self.batch, mixtures, *size), (self.batch, 3, *size)
        pick, value = (draw.uniform(1e-5, 1 - 1e-5, shape).astype(np.float32) for shape in shapes)
        return torch.from_numpy(pick), torch.from_numpy(value)

    def x(self) -> torch.Tensor:
        x = torch.from_numpy(self.expected["x_uint8"]).float()
        if self.config.data.output == "bernoulli":
            return x
        return losses.reduce_bits(x / 255, self.config.num_x_bits)


def numbered(name: str, values: Any) -> dict[str, torch.Tensor]:
    return {f"{name}_{i}": value for i, value in enumerate(values)}


def bn_buffers(model: AutoEncoder, prefix: str) -> dict[str, torch.Tensor]:
    layers = [layer for _, layer in model.batch_norms()]
    empty = torch.empty(0)
    return {
        f"{prefix}_running_mean": torch.cat([empty, *(m.running_mean for m in layers)]),
        f"{prefix}_running_var": torch.cat([empty, *(m.running_var for m in layers)]),
        f"{prefix}_num_batches_tracked": torch.tensor(
            [int(m.num_batches_tracked) for m in layers], dtype=torch.int64
        ),
    }


def posterior(case: Case) -> dict[str, torch.Tensor]:
    """`eval_*`, `posterior_u`, the pixel samples and the trace of the modules' outputs."""
    model, eps, x = case.model(), case.normals("eps"), case.x()
    names = set(case.info["trace_names"])
    trace: list[tuple[str, torch.Tensor]] = []
    for name, module in model.named_modules():
        if name in names:
            module.register_forward_hook(
                lambda _m, _i, out, name=name: trace.append((name, out.double()))
            )
    with torch.no_grad():
        out = model(x, eps)
        image = model.decoder_output(out.logits)
        recon = losses.reconstruction_loss(image, x, case.config.data.border)
    assert [name for name, _ in trace] == case.info["trace_names"]
    result = {
        "x": x,
        **numbered("eps", eps),
        **numbered("eval_mu_q", [layer.posterior.mean for layer in out.layers]),
        **numbered("eval_sigma_q", [layer.posterior.std for layer in out.layers]),
        **numbered("eval_mu_p", [layer.prior.mean for layer in out.layers]),
        **numbered("eval_sigma_p", [layer.prior.std for layer in out.layers]),
        **numbered("eval_z_before_flow", [layer.z_before_flow for layer in out.layers]),
        **numbered("eval_z", out.z),
        **numbered("posterior_u", [r.prior.standardise(r.z) for r in out.layers]),
        "eval_logits": out.logits,
        "eval_log_q": out.log_q,
        "eval_log_p": out.log_p,
        "eval_kl_all": torch.stack(out.kl_all),
        "eval_kl_diag": torch.stack(out.kl_diag),
        "eval_log_prob": image.log_prob(x),
        "eval_recon_loss": recon,
        "eval_log_iw": losses.log_importance_weight(recon, out.log_q, out.log_p),
        "eval_image": image.mean(),
        "trace": torch.stack(
            [
                torch.stack([o.mean(), o.std(), o.norm(), o.flatten()[o.numel() // 3]])
                for _, o in trace
            ]
        ),
    }
    if isinstance(image, NormalDecoder):
        result["vaebm_log_prob"] = image.log_prob(x, min_log_std=-2)
        result["pixel_sample"] = image.sample(noise=case.pixel_noise())
    elif case.config.data.output == "color":
        for t in (1.0, 0.7):
            result[f"pixel_sample_t{t}"] = image.sample(t, noise=case.pixel_noise())
    return result


def prior(case: Case) -> dict[str, torch.Tensor]:
    """`prior_*` and `grad_*`: from u to z and to the logits, and back by autograd."""
    model, u = case.model().requires_grad_(False), case.normals("u")
    result = numbered("u", u)

    def from_u(u: list[torch.Tensor], t: float) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
        z: list[torch.Tensor] = []
        log_p = []

        def choose(layer: int, prior: Normal, h: torch.Tensor | None) -> torch.Tensor:
            tempered = prior.tempered(t)
            z.append(tempered.sample(noise=u[layer]))
            log_p.append(tempered.log_prob(z[-1]).sum(dim=(1, 2, 3)))
            return z[-1]

        logits = model.walk(case.batch, choose)
        assert logits is not None
        return logits, z, sum(log_p)

    for t in (1.0, 0.7):
        with torch.no_grad():
            logits, z, log_p = from_u(u, t)
            assert torch.equal(logits, model.sample(case.batch, t, u=u))
        result |= numbered(f"prior_t{t}_z", z)
        result[f"prior_t{t}_logits"] = logits
        result[f"prior_t{t}_image"] = model.decoder_output(logits).mean()
        result[f"prior_t{t}_log_p"] = log_p
    leaves = [v.requires_grad_() for v in u]
    logits, z, _ = from_u(leaves, 1.0)
    for name, value in {
        "sum_z": sum(v.sum() for v in z),
        "half_sq_z": sum(0.5 * v.square().sum() for v in z),
        "mean_logits": logits.mean(),
    }.items():
        grads = torch.autograd.grad(value, leaves, retain_graph=True)
        result |= numbered(f"grad_{name}_wrt_u", grads)
    return result


def training(case: Case) -> dict[str, torch.Tensor]:
    """`train_*`, `step_*` and the regularisers: one forward and backward in training mode."""
    model, x = case.model().train(), case.x()
    out = model(x, case.normals("eps"))
    result = {
        **numbered("train_z", out.z),
        "train_logits": out.logits,
        "train_log_q": out.log_q,
        "train_log_p": out.log_p,
        "train_kl_all": torch.stack(out.kl_all),
        **bn_buffers(model, "train_bn"),
    }
    start = {
        size: tuple(
            torch.from_numpy(case.expected[f"spectral_start_{v}_{size[0]}x{size[1]}"])
            for v in "uv"
        )
        for size in losses.SpectralNorm(model).groups
    }
    spectral_norm = losses.SpectralNorm(model, start=start)  # type: ignore[arg-type]
    spectral = spectral_norm()
    for (rows, columns), vectors in spectral_norm.vectors.items():
        for name, vector in zip("uv", vectors, strict=True):
            result[f"spectral_{name}_{rows}x{columns}"] = vector
            result[f"spectral_start_{name}_{rows}x{columns}"] = start[rows, columns][
                "uv".index(name)
            ]
    alpha = losses.kl_alpha(case.config.groups_per_scale)
    recon = losses.reconstruction_loss(
        model.decoder_output(out.logits), x, case.config.data.border
    )
    kl = losses.balance_kl(out.kl_all, 0.3, alpha)
    bn = losses.batch_norm_term(model)
    loss = (recon + kl.total).mean() + 0.01 * spectral + 0.01 * bn
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert [name for name, _ in model.named_parameters()] == case.info["parameter_names"]
    nan = torch.tensor(torch.nan)
    return {
        **result,
        "step_alpha": alpha,
        "step_recon": recon,
        "step_balanced_kl": kl.total,
        "step_kl_coeffs": kl.weights,
        "step_kl_vals": kl.values,
        "step_loss": loss,
        "step_grad_norm_per_parameter": torch.stack(
            [nan if g is None else g.norm() for g in grads]
        ),
        "step_grad_sum_per_parameter": torch.stack([nan if g is None else g.sum() for g in grads]),
        "bn_loss": bn,
        "spectral_loss_first_call": spectral,
        "spectral_loss_second_call": spectral_norm(),
        "spectral_exact_sum_of_largest_singular_values": sum(
            torch.linalg.matrix_norm(m.effective_weight().flatten(1), 2)
            for m in model.conv_layers()
        ),
    }


def readjusted(case: Case) -> dict[str, torch.Tensor]:
    recipe = case.info["random_inputs"]["readjust"]
    noise = case.normals("readjust", recipe["batch"], recipe["iterations"])
    model, layers = case.model().train(), case.config.num_groups
    with torch.no_grad():
        for i in range(recipe["iterations"]):
            model.sample(recipe["batch"], 1.0, u=noise[i * layers : (i + 1) * layers])
    return bn_buffers(model, "readjust_bn")


def data_initialised(case: Case) -> dict[str, torch.Tensor]:
    if case.config.arch_instance != "res_elu":
        return {}
    model = case.model()
    layers = [m for m in model.modules() if isinstance(m, DataInitConv2d)]
    for layer in layers:
        layer.initialised = False
    with torch.no_grad():
        return {
            "datainit_logits": model(case.x(), case.normals("eps")).logits,
            "datainit_log_weight_norm": torch.cat([m.log_weight_norm.flatten() for m in layers]),
            "datainit_bias": torch.cat([m.bias for m in layers]),
        }


def tolerance(case: Case, name: str) -> float:
    """Relative to the largest entry, as the goldens' README states them."""
    if name.startswith(("grad_", "step_grad_", "spectral_u_", "spectral_v_")):
        return 1e-4
    own = case.info["float32_versus_float64"].get(name, 0.0)
    return max(1e-5, 10 * own) if own > 1e-6 else 1e-5


def difference(case: Case, name: str, got: np.ndarray) -> float:
    """Error over tolerance, or infinity where shapes differ."""
    expected = case.expected[name]
    allowed = tolerance(case, name)
    if name == "eval_log_prob" and case.config.num_mixture_dec > 1 and got.ndim == 3:
        allowed = 2e-2 / np.abs(expected).max()  # a difference of two sigmoids: absolute
    error = 0.0
    if name in case.info["subsampled_arrays"]:
        thin = case.info["subsampled_arrays"][name]
        whole = got.astype(np.float64)
        sums = {
            "sum": whole.sum(),
            "abs_sum": np.abs(whole).sum(),
            "sum_of_squares": (whole**2).sum(),
        }
        error = max(
            abs(value - thin[key])
            / (thin["sum_of_squares" if "squares" in key else "abs_sum"] or 1.0)
            for key, value in sums.items()
        )
        got = got[..., thin["start"] :: thin["step"], thin["start"] :: thin["step"]]
    got = got.reshape(1) if got.ndim == 0 else got
    if got.shape != expected.shape or not np.array_equal(np.isnan(got), np.isnan(expected)):
        return np.inf
    if not np.issubdtype(expected.dtype, np.floating):
        return 0.0 if np.array_equal(got, expected) else np.inf
    # Each statistic of the trace has a scale of its own.
    columns = zip(got.T, expected.T, strict=True) if name == "trace" else [(got, expected)]
    for a, b in columns:
        if b.size:
            scale = np.nanmax(np.abs(b)) or 1.0
            error = max(error, float(np.nanmax(np.abs(a - b)) / scale))
    return error / allowed


@pytest.mark.parametrize("folder", nvae_cases(), ids=lambda folder: folder.name)
def test_golden_case_gives_the_recorded_numbers(folder: Path) -> None:
    case = Case(folder)
    got: dict[str, torch.Tensor] = {}
    for part in (posterior, prior, training, readjusted, data_initialised):
        got |= part(case)
    unchecked = case.expected.keys() - got.keys() - {"x_uint8"}
    assert not unchecked, f"recorded arrays that nothing computes: {sorted(unchecked)}"
    errors = {
        name: difference(case, name, got[name].detach().numpy())
        for name in case.expected
        if name != "x_uint8"
    }
    wrong = {name: error for name, error in errors.items() if not error <= 1}
    assert not wrong, f"error / tolerance of {len(wrong)} arrays: {wrong}"


@pytest.mark.parametrize("folder", nvae_cases(), ids=lambda folder: folder.name)
def test_golden_state_dict_survives_reading_and_writing_bit_by_bit(
    folder: Path, tmp_path: Path
) -> None:
    info = json.loads((folder / "case.json").read_text())
    first = checkpoint.read(folder / "checkpoint.pt")
    model = checkpoint.build(first)
    assert [
        [key, list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in model.state_dict().items()
    ] == info["state_dict_entries"]
    assert sum(p.numel() for p in model.parameters()) == info["parameter_count"]
    assert len(model.conv_layers()) == info["conv_layers"]
    assert len(model.batch_norms()) == info["bn_layers"]
    assert [list(s) for s in model.latent_shapes] == [
        s[1:] for s in info["latent_shapes_top_to_bottom"]
    ]
    first.state_dict = OrderedDict(model.state_dict())
    checkpoint.write(tmp_path / "again.pt", first)
    second = checkpoint.read(tmp_path / "again.pt")
    assert list(second.state_dict) == list(first.state_dict)
    assert all(torch.equal(second.state_dict[k], v) for k, v in first.state_dict.items())
    assert (second.args, second.epoch, second.global_step) == (
        first.args,
        first.epoch,
        first.global_step,
    )
    assert str(second.optimizer) == str(first.optimizer)
    assert second.scheduler == first.scheduler
    assert second.grad_scalar == first.grad_scalar


def test_golden_readjustment_is_two_samples_in_training_mode() -> None:
    case = Case(nvae_cases()[0])
    by_hand, model = case.model().train(), case.model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _ in range(2):
            by_hand.sample(2, 0.7, generator=generator)
    batchnorm.readjust(
        model,
        temperature=0.7,
        iterations=2,
        batch_size=2,
        generator=torch.Generator().manual_seed(3),
    )
    assert not model.training
    for key, value in by_hand.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key

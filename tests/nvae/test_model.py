"""Behaviour of the auto-encoder: one walk, differentiable in u, the same in parts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from nvae.arch import ARCHITECTURES, ModelConfig
from nvae.distributions import Normal
from nvae.flows import Flow, HalfFlow
from nvae.layers import DataInitConv2d
from nvae.losses import SpectralNorm, balance_kl, kl_coefficient, norm_coefficient
from nvae.model import AutoEncoder
from tests.nvae.small_models import SMALL

TINY = replace(SMALL, num_latent_scales=2, num_nf=1, use_se=True, res_dist=True)


def tiny(config: ModelConfig = TINY) -> AutoEncoder:
    """In float64 and eval mode, with weights that make BN and flows matter."""
    model = AutoEncoder(config).double()
    with torch.no_grad():
        for _, layer in model.batch_norms():
            layer.running_mean.normal_(std=0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model.eval()


def noise(config: ModelConfig, batch: int) -> list[torch.Tensor]:
    return [torch.randn(batch, *s, dtype=torch.float64) for s in config.latent_shapes]


def z_of(model: AutoEncoder, u: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Normal]]:
    z: list[torch.Tensor] = []
    priors: list[Normal] = []

    def choose(layer: int, prior: Normal, h: torch.Tensor | None) -> torch.Tensor:
        assert (h is None) == (layer == 0)
        priors.append(prior)
        z.append(prior.sample(noise=u[layer]))
        return z[-1]

    assert model.walk(u[0].shape[0], choose, image=False) is None
    return z, priors


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"res_mbconv9"}))
def test_every_architecture_trains_every_parameter(name: str) -> None:
    config = replace(TINY, arch_instance=name, num_channels_enc=8, num_channels_dec=8)
    model = AutoEncoder(config)
    out = model(torch.rand(3, 1, 8, 8))
    (model.decoder_output(out.logits).log_prob(torch.rand(3, 1, 8, 8)).mean()
     + sum(k.mean() for k in out.kl_all)).backward()  # fmt: skip
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert out.logits.shape == (3, config.output_channels, 8, 8)


def test_eight_samples_are_four_and_four() -> None:
    model, u = tiny(), noise(TINY, 8)
    halves = [model.sample(4, 0.7, u=[v[part] for v in u]) for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(model.sample(8, 0.7, u=u), torch.cat(halves))


def test_without_the_image_nothing_after_the_last_latent_runs() -> None:
    model = tiny()
    for module in (model.dec_tower[-1], model.post_process, model.image_conditional):
        for part in module.modules():
            part.register_forward_hook(lambda *_: pytest.fail("this should not run"))
    z, _ = z_of(model, noise(TINY, 2))
    assert [tuple(v.shape[1:]) for v in z] == TINY.latent_shapes


@pytest.mark.parametrize("vanilla", [False, True])
def test_u_to_z_to_u_is_the_identity_and_its_log_determinant_the_sum_of_log_sigma(
    vanilla: bool,
) -> None:
    config = replace(TINY, num_latent_scales=1, num_groups_per_scale=1) if vanilla else TINY
    model = tiny(config).requires_grad_(False)
    u = noise(config, 1)
    z, priors = z_of(model, u)
    for prior, value, start in zip(priors, z, u, strict=True):
        torch.testing.assert_close(prior.standardise(value), start)

    def flat(point: torch.Tensor) -> torch.Tensor:
        parts = point.split([v.numel() for v in u])
        values, _ = z_of(model, [p.view_as(v) for p, v in zip(parts, u, strict=True)])
        return torch.cat([v.flatten() for v in values])

    jacobian = torch.autograd.functional.jacobian(flat, torch.cat([v.flatten() for v in u]))
    log_sigma = sum(p.std.log().sum() for p in priors)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_sigma)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_flow_is_triangular_with_a_unit_diagonal(mirror: bool) -> None:
    flow = HalfFlow(2, mirror).double()
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v).permute(0, 2, 3, 1), z)
    # Order of the latents: pixels row by row (reversed by the mirror), channels within a pixel.
    matrix = jacobian.permute(0, 1, 2, 3, 4, 6, 7, 5).reshape(32, 32)
    if mirror:
        order = torch.arange(32).view(16, 2).flip(0).flatten()
        matrix = matrix[order][:, order]
    torch.testing.assert_close(matrix.diagonal(), torch.ones(32, dtype=torch.float64))
    assert float(matrix.triu(1).abs().max()) == 0
    assert float(matrix.tril(-1).abs().max()) > 0


def test_both_halves_of_a_flow_preserve_volume() -> None:
    flow = Flow(2).double()
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v).flatten(), z).view(18, 18)
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(0, abs=1e-9)


def test_data_dependent_initialisation_centres_and_scales_each_channel() -> None:
    conv, x = DataInitConv2d(3, 4, 3, padding=1), torch.randn(8, 3, 6, 6) + 2
    out = conv(x)
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(dim=(0, 2, 3)), torch.full((4,), 0.2), atol=1e-4, rtol=0)
    assert torch.equal(conv(x), out), "it happens once"


def test_a_copy_has_ties_and_outputs_of_its_own_model() -> None:
    model, u = tiny(), noise(TINY, 2)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.sample(2, 1.0, u=u), model.sample(2, 1.0, u=u))
    assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_a_generator_makes_draws_repeatable(seed: int) -> None:
    model, x = tiny(), torch.rand(2, 1, 8, 8, dtype=torch.float64)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    for draw in (
        lambda: model.sample(2, 1.0, generator=generator()),
        lambda: model(x, generator=generator()).logits,
    ):
        assert torch.equal(draw(), draw())


def test_the_analytic_and_the_sampled_kl_agree_on_average() -> None:
    model = tiny(replace(TINY, num_nf=0))
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64).expand(400, -1, -1, -1)
    with torch.no_grad():
        out = model(x)
    sampled, analytic = out.log_q - out.log_p, torch.stack(out.kl_all).sum(0)
    difference = sampled - analytic
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 20
    torch.testing.assert_close(torch.stack(out.kl_diag).sum(), analytic.mean())


def test_shapes_that_do_not_fit_are_told() -> None:
    model, u = tiny(), noise(TINY, 2)
    with pytest.raises(
        ValueError, match=r"images of shape \(2, 3, 8, 8\), expected \(B, 1, 8, 8\)"
    ):
        model(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"u: got shapes .* the top layer first"):
        model.sample(3, 1.0, u=u)
    with pytest.raises(ValueError, match=r"eps: got shapes"):
        model(torch.zeros(2, 1, 8, 8, dtype=torch.float64), eps=u[:-1])


def test_bfloat16_autocast_stays_near_float32() -> None:
    model = tiny(replace(TINY, num_nf=0)).float()
    u = [v.float() for v in noise(TINY, 4)]
    with torch.no_grad():
        exact = model.sample(4, 1.0, u=u)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near = model.sample(4, 1.0, u=u)
    assert float((near - exact).abs().max()) < 0.1 * float(exact.abs().max())


def test_the_spectral_term_finds_the_largest_singular_values() -> None:
    model = tiny(replace(TINY, arch_instance="res_mbconv"))
    norm = SpectralNorm(model, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        value = norm()
    exact = sum(
        torch.linalg.matrix_norm(m.effective_weight().flatten(1), 2) for m in model.conv_layers()
    )
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
    value.backward()
    assert sum(p.grad is not None for p in model.parameters()) >= len(model.conv_layers())


def test_balanced_kl_of_equal_layers_is_the_plain_sum() -> None:
    kl = [torch.tensor([1.0, 3.0])] * 3
    balanced = balance_kl(kl, 0.5, torch.ones(3))
    torch.testing.assert_close(balanced.total, torch.tensor([1.5, 4.5]))
    torch.testing.assert_close(balance_kl(kl, 1.0, torch.ones(3)).total, torch.tensor([3.0, 9.0]))


def test_schedules_at_their_edges() -> None:
    assert kl_coefficient(0, 100, 0.0, 0.0, 1e-4) == 1
    assert norm_coefficient(0.3, 0.01) == 0.01
    with pytest.raises(ValueError, match="above 0, got 0 and 10"):
        norm_coefficient(0.3, 0, 10)

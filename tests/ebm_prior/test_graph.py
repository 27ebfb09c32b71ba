"""Replayed steps. On a CPU a capture is the step itself, run again: what is left to see is that
one graph serves every chain of its shapes, and that its draws are `langevin.run`'s."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from ebm_prior import langevin
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.base import in_mode
from ebm_prior.frozen import Steps, fast, graph
from tests.ebm_prior import small_vaes
from tests.ebm_prior.test_frozen import chain, make

captures = []


@pytest.fixture
def on_cpu(monkeypatch):
    """Replay on the CPU; the list grows by one per capture."""
    captures.clear()

    def capture(step, generator, pool):
        for _ in range(graph.WARM_UP):
            step()
        captures.append(step)
        return step, "pool"

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "DEVICES", ("cpu", "cuda"))
    return captures


def seeded():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def priors():
    """The same prior with replayed and with plain steps, in float64."""
    stepwise = make()
    replayed = fast(stepwise)
    replayed.sampler = graph.Replayed()
    return replayed, fast(stepwise)


def test_one_graph_serves_all_t_and_draws_what_single_steps_do(on_cpu, priors, generator):
    dim = priors[0].layout.dim
    for t in (2, 0, 1):
        u = torch.randn(3, dim, generator=generator, dtype=torch.float64)
        ends = [chain(p, u, t) for p in priors]
        assert torch.equal(*ends)
    assert len(on_cpu) == 1


def test_a_density_is_not_written_to_by_chains_on_others(on_cpu, priors, generator):
    quick, stepwise = priors
    u = torch.randn(3, quick.layout.dim, generator=generator, dtype=torch.float64)
    clean, noisy = (quick.log_density(t, u) for t in (0, 2))
    value = clean(u)
    for density in (clean, noisy, clean):
        ends = [
            sampler(u, density, step_size=0.1, num_steps=2, generator=seeded())
            for sampler in (quick.sampler, stepwise.sampler)
        ]
        assert torch.equal(*ends)
    assert torch.equal(clean(u), value)
    assert len(on_cpu) == 1


def test_a_copy_of_a_prior_has_graphs_of_its_own(on_cpu, priors):
    chain(priors[0], torch.zeros(1, priors[0].layout.dim, dtype=torch.float64))
    assert not copy.deepcopy(priors[0]).sampler._captured


def test_the_generator_goes_on_as_after_single_steps(on_cpu, priors):
    generators = [seeded(), seeded()]
    for _ in range(2):  # two chains, one after the other
        ends = [
            p.reverse(1, torch.zeros(2, p.layout.dim, dtype=torch.float64), generator=g)
            for p, g in zip(priors, generators, strict=True)
        ]
        assert torch.equal(*ends)
    assert torch.equal(*(g.get_state() for g in generators))


def test_without_a_generator_pytorchs_own_draws(on_cpu, priors):
    ends = []
    for prior in priors:
        torch.manual_seed(7)
        ends.append(prior.reverse(1, torch.zeros(2, prior.layout.dim, dtype=torch.float64)))
    assert torch.equal(*ends)


def test_masks_labels_batches_and_the_chain_without_a_model_have_graphs_of_their_own(on_cpu):
    attributes = ({"name": "a", "classes": 3, "layers": (0, 2)},)
    prior = make(attributes=attributes)
    quick, stepwise = fast(prior), fast(prior, Steps(graph=False))
    quick.sampler = graph.Replayed()
    u = torch.zeros(3, prior.layout.dim, dtype=torch.float64)
    mask = prior.layout.mask([1])
    labels = torch.tensor([[0], [1], [-1]])
    for drawing in (
        {},
        {"mask": mask},
        {"labels": labels},
        {"labels": labels.flip(0)},  # the same graph, other labels
        {"labels": labels, "guidance": 2.0},
        {"zero_energy": True},
        {"mask": ~mask},  # the same graph as the other mask's
        {},  # whose graph is gone by now
    ):
        ends = [p.reverse(0, u, generator=seeded(), **drawing) for p in (quick, stepwise)]
        assert torch.equal(*ends)
    assert len(on_cpu) == 6
    assert len(quick.sampler._captured) == graph.MOST


def test_in_train_mode_the_steps_before_a_capture_do_not_advance_spectral_norm(on_cpu):
    prior = make()
    other = copy.deepcopy(prior)
    quick, stepwise = fast(prior), fast(other)
    quick.sampler = graph.Replayed()
    u = torch.zeros(2, prior.layout.dim, dtype=torch.float64)
    for _ in range(2):
        with in_mode(quick.energies, training=True), in_mode(stepwise.energies, training=True):
            ends = [p.reverse(1, u, generator=seeded()) for p in (quick, stepwise)]
        assert torch.equal(*ends)
    torch.testing.assert_close(prior.energies.state_dict(), other.energies.state_dict())
    assert len(on_cpu) == 1


def test_other_weights_are_seen_and_another_copy_of_the_vae_is_captured_anew(on_cpu):
    vae = small_vaes.vae()
    backbone = NVAEBackbone(vae)
    prior = small_vaes.prior(backbone)
    quick = fast(prior)
    assert isinstance(quick.sampler, graph.Replayed)
    u = torch.zeros(2, prior.layout.dim)

    def both():
        stepwise = fast(prior, Steps(graph=False))
        return [p.reverse(0, u, generator=seeded()) for p in (quick, stepwise)]

    torch.testing.assert_close(*both())
    with torch.no_grad():
        for parameter in prior.energies.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(*both())
    assert len(on_cpu) == 1
    with torch.no_grad():
        vae.dec_tower[0].conv.weight.mul_(2)
    quick.backbone.refresh()
    torch.testing.assert_close(*both())
    assert len(on_cpu) == 2


def test_watched_chains_and_given_noise_run_step_by_step(on_cpu, priors):
    u = torch.zeros(2, priors[0].layout.dim, dtype=torch.float64)
    seen = []
    priors[0].reverse(0, u, on_step=lambda k, state, info: seen.append(k))
    assert seen == [0, 1, 2, 3]
    priors[0].reverse(0, u, noise=[u] * 4)
    langevin.run(u, priors[0].log_density(0, u), step_size=0.1, num_steps=1)
    assert not on_cpu


def test_what_cannot_be_captured_runs_step_by_step_and_says_so(priors, monkeypatch):
    def fails(step, generator, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture", fails)
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    u = torch.zeros(2, priors[0].layout.dim, dtype=torch.float64)
    with pytest.warns(UserWarning, match="could not be captured .operation not permitted"):
        first = chain(priors[0], u)
    assert torch.equal(first, chain(priors[1], u))
    assert torch.equal(first, chain(priors[0], u)), "once told is enough"


def test_on_a_cpu_nothing_is_captured(priors):
    chain(priors[0], torch.zeros(1, priors[0].layout.dim, dtype=torch.float64))
    assert not priors[0].sampler._captured


# --- on a GPU


@pytest.fixture
def on_gpu():
    """A prior with spectral norm on a small NVAE, and its latents' number."""
    backbone = NVAEBackbone(small_vaes.vae(num_latent=4).cuda())
    return make(dtype=torch.float32, backbone=backbone).cuda()


def drawn(prior, **drawing):
    generator = torch.Generator("cuda").manual_seed(0)
    return prior.sample_u(4, generator=generator, **drawing), generator.get_state()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_a_gpu_captured_chains_are_those_of_single_steps(on_gpu, precision):
    quick, stepwise = (
        fast(on_gpu, Steps(graph=captured, precision=precision)) for captured in (True, False)
    )
    for _ in range(2):
        ends = [drawn(prior) for prior in (quick, stepwise)]
        torch.testing.assert_close(*(u for u, _ in ends), rtol=1e-4, atol=1e-4)
        assert torch.equal(*(state for _, state in ends))
    assert len(quick.sampler._captured) == 1


@pytest.mark.gpu
def test_on_a_gpu_training_captures_a_chain_that_advances_spectral_norm(on_gpu):
    other = copy.deepcopy(on_gpu)
    u = torch.randn(4, on_gpu.layout.dim, device="cuda")
    for quick, prior in ((True, on_gpu), (False, other)):
        trained = fast(prior, Steps(graph=quick))
        for step in range(2):
            generator = torch.Generator("cuda").manual_seed(step)
            trained.loss(u, generator=generator)[0].backward()
        trained.sample_u(2, generator=generator)  # a picture on the way
    torch.testing.assert_close(on_gpu.energies.state_dict(), other.energies.state_dict())


@pytest.mark.gpu
def test_on_a_gpu_a_chain_waits_for_nothing(on_gpu):
    quick = fast(on_gpu)
    u = torch.randn(4, on_gpu.layout.dim, device="cuda")
    generator = torch.Generator("cuda")
    density = quick.log_density(1, u)

    def steps(num):
        quick.sampler(u, density, step_size=0.1, num_steps=num, generator=generator)

    steps(1)  # captures
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_what_waits_inside_a_step_is_not_captured(on_gpu):
    quick = fast(on_gpu)
    u = torch.zeros(2, on_gpu.layout.dim, device="cuda")
    density = quick.log_density(1, u)
    to_z = density.f.to_z
    waits = replace(density.f, to_z=lambda u: [z * float(z.sum() * 0 + 1) for z in to_z(u)])
    density = replace(density, f=waits)
    with pytest.warns(UserWarning, match="could not be captured"):
        end = quick.sampler(
            u, density, step_size=0.1, num_steps=2, generator=torch.Generator("cuda")
        )
    assert end.isfinite().all()

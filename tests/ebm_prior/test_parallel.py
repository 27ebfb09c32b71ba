"""Several processes: gradients are means over them, whatever the kind of prior."""

from __future__ import annotations

import pytest
import torch

from ebm_prior import kinds, parallel
from ebm_prior.config import PriorConfig
from ebm_prior.coupling import Attribute
from ebm_prior.training import run_state
from nvae import runtime
from tests.ebm_prior.test_trainer import same_run, trainer
from tests.ebm_prior.toys import LinearGaussian
from tests.processes import together

SMALL = {
    "network": "mlp",
    "width": 8,
    "depth": 1,
    "spectral_norm": True,
    "max_T": 1,
    "num_steps": 3,
    "b2": 0.1,
    "energy_scale": "none",
    "step_rule": "plain",
}
KINDS = {
    "diffusion": {"max_T": 3},
    "with labels": {"max_T": 3, "attributes": (Attribute("class", 4, (0, 2)),)},
    "joint": {"kind": "joint"},
    "ncp": {"kind": "ncp", "contexts": (None, (2,), (4,))},
}
STEPS, BATCH = 3, 6


def build(kind):
    backbone = LinearGaussian()
    torch.manual_seed(3)
    config = PriorConfig(backbone.layout.shapes, **SMALL | KINDS[kind])
    return kinds.build(backbone, config).double()


def gradients(prior, loss, rank, step):
    """Of one step of a process, from random numbers of its own."""
    g = torch.Generator().manual_seed(10 * step + rank)
    u = torch.randn(BATCH, 7, generator=g, dtype=torch.float64)
    further = {}
    if prior.config.attributes:
        further["labels"] = torch.randint(-1, 4, (BATCH, 1), generator=g)
    prior.learned.zero_grad()
    loss(u, generator=g, **further)[0].backward()
    return [p.grad.clone() for p in prior.learned.parameters()]


def _learn(rank, kind, out):
    with runtime.started("cpu"):
        prior, written = build(kind), []
        loss = parallel.averaged(prior.loss, prior.learned)
        assert all(p.grad is None for p in prior.learned.parameters())
        for parameter in prior.learned.parameters():
            parameter.register_post_accumulate_grad_hook(written.append)
        found = [gradients(prior, loss, rank, step) for step in range(STEPS)]
        state = prior.learned.state_dict()
    assert len(written) == STEPS * len(found[0]), "a gradient was written more than once"
    assert all(p.requires_grad for p in prior.learned.parameters())
    torch.save((found, state), out / f"{rank}.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_two_processes_are_the_mean_of_their_own(kind, tmp_path):
    together(_learn, kind, tmp_path)
    alone = [build(kind) for _ in range(2)]
    (first, state), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for step in range(STEPS):
        own = [gradients(prior, prior.loss, rank, step) for rank, prior in enumerate(alone)]
        assert not all(map(torch.equal, *own))
        for one, two, *theirs in zip(first[step], second[step], *own, strict=True):
            assert torch.equal(one, two)
            torch.testing.assert_close(one, sum(theirs) / 2)
    for name, value in alone[0].learned.state_dict().items():  # spectral norm's u and v
        torch.testing.assert_close(state[name], value)


def _average(rank):
    with runtime.started("cpu"):
        layer = torch.nn.Linear(1, 1, bias=False)
        (layer.weight.sum() * (1 + rank)).backward()
        parallel.average_gradients(layer)
    assert layer.weight.grad.item() == 1.5


def test_gradients_that_are_there_are_averaged_in_one_message():
    together(_average)


def _train(rank, out, steps):
    with runtime.started("cpu"):
        training = trainer(out, iterations=steps, prior={"width": 32})
        state = run_state.read(out)
        if state is not None:
            training.resume(state)
        assert training.run().done


def test_three_processes_go_on_to_the_bit(tmp_path):
    """Of three numbers the order of the sum shows."""
    together(_train, tmp_path / "whole", 4, count=3)
    for steps in (2, 4):
        together(_train, tmp_path / "parts", steps, count=3)
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_alone_a_loss_is_what_it_is():
    prior = build("diffusion")
    assert parallel.averaged(prior.loss, prior.learned) == prior.loss

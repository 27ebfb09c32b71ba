"""The measured hole between distributions whose divergence is known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ebm_prior import hole
from ebm_prior.critics import NETWORKS, Critic
from ebm_prior.latents import Layout


class Identity:
    """z = u."""

    def __init__(self, *shapes):
        self.layout = Layout(shapes)

    def to_z(self, u, temperature=1.0):
        return self.layout.split(u)


def samples(posterior, generator, shapes=((4,),)):
    """z of given draws, and of as many standard normal ones."""
    layout = Layout(shapes)
    prior = torch.randn(posterior.shape, generator=generator)
    return hole.Samples(layout.split(posterior), layout.split(prior))


def measured(draw, generator, shapes=((4,),), network="mlp", steps=100, counts=(3000, 1000, 3000)):
    """`draw(n)` gives n posterior draws."""
    parts = [samples(draw(n), generator, shapes) for n in counts]
    return hole.measure(*parts, network=network, steps=steps, generator=generator)


def shifted(m, generator, dim=4):
    return lambda n: m + torch.randn(n, dim, generator=generator)


def test_the_bound_is_the_divergence_where_d_is_the_log_ratio(generator):
    n, m = 200_000, 1.2  # KL(N(m, 1) || N(0, 1)) = m^2 / 2
    q, p = (torch.randn(n, generator=generator).double() for _ in range(2))
    bound = hole.donsker_varadhan(m * (m + q) + 7, m * p + 7)  # a constant in d does not matter
    assert float(bound) == pytest.approx(m**2 / 2, abs=0.03)
    worse = hole.donsker_varadhan(2 * m * (m + q), 2 * m * p)
    assert float(worse) < float(bound)


def test_of_shifted_gaussians_most_of_the_divergence_is_found_and_not_more(generator):
    m, exact = 1.0, 2.0  # KL(N(m, I) || N(0, I)) = 4 m^2 / 2
    gap = measured(shifted(m, generator), generator)
    assert 0.8 * exact < gap.nats < exact + 4 * gap.standard_error
    best = 0.5 * (1 + math.erf(m / math.sqrt(2)))  # Phi(|shift| / 2), shift 2 m
    assert gap.accuracy == pytest.approx(best, abs=0.04)
    assert not gap.saturated


def test_equal_distributions_have_no_hole(generator):
    gap = measured(shifted(0.0, generator), generator, steps=30)
    assert abs(gap.nats) < 4 * gap.standard_error + 0.01
    assert gap.accuracy == pytest.approx(0.5, abs=0.04)


def test_more_than_the_samples_can_show_is_told(generator):
    gap = measured(shifted(4.0, generator), generator, steps=40, counts=(500, 300, 300))
    assert gap.nats < 32
    assert gap.saturated == (gap.nats > math.log(300))
    assert gap.saturated


def test_a_map_whose_neighbours_agree_is_for_convolutions(generator):
    def stripes(n):
        x = torch.randn(n, 1, 8, 8, generator=generator)
        return ((x + 0.6 * x.roll(1, 3)) / math.sqrt(1.36)).flatten(1)

    found = {
        network: measured(stripes, generator, ((1, 8, 8),), network, 40, (600, 300, 300)).nats
        for network in NETWORKS
    }
    assert found["map"] > 1
    assert found["map"] > 2 * found["mlp"]


def test_a_survey_names_the_layer_that_differs_and_its_control_finds_nothing(generator):
    backbone = Identity((3,), (2, 2, 2))
    shift = torch.cat([torch.zeros(3), torch.full((8,), 0.7)])
    u, held = (
        shift + torch.randn(*shape, 11, generator=generator) for shape in ((2, 800), (600,))
    )
    gaps = list(hole.survey(backbone, u, held, steps=40, generator=generator))
    by_name = {(gap.compared, gap.network): gap for gap in gaps}
    assert list(by_name)[:3] == [
        ("control", "map"),
        ("all layers", "mlp"),
        ("all layers", "map"),
    ]
    assert [gap.compared for gap in gaps[3:]] == ["layer 0", "layer 1"]
    assert abs(gaps[0].nats) < 0.2
    assert abs(gaps[3].nats) < 0.2
    assert gaps[4].nats > 1
    told = hole.advice(gaps)
    assert told.startswith("a prior can help here")
    assert "alone the widest gap is that of layer 1" in told
    assert json.loads(json.dumps(hole.report(gaps)))[0]["compared"] == "control"


def test_where_posterior_and_prior_agree_no_prior_is_advised(generator):
    u, held = (torch.randn(*shape, 4, generator=generator) for shape in ((1, 400), (300,)))
    gaps = list(hole.survey(Identity((4,)), u, held, steps=20, generator=generator))
    assert len(gaps) == 3  # one layer: nothing to take apart
    assert hole.advice(gaps).startswith("no hole found")


def test_the_same_seed_measures_the_same_and_a_caller_without_gradients_is_no_hindrance():
    def once():
        generator = torch.Generator().manual_seed(5)
        return measured(shifted(1.0, generator), generator, steps=6, counts=(200, 100, 100)).nats

    with torch.no_grad():
        again = once()
    assert once() == again


def test_many_layers_are_taken_apart_by_the_size_of_their_maps():
    one, two = (4, 2, 2), (4, 4, 4)
    assert hole.parts(Layout((one,) * 5 + (two,) * 4)) == {
        "layers 0 to 4": [0, 1, 2, 3, 4],
        "layers 5 to 8": [5, 6, 7, 8],
    }
    assert hole.parts(Layout((one, two))) == {"layer 0": [0], "layer 1": [1]}
    assert hole.parts(Layout((one,) * 9)) == {}


def test_statistics_are_those_of_each_layer(generator):
    u = torch.randn(5000, 5, generator=generator) * torch.tensor([1, 1, 3, 3, 3])
    u[:, :2] += 2
    top, low = hole.statistics(Layout(((2,), (3,))), u)
    assert top.u_mean == pytest.approx(2, abs=0.1)
    assert low.u_std == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 1, 1), (2, 8, 16), (3, 5, 6)])
def test_every_network_takes_every_shape_and_learns_in_all_its_parts(network, shape, generator):
    critic = Critic([shape], network)
    critic([torch.randn(6, *shape, generator=generator)]).square().sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_too_few_images_are_refused(generator):
    with pytest.raises(ValueError, match="at least 20"):
        next(
            hole.survey(
                Identity((2,)), torch.zeros(1, 5, 2), torch.zeros(50, 2), generator=generator
            )
        )

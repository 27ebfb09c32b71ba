r"""The hole between aggregate posterior and prior, measured before any prior is trained.

A small discriminator d is trained for seconds to tell z of the aggregate posterior (q) from z of
the VAE's own prior (p). On samples it never saw it gives the Donsker-Varadhan bound

.. math:: KL(q \| p) \ge E_q[d(z)] - \log E_p[e^{d(z)}]

in nats per image. With d a sum of one network per layer, as the energies are, the right side is
also the held-out log-likelihood that the prior :math:`p\,e^{d} / Z` gains over p: what one EBM
with such energies would close (contract, experiments.md, "How far is the aggregate posterior from
the prior?").

What is compared: z = T(u), u a posterior draw or N(0, I). T is invertible, so for all layers
together the divergence in z is that in u. A layer alone is its marginal z_i, on both sides with
everything above it integrated out; the numbers of single layers do not add up to that of all.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ebm_prior.backbones.base import Backbone
from ebm_prior.critics import Critic
from ebm_prior.langevin import standard_normal
from ebm_prior.latents import Layout

HELD_PRIOR = 4  # held-out prior draws for each held-out posterior draw: they cost little
CUTS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 1.0)  # quantiles of d under the prior
LOOKS = 6  # times at which the discriminator is looked at while it is trained
ALONE = 8  # hierarchies of more layers are taken apart by map size, not layer by layer
SMALL = 1.0  # nats; in a prototype nothing was gained at .6, much at 3.5


@dataclass(frozen=True)
class Gap:
    """One comparison.

    Attributes:
        compared: `all layers`, `layer 1`, or `control`: aggregate against aggregate.
        nats: the bound on held-out samples; below zero only by their noise.
        standard_error: of `nats`, from the number of held-out samples.
        accuracy: of telling the two apart, held out; chance is .5.
        saturation: log of the number of prior samples. No bound from that many samples is sure
            beyond it (McAllester and Stratos, 2020): larger `nats` mean "at least this much".
    """

    compared: str
    network: str
    nats: float
    standard_error: float
    accuracy: float
    saturation: float
    seconds: float

    @property
    def saturated(self) -> bool:
        return self.nats > self.saturation


class LayerStatistics(NamedTuple):
    """Of one layer's u over the aggregate; under the prior 1, and 0 up to sampling noise."""

    u_std: float
    u_mean: float  # root mean square over the coordinates of their means


def donsker_varadhan(of_posterior: Tensor, of_prior: Tensor) -> Tensor:
    """E_q[d] - log E_p[e^d], (), from d at samples of q, (n,), and of p, (m,)."""
    return of_posterior.mean() - (of_prior.logsumexp(0) - math.log(len(of_prior)))


class Samples(NamedTuple):
    """z of both sides, one (n, \\*shape) per layer; n of the two may differ."""

    posterior: list[Tensor]
    prior: list[Tensor]

    def of(self, layers: Sequence[int]) -> Samples:
        """These layers alone."""
        return Samples([self.posterior[i] for i in layers], [self.prior[i] for i in layers])


@torch.enable_grad()
def measure(
    train: Samples,
    choose: Samples,
    held: Samples,
    *,
    network: str,
    compared: str = "all layers",
    steps: int = 300,
    batch_size: int = 64,
    lr: float = 3e-3,
    generator: torch.Generator,
) -> Gap:
    """Train a discriminator on `train`, choose on `choose`, and bound the divergence on `held`.

    d is the logit, looked at a few times while it is trained, and cut off above: the few largest
    values decide log E_p[e^d], and a network is overconfident exactly there. Time and cut are
    chosen apart from the held-out samples, so what those give is still a bound; where nothing
    beats d = 0, it is 0.
    """
    started = time.perf_counter()
    like = train.posterior[0]
    with torch.random.fork_rng(devices=[]):
        seed = torch.randint(2**62, (), generator=generator, device=generator.device)
        torch.default_generator.manual_seed(int(seed))
        critic = Critic([part.shape[1:] for part in train.posterior], network)
    critic = critic.to(like.device, like.dtype)
    optimiser = torch.optim.Adam(critic.parameters(), lr)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - 0.9 * step / steps)
    best, cut, weights = 0.0, None, critic.state_dict()
    for step in range(1, steps + 1):
        real, drawn = (_batch(z, batch_size, generator) for z in train)
        loss = softplus(-critic(real)).mean() + softplus(critic(drawn)).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        decay.step()
        if step * LOOKS // steps > (step - 1) * LOOKS // steps:
            of_q, of_p = (_values(critic, z) for z in choose)
            for c in of_p.quantile(of_p.new_tensor(CUTS)):
                bound = float(donsker_varadhan(of_q.clamp(max=c), of_p.clamp(max=c)))
                if bound > best:
                    best, cut, weights = bound, c, copy.deepcopy(critic.state_dict())
    critic.load_state_dict(weights)
    if cut is None:
        of_q, of_p = (torch.zeros(len(z[0]), dtype=torch.float64) for z in held)
    else:
        of_q, of_p = (_values(critic, z).clamp(max=cut) for z in held)
    weight = (of_p - of_p.max()).exp()  # delta method for the logarithm of a mean
    variance = of_q.var() / len(of_q) + weight.var() / len(of_p) / weight.mean().square()
    right = [side.sign().double().mean() / 2 + 0.5 for side in (of_q, -of_p)]
    return Gap(
        compared=compared,
        network=network,
        nats=float(donsker_varadhan(of_q, of_p)),
        standard_error=float(variance.sqrt()),
        accuracy=float(sum(right)) / 2,
        saturation=math.log(len(of_p)),
        seconds=time.perf_counter() - started,
    )


def survey(
    backbone: Backbone,
    u: Tensor,
    held: Tensor,
    *,
    networks: Sequence[str] = ("mlp", "map"),
    steps: int = 300,
    generator: torch.Generator,
) -> Iterator[Gap]:
    """The control, all layers with each network, then single layers with the better one.

    The control is the aggregate against itself, half of the images against the other half.

    Args:
        u: (R, n, D), R posterior draws of n images, for training and choosing.
        held: (m, D), a draw each of m other images.

    Yields:
        Each result as soon as it is there.

    Raises:
        ValueError: too few images.
    """
    if u.shape[1] < 20 or len(held) < 20:
        raise ValueError(
            f"{u.shape[1]} images to train on and {len(held)} held out: expected at least 20 each"
        )

    def both(u: Tensor, more: int = 1) -> Samples:
        noise = standard_normal(u.repeat(more, 1), generator)
        return Samples(latents(backbone, u), latents(backbone, noise))

    def halves(z: list[Tensor], draws: int) -> Samples:
        images = torch.arange(len(z[0]), device=z[0].device) % (len(z[0]) // draws)
        first = images % 2 == 0
        return Samples([part[first] for part in z], [part[~first] for part in z])

    cut = u.shape[1] * 4 // 5
    against = [
        both(u[:, :cut].flatten(0, 1)),
        both(u[:, cut:].flatten(0, 1)),
        both(held, HELD_PRIOR),
    ]

    def gap(compared: str, network: str, samples: list[Samples]) -> Gap:
        return measure(
            *samples, network=network, compared=compared, steps=steps, generator=generator
        )

    draws = (len(u), len(u), 1)
    itself = [halves(z.posterior, n) for z, n in zip(against, draws, strict=True)]
    yield gap("control", networks[-1], itself)
    whole = []
    for network in networks:
        whole.append(gap("all layers", network, against))
        yield whole[-1]
    best = max(whole, key=lambda gap: gap.nats).network
    for name, layers in parts(backbone.layout).items():
        yield gap(name, best, [z.of(layers) for z in against])


def parts(layout: Layout) -> dict[str, list[int]]:
    """What is compared alone: single layers or, of many, runs of layers of the same shape."""
    if layout.num_layers == 1:
        return {}
    if layout.num_layers <= ALONE:
        return {f"layer {i}": [i] for i in range(layout.num_layers)}
    runs = [list(run) for _, run in groupby(range(layout.num_layers), layout.shapes.__getitem__)]
    return {f"layers {run[0]} to {run[-1]}": run for run in runs} if len(runs) > 1 else {}


def statistics(layout: Layout, u: Tensor) -> list[LayerStatistics]:
    """Per layer of u, (n, D)."""
    return [
        LayerStatistics(float(part.std()), float(part.mean(0).square().mean().sqrt()))
        for part in layout.split(u)
    ]


def advice(gaps: Sequence[Gap]) -> str:
    """What the numbers say about training a prior, in words.

    `map` is a light network with biases: it says that local structure is there to be learned,
    which the published convolutional energies, deep and without biases, learn more slowly.
    """
    (control,) = (gap for gap in gaps if gap.compared == "control")
    whole = sorted(
        (gap for gap in gaps if gap.compared == "all layers"), key=lambda gap: -gap.nats
    )
    best, layers = whole[0], [gap for gap in gaps if gap.compared.startswith("layer")]
    amount = f"{'more than ' if best.saturated else ''}{best.nats:.2f} nats"
    noise = max(3 * best.standard_error, control.nats)
    if best.nats <= noise:
        return (
            f"no hole found: {amount}, within the noise ({noise:.2f}); discriminators trained for"
            " longer, on more images, might still find one"
        )
    text = "a prior can help here" if best.nats >= SMALL else "a small hole, little to gain"
    text += f": the {best.network} network tells posterior from prior by {amount} per image"
    text += f" (accuracy {best.accuracy:.2f})"
    if layers:
        top = max(layers, key=lambda gap: gap.nats)
        text += f"; alone the widest gap is that of {top.compared} ({top.nats:.2f} nats)"
    for other in whole[1:]:
        apart = best.nats - other.nats > 2 * (best.standard_error + other.standard_error)
        word = "more than" if apart else "about as much as"
        text += f"; {best.network} finds {word} {other.network} ({other.nats:.2f})"
        text += f": prefer {best.network} energies" if apart else ""
    return text


def report(gaps: Sequence[Gap]) -> list[dict[str, Any]]:
    """Plain values, ready for JSON."""
    return [{**asdict(gap), "saturated": gap.saturated} for gap in gaps]


@torch.no_grad()
def latents(backbone: Backbone, u: Tensor, batch_size: int = 250) -> list[Tensor]:
    """z = T(u), one (n, \\*shape) per layer, made in blocks."""
    blocks = [backbone.to_z(block) for block in u.split(batch_size)]
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


def _batch(z: Sequence[Tensor], size: int, generator: torch.Generator) -> list[Tensor]:
    """The same random rows of every layer."""
    rows = torch.randint(len(z[0]), (size,), generator=generator, device=generator.device)
    return [part[rows.to(part.device)] for part in z]


@torch.no_grad()
def _values(critic: Critic, z: Sequence[Tensor], batch_size: int = 1000) -> Tensor:
    """d at all samples, (n,) float64 on the CPU."""
    blocks = zip(*(part.split(batch_size) for part in z), strict=True)
    return torch.cat([critic(block) for block in blocks]).double().cpu()

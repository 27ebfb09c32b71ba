"""Energies of equal shape as one wide network, with what does not change in a chain done once.

n networks of the same shape become one whose layers are batches of n matrices or convolutions of n
groups; inside, the n maps stand one behind the other in the batch, the first network's first.
Spectral norm is evaluated and the part that sees t is run once per chain. In train mode,
where every call advances spectral norm (contract, networks.md), both happen in every call, as in
the networks themselves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_prior.energy import Columns, Energy, EnergyNets, TimedNet, time_embedding
from ebm_prior.frozen.convolution import Convolution, Product
from ebm_prior.spectral_norm import SpectralNorm, power_iteration
from ebm_prior.steps import Steps

LARGE = 2**16  # values of a kernel that a convolution on a CPU rearranges at a cost
FEW = 4  # convolutions below this number are quicker one by one than put side by side


class WideEnergies(EnergyNets):
    """The same networks, evaluated side by side where no parameter wants a gradient.

    They are shared, not copied: state dict, parameters and modes are those of the networks given.
    Where a parameter wants a gradient the networks themselves are called.

    Args:
        nets: see `EnergyNets`.
        shapes: of the layers' z.
        steps: `once`, `group` and `merge` are of interest here.
    """

    def __init__(self, nets: EnergyNets, shapes: Sequence[tuple[int, ...]], steps: Steps) -> None:
        super().__init__(nets.children())
        self.train(nets.training)
        self.shapes, self.steps = tuple(shapes), steps
        self._groups: list[Group] | None = None

    def forward(self, z: Sequence[Tensor], t: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        in_shares = any(m.shares > 1 for m in self.modules() if isinstance(m, SpectralNorm))
        return super().forward(z, t) if learning or in_shares else self.at(t)(z)

    def at(self, t: Tensor) -> WideColumns:
        """The function z -> `self(z, t)` for the many calls of a chain.

        Reads the weights as they are now: fused optimisers change them without a trace.
        """
        with torch.inference_mode(False), torch.no_grad():
            groups = self._refreshed()
            embedding = time_embedding(t).to(groups[0].weight.dtype)
            return WideColumns(
                groups, embedding, every_call=not self.steps.once or self._advancing
            )

    @property
    def _advancing(self) -> bool:
        return any(m.training for m in self.modules() if isinstance(m, SpectralNorm))

    def _refreshed(self) -> list[Group]:
        """The wide copies with the weights of now, in the place where they were."""
        like = next(self.parameters())
        held = None if self._groups is None else self._groups[0].weight
        if held is None or (held.device, held.dtype) != (like.device, like.dtype):
            self._groups = self._grouped()
        assert self._groups is not None
        for group in self._groups:
            group.read()
        return self._groups

    def _grouped(self) -> list[Group]:
        alike: dict[Any, list[int]] = {}
        for i, net in enumerate(self.children()):
            shapes = tuple((name, tuple(x.shape)) for name, x in net.state_dict().items())
            alike.setdefault((type(net), self.shapes[i], shapes), []).append(i)
        merge, groups = self.steps.merge, []
        for which in alike.values():
            nets = [self.layer(i) for i in which]
            few = len(nets) < FEW and any(isinstance(m, nn.Conv2d) for m in nets[0].modules())
            if few or not self.steps.group:
                groups += [Group([net], [i], merge) for net, i in zip(nets, which, strict=True)]
            else:
                groups.append(Group(nets, which, merge))
        return groups


class WideColumns(Columns):
    """The same on the wide copies.

    Args:
        embedding: of t, (B, 128).
        every_call: evaluate spectral norm and the part that sees t in every call.
    """

    def __init__(self, groups: list[Group], embedding: Tensor, every_call: bool) -> None:
        self.groups, self.embedding, self.every_call = groups, embedding, every_call
        self.timed = [] if every_call else [group.timed(embedding) for group in groups]

    def tensors(self) -> list[Tensor]:
        return [self.embedding, *(part for parts in self.timed for part in parts)]

    def own(self) -> WideColumns:
        other = copy.copy(self)
        other.embedding = self.embedding.clone()
        other.timed = [[part.clone() for part in parts] for parts in self.timed]
        return other

    def advancing(self) -> list[Tensor]:
        layers = [layer for group in self.groups for layer in group.layers]
        return [x for layer in layers for x in layer.advancing()]

    @property
    def key(self) -> Any:
        return id(self.groups), self.every_call, bool(self.advancing())

    def __call__(self, z: Sequence[Tensor]) -> Tensor:
        columns: dict[int, Tensor] = {}
        for number, group in enumerate(self.groups):
            if self.every_call:
                with torch.no_grad():
                    group.normalise()
                    timed = group.timed(self.embedding)
            else:
                timed = self.timed[number]
            found = group.f(torch.cat([z[i] for i in group.which]), timed)
            columns.update(zip(group.which, found.chunk(len(group.which)), strict=True))
        return torch.cat([columns[i] for i in sorted(columns)], dim=1)


def suits(nets: EnergyNets) -> bool:
    """Whether all that the networks are made of is known here: dense layers and convolutions."""
    return all(_known(module) for net in nets.children() for module in net.modules()) and all(
        isinstance(net, Energy) for net in nets.children()
    )


def _known(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        plain = (module.groups, set(module.dilation), module.padding_mode)
        return plain == (1, {1}, "zeros") and not isinstance(module.padding, str)
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return isinstance(module, nn.Linear) or not own


class Group:
    """Networks of equal shape as one.

    Args:
        nets: the networks, whose weights are read by `read`.
        which: the layers that they are of.
        merge: layers of the network that get the same input are one.
    """

    def __init__(self, nets: Sequence[nn.Module], which: Sequence[int], merge: bool) -> None:
        self.which = list(which)
        net = copy.deepcopy(nets[0]).requires_grad_(False)
        assert isinstance(net, Energy)
        self.layers: list[Wide] = []
        for name, module in list(net.named_modules()):
            kind = {nn.Linear: WideLinear, nn.Conv2d: WideConv2d}
            wide = next((w for plain, w in kind.items() if isinstance(module, plain)), None)
            if wide is not None:
                self.layers.append(wide([each.get_submodule(name) for each in nets]))
                net.set_submodule(name, self.layers[-1])
        self.net, self.f = net, net.f
        if merge:
            for module in [m for m in net.modules() if isinstance(m, TimedNet)]:
                for first, second in module.forks:
                    self._merge(module, first, second)

    def _merge(self, module: TimedNet, first: str, second: str) -> None:
        """Put one layer in the place of two."""
        children = [module.get_submodule(name) for name in (first, second)]
        pair = [next(m for m in child.modules() if isinstance(m, Wide)) for child in children]
        in_turn = zip(*(layer.sources for layer in pair), strict=True)
        merged = type(pair[0])([source for both in in_turn for source in both], side_by_side=2)
        self.layers = [layer for layer in self.layers if layer not in pair] + [merged]
        activated = isinstance(children[0], nn.Sequential)
        module.merged[first] = nn.Sequential(nn.SiLU(), merged) if activated else merged
        for name in (first, second):
            module.set_submodule(name, nn.Identity())  # neither is needed any more

    @property
    def weight(self) -> Tensor:
        """Any of its weights: it tells device and precision."""
        return self.layers[0].weight

    def read(self) -> None:
        for layer in self.layers:
            layer.read()

    def normalise(self) -> None:
        for layer in self.layers:
            layer.normalise()

    def timed(self, embedding: Tensor) -> list[Tensor]:
        return self.net.timed(embedding.repeat(len(self.which), 1))


class Wide(nn.Module):
    """Layers of equal shape side by side; weight (n, out, in) with `in` times the kernel's size.

    The tensors stay where they are when they are read again: a captured graph keeps their place.

    Args:
        layers: one of each network, or several in turn.
        side_by_side: how many each network has: they get the same input and give their outputs as
            channels one beside the other.
    """

    def __init__(self, layers: Sequence[nn.Module], side_by_side: int = 1) -> None:
        super().__init__()
        self.sources: tuple[Any, ...] = tuple(layers)  # a tuple hides them from registration
        self.side_by_side = side_by_side
        self.normalised = isinstance(layers[0], SpectralNorm)
        self.kernel = self._source(layers[0]).shape[2:]
        self.weight = self._stacked([self._source(layer) for layer in layers])
        self.raw = torch.empty_like(self.weight) if self.normalised else self.weight
        self.bias: Tensor | None = None
        if self.sources[0].bias is not None:
            self.bias = self._stacked([layer.bias for layer in layers])
        if self.normalised:
            self.u = torch.stack([layer.weight_u for layer in self.sources])
            self.v = torch.stack([layer.weight_v for layer in self.sources])

    @staticmethod
    def _source(layer: Any) -> Tensor:
        return layer.weight_orig if isinstance(layer, SpectralNorm) else layer.weight

    @staticmethod
    def _stacked(tensors: Sequence[Any], out: Tensor | None = None) -> Tensor:
        flat = [x.detach().flatten(1) if x.ndim > 1 else x.detach() for x in tensors]
        return torch.stack(flat, out=out)

    def read(self) -> None:
        """Take the layers' weights, and normalise them with the vectors as they are."""
        self._stacked([self._source(layer) for layer in self.sources], out=self.raw)
        if self.bias is not None:
            self._stacked([layer.bias for layer in self.sources], out=self.bias)
        if self.normalised:
            torch.stack([layer.weight_u for layer in self.sources], out=self.u)
            torch.stack([layer.weight_v for layer in self.sources], out=self.v)
            self._divide()

    def normalise(self) -> None:
        """What a call of the layers does before it uses their weights."""
        if not self.normalised:
            return
        if self.sources[0].training:
            u, v = power_iteration(self.raw, self.u)
            self.u.copy_(u)
            self.v.copy_(v)
            _, _, *theirs = self.advancing()
            torch._foreach_copy_(theirs, [x for pair in zip(u, v, strict=True) for x in pair])
        self._divide()

    def advancing(self) -> list[Tensor]:
        """What `normalise` changes, but for the weight that follows from it."""
        if not (self.normalised and self.sources[0].training):
            return []
        theirs = [x for each in self.sources for x in (each.weight_u, each.weight_v)]
        return [self.u, self.v, *theirs]

    def _divide(self) -> None:
        sigma = self.u.unsqueeze(1) @ self.raw @ self.v.unsqueeze(2)
        torch.div(self.raw, sigma, out=self.weight)

    def kernels(self) -> tuple[Tensor, Tensor | None]:
        """Weight (n, out, in) and bias (n, out) of n networks, all of a network's layers."""
        shape = (-1, self.side_by_side)
        weight = self.weight.unflatten(0, shape).flatten(1, 2)
        return weight, None if self.bias is None else self.bias.unflatten(0, shape).flatten(1)


class WideLinear(Wide):
    """(n B, in) -> (n B, out): a batch of n matrix products."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.kernels()
        x, matrices = x.unflatten(0, (len(weight), -1)), weight.transpose(1, 2)
        if bias is None:
            return (x @ matrices).flatten(0, 1)
        return torch.baddbmm(bias.unsqueeze(1), x, matrices).flatten(0, 1)


class WideConv2d(Wide):
    """(n B, in, H, W) -> (n B, out, H', W'): n convolutions.

    As one of n groups, or as a batch of products of all windows with the kernels: the latter on a
    CPU where the kernels are the larger part, which a convolution would rearrange in each call.
    """

    def forward(self, x: Tensor) -> Tensor:
        like = self.sources[0]
        weight, bias = self.kernels()
        weight = weight.unflatten(2, (-1, *self.kernel))
        n, out = weight.shape[:2]
        sides = zip(x.shape[2:], self.kernel, like.stride, like.padding, strict=True)
        pixels = math.prod((side + 2 * p - k) // s + 1 for side, k, s, p in sides)
        large = weight[0].numel() >= LARGE and len(x) // n * pixels <= out
        product = x.device.type == "cpu" and large
        if n == 1 and not product:
            flat = None if bias is None else bias[0]
            return F.conv2d(x, weight[0], flat, like.stride, like.padding)
        how = Product if product else Convolution
        return how.apply(x, weight, bias, like.stride, like.padding)

"""What all kinds of priors share: a backbone, a configuration, draws of u and images of them."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ebm_prior.backbones.base import Backbone
from ebm_prior.config import PriorConfig

Same = TypeVar("Same", bound="Prior")


class LossInfo(NamedTuple):
    """What a training step shows; tensors without a graph, so that reading them is a choice."""

    difference: Tensor  # (), mean over the batch of sum_i f_i(u-) - f_i(u+), not divided by e2
    u_std: Tensor  # (), deviation of all coordinates of the negatives
    layer_loss: Tensor  # (L,), the loss of each layer
    positive: Tensor  # (L,), mean f_i(u+)
    negative: Tensor  # (L,), mean f_i(u-)
    classified: Tensor  # (2,), labels at t = 0: those predicted, and all


class Prior(nn.Module, ABC):
    """A prior on the latents of one backbone.

    Attributes:
        backbone: the VAE; not a submodule, so neither its parameters nor its mode follow ours.
    """

    def __init__(self, backbone: Backbone, config: PriorConfig) -> None:
        super().__init__()
        _check_shapes(config, backbone)
        self._held = (backbone,)  # a tuple hides it from nn.Module's registration
        self.config = config
        self.layout = backbone.layout

    @classmethod
    @abstractmethod
    def networks(cls, config: PriorConfig) -> nn.Module:
        """A fresh `learned` module, from the configuration alone: also what a file must fill."""

    @property
    @abstractmethod
    def learned(self) -> nn.Module:
        """What training changes and a file holds."""

    @abstractmethod
    def sample_u(
        self,
        num: int,
        *,
        generator: torch.Generator | None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw u_0, (num, D); the callback is called with (k, u_k) for every state on the way."""

    @abstractmethod
    def energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B,) at u (B, D): low where the prior has more mass than the VAE's own, see the kind."""

    def layer_energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B, L) at u (B, D): the energy of each layer, where it is a sum over layers."""
        raise ValueError(
            f"a {self.config.kind} prior has no energy of single layers, only that of all: energy"
        )

    @classmethod
    def check_learned(cls, config: PriorConfig, learned: Mapping[str, Tensor]) -> None:
        """Refuse values that cannot be used; names, shapes and finiteness are checked already."""

    def loss(
        self, u: Tensor, *, generator: torch.Generator | None, squared_penalty: float = 0.0
    ) -> tuple[Tensor, LossInfo]:
        """One training step's loss for posterior draws u, (B, D)."""
        raise ValueError(f"a {self.config.kind} prior is not trained in steps")

    @property
    def backbone(self) -> Backbone:
        return self._held[0]

    def refresh_backbone(self) -> None:
        """Have a backbone that keeps copies of its weights look whether they are still so."""
        refresh = getattr(self.backbone, "refresh", None)
        if refresh is not None:
            refresh()

    def on(self: Same, backbone: Backbone) -> Same:
        """The same prior, its learned part shared, on another view of the same VAE."""
        _check_shapes(self.config, backbone)
        other = copy.copy(self)
        other._modules = dict(self._modules)  # a copy of its own: to replace one is not to share
        other._held = (backbone,)
        return other

    @property
    def weight(self) -> Tensor:
        """Any learned tensor: it tells device and precision."""
        return next(iter(self.learned.state_dict().values()))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @torch.no_grad()
    def sample(
        self,
        num: int,
        temperature: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        **drawing: Any,
    ) -> Tensor:
        """Draw images, (num, C, H, W) in [0, 1].

        The temperature enters only in the last map u_0 -> z -> x; u_0 is drawn at 1.

        Args:
            seed: for a generator of its own; or give the `generator`; or neither, and PyTorch's
                own generator draws.
            drawing: further arguments of this kind's `sample_u`, for example `labels`.
        """
        if seed is not None:
            if generator is not None:
                raise ValueError("sample got a seed and a generator; give one of them")
            generator = torch.Generator(self.device).manual_seed(seed)
        u = self.sample_u(num, generator=generator, **drawing)
        return self.backbone.decode(u, temperature, generator)


def _check_shapes(config: PriorConfig, backbone: Backbone) -> None:
    if backbone.layout.shapes != config.shapes:
        raise ValueError(
            f"the prior is for latents {config.shapes}, the backbone has"
            f" {backbone.layout.shapes}: they do not belong together"
        )


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module requires a gradient inside; afterwards each as before."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside; afterwards each submodule as before."""
    before = [(m, m.training) for m in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for submodule, mode in before:
            submodule.training = mode


@contextlib.contextmanager
def plain_numbers(device: str) -> Iterator[None]:
    """Outside a caller's autocast and inference mode: chains need float32 and gradients."""
    with torch.inference_mode(False), torch.autocast(device, enabled=False):
        yield

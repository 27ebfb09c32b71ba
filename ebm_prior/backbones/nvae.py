"""NVAE as a backbone: the map between x, u and z of a frozen `nvae.AutoEncoder`.

The contract's u-space (paper, Sec. 3.1): z_i = mu_i(z above) + temperature * sigma_i(z above) u_i.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.backbones.folded.walk import Walk
from ebm_prior.backbones.top_down import TopDown
from ebm_prior.fingerprint import fingerprint
from ebm_prior.latents import Layout
from ebm_prior.steps import Steps
from nvae import batchnorm, checkpoint
from nvae.arch import ModelConfig
from nvae.model import AutoEncoder, Choose


class NVAEBackbone(TopDown):
    """A frozen view of a model: the same memory, no gradient to it, always in eval mode.

    The model itself keeps its mode and its `requires_grad`. Its BatchNorm statistics are seen as
    they are, also after a re-estimation, unless statistics of our own are given: those of a
    re-estimation belong to the map T that a prior was trained for.

    Args:
        model: the live model: an `nvae.AutoEncoder`, or any module with NVAE's state dict.
        bn_statistics: entries `<layer>.running_mean`, `.running_var`, `.num_batches_tracked` of
            its state dict, to use in place of the model's.
        config: what the model is; None asks the model, which is then to be an `AutoEncoder`.
        steps: run T at temperature 1 on a frozen copy, the same to rounding, differentiable once;
            None is the plain walk. The copy is made when it is first needed, and anew after a
            `refresh` that finds other weights or statistics: call it when the model has been
            changed in place.

    Attributes:
        copies: how many models have been seen: what was captured of one serves no other.
    """

    def __init__(
        self,
        model: nn.Module,
        bn_statistics: Mapping[str, Tensor] | None = None,
        *,
        config: ModelConfig | None = None,
        steps: Steps | None = None,
    ) -> None:
        if config is None:
            if not isinstance(model, AutoEncoder):
                raise ValueError(
                    "expected an nvae.AutoEncoder or an object with the Backbone methods, got"
                    f" {type(model).__name__}; for a live upstream model use ebm_prior.attach"
                )
            config = model.config
        self.live, self.config, self.steps = model, config, steps
        self.model = _view(model, config)
        self.layout = Layout(tuple(config.latent_shapes))
        self.bn_statistics = _checked(self.model, bn_statistics)
        self.copies = 0
        self._walk: Walk | None = None
        self._seen: list[Any] | None = None
        self.refresh()

    @property
    def device(self) -> torch.device:
        return self.model.prior_ftr0.device

    def fingerprint(self) -> str:
        """The parameters' name: `ebm_prior.fingerprint.fingerprint`."""
        return fingerprint(self.model.state_dict())

    def with_bn_statistics(self, statistics: Mapping[str, Tensor] | None) -> NVAEBackbone:
        """A view of the same model with other BatchNorm statistics, or its own again (None)."""
        return NVAEBackbone(self.live, statistics, config=self.config, steps=self.steps)

    def folded(self, steps: Steps) -> NVAEBackbone:
        """A view of the same model with its map T on a frozen copy."""
        return NVAEBackbone(self.live, self.bn_statistics, config=self.config, steps=steps)

    def to_z(self, u: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """T: u (B, D) -> z, top first; differentiable in u, on a frozen copy once."""
        if self.steps is None or temperature != 1:
            return super().to_z(u, temperature)
        return self.layout.split(self.walk()(u))

    @torch.no_grad()
    def walk(self) -> Walk:
        """The frozen copy."""
        assert self.steps is not None
        if self._walk is None:
            with torch.inference_mode(False):  # it is kept, for chains that need gradients too
                self._walk = Walk(self.model, self.steps)
        return self._walk

    def readjust_bn(
        self,
        *,
        iterations: int,
        batch_size: int,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Re-estimate the live model's statistics from its own samples at temperature 1.

        Returns:
            Copies of them, for `with_bn_statistics`.
        """
        batchnorm.readjust(
            self.live,  # type: ignore[arg-type]  # upstream's own class has what it needs, too
            temperature=1.0,
            iterations=iterations,
            batch_size=batch_size,
            generator=generator,
            progress=progress,
        )
        self.refresh()
        return bn_statistics(self.model)

    @torch.no_grad()
    def refresh(self) -> None:
        """Look at the live model's tensors again: it may have replaced them, or moved."""
        now = self.live.state_dict() | dict(self.bn_statistics or {})
        device = now["prior_ftr0"].device
        for layer, module in self.model.named_modules(remove_duplicate=False):
            prefix = f"{layer}." if layer else ""
            for name, parameter in _parameters(module):
                if not _same(parameter, now[prefix + name]):
                    # A parameter of its own, not `data` of the old one: with what counts changes.
                    another = nn.Parameter(now[prefix + name], requires_grad=False)
                    setattr(module, name, another)
            for name, buffer in module.named_buffers(recurse=False):
                # The masks of the flows are in no state dict: those of the view stay, and move.
                current = now.get(prefix + name, buffer).to(device)
                if not _same(buffer, current):
                    setattr(module, name, current)
        seen = None if self.steps is None else _state(self.model)
        if seen != self._seen:
            self._walk, self._seen = None, seen
            self.copies += 1

    @torch.no_grad()
    def infer(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the posterior and standardise, in one pass.

        .. math:: u_i = (z_i - \\mu_i) / \\sigma_i

        with z_i after the normalising flows, mu_i and sigma_i the prior's at temperature 1.

        Args:
            x: (B, C, H, W) in [0, 1].

        Returns:
            u, (B, D).
        """
        return self._drawn(x, None, generator)

    @torch.no_grad()
    def infer_with(self, x: Tensor, eps: Sequence[Tensor]) -> Tensor:
        """`infer` with the noise before the flows given, one (B, ...) tensor per layer."""
        return self._drawn(x, list(eps), None)

    def _drawn(
        self, x: Tensor, eps: list[Tensor] | None, generator: torch.Generator | None
    ) -> Tensor:
        def posterior() -> Choose:
            encoded = self.model.encode(x)
            return self.model.posterior_choice(encoded, eps=eps, generator=generator)

        return self.standardised(x, posterior)

    @torch.no_grad()
    def decode(
        self, u: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of the decoder's distribution, clamped to [0, 1]; Bernoulli: its mean."""
        output = self.model.decoder_output(self.logits(u, temperature))
        if self.config.data.output == "bernoulli":
            return output.mean()
        return output.sample(generator=generator).clamp(0.0, 1.0)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> NVAEBackbone:
    """The frozen backbone of an NVAE checkpoint, on `device`."""
    return NVAEBackbone(checkpoint.load(path, device=device))


def bn_statistics(model: AutoEncoder) -> dict[str, Tensor]:
    """Copies of the BatchNorm statistics of the generating path, which re-estimation changes."""
    return {
        f"{layer}.{name}": buffer.detach().clone()
        for layer, module in model.batch_norms()
        if layer.startswith(("dec_tower", "post_process"))
        for name, buffer in module.named_buffers()
    }


def _view(live: nn.Module, config: ModelConfig) -> AutoEncoder:
    """A module tree of ours around the live model's tensors; nothing in it asks for a gradient."""
    with torch.device("meta"):
        view = AutoEncoder(config)
    try:
        view.load_state_dict(live.state_dict(), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"the live {type(live).__name__} is not the model that its arguments describe"
            f" ({' '.join(str(error).split())[:300]}); give the args of its own checkpoint"
        ) from None
    return view.requires_grad_(False).eval()


def _state(model: nn.Module) -> list[Any]:
    """What changes when a weight or a statistic does.

    PyTorch counts the changes of a tensor in place, but neither those of BatchNorm's statistics
    nor those that fused optimisers make: their norms tell.
    """
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    norms = torch.stack(torch._foreach_norm(tensors)).tolist()
    return [*((x.data_ptr(), x._version) for x in tensors), *norms]


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A module's own, by each of their names."""
    return list(module.named_parameters(recurse=False, remove_duplicate=False))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.device == b.device


def _checked(
    model: AutoEncoder, statistics: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Our own copies of the statistics."""
    if statistics is None:
        return None
    buffers = dict(model.named_buffers())
    for key, value in statistics.items():
        if key not in buffers or buffers[key].shape != value.shape:
            has = tuple(buffers[key].shape) if key in buffers else "no such buffer"
            raise ValueError(
                f"BatchNorm statistics {key} have shape {tuple(value.shape)}, the model has {has};"
                " they belong to another backbone"
            )
    return {key: value.detach().clone() for key, value in statistics.items()}

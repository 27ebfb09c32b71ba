"""One step's loss and its gradients: KL warm-up and balancing, regularisers, micro batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvae import distributed, losses
from nvae.model import AutoEncoder, Forward
from nvae.training.guard import IMAGES
from nvae.training.settings import Settings


@dataclass(frozen=True)
class Terms:
    """The loss of one (micro) batch without the regularisers, and what it was made of."""

    loss: Tensor  # ()
    reconstruction: Tensor  # (B,)
    kl: losses.BalancedKL
    x: Tensor
    forward: Forward

    def finite(self) -> dict[str, Tensor]:
        """By name what must be finite, the first cause first."""
        return {
            IMAGES: self.x,
            "log p(x | z)": self.reconstruction,
            **{f"the KL of layer {i}": kl for i, kl in enumerate(self.forward.kl_all)},
            "the loss": self.loss,
        }


@dataclass(frozen=True)
class Step:
    """What a step measured on this process, without gradient; means over its batch."""

    loss: Tensor  # with the regularisers
    reconstruction: Tensor
    kl: Tensor  # not balanced
    beta: float
    norm_coefficient: float
    norm: tuple[Tensor, Tensor]  # the spectral and the BN term
    last: Terms


class Objective:
    """The loss as a function of step and batch.

    Args:
        network: the model, or what averages its gradients over the processes around it.
        total: number of all steps, which the KL coefficient is measured by.
        autocast: makes the context of forward pass and loss.
    """

    def __init__(
        self,
        model: AutoEncoder,
        network: nn.Module,
        settings: Settings,
        total: int,
        autocast: Callable[[], contextlib.AbstractContextManager[object]],
    ) -> None:
        self.model, self.network, self.settings, self.total = model, network, settings, total
        self.autocast = autocast
        self.spectral = losses.SpectralNorm(model) if settings.weight_decay_norm else None
        alpha = losses.kl_alpha(model.config.groups_per_scale)
        self.alpha = alpha.to(model.prior_ftr0.device)
        self.pool = distributed.mean if settings.kl_balance == "union" else lambda size: size

    def beta(self, step: int) -> float:
        """The KL coefficient."""
        s = self.settings
        return losses.kl_coefficient(
            step, self.total, s.kl_anneal_portion, s.kl_const_portion, s.kl_const_coeff
        )

    def norm_coefficient(self, beta: float) -> float:
        """The regularisers' coefficient."""
        s = self.settings
        first = s.weight_decay_norm_init if s.weight_decay_norm_anneal else None
        return losses.norm_coefficient(beta, s.weight_decay_norm, first)

    def noise(self, images: int) -> list[Tensor]:
        """This process's part of the noise that all draw alike, per layer (images, C, H, W).

        It comes from PyTorch's own generator of the device, seeded the same everywhere: together
        the processes get what one process with all the images would.
        """
        first, all_images = distributed.rank() * images, distributed.world_size() * images
        device = self.model.prior_ftr0.device
        return [
            torch.randn(all_images, *shape, device=device)[first : first + images].clone()
            for shape in self.model.latent_shapes
        ]

    def terms(self, network: nn.Module, x: Tensor, beta: float) -> Terms:
        """Forward pass over images at full bit depth, and the loss."""
        config = self.model.config
        with self.autocast():
            x = losses.reduce_bits(x, config.num_x_bits)
            result = network(x, self.noise(len(x)))
            output = self.model.decoder_output(result.logits)
            reconstruction = losses.reconstruction_loss(output, x, config.data.border)
            kl = losses.balance_kl(result.kl_all, beta, self.alpha, self.pool)
            loss = (reconstruction + self.settings.kl_weight * kl.total).mean()
        return Terms(loss, reconstruction, kl, x, result)

    def backward(self, x: Tensor, step: int, scale: Callable[[Tensor], Tensor]) -> Step:
        """Leave the gradients of a step, averaged over processes, in the parameters.

        Args:
            x: (B, C, H, W), this process's batch.
            scale: applied to the loss before its backward pass.
        """
        beta = self.beta(step)
        coefficient = self.norm_coefficient(beta)
        parts = x.split(self.settings.micro)
        seen: list[Tensor] = []
        zero = x.new_zeros(())
        norm = (zero, zero)
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self._summing_here():
                terms = self.terms(self.network, part, beta)
                loss = terms.loss / len(parts)
                if last and self.spectral is not None:
                    norm = (self.spectral(), losses.batch_norm_term(self.model))
                    loss = loss + coefficient * (norm[0] + norm[1])
                scale(loss).backward()
            kl = torch.stack(terms.forward.kl_all).detach().sum(0).mean()
            reconstruction = terms.reconstruction.detach().mean()
            seen.append(torch.stack([loss.detach() * len(parts), reconstruction, kl]).float())
        # Of the regularisers only the last part knows: its loss has them, len(parts) times.
        mean_loss, reconstruction, kl = torch.stack(seen).mean(0)
        norm = (norm[0].detach(), norm[1].detach())
        return Step(mean_loss, reconstruction, kl, beta, coefficient, norm, terms)

    def _summing_here(self) -> contextlib.AbstractContextManager[object]:
        """A context whose backward passes do not average over the processes yet."""
        if isinstance(self.network, nn.parallel.DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()

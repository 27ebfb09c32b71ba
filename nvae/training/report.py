"""What is measured of a run and told: steps, epochs, evaluations (contract 6.4 and 6.5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nvae import distributed
from nvae.likelihood import importance_weighted
from nvae.model import AutoEncoder
from nvae.seeds import derived
from nvae.training import monitor
from nvae.training.log import Log
from nvae.training.objective import Step
from nvae.training.settings import Settings


class Report:
    """Upstream's tags and axes; every process calls, the first one's `log` tells.

    Args:
        held_out: images to evaluate on; None: no evaluations.
    """

    def __init__(
        self,
        settings: Settings,
        model: AutoEncoder,
        held_out: Dataset[Tensor] | None,
        log: Log,
    ) -> None:
        self.settings, self.model, self.held_out, self.log = settings, model, held_out, log

    def step(self, n: int, done: Step, rate: float, means: Tensor, seconds: float) -> None:
        """Scalars of step n averaged over the processes, and more rarely a picture.

        Args:
            means: of loss, reconstruction and KL, in this epoch so far.
            seconds: of all n steps, without evaluations.
        """
        terms = done.last
        images = self.settings.batch_size * distributed.world_size()
        own = torch.stack([done.loss, done.reconstruction, done.kl, *terms.kl.values]).float()
        channels = torch.stack([kl.detach().float() for kl in terms.forward.kl_diag])
        mean = distributed.mean(torch.cat([own, channels.flatten()]))
        loss, reconstruction, kl, *values = mean[: len(own)].tolist()
        active = (mean[len(own) :].view_as(channels) > 0.1).sum(1).tolist()
        spectral, bn = (float(term) for term in done.norm)
        scalars = {
            "train/norm_loss": spectral,
            "train/bn_loss": bn,
            "train/norm_coeff": done.norm_coefficient,
            "train/nelbo_avg": float(means[0]),
            "train/lr": rate,
            "train/nelbo_iter": loss,
            "train/kl_iter": kl,
            "train/recon_iter": reconstruction,
            "train/seconds": seconds,
            "train/images_per_second": n * images / seconds,
            "kl_coeff/coeff": done.beta,
            "kl/total_active": sum(active),
        }
        for layer, weight in enumerate(terms.kl.weights.tolist()):
            scalars[f"kl/active_{layer}"] = active[layer]
            scalars[f"kl_coeff/layer_{layer}"] = weight
            scalars[f"kl_vals/layer_{layer}"] = values[layer]
        self.log.scalars(n, scalars)
        if self.log.tells and n % (10 * self.settings.log_every) == 0:
            pair = monitor.reconstruction(
                self.model, terms.x, terms.forward.logits, self.settings.seed, n
            )
            self.log.picture(n, "reconstruction", pair)

    def epoch(self, n: int, epoch: int, means: Tensor, evaluate: bool) -> None:
        """What an epoch, counted from 0, came to."""
        self.log.scalars(n, {"train/nelbo": float(means[0])})
        told = "loss {:.2f}, reconstruction {:.2f}, KL {:.2f}".format(*means.tolist())
        if evaluate:
            told += self._evaluation(n, self.settings.iw_samples, at=epoch)
            for t in monitor.TEMPERATURES if self.log.tells else ():
                image = monitor.samples(self.model, t, self.settings.seed)
                self.log.picture(epoch, f"generated_{t:.1f}", image)
        self.log.say(f"epoch {epoch + 1} of {self.settings.epochs}: {told}")

    def end(self, n: int) -> None:
        """The last evaluation, with more importance samples."""
        at = self.settings.epochs + 1
        self.log.say(f"done{self._evaluation(n, self.settings.final_iw_samples, at=at)}")

    def _evaluation(self, n: int, samples: int, *, at: int) -> str:
        if self.held_out is None or not samples:
            return ""
        found = importance_weighted(
            self.model,
            self.held_out,
            samples,
            batch_size=self.settings.batch_size,
            seed=derived(self.settings.seed, at),
            workers=max(self.settings.workers, 0),
            progress=self.log.tells,
        )
        values = {
            "val/neg_log_p": found.neg_log_p,
            "val/nelbo": found.nelbo,
            "val/bpd_log_p": found.neg_log_p_bpd,
            "val/bpd_elbo": found.nelbo_bpd,
        }
        self.log.scalars(n, values, at=at)
        return (
            f"; held out, {samples} importance samples: nelbo {found.nelbo:.3f}"
            f" ({found.nelbo_bpd:.4f} bpd), -log p {found.neg_log_p:.3f}"
            f" ({found.neg_log_p_bpd:.4f} bpd)"
        )

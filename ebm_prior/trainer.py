"""Train a prior on a frozen VAE; one of kind diffusion by Algorithm 1 (paper, Section 3.2)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ebm_prior import checkpoint, parallel
from ebm_prior.base import Prior
from ebm_prior.files import written_whole
from ebm_prior.fingerprint import backbone_fingerprint
from ebm_prior.langevin import standard_normal
from ebm_prior.seeds import seeded
from ebm_prior.training import adam, run_state
from ebm_prior.training.ema import Average
from ebm_prior.training.guard import MEMORY, Guard, Limits, Measured
from ebm_prior.training.interrupt import Interrupt
from ebm_prior.training.run_log import RunLog
from ebm_prior.training.settings import TrainSettings

PRIOR = "prior.safetensors"
GRID_KEY = 2**31  # the pictures' noise: a process's own noise has its rank in this place

Show = Callable[[Path, Tensor, str], "np.ndarray | None"]


class Source(Protocol):
    """Where images come from; `ebm_prior.training.batches.Batches` is one."""

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Tensor | Sequence[Tensor]]:
        """The batches of an epoch from batch `start` on: (B, C, H, W), or that and labels."""
        ...


@dataclass(frozen=True)
class Summary:
    """How a call of `Trainer.run` ended."""

    step: int
    steps: int
    seconds: float  # of all calls together
    difference: float
    u_std: float
    data_std: float
    halvings: int
    signal: int  # number of the signal that stopped it, 0 if it is done
    accuracy: float | None = None  # of the labels at t = 0, where there are any

    @property
    def done(self) -> bool:
        return self.step >= self.steps


class Trainer:
    """Trains `prior.learned`; writes `last.pt`, `prior.safetensors`, logs and pictures to `out`.

    Of several processes each has batches and noise of its own; gradients are means over them.

    Args:
        prior: on the device to train on; of it `loss`, `sample_u`, `learned`, `backbone` and
            `config` are used.
        data: images in [0, 1], `len(data)` batches per epoch of this process.
        fingerprint: of the backbone; None computes it.
        bn_statistics: of a re-estimated backbone, saved with the prior.
        facts: what else must not change when a run goes on, for example the data set.
        show: writes images (N, C, H, W) to a PNG under a caption and returns its pixels; None
            makes no pictures.
        bar: show a progress bar.
    """

    def __init__(
        self,
        prior: Prior,
        data: Source,
        settings: TrainSettings,
        out: Path | str,
        *,
        fingerprint: str | None = None,
        bn_statistics: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
        show: Show | None = None,
        bar: bool = True,
    ) -> None:
        self.prior, self.data, self.settings, self.out = prior, data, settings, Path(out)
        self.device = next(prior.learned.parameters()).device
        self.bn_statistics = bn_statistics
        self.fingerprint = fingerprint or backbone_fingerprint(prior.backbone)
        self.show, self.bar = show, bar
        config = {k: v for k, v in prior.config.to_dict().items() if k != "preset"}
        self.facts = {
            **config,
            **settings.facts(),
            "backbone": self.fingerprint,
            "processes": parallel.world_size(),
            "batches per epoch": len(data),
            **(facts or {}),
        }
        self.generator = seeded(self.device, settings.seed, parallel.rank())
        parallel.broadcast(prior.learned)
        self.loss = parallel.averaged(prior.loss, prior.learned)
        self.optimizer = adam.make(
            prior.learned.parameters(),
            name=settings.optimizer,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.ema = Average(prior.learned, settings.ema) if settings.ema else None
        limits = Limits.of(prior.config)
        difference = settings.guard_difference or limits.difference
        self.guard = Guard(Limits(difference, settings.guard_u_std))
        self.step = self.good_step = 0
        self.seconds, self.lr_factor = 0.0, 1.0
        self.accuracy: float | None = None  # of the labels at t = 0, a running mean
        self.good = self._learned()
        self.block = 1  # samples drawn at once for a picture: as many as fit in training

    # --- going on -------------------------------------------------------------------------

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up the state of `run_state.read`.

        Raises:
            ValueError: it is the state of a run with other settings.
        """
        run_state.check_facts(self.out / run_state.NAME, state["facts"], self.facts)
        self._set_learned(state["learned"])
        self.good, self.good_step = state["good"], state["good_step"]
        self.guard.load_state_dict(state["guard"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.lr_factor = state["lr_factor"]
        if not run_state.set_random_state(self.generator, state["rng"]):
            # Another kind of device has other random numbers: go on with fresh ones.
            self.generator = seeded(self.device, self.settings.seed, parallel.rank(), self.step)

    def run(self) -> Summary:
        """Train until `settings.iterations`, or until a SIGINT or SIGTERM; save in either case.

        Raises:
            ValueError: training diverged again and again. The last good state has been saved.
        """
        main = parallel.rank() == 0
        self.out.mkdir(parents=True, exist_ok=True)
        if main:
            config = {"prior": self.prior.config.to_dict(), "training": asdict(self.settings)}
            with written_whole(self.out / "config.json") as temporary:
                text = json.dumps({**config, "backbone": self.fingerprint}, indent=2)
                temporary.write_text(text + "\n", encoding="utf-8")
        steps = self.settings.iterations
        log = RunLog(self.out if main else None, step=self.step, steps=steps, bar=self.bar)
        stopped_by = 0
        try:
            with Interrupt() as interrupt:
                while self.step < steps and not stopped_by:
                    for batch in self.data.epoch(*divmod(self.step, len(self.data))):
                        x, labels = (batch, None) if isinstance(batch, Tensor) else batch
                        stopped_by = self._iterate(x, labels, log, interrupt)
                        if stopped_by or self.step >= steps:
                            break
        finally:
            log.close()
        guard = self.guard
        watched = guard.difference, guard.u_std, guard.data_std, guard.halvings
        return Summary(
            self.step, steps, self.seconds, *watched, signal=stopped_by, accuracy=self.accuracy
        )

    def _iterate(self, x: Tensor, labels: Tensor | None, log: RunLog, interrupt: Interrupt) -> int:
        """One step and what is due after it; returns the signal that asks to stop, or 0."""
        started = time.perf_counter()
        settings = self.settings
        measured, asked = self._train_step(x, labels, interrupt.number)
        reason = self.guard.judge(measured)
        if reason is None:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update()
        self.step += 1
        self.seconds += time.perf_counter() - started
        step, last = self.step, self.step >= settings.iterations
        if step % settings.log_every == 0 or step == 1 or last:
            lr = self.optimizer.param_groups[0]["lr"]
            learned = {} if self.accuracy is None else {"accuracy": self.accuracy}
            log.scalars(step, {**asdict(measured), **learned, "lr": lr, "seconds": self.seconds})
        shown = {"difference": f"{self.guard.difference:+.3f}", "u_std": f"{self.guard.u_std:.3f}"}
        if self.accuracy is not None:
            shown["accuracy"] = f"{self.accuracy:.2f}"
        log.advance(shown)
        if reason is not None:
            self._go_back(reason, log)
        elif step % settings.guard_every == 0 and self.guard.well:
            self.good, self.good_step = self._learned(), step
        if last or asked or step % settings.save_every == 0:
            self._save(log)
        if self._picture_due(len(x)):
            self._draw(log)
        return asked

    # --- one step -------------------------------------------------------------------------

    def _train_step(self, x: Tensor, labels: Tensor | None, asked: int) -> tuple[Measured, int]:
        """Gradients of one step, the same on all processes, and what all of them measured."""
        self.block = len(x)
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr
        self.optimizer.zero_grad()  # before the chain, which is where memory is short
        u = self.prior.backbone.infer(x.to(self.device, non_blocking=True), self.generator)
        supervised: dict[str, Any] = {}
        if labels is not None:
            labels = labels.to(self.device, non_blocking=True)
            supervised = {"labels": labels, "label_weight": self.settings.label_weight}
        loss, info = self.loss(
            u,
            generator=self.generator,
            squared_penalty=self.settings.squared_penalty,
            **supervised,
        )
        loss.backward()
        parameters = self.prior.learned.parameters()
        gradient = adam.gradient_norm(parameters, self.settings.grad_clip)
        worst = info.layer_loss.abs().max()
        signal = torch.tensor(float(asked), device=self.device)
        lost = ~u.isfinite().all()
        means = (loss.detach(), info.difference, info.u_std, u.std(), gradient)
        # One message carries all that the processes must agree on: divergence, and stopping.
        numbers = torch.stack(
            [value.float() for value in (*means, worst, signal, lost, *info.classified)]
        )
        every = parallel.gather(numbers).cpu()  # the step's one wait for the device
        worst_layer, asked, lost_somewhere = every[:, len(means) : -2].amax(0).tolist()
        if lost_somewhere:
            raise ValueError(
                f"step {self.step + 1}: the backbone's posterior holds NaN or infinite values;"
                " check the checkpoint with `ebm_prior doctor`, or try --bn_readjust"
            )
        correct, labelled = every[:, -2:].sum(0).tolist()
        if labelled:
            before = correct / labelled if self.accuracy is None else self.accuracy
            self.accuracy = before + (correct / labelled - before) / MEMORY
        loss_mean, difference, u_std, data_std, norm = every[:, : len(means)].mean(0).tolist()
        measured = Measured(loss_mean, difference, u_std, data_std, norm, worst_layer)
        return measured, int(asked)

    @property
    def _lr(self) -> float:
        return self.lr_factor * self.settings.lr_at(self.step, len(self.data))

    def _go_back(self, reason: str, log: RunLog) -> None:
        """Take up the last good state with half the learning rate, or give up."""
        self._set_learned(self.good)
        if self.guard.halvings >= self.settings.max_halvings:
            self._save(log)
            raise ValueError(
                f"training diverged at step {self.step} ({reason}) after the learning rate had"
                f" been halved {self.guard.halvings} times; the last good state, of step"
                f" {self.good_step}, is in {self.out / PRIOR}. Start again with a smaller --lr,"
                " --grad_clip 1, --squared_penalty 0.001 or --spectral_norm"
            )
        self.guard.went_back()
        self.lr_factor /= 2
        log.say(
            f"step {self.step}: {reason}; back to the weights of step {self.good_step}, learning"
            f" rate halved to {self._lr:.3g}"
        )

    def _learned(self) -> dict[str, Any]:
        """A copy of everything an update changes."""
        return run_state.on_cpu(
            {
                "energies": self.prior.learned.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else {},
            }
        )

    def _set_learned(self, state: Mapping[str, Any]) -> None:
        self.prior.learned.load_state_dict(state["energies"])
        # Copied: the optimiser would take the tensors themselves and update them in place.
        self.optimizer.load_state_dict(run_state.on_cpu(state["optimizer"]))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    # --- files ----------------------------------------------------------------------------

    def _save(self, log: RunLog) -> None:
        """Write `last.pt` and the prior; every process comes here, the first one writes."""
        if not parallel.alike(self.prior.learned):
            log.say("processes have drifted apart by rounding; all take the first one's weights")
            parallel.broadcast(self.prior.learned)
        rng = run_state.random_states(self.generator)
        if parallel.rank() == 0:
            run_state.write(
                self.out,
                {
                    "facts": self.facts,
                    "step": self.step,
                    "seconds": self.seconds,
                    "learned": self._learned(),
                    "good": self.good,
                    "good_step": self.good_step,
                    "guard": self.guard.state_dict(),
                    "lr_factor": self.lr_factor,
                    "rng": rng,
                    "bn_statistics": run_state.on_cpu(dict(self.bn_statistics or {})),
                },
            )
            with self._evaluated():
                checkpoint.save(
                    self.out / PRIOR,
                    self.prior,
                    fingerprint=self.fingerprint,
                    bn_statistics=self.bn_statistics,
                    step=self.step,
                )
        parallel.wait()

    def _evaluated(self) -> contextlib.AbstractContextManager[None]:
        """A context with the weights that are saved and sampled."""
        return self.ema.applied() if self.ema is not None else contextlib.nullcontext()

    def _picture_due(self, batch_size: int) -> bool:
        """Every `grid_every` steps and at the end, but not if it took longer than the training."""
        settings = self.settings
        if not settings.grid_every:
            return False
        chains = settings.grid_size * self.prior.config.max_T  # as many as a step of that batch
        worth = self.step * batch_size >= chains
        return self.step % settings.grid_every == 0 or (self.step >= settings.iterations and worth)

    @torch.no_grad()
    def _draw(self, log: RunLog) -> None:
        """Samples from the same noise each time, and once what the Gaussian prior makes of it."""
        if self.show is None or parallel.rank() != 0:
            return
        size = self.settings.grid_size
        try:
            with self._evaluated():
                blocks = [
                    self._samples(first, min(self.block, size - first))
                    for first in range(0, size, self.block)
                ]
        except ValueError as error:  # the chain diverged; the guard decides about the training
            log.say(f"step {self.step}: no picture: {error}")
            return
        gaussian, samples = (torch.cat(part).cpu() for part in zip(*blocks, strict=True))
        grids = self.out / "grids"
        if not (grids / "gaussian.png").exists():
            picture = self.show(grids / "gaussian.png", gaussian, "Gaussian prior")
            log.picture(0, "gaussian", picture)
        kind = self.prior.config.kind
        caption = f"{'EBM' if kind == 'diffusion' else kind} prior, step {self.step}"
        path = grids / f"step_{self.step:07}.png"
        log.picture(self.step, "samples", self.show(path, samples, caption))

    def _samples(self, key: int, count: int) -> tuple[Tensor, Tensor]:
        """Images from the Gaussian prior and from this one, whose chain starts at the same noise.

        A kind without states on the way gives no noise to start at: any will do.
        """
        generator = seeded(self.device, self.settings.seed, GRID_KEY, key)
        chain: list[Tensor] = []
        u = self.prior.sample_u(count, generator=generator, callback=lambda _, u: chain.append(u))
        noise = chain[0] if len(chain) > 1 else standard_normal(u, generator)
        backbone = self.prior.backbone
        return backbone.decode(noise, 1.0, generator), backbone.decode(u, 1.0, generator)

"""The training loop: steps, what is due after them, and the files it can go on from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nvae import checkpoint, distributed, losses
from nvae.likelihood import importance_weighted
from nvae.model import AutoEncoder
from nvae.runtime import Runtime
from nvae.seeds import derived
from nvae.training import monitor, state
from nvae.training.batches import Batches
from nvae.training.guard import Guard, bad_weight, first_fault
from nvae.training.interrupt import noted
from nvae.training.log import Log
from nvae.training.objective import Objective, Step
from nvae.training.settings import Settings

ADVICE = (
    "train with a larger --weight_decay_norm, with --weight_decay_norm_anneal, or with a lower"
    " --learning_rate"
)


class Trainer:
    """One run: `images` to train on, `held_out` to evaluate on (None: no evaluations)."""

    def __init__(
        self,
        settings: Settings,
        here: Runtime,
        images: Dataset[Tensor],
        held_out: Dataset[Tensor] | None,
    ) -> None:
        self.settings, self.here, self.held_out = settings, here, held_out
        self.device, self.folder = here.device, Path(settings.folder)
        self.config = settings.model_config()
        kind = settings.amp if settings.amp != "auto" else "fp16" if self._on_gpu else "off"
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind)
        self.batches = Batches(
            images,
            settings.batch_size,
            seed=settings.seed,
            micro=settings.micro,
            workers=max(settings.workers, 0),
            pin=self._on_gpu,
        )
        self.total = self.batches.iterations * settings.epochs
        # The order of these draws from PyTorch's own generator makes a seed's run what it is.
        torch.manual_seed(settings.seed)
        self.model = AutoEncoder(self.config).to(self.device)
        self.objective = Objective(
            self.model, self._averaging(), settings, self.total, self._autocast
        )
        self.optimizer = torch.optim.Adamax(
            self.model.parameters(),
            lr=settings.learning_rate,
            eps=1e-3,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = settings.learning_rate  # upstream's scheduler looks for it
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=1024.0, enabled=self.dtype == torch.float16
        )
        self.guard = Guard(settings.max_skips, settings.max_rollbacks)
        self.facts = state.facts(
            settings,
            self.config,
            len(images),  # type: ignore[arg-type]
            distributed.world_size(),
        )
        self.step, self.seconds, self.finished = 0, 0.0, False
        # Of this epoch: loss, reconstruction, KL, and the number of steps.
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        # BatchNorm's buffers and, of one kind each, copies that a lost step is undone with.
        buffers = [buffer for _, layer in self.model.batch_norms() for buffer in layer.buffers()]
        kinds = {buffer.dtype for buffer in buffers}
        parts = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self._statistics = [(part, [buffer.clone() for buffer in part]) for part in parts]

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def epoch(self) -> int:
        return self.step // self.batches.iterations

    def _averaging(self) -> nn.Module:
        """The model, within what averages gradients over the processes if there are several."""
        if not distributed.several():
            return self.model
        return nn.parallel.DistributedDataParallel(
            self.model,
            device_ids=[self.device.index] if self._on_gpu else None,
            broadcast_buffers=False,  # BatchNorm's statistics are those of all processes already
            find_unused_parameters=self.config.vanilla,  # there `prior_ftr0` is not used
        )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    # --- going on -------------------------------------------------------------------------

    def resume(self) -> str:
        """Take up `last.pt`, or without one `checkpoint.pt`; tells from where.

        Raises:
            ValueError: neither is there, or it belongs to another run.
        """
        last = state.read(self.folder)
        if last is not None:
            state.check_facts(self.folder / state.LAST, last["facts"], self.facts)
            self._set_learned(last["learned"])
            self.guard.load_state_dict(last["guard"])
            self.step, self.seconds = last["step"], last["seconds"]
            self.finished = last["finished"]
            self.sums.copy_(last["sums"])
            if last["rng"]["device"] == self.device.type:
                self._set_random_state(last["rng"]["state"])
                return f"going on after step {self.step}"
            torch.manual_seed(derived(self.settings.seed, self.step))
            return f"going on after step {self.step}, with the random numbers of another device"
        path = self.folder / state.CHECKPOINT
        self._take(path, checkpoint.read(path))
        torch.manual_seed(derived(self.settings.seed, self.step))
        return f"going on after epoch {self.epoch} of {path}, with fresh random numbers"

    def _take(self, path: Path, found: checkpoint.Checkpoint) -> None:
        """A checkpoint of upstream, or of ours whose `last.pt` is gone."""
        state.check_facts(path, vars(found.config), vars(self.config))
        self.model.load_state_dict(found.state_dict)
        if found.optimizer:
            self._load_optimizer(found.optimizer)
        if found.grad_scalar and self.scaler.is_enabled():
            self.scaler.load_state_dict(found.grad_scalar)
        self.step = found.epoch * self.batches.iterations

    def _load_optimizer(self, content: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(content)
        for group in self.optimizer.param_groups:
            group["foreach"] = True  # files of upstream's fused optimiser do not say

    def _learned(self) -> dict[str, Any]:
        """Everything an update changes."""
        spectral = self.objective.spectral
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "spectral": {} if spectral is None else spectral.state_dict(),
        }

    def _set_learned(self, learned: dict[str, Any]) -> None:
        self.model.load_state_dict(learned["model"])
        self._load_optimizer(learned["optimizer"])
        if self.scaler.is_enabled() and learned["scaler"]:
            self.scaler.load_state_dict(learned["scaler"])
        if self.objective.spectral is not None:
            self.objective.spectral.load_state_dict(learned["spectral"])

    def _random_state(self) -> Tensor:
        if self._on_gpu:
            return torch.cuda.get_rng_state(self.device)
        return torch.get_rng_state()

    def _set_random_state(self, value: Tensor) -> None:
        if self._on_gpu:
            torch.cuda.set_rng_state(value, self.device)
        else:
            torch.set_rng_state(value)

    # --- the loop -------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end, to `max_steps`, or until a signal; returns its number or 0.

        Raises:
            ValueError: training diverged again and again. The last good state is in `last.pt`.
        """
        main = self.here.is_main
        log = Log(self.folder if main else None, step=self.step, steps=self.total)
        if self._on_gpu:
            torch.backends.cudnn.benchmark = True
        try:
            with noted() as signals:
                stopped_by = self._train(log, signals)
            if self.step == self.total and not self.finished:
                self._finish(log)
            return stopped_by
        finally:
            log.close()

    def _train(self, log: Log, signals: list[int]) -> int:
        steps = min(self.total, self.settings.max_steps or self.total)
        iterations = self.batches.iterations
        self.model.train()
        while self.step < steps:
            for x in self.batches.epoch(*divmod(self.step, iterations)):
                asked = self._step(x.to(self.device, non_blocking=True), log, signals)
                if self.step % iterations == 0:
                    self._end_of_epoch(log)
                elif self.step % self.settings.save_every == 0:
                    self._save(log)
                if asked or self.step >= steps:
                    return self._stop(log, asked)
        return 0

    def _stop(self, log: Log, asked: int) -> int:
        """Leave a checkpoint of where training is, whether it is done or not."""
        if self.step % self.batches.iterations:
            self._save(log)
        if self.step < self.total:
            self._write_checkpoint()
        return asked

    def _step(self, x: Tensor, log: Log, signals: list[int]) -> int:
        """One step and what it tells; the signal that asks some process to stop, or 0."""
        started = time.perf_counter()
        random_state, spectral = self._random_state(), self.objective.spectral
        memory = None if spectral is None else spectral.state_dict()
        for buffers, copies in self._statistics:
            torch._foreach_copy_(copies, buffers)
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        done = self.objective.backward(x, self.step, self.scaler.scale)
        lost, asked = self._agreed(done, signals)
        if lost:
            fault = first_fault(self.model, lambda: self._again(x, done.beta, random_state))
            for buffers, copies in self._statistics:
                torch._foreach_copy_(buffers, copies)
            if spectral is not None and memory is not None:
                spectral.load_state_dict(memory)
            self._forgive_or_go_back(fault, log)
        else:
            self.scaler.step(self.optimizer)  # on overflow it does nothing
            self.scaler.update()
            self.sums[:3] += torch.stack([done.loss, done.reconstruction, done.kl])
            self.sums[3] += 1
        self.step += 1
        self.seconds += time.perf_counter() - started
        if not lost and self.step % self.settings.log_every == 0:
            self._tell(done, rate, log)
        log.advance(epoch=f"{self.epoch}", loss=f"{float(done.loss):.1f}")
        return asked

    def _rate(self) -> float:
        s = self.settings
        rate = losses.learning_rate(
            self.step,
            iterations_per_epoch=self.batches.iterations,
            epochs=s.epochs,
            warmup_epochs=s.warmup_epochs,
            peak=s.learning_rate,
            floor=s.learning_rate_min,
        )
        return rate * self.guard.lr_factor

    def _agreed(self, done: Step, signals: list[int]) -> tuple[bool, int]:
        """Whether the step is lost, and the signal that asks to stop, or 0.

        One message carries what all processes must agree on.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        largest = nn.utils.get_total_norm(gradients, norm_type=math.inf)
        asked = largest.new_tensor(signals[0] if signals else 0)
        bad = [~done.loss.isfinite(), ~largest.isfinite()]
        message = torch.stack([*(flag.to(asked) for flag in bad), asked])
        loss_bad, gradient_bad, signal = distributed.largest(message).tolist()
        # Loss scaling looks for the largest scale that just fits; going too far is part of it.
        overflow = bool(gradient_bad and not loss_bad and self.scaler.get_scale() > 1)
        return bool(loss_bad or gradient_bad) and not overflow, int(signal)

    def _again(self, x: Tensor, beta: float, random_state: Tensor) -> Iterator[dict[str, Tensor]]:
        """The step's forward passes once more, with the same noise."""
        self._set_random_state(random_state)
        for part in x.split(self.settings.micro):
            yield self.objective.terms(self.model, part, beta).finite()

    def _forgive_or_go_back(self, fault: str, log: Log) -> None:
        where = f"step {self.step + 1}: not finite: {fault}"
        if self.guard.forgives(self.step):
            log.say(f"{where}; skipped ({len(self.guard.skipped)} of {self.guard.max_skips})")
            return
        last = state.read(self.folder)
        may = self.guard.may_go_back()
        if last is None or not may:
            good = f"of step {last['step']}, is in {state.LAST}" if last else "does not exist"
            raise ValueError(
                f"training diverged at {where}; {self.guard.max_skips} steps were skipped,"
                f" {self.guard.rollbacks} times training went back. The last good state {good};"
                f" {ADVICE}"
            )
        self._set_learned(last["learned"])
        log.say(
            f"{where}; back to the weights of step {last['step']}, learning rate from now on times"
            f" {self.guard.lr_factor:g}"
        )

    # --- what is due ----------------------------------------------------------------------

    def _tell(self, done: Step, rate: float, log: Log) -> None:
        """Scalars and a picture of a step, the scalars averaged over the processes."""
        terms = done.last
        own = [done.loss, done.reconstruction, done.kl, *terms.kl.values]
        channels = torch.stack([kl.detach().float() for kl in terms.forward.kl_diag])
        mean = distributed.mean(torch.cat([torch.stack(own).float(), channels.flatten()]))
        loss, reconstruction, kl, *values = mean[: len(own)].tolist()
        active = (mean[len(own) :].view_as(channels) > 0.1).sum(1).tolist()
        average = float(self._means_of_epoch()[0])
        spectral, bn = (float(term) for term in done.norm)
        scalars = {
            "train/norm_loss": spectral,
            "train/bn_loss": bn,
            "train/norm_coeff": done.norm_coefficient,
            "train/nelbo_avg": average,
            "train/lr": rate,
            "train/nelbo_iter": loss,
            "train/kl_iter": kl,
            "train/recon_iter": reconstruction,
            "kl_coeff/coeff": done.beta,
            "kl/total_active": sum(active),
            "train/seconds": self.seconds,
        }
        for layer, weight in enumerate(terms.kl.weights.tolist()):
            scalars[f"kl/active_{layer}"] = active[layer]
            scalars[f"kl_coeff/layer_{layer}"] = weight
            scalars[f"kl_vals/layer_{layer}"] = values[layer]
        log.scalars(self.step, scalars)
        if self.step % (10 * self.settings.log_every) == 0 and self.here.is_main:
            pair = monitor.reconstruction(
                self.model, terms.x, terms.forward.logits, self.settings.seed, self.step
            )
            log.picture(self.step, "reconstruction", pair)

    def _means_of_epoch(self) -> Tensor:
        """Loss, reconstruction and KL of this epoch so far, without lost steps."""
        sums = distributed.mean(self.sums)
        return sums[:3] / sums[3].clamp_min(1)

    def _end_of_epoch(self, log: Log) -> None:
        epoch, epochs = self.epoch - 1, self.settings.epochs
        means = self._means_of_epoch()
        self.sums.zero_()
        log.scalars(self.step, {"train/nelbo": float(means[0])})
        told = "loss {:.2f}, reconstruction {:.2f}, KL {:.2f}".format(*means.tolist())
        if self.held_out is not None and monitor.evaluation_due(epoch, epochs):
            told += self._evaluate(log, self.settings.iw_samples, at=epoch)
            if self.here.is_main:
                for t in monitor.TEMPERATURES:
                    image = monitor.samples(self.model, t, self.settings.seed)
                    log.picture(epoch, f"generated_{t:.1f}", image)
        log.say(f"epoch {epoch + 1} of {epochs}: {told}")
        if monitor.checkpoint_due(epoch, epochs):
            self._write_checkpoint()
        self._save(log)  # at last: a state after the epoch means that all of this is done

    def _evaluate(self, log: Log, samples: int, *, at: int) -> str:
        if self.held_out is None or not samples:
            return ""
        found = importance_weighted(
            self.model,
            self.held_out,
            samples,
            batch_size=self.settings.batch_size,
            seed=derived(self.settings.seed, at),
            workers=max(self.settings.workers, 0),
            progress=self.here.is_main,
        )
        values = {
            "val/neg_log_p": found.neg_log_p,
            "val/nelbo": found.nelbo,
            "val/bpd_log_p": found.neg_log_p_bpd,
            "val/bpd_elbo": found.nelbo_bpd,
        }
        log.scalars(self.step, values, at=at)
        return (
            f"; held out, {samples} importance samples: nelbo {found.nelbo:.3f}"
            f" ({found.nelbo_bpd:.4f} bpd), -log p {found.neg_log_p:.3f}"
            f" ({found.neg_log_p_bpd:.4f} bpd)"
        )

    def _finish(self, log: Log) -> None:
        told = self._evaluate(log, self.settings.final_iw_samples, at=self.settings.epochs + 1)
        self.finished = True
        self._save(log)
        log.say(f"done{told}")

    def _save(self, log: Log) -> None:
        """Write `last.pt`, unless the weights are lost; all processes come here."""
        fault = bad_weight(self.model)
        if fault is not None:
            raise ValueError(
                f"training diverged before step {self.step + 1}: not finite: {fault}; the last"
                f" good state stays in {state.LAST}, if there is one; {ADVICE}"
            )
        if self.here.is_main:
            state.write(
                self.folder,
                {
                    "facts": self.facts,
                    "step": self.step,
                    "seconds": self.seconds,
                    "finished": self.finished,
                    "learned": self._learned(),
                    "guard": self.guard.state_dict(),
                    "sums": self.sums,
                    "rng": {"device": self.device.type, "state": self._random_state()},
                },
            )
        distributed.wait()

    def _write_checkpoint(self) -> None:
        if self.here.is_main:
            content = state.checkpoint(
                self.settings,
                self.config,
                step=self.step,
                iterations=self.batches.iterations,
                state=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=self.scaler.state_dict(),
            )
            checkpoint.write(self.folder / state.CHECKPOINT, content)

"""The training loop: steps, what is due after them, and the files it can go on from."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nvae import checkpoint, distributed, losses
from nvae.model import AutoEncoder
from nvae.runtime import Runtime
from nvae.seeds import derived
from nvae.training import monitor, state
from nvae.training.batches import Batches
from nvae.training.guard import Guard, bad_weight, first_fault
from nvae.training.interrupt import noted
from nvae.training.log import Log
from nvae.training.objective import Objective, Step
from nvae.training.report import Report
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
        self.step, self.seconds, self.finished, self.lost = 0, 0.0, False, False
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
        """The model, within what averages gradients over the processes if there are several.

        The processes' weights never part; upstream averages them every 100 steps.
        """
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
        steps = min(self.total, self.settings.max_steps or self.total)
        log = Log(self.folder if self.here.is_main else None, step=self.step, steps=steps)
        report = Report(self.settings, self.model, self.held_out, log)
        if self._on_gpu:
            torch.backends.cudnn.benchmark = True
        try:
            with noted() as signals:
                stopped_by = self._train(steps, report, signals)
            if self.step == self.total and not self.finished:
                self._finish(report)
            return stopped_by
        finally:
            log.close()

    def _train(self, steps: int, report: Report, signals: list[int]) -> int:
        iterations, epochs = self.batches.iterations, self.settings.epochs
        save = publish = False  # what is due: last.pt, checkpoint.pt
        self.model.train()
        while self.step < steps:
            for batch in self.batches.epoch(*divmod(self.step, iterations)):
                x = batch.to(self.device, non_blocking=True)
                asked = self._step(x, report, signals)
                ended, stop = self.step % iterations == 0, asked > 0 or self.step >= steps
                if ended:
                    self._end_of_epoch(report)
                save = save or ended or stop or self.step % self.settings.save_every == 0
                publish = (
                    publish or stop or (ended and monitor.checkpoint_due(self.epoch - 1, epochs))
                )
                if save and self._sound(x):
                    if publish:
                        self._write_checkpoint()
                    self._save()  # at last: a state after an epoch means that its end is done
                    save = publish = False
                if stop:
                    if save and self.step == self.total:
                        raise ValueError(
                            f"training diverged in its last steps; the last good state stays in"
                            f" {state.LAST}, if there is one; {ADVICE}"
                        )
                    return asked
        return 0

    def _step(self, x: Tensor, report: Report, signals: list[int]) -> int:
        """One step and what it tells; the signal that asks some process to stop, or 0."""
        started = time.perf_counter()
        random_state = self._random_state()
        undo = self._remembered()
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        done = self.objective.backward(x, self.step, self.scaler.scale)
        lost, asked = self._agreed(done, signals)
        if lost:
            undo()
            fault = first_fault(self.model, lambda: self._again(x, done.beta, random_state))
            undo()
            self._forgive_or_go_back(fault, report.log)
        else:
            self.scaler.step(self.optimizer)  # on overflow it does nothing
            self.scaler.update()
            self.sums[:3] += torch.stack([done.loss, done.reconstruction, done.kl])
            self.sums[3] += 1
        self.lost = lost
        self.step += 1
        self.seconds += time.perf_counter() - started
        if not lost and self.step % self.settings.log_every == 0:
            report.step(self.step, done, rate, self._means_of_epoch(), self.seconds)
        report.log.advance(epoch=f"{self.epoch}", loss=f"{float(done.loss):.1f}")
        return asked

    def _remembered(self) -> Callable[[], None]:
        """Keep what forward passes change, the weights apart; the result puts it back."""
        spectral = self.objective.spectral
        vectors = None if spectral is None else spectral.state_dict()
        for buffers, copies in self._statistics:
            torch._foreach_copy_(copies, buffers)

        def undo() -> None:
            for buffers, copies in self._statistics:
                torch._foreach_copy_(buffers, copies)
            if spectral is not None and vectors is not None:
                spectral.load_state_dict(vectors)

        return undo

    def _sound(self, x: Tensor) -> bool:
        """Whether weights and loss are finite, so that this is a state to go back to."""
        if self.lost or bad_weight(self.model) is not None:
            return False
        random_state, undo = self._random_state(), self._remembered()
        with torch.no_grad():
            part = x[: self.settings.micro]
            loss = self.objective.terms(self.model, part, self.objective.beta(self.step)).loss
        undo()
        self._set_random_state(random_state)
        return not float(distributed.largest((~loss.isfinite()).float()))

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
        seen = distributed.collect(last["step"] if last else None)
        if any(step != seen[0] for step in seen):
            raise ValueError(
                f"training diverged at {where}, and the processes do not see the same"
                f" {state.LAST} in {self.folder} to go back to; give all machines one --root that"
                " they share"
            )
        if last is None or not self.guard.may_go_back():
            good = f", of step {last['step']}, is in {state.LAST}" if last else " was not saved"
            raise ValueError(
                f"training diverged at {where}; {self.guard.max_skips} steps were skipped after"
                f" {self.guard.rollbacks} returns to an earlier state. The last good"
                f" state{good}; {ADVICE}"
            )
        self._set_learned(last["learned"])
        log.say(
            f"{where}; back to the weights of step {last['step']}, learning rate from now on times"
            f" {self.guard.lr_factor:g}"
        )

    # --- what is due ----------------------------------------------------------------------

    def _means_of_epoch(self) -> Tensor:
        """Loss, reconstruction and KL of this epoch so far, without lost steps."""
        sums = distributed.mean(self.sums)
        return sums[:3] / sums[3].clamp_min(1)

    def _end_of_epoch(self, report: Report) -> None:
        epoch = self.epoch - 1
        evaluate = monitor.evaluation_due(epoch, self.settings.epochs)
        report.epoch(self.step, epoch, self._means_of_epoch(), evaluate)
        self.sums.zero_()

    def _finish(self, report: Report) -> None:
        report.end(self.step)
        self.finished = True
        self._save()

    def _save(self) -> None:
        """Write `last.pt`; all processes come here."""
        sums = distributed.mean(self.sums)
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
                    "sums": sums,
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

"""Train a small hierarchical VAE on images (contract, settings.md, "HVAE backbone")."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ebm_prior import parallel
from ebm_prior.backbones.hvae import file as hvae_file
from ebm_prior.backbones.hvae.backbone import HVAEBackbone
from ebm_prior.backbones.hvae.model import HVAE
from ebm_prior.backbones.hvae.objective import terms
from ebm_prior.backbones.hvae.settings import HVAESettings
from ebm_prior.files import written_whole
from ebm_prior.seeds import seeded
from ebm_prior.training import run_state
from ebm_prior.training.ema import Average
from ebm_prior.training.interrupt import Interrupt
from ebm_prior.training.run_log import RunLog

MODEL = "hvae.safetensors"
GRID_KEY = 2**31  # the pictures' noise: a process's own noise has its rank in this place
LOST = 50  # skipped steps in a row after which training goes back
MAX_HALVINGS = 5
TIME_IS_UP = 1000  # in the place of a signal's number

#: (path, images (N, C, H, W), caption, images in a row (None: square)) -> pixels
Show = Callable[[Path, Tensor, str, "int | None"], "np.ndarray | None"]


class Source(Protocol):
    """Where images come from; `ebm_prior.training.batches.Batches` is one."""

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def epoch(self, number: int, start: int = 0) -> Iterator[Tensor]:
        """The batches (B, C, H, W) of an epoch from batch `start` on."""
        ...


@dataclass(frozen=True)
class Summary:
    """How a call of `HVAETrainer.run` ended."""

    step: int
    steps: int
    seconds: float  # of all calls together
    skipped: int
    halvings: int
    signal: int  # number of the signal that stopped it, 0 if none did

    @property
    def done(self) -> bool:
        return self.step >= self.steps


class HVAETrainer:
    """Trains a network; writes `last.pt`, `hvae.safetensors`, logs and pictures to `out`.

    Args:
        model: on the device to train on.
        data: images in [0, 1], `len(data)` batches per epoch of this process.
        shown: a few images to reconstruct in pictures; None: no pictures.
        facts: what else must not change when a run goes on, for example the data set.
        show: writes a grid; see `Show`.
        bar: show a progress bar.
    """

    def __init__(
        self,
        model: HVAE,
        data: Source,
        settings: HVAESettings,
        out: Path | str,
        *,
        shown: Tensor | None = None,
        facts: Mapping[str, Any] | None = None,
        show: Show | None = None,
        bar: bool = True,
    ) -> None:
        self.model, self.data, self.settings, self.out = model, data, settings, Path(out)
        self.shown, self.show, self.bar = shown, show, bar
        self.device = model.start.device
        self.facts = {
            **json.loads(json.dumps(model.config.to_dict())),
            **settings.facts(),
            "processes": parallel.world_size(),
            "batches per epoch": len(data),
            **(facts or {}),
        }
        self.generator = seeded(self.device, settings.seed, parallel.rank())
        parallel.broadcast(model)
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.ema = Average(model, settings.ema) if settings.ema else None
        self.step, self.seconds, self.lr_factor = 0, 0.0, 1.0
        self.skipped = self.in_a_row = self.halvings = 0
        self.good, self.good_step = self._learned(), 0

    # --- going on -------------------------------------------------------------------------

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up the state of `run_state.read`.

        Raises:
            ValueError: it is the state of a run with other settings.
        """
        run_state.check_facts(self.out / run_state.NAME, state["facts"], self.facts)
        self._set_learned(state["learned"])
        self.good, self.good_step = state["good"], state["good_step"]
        self.skipped, self.in_a_row, self.halvings = state["guard"]
        self.step, self.seconds = state["step"], state["seconds"]
        self.lr_factor = state["lr_factor"]
        if not run_state.set_random_state(self.generator, state["rng"]):
            # Another kind of device has other random numbers: go on with fresh ones.
            self.generator = seeded(self.device, self.settings.seed, parallel.rank(), self.step)

    def run(self) -> Summary:
        """Train until `iterations`, a SIGINT, a SIGTERM or `max_minutes`; save in any case.

        Raises:
            ValueError: training diverged again and again. The last good state has been saved.
        """
        main, steps = parallel.rank() == 0, self.settings.iterations
        self.out.mkdir(parents=True, exist_ok=True)
        if main:
            config = {"network": self.model.config.to_dict(), "training": asdict(self.settings)}
            with written_whole(self.out / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        log = RunLog(self.out if main else None, step=self.step, steps=steps, bar=self.bar)
        until = time.monotonic() + 60 * (self.settings.max_minutes or math.inf)
        asked = 0
        try:
            with Interrupt() as interrupt:
                while self.step < steps and not asked:
                    for x in self.data.epoch(*divmod(self.step, len(self.data))):
                        up = TIME_IS_UP if time.monotonic() > until else 0
                        asked = self._iterate(x, log, interrupt.number or up)
                        if asked or self.step >= steps:
                            break
        finally:
            log.close()
        signal = 0 if asked == TIME_IS_UP else asked
        return Summary(self.step, steps, self.seconds, self.skipped, self.halvings, signal)

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[HVAE]:
        """The network with the weights that are saved and shown, the last good ones at need."""
        if not self._well():
            model = copy.deepcopy(self.model)
            model.load_state_dict({**self.good["model"], **self.good["ema"]})
            yield model
            return
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            yield self.model

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The context of the network's computations."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"
        )

    # --- one step -------------------------------------------------------------------------

    def _iterate(self, x: Tensor, log: RunLog, asked: int) -> int:
        """One step and what is due after it; returns the signal that asks to stop, or 0."""
        started, settings = time.perf_counter(), self.settings
        measured, asked = self._train_step(x, asked)
        reason = self._wrong(measured)
        if reason is None:
            self.optimizer.step()
            self.in_a_row = 0
            if self.ema is not None:
                # Rising, or the initial weights would stay in the average of a short run.
                self.ema.decay = min(settings.ema, (1 + self.step) / (10 + self.step))
                self.ema.update()
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            log.say(f"step {self.step + 1}: {reason}; no update")
        self.step += 1
        self.seconds += time.perf_counter() - started
        last = self.step >= settings.iterations
        due = self.step % settings.log_every == 0 or self.step == 1 or last
        if due and reason is None:
            log.scalars(self.step, {**measured, "seconds": self.seconds})
        log.advance({"bpd": f"{measured['bits_per_dim']:.3f}", "kl": f"{measured['kl']:.0f}"})
        if self.in_a_row >= LOST:
            self._go_back(log)
        if last or asked or self.step % settings.save_every == 0:
            self._save(log)
        if settings.grid_every and (last or self.step % settings.grid_every == 0):
            self._draw(log)
        return asked

    def _train_step(self, x: Tensor, asked: int) -> tuple[dict[str, float], int]:
        """Gradients of one step, the same on all processes, and what all of them measured."""
        settings, model = self.settings, self.model
        lr, weight = self.lr_factor * settings.lr_at(self.step), settings.kl_weight_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        x = x.to(self.device, non_blocking=True)
        if settings.flips:
            turned = torch.rand(len(x), 1, 1, 1, generator=self.generator, device=self.device)
            x = torch.where(turned < 0.5, x.flip(-1), x)
        with self.precision():
            found = terms(model, x, self.generator, weight, settings.free_bits)
        self.optimizer.zero_grad()
        found.loss.backward()
        parallel.average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        # One message carries all that the processes must agree on, stopping included.
        signal = torch.tensor(float(asked), device=self.device)
        numbers = torch.stack([found.loss, found.nll, norm, *found.kl, signal]).detach().float()
        every = parallel.gather(numbers)
        loss, nll, gradient, *kl = every[:, :-1].mean(0).tolist()
        bits = (nll + sum(kl)) / (model.config.image_dims * math.log(2))
        measured = {"loss": loss, "bits_per_dim": bits, "nll": nll, "kl": sum(kl)}
        measured |= {f"kl_{i}": value for i, value in enumerate(kl)}
        measured |= {"gradient": gradient, "lr": lr, "kl_weight": weight}
        return measured, int(every[:, -1].max())

    def _wrong(self, measured: Mapping[str, float]) -> str | None:
        """Why a step must not be applied, or None."""
        if not all(map(math.isfinite, measured.values())):
            return "loss or gradient is not finite"
        if measured["gradient"] > self.settings.grad_skip:
            return f"the gradient's norm is {measured['gradient']:.3g}, above grad_skip"
        return None

    def _well(self) -> bool:
        """Whether the last update was applied, and left every weight and average finite."""
        averages = self.ema.shadow if self.ema is not None else {}
        values = (*self.model.state_dict().values(), *averages.values())
        return not self.in_a_row and all(bool(value.isfinite().all()) for value in values)

    def _go_back(self, log: RunLog) -> None:
        """Take up the last saved state with half the learning rate, or give up."""
        self._set_learned(self.good)
        if self.halvings >= MAX_HALVINGS:
            self._save(log)
            raise ValueError(
                f"training diverged at step {self.step}, after the learning rate had been halved"
                f" {self.halvings} times; the state of step {self.good_step} is in"
                f" {self.out / MODEL}. Start again with a smaller --lr, or --amp off"
            )
        self.halvings, self.in_a_row, self.lr_factor = self.halvings + 1, 0, self.lr_factor / 2
        log.say(f"back to step {self.good_step} with learning rate factor {self.lr_factor:g}")

    def _learned(self) -> dict[str, Any]:
        """A copy of everything an update changes."""
        return run_state.on_cpu(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else {},
            }
        )

    def _set_learned(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        # Copied: the optimiser would take the tensors themselves and update them in place.
        self.optimizer.load_state_dict(run_state.on_cpu(state["optimizer"]))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    # --- files ----------------------------------------------------------------------------

    def _save(self, log: RunLog) -> None:
        """Write `last.pt` and the network; every process comes here, the first one writes.

        Among skipped steps the weights may be what is wrong: then the network's file has the last
        good ones. `last.pt` has both, to go on as if nothing had happened.
        """
        if not parallel.alike(self.model):
            log.say("processes have drifted apart by rounding; all take the first one's weights")
            parallel.broadcast(self.model)
        rng = run_state.random_states(self.generator)
        if self._well():
            self.good, self.good_step = self._learned(), self.step
        else:
            log.say(f"step {self.step}: {MODEL} gets the weights of step {self.good_step}")
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
                    "guard": [self.skipped, self.in_a_row, self.halvings],
                    "lr_factor": self.lr_factor,
                    "rng": rng,
                    "bn_statistics": {},  # of the format; this network has none
                },
            )
            with self.evaluated() as model:
                training = {**asdict(self.settings), "seconds": round(self.seconds, 1)}
                hvae_file.save(self.out / MODEL, model, step=self.good_step, training=training)
        parallel.wait()

    @torch.no_grad()
    def _draw(self, log: RunLog) -> None:
        """Images beside their reconstructions, and samples from the same noise each time."""
        if self.show is None or self.shown is None or parallel.rank() != 0:
            return
        generator = seeded(self.device, self.settings.seed, GRID_KEY)
        x = self.shown[: self.settings.grid_size].to(self.device)
        with self.evaluated() as model:
            backbone = HVAEBackbone(model)
            again = backbone.decode(backbone.infer(x, generator))
            u = torch.randn(len(x), backbone.layout.dim, generator=generator, device=self.device)
            samples = backbone.decode(u)
        pairs = torch.stack([x, again], dim=1).flatten(0, 1).cpu()
        for name, pictures, about, columns in (
            ("reconstructions", pairs, "held-out images, each left of its reconstruction", 8),
            (
                "samples",
                samples.cpu(),
                "the VAE's own samples (Gaussian prior, mean images)",
                None,
            ),
        ):
            path = self.out / "grids" / f"{name}_{self.step:07}.png"
            caption = f"step {self.step}: {about}"
            log.picture(self.step, name, self.show(path, pictures, caption, columns))

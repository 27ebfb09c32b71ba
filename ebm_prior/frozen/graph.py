"""Langevin steps on CUDA as one captured graph, replayed.

A step launches thousands of small kernels, which a CPU hands out more slowly than a GPU runs them.
Captured, they are handed out as one. One graph serves every chain of its shapes: u_{t+1}, the
step size and whatever else depends on t lie in tensors of the graph's own, into which each chain's
are copied. The noise is drawn inside, by a generator that the graph knows and that takes up the
caller's state before a chain and gives it back after, so that the draws are those of
`langevin.run`. Nothing waits for the device in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.prior import Conditional

DEVICES = ("cuda",)  # that have graphs
MOST = 4  # graphs kept: each holds the memory of a step
WARM_UP = 3  # steps before a capture, which libraries use to choose their kernels


class Replayed:
    """`langevin.run` with captured steps where that is possible, else step by step.

    Possible are chains on a `Conditional` on CUDA whose noise comes from a generator there and
    whose steps nobody watches.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured] = {}
        self._refused = False

    def __call__(
        self,
        u: Tensor,
        log_density: langevin.LogDensity,
        *,
        step_size: float | Tensor,
        num_steps: int,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        **watched: Any,
    ) -> Tensor:
        """The last state; `watched` are the `noise` and `callback` of `langevin.run`."""
        captured = None
        alone = all(each is None for each in watched.values())
        if alone and not self._refused and _suits(u, log_density, generator):
            assert isinstance(log_density, Conditional)
            chain = _Chain(langevin.init(u).u, log_density, _per_sample(step_size, u), mask)
            captured = self._found(chain)
        if captured is not None:
            return captured.run(chain, num_steps, generator)
        return langevin.run(
            u,
            log_density,
            step_size=step_size,
            num_steps=num_steps,
            generator=generator,
            mask=mask,
            **watched,
        )

    def _found(self, chain: _Chain) -> _Captured | None:
        """The graph for a chain, captured now if there is none; None if that fails."""
        key = chain.key
        if key not in self._captured:
            try:
                captured = _Captured(chain)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._refused = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(
                    f"Langevin steps could not be captured ({reason}); they run one by one, which"
                    " is slower and otherwise the same",
                    stacklevel=2,
                )
                return None
            while len(self._captured) >= MOST:
                del self._captured[next(iter(self._captured))]
            self._captured[key] = captured
        return self._captured[key]


class _Chain:
    """What a step of a chain reads: the state and the tensors of its target."""

    def __init__(
        self, u: Tensor, target: Conditional, step_size: Tensor, mask: Tensor | None
    ) -> None:
        self.u, self.target, self.step_size, self.mask = u, target, step_size, mask

    @property
    def tensors(self) -> list[Tensor]:
        given = [self.u, self.step_size, *self.target.tensors()]
        return given if self.mask is None else [*given, self.mask]

    @property
    def key(self) -> Any:
        """Equal for chains that one graph serves."""
        shapes = tuple((tuple(x.shape), x.dtype, x.device) for x in self.tensors)
        return shapes, self.mask is None, self.target.key

    def own(self) -> _Chain:
        """The same on tensors that nobody else has."""
        target = self.target
        copies = {name: getattr(target, name).clone() for name in ("u_next", "alpha", "weight")}
        f = target.f
        if f is not None:
            scale = f.scale.clone() if isinstance(f.scale, Tensor) else f.scale
            f = replace(f, scale=scale, labels=None if f.labels is None else f.labels.clone())
        mask = None if self.mask is None else self.mask.clone()
        target = replace(target, f=f, **copies)
        return _Chain(self.u.clone(), target, self.step_size.clone(), mask)


class _Captured:
    """A captured step with its tensors."""

    def __init__(self, chain: _Chain) -> None:
        self.chain = chain.own()
        device = chain.u.device
        self.generator = torch.Generator(device)
        target = chain.target
        advancing = target.f.columns.advancing() if target.f is not None else []
        before = [x.clone() for x in advancing]
        try:
            self.replay = capture(self._step, self.generator)
        finally:
            for tensor, value in zip(advancing, before, strict=True):
                tensor.copy_(value)  # the steps before the capture are no part of any chain

    def _step(self) -> None:
        chain = self.chain
        noise = langevin.standard_normal(chain.u, self.generator)
        state = langevin.State(chain.u)
        state, _ = langevin.step(state, chain.target, chain.step_size, noise, chain.mask)
        chain.u.copy_(state.u)

    def run(self, chain: _Chain, num_steps: int, generator: torch.Generator | None) -> Tensor:
        """The last state of a chain, which is to have the key of the captured one."""
        torch._foreach_copy_(self.chain.tensors, chain.tensors)
        drawing = generator or _default_generator(chain.u.device)
        self.generator.set_state(drawing.get_state())
        for _ in range(num_steps):
            self.replay()
        drawing.set_state(self.generator.get_state())
        return self.chain.u.clone()


def capture(step: Callable[[], None], generator: torch.Generator) -> Callable[[], None]:
    """A function that does what `step` does, by one launch; CUDA only.

    Args:
        step: reads and writes tensors in place, always the same ones; run a few times first.
        generator: what it draws with.
    """
    side = torch.cuda.Stream(generator.device)
    side.wait_stream(torch.cuda.current_stream(generator.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(generator.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _suits(u: Tensor, log_density: langevin.LogDensity, generator: torch.Generator | None) -> bool:
    on_device = generator is None or generator.device.type == u.device.type
    return on_device and isinstance(log_density, Conditional) and u.device.type in DEVICES


def _per_sample(step_size: float | Tensor, u: Tensor) -> Tensor:
    """(B,), like u."""
    if isinstance(step_size, Tensor):
        return step_size.to(u).expand(len(u))
    return u.new_full((len(u),), step_size)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]

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
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.prior import Conditional

DEVICES = ("cuda",)  # that have graphs
MOST = 4  # graphs kept
WARM_UP = 3  # steps before a capture, which libraries use to choose their kernels


class Replayed:
    """`langevin.run` with captured steps where that is possible, else step by step.

    Possible are chains on a `Conditional` on CUDA whose noise comes from a generator there and
    whose steps nobody watches. The graphs share one pool of memory: no two of them run at once,
    and what they leave to each other lies outside it.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, _Captured] = {}  # the least recently used first
        self._pool: Any = None
        self._refused = False

    def __deepcopy__(self, memo: Any) -> Replayed:
        return Replayed()  # a graph has no copy

    def __reduce__(self) -> tuple[Any, ...]:
        return Replayed, ()

    def __call__(
        self,
        u: Tensor,
        log_density: langevin.LogDensity,
        *,
        step_size: float | Tensor,
        num_steps: int,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
        mask: Tensor | None = None,
        callback: Callable[[int, langevin.State, langevin.Info], None] | None = None,
    ) -> Tensor:
        """The last state, see `langevin.run`."""
        captured = None
        alone = noise is None and callback is None
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
            noise=noise,
            mask=mask,
            callback=callback,
        )

    def _found(self, chain: _Chain) -> _Captured | None:
        """The graph for a chain, captured now if there is none; None if that fails."""
        key = chain.key
        captured = self._captured.pop(key, None)
        if captured is None:
            while len(self._captured) >= MOST:
                del self._captured[next(iter(self._captured))]
            try:
                captured = _Captured(chain, self._pool)
            except RuntimeError as error:  # out of memory, too: single steps may need less
                self._captured.clear()
                self._refused = True
                reason = " ".join(str(error).split())[:200]
                warnings.warn(
                    f"Langevin steps could not be captured ({reason}); they run one by one, which"
                    " is slower and otherwise the same",
                    stacklevel=2,
                )
                return None
            self._pool = captured.pool
        self._captured[key] = captured
        return captured


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
            labels = None if f.labels is None else f.labels.clone()
            f = replace(f, columns=f.columns.own(), scale=scale, labels=labels)
        mask = None if self.mask is None else self.mask.clone()
        target = replace(target, f=f, **copies)
        return _Chain(self.u.clone(), target, self.step_size.clone(), mask)


class _Captured:
    """A captured step with its tensors.

    Args:
        pool: the memory of an earlier graph, to share.
    """

    def __init__(self, chain: _Chain, pool: Any) -> None:
        self.chain = chain.own()
        device = chain.u.device
        self.generator = torch.Generator(device)
        target = chain.target
        advancing = target.f.columns.advancing() if target.f is not None else []
        before = [x.clone() for x in advancing]
        try:
            self.replay, self.pool = capture(self._step, self.generator, pool)
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


def capture(
    step: Callable[[], None], generator: torch.Generator, pool: Any
) -> tuple[Callable[[], None], Any]:
    """A function that does what `step` does, by one launch, and its pool of memory; CUDA only.

    Args:
        step: reads and writes tensors in place, always the same ones; run a few times first.
        generator: what it draws with.
        pool: of an earlier graph, to share, or None.

    Raises:
        RuntimeError: the step cannot be captured; the caller's stream is the current one again.
    """
    device = generator.device
    caller = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            side.wait_stream(caller)
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    step()
            caller.wait_stream(side)
            graph.register_generator_state(generator)
            # Other threads, those that read images, go on as they like meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=side, capture_error_mode="thread_local"
            ):
                step()
    except BaseException:
        torch.cuda.set_stream(caller)
        raise
    return graph.replay, graph.pool()


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

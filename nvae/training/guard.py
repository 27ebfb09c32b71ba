"""What happens when numbers stop being finite: where it began, and how often it is forgiven."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nvae import distributed

IMAGES = "the images"
MEMORY = 1000  # steps within which skipped ones are counted


class Guard:
    """Counts skipped steps and returns to the last good state.

    Args:
        max_skips: of the last `MEMORY` steps that may be skipped.
        max_rollbacks: returns with half the learning rate before training gives up.
    """

    def __init__(self, max_skips: int, max_rollbacks: int) -> None:
        self.max_skips, self.max_rollbacks = max_skips, max_rollbacks
        self.skipped: list[int] = []
        self.rollbacks = 0

    def forgives(self, step: int) -> bool:
        """Note that a step was lost; False if there were too many."""
        self.skipped = [s for s in self.skipped if s > step - MEMORY] + [step]
        return len(self.skipped) <= self.max_skips

    def may_go_back(self) -> bool:
        """Take one return from the budget; False if there is none left."""
        if self.rollbacks >= self.max_rollbacks:
            return False
        self.rollbacks += 1
        self.skipped = []
        return True

    @property
    def lr_factor(self) -> float:
        return 0.5**self.rollbacks

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped), "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.rollbacks = list(state["skipped"]), state["rollbacks"]


def bad_weight(model: nn.Module) -> str | None:
    """The first parameter or buffer that is not finite, None if all are."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            return f"the weights {name}"
    return None


def first_fault(model: nn.Module, again: Callable[[], Iterator[dict[str, Tensor]]]) -> str:
    """Where the numbers of a lost step first were not finite, on any process.

    Looked for in the weights, then along the forward pass (run again), then in the gradients,
    which arise from the end of the model to its beginning.

    Args:
        again: repeats the step's forward passes; gives by name what came out of each.
    """
    found = [(3, 0, "the gradients, while all of the forward pass is finite")]
    weight = bad_weight(model)
    if weight:
        found.append((0, 0, weight))
    lost = [n for n, p in model.named_parameters() if p.grad is not None and _lost(p.grad)]
    if lost:
        found.append((2, 0, f"the gradient of {lost[-1]}"))
    with _watched(model) as outputs, torch.no_grad():
        for results in again():
            named = [name for name, value in results.items() if _lost(value)]
            if named:
                place = 0 if named[0] == IMAGES else len(outputs.seen)
                found.append((1, place, named[0]))
    if outputs.first:
        found.append((1, *outputs.first))
    # All processes run the same modules; a NaN of one reaches the others with its statistics.
    every = distributed.collect(min(found))
    rank = min(range(len(every)), key=lambda r: every[r][:2])
    where = f" on process {rank}" if len(every) > 1 else ""
    return every[rank][2] + where


def _lost(value: Tensor) -> bool:
    return not bool(value.isfinite().all())


class _Outputs:
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.first: tuple[int, str] | None = None


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Outputs]:
    """Note the first module whose output is not finite, by its place in the forward pass."""
    outputs = _Outputs()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.seen.append(name)
            if outputs.first is None and isinstance(output, Tensor) and _lost(output):
                outputs.first = (len(outputs.seen), f"the output of {name}")

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()

"""`last.pt`: everything a training run needs to go on as if it had never stopped.

Plain dicts, numbers and tensors, so that it is read with `weights_only=True`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_prior import parallel
from ebm_prior.files import written_whole

FORMAT = 1
NAME = "last.pt"
KEYS = (
    *("facts", "step", "seconds", "learned", "good", "good_step", "guard", "lr_factor", "rng"),
    "bn_statistics",
)


def on_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with every tensor copied to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(entry) for entry in value)
    return value


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `last.pt`; a crash leaves the previous one."""
    with written_whole(folder / NAME) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read `last.pt` of a run; None if the folder holds none.

    Raises:
        ValueError: a file that is not whole, or none of ours.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    advice = "take the folder away to start again"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{path}: not a whole run state ({reason}); {advice}") from None
    number = state.get("format") if isinstance(state, dict) else None
    if number != FORMAT:
        raise ValueError(f"{path}: format {number!r:.40}, expected {FORMAT}; {advice}")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"{path}: lacks {', '.join(missing)}; {advice}")
    return state


def check_facts(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a run began with.

    Raises:
        ValueError: each changed setting with both values.
    """
    names = sorted(before.keys() | now.keys())
    changed = [
        f"{name} {before.get(name)!r:.80} (now {now.get(name)!r:.80})"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with {', '.join(changed)}; go on with the old settings, or start"
            " a run of its own with another --out"
        )


# --- random numbers


def random_states(generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Per process its generator's state and PyTorch's own on the CPU, where data sets may draw."""
    own = [generator.get_state(), torch.get_rng_state()]
    flat = torch.cat(own).to(generator.device)
    return [
        dict(zip(("generator", "torch"), row.split([len(s) for s in own]), strict=True))
        for row in parallel.gather(flat).cpu()
    ]


def set_random_state(generator: torch.Generator, states: list[dict[str, Tensor]]) -> bool:
    """Continue this process's random numbers; False if another kind of device drew them."""
    mine = states[parallel.rank()]
    torch.set_rng_state(mine["torch"].clone())
    if len(mine["generator"]) != len(generator.get_state()):
        return False
    generator.set_state(mine["generator"].clone())
    return True

"""`last.pt`: all that a run needs to go on as if it had never stopped; and `checkpoint.pt`.

`last.pt` is ours: weights, optimiser, random numbers, spectral vectors, the place in the epoch;
plain dicts and tensors, read with `weights_only=True`. `checkpoint.pt` is upstream's format.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae.arch import ModelConfig
from nvae.checkpoint import Checkpoint
from nvae.runtime import written_whole
from nvae.training.settings import Settings

FORMAT = 1
LAST, CHECKPOINT = "last.pt", "checkpoint.pt"
KEYS = ("facts", "step", "seconds", "finished", "learned", "guard", "sums", "rng")


def write(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `last.pt`; a crash leaves the previous one."""
    with written_whole(folder / LAST) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def read(folder: Path) -> dict[str, Any] | None:
    """Read `last.pt` to the CPU; None if there is none.

    Raises:
        ValueError: a file that is not whole, or none of ours.
    """
    path = folder / LAST
    if not path.is_file():
        return None
    advice = f"take it away to go on from {CHECKPOINT}, or the folder to start again"
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


def clear_litter(folder: Path) -> None:
    """Remove the half-written files that killed processes left."""
    for name in (LAST, CHECKPOINT):
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def facts(settings: Settings, config: ModelConfig, images: int, processes: int) -> dict[str, Any]:
    """The settings that make another run of it when they change.

    The number of processes may change as long as all together see the same batches.
    """
    names = (
        *("learning_rate", "learning_rate_min", "weight_decay", "epochs", "warmup_epochs"),
        *("weight_decay_norm", "weight_decay_norm_init", "weight_decay_norm_anneal"),
        *("kl_anneal_portion", "kl_const_portion", "kl_const_coeff", "kl_weight", "kl_balance"),
        *("seed", "amp"),
    )
    result = {name: getattr(settings, name) for name in names}
    result["images"] = images
    result["batch_size of all processes"] = settings.batch_size * processes
    result["micro_batch of all processes"] = settings.micro * processes
    if settings.kl_balance == "local":
        result["processes"] = processes
    return {**asdict(config), **result}


def check_facts(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than a run began with.

    Raises:
        ValueError: each changed setting with both values.
    """
    changed = [
        f"{name} {before.get(name)!r:.80} (now {now.get(name)!r:.80})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} was trained with {', '.join(changed)}; go on with the old settings, or start"
            f" a run of its own with another --save. Without {LAST}, --cont_training goes on from"
            f" {CHECKPOINT} with other settings of the training, not of the model"
        )


def checkpoint(
    settings: Settings,
    config: ModelConfig,
    *,
    step: int,
    iterations: int,
    state: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any],
) -> Checkpoint:
    """Upstream's file of a run: `epoch` counts finished epochs. All tensors are on the CPU."""
    epoch = step // iterations
    # What upstream's scheduler would hold: it steps at the start of the epochs after the warm-up.
    k = max(0, epoch - 1 - settings.warmup_epochs)
    scheduler = {
        "T_max": float(settings.epochs - settings.warmup_epochs - 1),
        "eta_min": settings.learning_rate_min,
        "base_lrs": [settings.learning_rate],
        "last_epoch": k,
        "_step_count": k + 1,
        "_last_lr": [group["lr"] for group in optimizer["param_groups"]],
    }
    moved: dict[int, Tensor] = {}
    return Checkpoint(
        state_dict=OrderedDict(_on_cpu(state, moved)),
        config=config,
        args={**settings.recorded(), "num_total_iter": iterations * settings.epochs},
        epoch=epoch,
        global_step=step,
        optimizer=_on_cpu(optimizer, moved),
        scheduler=scheduler,
        grad_scalar=dict(scaler),
    )


def _on_cpu(value: Any, moved: dict[int, Tensor]) -> Any:
    """Nested dicts and lists with each tensor on the CPU; two names of one tensor stay so."""
    if isinstance(value, Tensor):
        return moved.setdefault(value.data_ptr(), value.detach().cpu())
    if isinstance(value, Mapping):
        return {key: _on_cpu(entry, moved) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry, moved) for entry in value)
    return value

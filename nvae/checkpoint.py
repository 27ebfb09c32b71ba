"""Reading and writing upstream NVAE checkpoints, safely (contract chapter 4)."""

from __future__ import annotations

import argparse
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae.arch import ModelConfig
from nvae.model import AutoEncoder
from nvae.runtime import written_whole

BOMB = 100  # times its size that a file may unpack to; one of weights is stored as it is


@dataclass
class Checkpoint:
    """A checkpoint in memory. `state_dict` has upstream's names, order and alias keys."""

    state_dict: OrderedDict[str, Tensor]
    config: ModelConfig
    args: dict[str, Any]
    epoch: int = 0
    global_step: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    grad_scalar: dict[str, Any] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint to the CPU: zip container or the older stream, from upstream or from us.

    No code in the file is run: of classes only `argparse.Namespace` is let through. Names, shapes
    and values of all tensors are checked against the configuration; tensors are copies, as files
    of the fused optimiser hold views of larger storages.

    Raises:
        ValueError: the file is missing, damaged, of another kind, or does not fit itself.
    """
    return _read(path)[0]


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> AutoEncoder:
    """The model of a checkpoint, in eval mode, on `device`."""
    checkpoint, skeleton = _read(path)
    return _filled(skeleton, checkpoint).to(device)


def build(checkpoint: Checkpoint) -> AutoEncoder:
    """A model in eval mode around the checkpoint's own tensors (not copies), on their device."""
    return _filled(_skeleton(checkpoint.config), checkpoint)


def write(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a file that upstream reads too; a crash leaves the old file as it was."""
    state = OrderedDict((k, v.detach()) for k, v in checkpoint.state_dict.items())
    if hasattr(checkpoint.state_dict, "_metadata"):
        state._metadata = checkpoint.state_dict._metadata  # type: ignore[attr-defined]
    content = {
        "epoch": checkpoint.epoch,
        "state_dict": state,
        "optimizer": checkpoint.optimizer,
        "global_step": checkpoint.global_step,
        "args": argparse.Namespace(**{**asdict(checkpoint.config), **checkpoint.args}),
        "arch_instance": checkpoint.config.cells,
        "scheduler": checkpoint.scheduler,
        "grad_scalar": checkpoint.grad_scalar,
    }
    with written_whole(path) as temporary:
        torch.save(content, temporary)


def _skeleton(config: ModelConfig) -> AutoEncoder:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return AutoEncoder(config)


def _filled(skeleton: AutoEncoder, checkpoint: Checkpoint) -> AutoEncoder:
    skeleton.load_state_dict(checkpoint.state_dict, assign=True)
    return skeleton.eval()


def _read(path: str | os.PathLike[str]) -> tuple[Checkpoint, AutoEncoder]:
    """The checkpoint, and the empty model it was checked against."""
    content = _unpickle(Path(path))
    try:
        return _parsed(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of that format: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _unpickle(path: Path) -> object:
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(f"{path}: {what}; give the path of a checkpoint.pt")
    if is_safetensors(path):
        raise ValueError(
            f"{path}: a .safetensors file, expected NVAE's checkpoint.pt; VAEs and priors in"
            " that format are for `python -m ebm_prior`"
        )
    try:
        _refuse_bomb(path)
        # torch.load reads past a flipped bit; the container has a checksum for each tensor.
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        if damaged:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),  # about the pickle protocols of other kinds of file
        ):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged file can fail anywhere inside; all of it means the same to the user.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise ValueError(
                f"{path}: the file refers to {refused[1]}, which no checkpoint needs; it was not"
                " run. Get the file from its source again"
            ) from None
        reason = str(error).partition(". ")[0].partition("\n")[0][:200]
        raise ValueError(
            f"{path}: not a readable checkpoint (truncated, or another kind of file?), nothing in"
            f" it was run: {type(error).__name__}: {reason}"
        ) from None


def _refuse_bomb(path: Path) -> None:
    """PyTorch unpacks compressed entries, of which a few kB may hold gigabytes; weights do not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > BOMB * path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {BOMB} times its size")


def _parsed(content: object) -> tuple[Checkpoint, AutoEncoder]:
    if not isinstance(content, dict) or not {"state_dict", "args"} <= content.keys():
        keys = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"not a checkpoint of NVAE: expected a dict with state_dict and args, got {keys}"
        )
    args = content["args"]
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, dict):
        raise ValueError(f"args: got {type(args).__name__}, expected argparse.Namespace")
    config = ModelConfig.from_args(args)
    skeleton = _skeleton(config)
    checkpoint = Checkpoint(
        state_dict=_checked_state(content["state_dict"], skeleton.state_dict()),
        config=config,
        args={**asdict(config), **args},
        epoch=_typed(content, "epoch", int, 0),
        global_step=_typed(content, "global_step", int, 0),
        optimizer=_copied(_typed(content, "optimizer", dict, {})),
        scheduler=_typed(content, "scheduler", dict, {}),
        grad_scalar=_typed(content, "grad_scalar", dict, {}),
    )
    return checkpoint, skeleton


def _typed(content: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = content.get(key, default)
    if type(value) is not kind:
        raise ValueError(f"{key}: got {type(value).__name__}, expected {kind.__name__}")
    return value


def _checked_state(state: object, expected: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """The file's tensors, each checked, in the model's order and with its aliases.

    Each holds memory of its own, except that an alias is the very tensor it is the alias of.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise ValueError("state_dict: expected a dict of name -> tensor")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    aliases = {key for key in expected if key.endswith(".weight_normalized")}
    missing = [key for key in expected if key not in state and key not in aliases]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        raise ValueError(
            f"state_dict does not fit its args: {_listed('missing', missing)};"
            f" {_listed('unexpected', unexpected)}"
        )
    result: OrderedDict[str, Tensor] = OrderedDict()
    seen: set[int] = set()
    for key, model_value in expected.items():
        if key in aliases:
            first = key.removesuffix("_normalized")
            result[key] = result[first]
            if key in state and not _same(state[key], state[first]):
                raise ValueError(
                    f"{key} differs from {first}; they are two names of one tensor, so the file"
                    " was changed by something that did not know"
                )
        else:
            value = _checked_tensor(key, state[key], model_value)
            result[key] = value.clone() if value.data_ptr() in seen else value
            seen.add(value.data_ptr())
    if hasattr(expected, "_metadata"):
        result._metadata = expected._metadata  # type: ignore[attr-defined]
    return result


def _checked_tensor(key: str, value: Tensor, expected: Tensor) -> Tensor:
    if value.shape != expected.shape:
        raise ValueError(
            f"{key}: got shape {tuple(value.shape)}, expected {tuple(expected.shape)}; the file's"
            " args and weights belong to different models"
        )
    if value.is_floating_point() != expected.is_floating_point() or value.is_complex():
        raise ValueError(f"{key}: got {value.dtype}, expected {expected.dtype}")
    if value.layout != torch.strided or value.is_quantized:
        raise ValueError(f"{key}: got a {value.layout} tensor, expected a plain one")
    # Floats of other widths become float32, the only one upstream knows.
    value = _owned(value.detach().to(expected.dtype)).contiguous()
    # The sum shows a NaN or an infinity at a tenth of the time; it may overflow without one.
    if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
        raise ValueError(f"{key}: some values are not finite; the training that wrote this failed")
    if key.endswith("running_var") and (value < 0).any():
        raise ValueError(f"{key}: some variances are negative; the file is damaged")
    return value


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal; at once if both are the same view of the same memory."""
    one = a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    return one or torch.equal(a, b)


def _owned(value: Tensor) -> Tensor:
    """The tensor, copied if it is a view: files of the fused optimiser hold slices of stacks."""
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole else value.clone()


def _listed(what: str, keys: list[str]) -> str:
    return f"{len(keys)} {what}" + (f" (first: {', '.join(keys[:3])})" if keys else "")


def _copied(value: Any) -> Any:
    """Tensors inside dicts and lists copied, so that no view of a large storage is kept."""
    if isinstance(value, Tensor):
        return _owned(value)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value

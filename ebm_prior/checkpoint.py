"""A prior's file: one `.safetensors` that says for which backbone it was made.

Tensors: what the prior learned, `netE{i}.<key>` for the energy of layer i (0 = top), and, if
BatchNorm was re-estimated for the training, `bn.<key>`: those statistics belong to the map T and
are used with this prior.
Metadata: `format`, `config` (JSON), `fingerprint`, `step`, `version`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ebm_prior import kinds
from ebm_prior._version import __version__
from ebm_prior.backbones.base import Backbone
from ebm_prior.base import Prior
from ebm_prior.config import PriorConfig
from ebm_prior.files import one_line, written_whole
from ebm_prior.fingerprint import backbone_fingerprint, check_fingerprint

FORMAT = 1
BN = "bn."
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PriorFile:
    """What a prior's file holds, checked: finite tensors, names and shapes as the config says."""

    config: PriorConfig
    learned: dict[str, Tensor]
    bn_statistics: dict[str, Tensor] | None
    fingerprint: str
    step: int
    version: str


def save(
    path: PathLike,
    prior: Prior,
    *,
    fingerprint: str | None = None,
    bn_statistics: Mapping[str, Tensor] | None = None,
    step: int = 0,
) -> None:
    """Write the prior; the file appears whole or not at all.

    Args:
        fingerprint: of the backbone as read from its file; None computes it from the prior's.
        bn_statistics: state-dict entries of re-estimated BatchNorm layers; None takes those of the
            prior's backbone, if it has statistics of its own.
    """
    if bn_statistics is None:
        bn_statistics = getattr(prior.backbone, "bn_statistics", None)
    tensors = dict(prior.learned.state_dict())
    tensors |= {BN + key: value for key, value in (bn_statistics or {}).items()}
    metadata = {
        "format": str(FORMAT),
        "config": json.dumps(prior.config.to_dict()),
        "fingerprint": fingerprint or backbone_fingerprint(prior.backbone),
        "step": str(step),
        "version": __version__,
    }
    with written_whole(path) as temporary:
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata
        )


def read(path: PathLike) -> PriorFile:
    """Read and check a prior's file without a backbone.

    Raises:
        ValueError: one line: what is wrong, what was expected, what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a prior written by `ebm_prior train`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole .safetensors file ({one_line(error)}); copy it again, or"
            " import the authors' files with `ebm_prior convert`"
        ) from None
    number = metadata.get("format", "none")
    if number != str(FORMAT):
        raise ValueError(
            f"{path}: format number {number[:40]}, expected {FORMAT}; not a prior of this"
            " package, or one of a newer version: update nvae-ebm-prior"
        )
    try:
        config = PriorConfig.from_dict(json.loads(metadata["config"]))
        name, step = metadata["fingerprint"], int(metadata["step"])
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lacks {error}; write it with save()") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: unreadable metadata: {one_line(error)}") from None
    learned = {k: v for k, v in tensors.items() if not k.startswith(BN)}
    statistics = {k.removeprefix(BN): v for k, v in tensors.items() if k.startswith(BN)}
    check_tensors(str(path), config, learned)
    _check_finite(str(path), statistics)
    _check_statistics(str(path), statistics)
    return PriorFile(
        config, learned, statistics or None, name, step, metadata.get("version", "unknown")
    )


def load(path: PathLike, vae_or_backbone: Any) -> Prior:
    """Read a prior for a backbone: an `nvae` model, or anything with the `Backbone` methods.

    Raises:
        ValueError: a file that is broken, or made for another backbone.
    """
    file = read(path)
    backbone = _with_statistics(vae_or_backbone, file.bn_statistics)
    check_fingerprint(str(path), file.fingerprint, backbone_fingerprint(backbone))
    check_layout(str(path), file.config, backbone)
    return assemble(backbone, file.config, file.learned)


def assemble(backbone: Backbone, config: PriorConfig, learned: Mapping[str, Tensor]) -> Prior:
    """A prior in eval mode from checked tensors, on the backbone's device if it names one."""
    with torch.random.fork_rng(devices=[]):  # initial weights must not cost the caller's draws
        prior = kinds.build(backbone, config)
    prior.learned.load_state_dict(dict(learned))
    return prior.to(getattr(backbone, "device", torch.device("cpu"))).eval()


def check_layout(name: str, config: PriorConfig, backbone: Backbone) -> None:
    """Refuse a prior whose latent shapes are not the backbone's."""
    if tuple(config.shapes) != tuple(backbone.layout.shapes):
        raise ValueError(
            f"{name} is for latents {_shapes(config.shapes)}, the backbone has"
            f" {_shapes(backbone.layout.shapes)}; give it the backbone it was trained on"
        )


def check_tensors(name: str, config: PriorConfig, learned: Mapping[str, Tensor]) -> None:
    """Names, shapes and values against networks built without memory: a claimed width is free."""
    # Even without memory, building a module takes time: no more of them than the file has tensors.
    nets = config.kind != "fitted"
    deep = max(config.depth, 1) if config.network == "mlp" else 1
    claimed = len(config.shapes) * deep if nets else 1
    if claimed > len(learned):
        raise ValueError(
            f"{name}: {len(learned)} tensors for {len(config.shapes)} layers of depth"
            f" {config.depth}; the file is not whole"
        )
    try:
        with torch.device("meta"):
            expected = kinds.kind(config.kind).networks(config).state_dict()
    except (RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}: impossible networks: {one_line(error)}") from None
    missing, unknown = sorted(expected.keys() - learned), sorted(learned.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"{name}: {len(missing)} tensors are missing ({_few(missing)}) and {len(unknown)}"
            f" are unknown ({_few(unknown)}) for a {config.kind} prior with a {config.network!r}"
            f" network of width {config.width}"
        )
    for key, value in learned.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{name}: {key} has shape {tuple(value.shape)}, expected"
                f" {tuple(expected[key].shape)}; the file's config and tensors disagree"
            )
    _check_finite(name, learned)
    try:
        kinds.kind(config.kind).check_learned(config, learned)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; the file is damaged") from None


def _check_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{name}: {key} holds NaN or infinite values, expected finite ones; the training"
                " blew up: go back to an earlier file"
            )


def _check_statistics(name: str, statistics: Mapping[str, Tensor]) -> None:
    """BatchNorm statistics of the kinds that a layer can use."""
    for key, value in statistics.items():
        counter = key.endswith("num_batches_tracked")
        if value.dtype != (torch.int64 if counter else torch.float32):
            raise ValueError(f"{name}: BatchNorm statistics {key} are of type {value.dtype}")
        if key.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{name}: some variances of {key} are negative; the file is damaged")


def _with_statistics(given: Any, statistics: dict[str, Tensor] | None) -> Backbone:
    """The backbone that uses the file's BatchNorm statistics, if the file holds any."""
    if not hasattr(given, "infer"):
        # Late, so that a prior on a backbone of one's own never imports `nvae`.
        from ebm_prior.backbones.files import of_model

        return of_model(given, statistics)
    if statistics is None:
        return given
    use: Callable[..., Backbone] | None = getattr(given, "with_bn_statistics", None)
    if use is None:
        raise ValueError(
            f"the prior holds BatchNorm statistics, but {type(given).__name__} has no method"
            " with_bn_statistics to take them; add it, or train without re-estimation"
        )
    return use(statistics)


def _shapes(shapes: Any) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"

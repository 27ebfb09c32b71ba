"""FID's Inception v3, with weights from a local file.

The architecture is that of TensorFlow's Inception v3 of 2015-12-05 as the FID literature uses it
(public definition of pytorch-fid, Apache-2.0): average pools leave the padding out, the last block
pools by maximum, 1008 classes. Names of weights are those of `pt_inception-2015-12-05`. BatchNorm
is folded into the convolutions when the file is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.digest import sha256
from nvae.features import FeatureNetwork, Features

#: Number of features -> the layer whose mean over positions they are.
TAPS = {64: "maxpool_1", 192: "maxpool_2", 768: "Mixed_6e", 1280: "Mixed_7a", 2048: "Mixed_7c"}
FID_FEATURES = 2048
CLASSES = 1008
SIZE = 299
BN_EPS = 1e-3

#: One step of a branch: (channels, kernel[, stride]), a pool by name, or a fork: two steps whose
#: results are joined.
Step = tuple[int, int | tuple[int, int]] | tuple[int, int, int] | str | list


def _a(pool: int) -> dict[str, list[Step]]:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": ["average", (pool, 1)],
    }


def _c(width: int) -> dict[str, list[Step]]:
    row, column = (width, (1, 7)), (width, (7, 1))
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), row, (192, (7, 1))],
        "branch7x7dbl": [(width, 1), column, row, column, (192, (1, 7))],
        "branch_pool": ["average", (192, 1)],
    }


def _e(pool: str) -> dict[str, list[Step]]:
    fork: Step = [(384, (1, 3)), (384, (3, 1))]
    return {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
        "branch_pool": [pool, (192, 1)],
    }


#: Stage -> its branches; those of the stem have one branch without a name.
STAGES: dict[str, dict[str, list[Step]]] = {
    "Conv2d_1a_3x3": {"": [(32, 3, 2)]},
    "Conv2d_2a_3x3": {"": [(32, 3, 0)]},
    "Conv2d_2b_3x3": {"": [(64, 3)]},
    "maxpool_1": {"": ["halve"]},
    "Conv2d_3b_1x1": {"": [(80, 1)]},
    "Conv2d_4a_3x3": {"": [(192, 3, 0)]},
    "maxpool_2": {"": ["halve"]},
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": {
        "branch3x3": [(384, 3, 2)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
        "branch_pool": ["halve"],
    },
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": {
        "branch3x3": [(192, 1), (320, 3, 2)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)],
        "branch_pool": ["halve"],
    },
    "Mixed_7b": _e("average"),
    "Mixed_7c": _e("maximum"),
}


def _pool(name: str) -> nn.Module:
    if name == "average":
        return nn.AvgPool2d(3, 1, padding=1, count_include_pad=False)
    return nn.MaxPool2d(3, 2) if name == "halve" else nn.MaxPool2d(3, 1, padding=1)


def _convolution(channels: int, step: tuple) -> nn.Conv2d:
    """Stride 1 keeps the size; a third entry is the stride without padding (0: stride 1)."""
    width, kernel = step[:2]
    if len(step) == 3:
        return nn.Conv2d(channels, width, kernel, stride=max(step[2], 1))
    return nn.Conv2d(channels, width, kernel, padding="same")


class Stage(nn.Module):
    """Branches side by side, joined over channels; every convolution is followed by ReLU.

    Convolutions are children with the file's names: `branch3x3dbl_2`, in a fork `branch3x3_2a`.
    """

    def __init__(self, channels: int, branches: Mapping[str, Sequence[Step]]) -> None:
        super().__init__()
        self.paths: list[list[str | tuple[str, str] | nn.Module]] = []
        self.channels = 0
        for branch, steps in branches.items():
            path: list[str | tuple[str, str] | nn.Module] = []
            width, several = channels, sum(not isinstance(step, str) for step in steps) > 1
            number = 0
            for step in steps:
                if isinstance(step, str):
                    path.append(_pool(step))
                    continue
                number += 1
                name = (f"{branch}_{number}" if several else branch) or "unit"
                if isinstance(step, list):
                    for end, side in zip("ab", step, strict=True):
                        self.add_module(name + end, _convolution(width, side))
                    path.append((f"{name}a", f"{name}b"))
                    width = sum(side[0] for side in step)
                else:
                    self.add_module(name, _convolution(width, step))
                    path.append(name)
                    width = step[0]
            self.paths.append(path)
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for path in self.paths:
            y = x
            for step in path:
                if isinstance(step, nn.Module):
                    y = step(y)
                elif isinstance(step, tuple):
                    y = torch.cat([F.relu(self.get_submodule(name)(y)) for name in step], 1)
                else:
                    y = F.relu(self.get_submodule(step)(y))
            results.append(y)
        return torch.cat(results, 1)


class Inception(FeatureNetwork):
    """The stages up to the layer of the wanted features; with 2048 of them the logits as well."""

    def __init__(self, num_features: int = FID_FEATURES) -> None:
        super().__init__()
        self.num_features, self.label, self.sha256 = num_features, str(num_features), ""
        self.stages = nn.ModuleDict()
        channels = 3
        for name, branches in STAGES.items():
            stage = Stage(channels, branches)
            self.stages[name], channels = stage, stage.channels
            if name == TAPS[num_features]:
                break
        # Only the weight: the Inception Score leaves the bias out.
        classes = CLASSES if num_features == FID_FEATURES else 0
        self.fc = nn.Parameter(torch.empty(classes, channels)) if classes else None

    def features(self, x: Tensor) -> Features:
        size = (SIZE, SIZE)
        x = 2 * F.interpolate(x, size=size, mode="bilinear", align_corners=False) - 1
        for stage in self.stages.values():
            x = stage(x)
        pooled = x.mean((2, 3))
        return Features(pooled, None if self.fc is None else pooled @ self.fc.T)

    def units(self) -> dict[str, nn.Conv2d]:
        """Every convolution by its name in the file."""
        found = self.stages.named_modules()
        return {n.removesuffix(".unit"): m for n, m in found if isinstance(m, nn.Conv2d)}


# --- the file


def load(path: str | os.PathLike[str], num_features: int = FID_FEATURES) -> Inception:
    """The network with the weights of a file.

    Args:
        path: `.pth`, `.pt` or `.safetensors` with the keys of `pt_inception-2015-12-05`, or an
            `.npz` with folded convolutions (`<name>.weight`, or int16 `<name>.q` times
            `<name>.scale`, and `<name>.bias`), which need not be complete.

    Raises:
        ValueError: no such file, not weights of this network, or none for the wanted features.
    """
    path = Path(path)
    state = _read(path)
    with torch.device("meta"):
        network = Inception(num_features)
    missing = []
    for name, unit in network.units().items():
        weight, bias = _folded(state, name)
        if weight is None or bias is None:
            missing.append(name)
            continue
        expected = (tuple(unit.weight.shape), (unit.out_channels,))
        if (tuple(weight.shape), tuple(bias.shape)) != expected:
            raise ValueError(
                f"--inception {path}: {name} has shapes {tuple(weight.shape)} and"
                f" {tuple(bias.shape)}, expected {expected[0]} and {expected[1]}: another network"
                " than FID's Inception v3"
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"--inception {path}: {name} is not finite; get the file again")
        unit.weight = nn.Parameter(weight, requires_grad=False)
        unit.bias = nn.Parameter(bias, requires_grad=False)
    if network.fc is not None:
        fc = state.get("fc.weight")
        if fc is None or fc.shape != network.fc.shape:
            missing.append("fc")
        else:
            network.fc = nn.Parameter(fc.float(), requires_grad=False)
    if missing:
        _refuse(path, state, missing, num_features)
    network.sha256 = sha256(path)
    # The layout with channels last is half as fast again on a CPU.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"--inception {path}: there is no such file. FID needs the weights"
            " pt_inception-2015-12-05 (.pth or .safetensors); without them --features random gives"
            " numbers for relative use"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as archive:
                arrays = {k: archive[k] for k in archive.files}
            return {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind in "fi"}
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in state.items() if isinstance(v, Tensor)}
    except Exception as error:  # each container fails in its own ways
        reason = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"--inception {path}: not a whole .pth, .safetensors or .npz file of weights"
            f" ({type(error).__name__}: {reason}); get it again"
        ) from None


def _folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor | None, Tensor | None]:
    r"""Weight and bias of a convolution with its BatchNorm.

    .. math:: W' = W s, \quad b' = \beta - m s, \quad s = \gamma / \sqrt{v + \epsilon}
    """
    if f"{name}.conv.weight" in state:
        parts = ("weight", "bias", "running_mean", "running_var")
        norm = [state.get(f"{name}.bn.{part}") for part in parts]
        if any(part is None for part in norm):
            return None, None
        gamma, beta, mean, var = (part.double() for part in norm if part is not None)
        scale = gamma / (var + BN_EPS).sqrt()
        weight = state[f"{name}.conv.weight"].double() * scale[:, None, None, None]
        return weight.float(), (beta - mean * scale).float()
    bias = state.get(f"{name}.bias")
    if f"{name}.q" in state and f"{name}.scale" in state:
        return state[f"{name}.q"].float() * state[f"{name}.scale"][:, None, None, None], bias
    return state.get(f"{name}.weight"), bias


def _refuse(path: Path, state: Mapping[str, Tensor], missing: list[str], wanted: int) -> None:
    """Say what the file lacks and what it is good for."""
    with torch.device("meta"):
        whole = Inception()
    present = {n for n in whole.units() if all(part is not None for part in _folded(state, n))}
    good = []
    for count in TAPS:
        with torch.device("meta"):
            needed = set(Inception(count).units())
        if needed <= present and (count < FID_FEATURES or "fc.weight" in state):
            good.append(str(count))
    advice = (
        f"this file is good for --features {', '.join(good)} (name the numbers after them, they"
        " are not FID)"
        if good
        else "expected the keys of pt_inception-2015-12-05, such as Conv2d_1a_3x3.conv.weight"
    )
    raise ValueError(
        f"--inception {path}: lacks {len(missing)} layers of the {wanted} features (first:"
        f" {', '.join(missing[:3])}); {advice}"
    )

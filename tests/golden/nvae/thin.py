"""Make the small golden cases of this folder from the full ones: python thin.py GOLDENS HERE.

Every number kept is upstream's. Left out: noise and inputs that `case.json` says how to draw, and
what follows from the rest. Arrays above `KEEP` elements are stored like upstream's own
`subsampled_arrays`: every n-th row and column, and three sums over the whole array. Checkpoints in
the zip container are compressed; the tensors in them are as they were.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

KEEP = 200
LEFT_OUT = ("eps_", "u_", "x", "spectral_exact", "spectral_v_", "prior_t0.7_z", "train_z")


def thin(array: np.ndarray) -> tuple[np.ndarray, dict[str, Any] | None]:
    if array.ndim < 4 or array.size <= KEEP or array.dtype != np.float32:
        return array, None
    step = 2
    while array[..., step // 2 :: step, step // 2 :: step].size > KEEP and step < array.shape[-1]:
        step *= 2
    whole = array.astype(np.float64)
    sums = {
        "full_shape": list(array.shape),
        "start": step // 2,
        "step": step,
        "sum": float(whole.sum()),
        "abs_sum": float(np.abs(whole).sum()),
        "sum_of_squares": float((whole**2).sum()),
    }
    return array[..., step // 2 :: step, step // 2 :: step], sums


def copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    info = json.loads((source / "case.json").read_text())
    arrays: dict[str, np.ndarray] = {}
    with np.load(source / "io.npz") as full:
        for name in full.files:
            if name != "x_uint8" and name.startswith(LEFT_OUT):
                continue
            if name in info["subsampled_arrays"]:  # thin what is thin already, keep its sums
                old = info["subsampled_arrays"][name]
                arrays[name], new = thin(full[name])
                if new is not None:
                    old["start"] += old["step"] * new["start"]
                    old["step"] *= new["step"]
            elif name == "x_uint8" or name.startswith("spectral_start"):
                arrays[name] = full[name]
            else:
                arrays[name], new = thin(full[name])
                if new is not None:
                    info["subsampled_arrays"][name] = new
    np.savez_compressed(target / "io.npz", **arrays)
    for table in ("subsampled_arrays", "float32_versus_float64"):
        info[table] = {name: v for name, v in info[table].items() if name in arrays}
    (target / "case.json").write_text(json.dumps(info, separators=(",", ":")))
    checkpoint = source / "checkpoint.pt"
    if not zipfile.is_zipfile(checkpoint):
        shutil.copyfile(checkpoint, target / "checkpoint.pt")
        return
    with (
        zipfile.ZipFile(checkpoint) as old_file,
        zipfile.ZipFile(
            target / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=9
        ) as new_file,
    ):
        for entry in old_file.infolist():
            new_file.writestr(entry.filename, old_file.read(entry))


def first_cells(source: Path, target: Path) -> None:
    """Of a large case only the first cells: their weights, their part of the recorded arrays."""
    info = json.loads((source / "case.json").read_text())
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(source / "checkpoint.pt", weights_only=True)["state_dict"]
    kept = {k: v.numpy() for k, v in state.items() if k.startswith(("stem.", "pre_process."))}
    rows = [name.startswith(("stem", "pre_process.")) for name in info["trace_names"]]
    with np.load(source / "io.npz") as full:
        kept["x_uint8"] = full["x_uint8"]
        kept["trace"] = full["trace"][rows]
        biases = [v for k, v in kept.items() if k.startswith("pre_") and k.endswith("conv_0.bias")]
        norms = [v for k, v in kept.items() if k.endswith("running_mean")]
        for name, size in {
            "datainit_log_weight_norm": sum(v.size for v in biases),
            "datainit_bias": sum(v.size for v in biases),
            "train_bn_running_mean": sum(v.size for v in norms),
            "train_bn_running_var": sum(v.size for v in norms),
        }.items():
            if name in full.files and size:
                kept[name] = full[name][:size]
    flags = np.array(json.dumps(info["training_flags"]))
    np.savez_compressed(target, training_flags=flags, **kept)


def bernoulli(source: Path, target: Path) -> None:
    """Of the black-and-white case only what the output distribution needs."""
    names = ("x_uint8", "eval_logits", "eval_log_prob", "eval_recon_loss", "eval_image")
    with np.load(source / "io.npz") as full:
        np.savez_compressed(target, **{name: full[name] for name in names})


WHOLE = (
    "cifar10_mbconv_den",
    "cifar10_mbconv_sep11",
    "cifar10_no_res_dist_mbconv_res_enc_ne_dec",
    "cifar10_no_se_mbconv_sep",
    "cifar10_res35_mbconv_old_checkpoint",
    "cifar10_vanilla_one_group",
    "lsun_church64_gaussian_3scales",
)

if __name__ == "__main__":
    goldens, here = map(Path, sys.argv[1:])
    for case in WHOLE:
        copy(goldens / case, here / case)
    for name in ("res_elu", "res_bnelu"):
        first_cells(goldens / f"cifar10_{name}", here / f"first_cells_{name}.npz")
    bernoulli(goldens / "mnist_bernoulli_2scales_ada", here / "bernoulli.npz")

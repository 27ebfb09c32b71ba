"""Which pictures of a folder or a zip belong to which half."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import numpy as np

from nvae import pickles, runtime
from nvae.convert.sources import Source

CELEBA_LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")
INDEX_FILES = ("train_test_ind.pt", "train_test_ind.npz")  # upstream's, and ours
# Names of subfolders that hold a half.
HALVES = {"train": {"train"}, "validation": {"validation", "valid", "val"}, "test": {"test"}}
SPLITS = tuple(HALVES)


def choose(
    source: Source,
    dataset: str,
    split: str,
    out: Path,
    *,
    split_file: Path | None = None,
    whole: bool = False,
    seed: int = 0,
    dry_run: bool = False,
) -> Source:
    """The pictures of one half, in the order of the half.

    In this order of preference: all of them (`whole`); those of a split file, given or found
    (CelebA's list beside the pictures, FFHQ's indices in `out`); for FFHQ a random 9 of 10, drawn
    once from `seed` and written to `out`; those in the subfolder of that name.

    Raises:
        ValueError: none of these, or a split file that does not fit the pictures.
    """
    if source.kind in ("tfrecords", "lmdb"):
        if whole or split_file is not None:
            raise ValueError(f"{source.where} has halves of its own: no --whole, no --split_file")
        return source
    if whole:
        return source
    path = split_file or _found(source, dataset, out)
    if path is not None:
        positions = _of_file(source, path, split)
    elif dataset == "ffhq":
        positions = _drawn(source, out, seed, dry_run).get(split, [])
    elif dataset == "celeba_64" and not _of_subfolder(source, split):
        raise ValueError(
            f"no {CELEBA_LISTS[0]} beside {source.where}; it comes with CelebA's aligned pictures"
            " (folder Eval), or name it: --split_file"
        )
    else:
        positions = _of_subfolder(source, split)
    if not positions:
        raise ValueError(
            f"{source.where} has no pictures of its own for {split}; expected the subfolders train"
            " and validation, or --split_file, or --whole if they all belong to it"
        )
    return source.only(positions)


def _found(source: Source, dataset: str, out: Path) -> Path | None:
    around = (source.where, source.where.parent, source.where.parent.parent)
    candidates: list[Path] = []
    if dataset == "celeba_64":
        candidates = [p / e / n for p in around for e in ("", "Eval") for n in CELEBA_LISTS]
    elif dataset == "ffhq":
        candidates = [out / name for name in INDEX_FILES]
    return next((path for path in candidates if path.is_file()), None)


def _of_subfolder(source: Source, split: str) -> list[int]:
    folders = [set(PurePosixPath(source.name(i)).parent.parts) for i in range(len(source))]
    return [i for i, parts in enumerate(folders) if parts & HALVES[split]]


# --- split files


def _of_file(source: Source, path: Path, split: str) -> list[int]:
    if path.suffix in (".pt", ".npz"):
        return _of_indices(source, path, _indices(path), split)
    return _of_list(source, path, split)


def _of_list(source: Source, path: Path, split: str) -> list[int]:
    """Lines of a picture's name and 0, 1 or 2: train, validation, test; as csv under a title."""
    wanted = str(SPLITS.index(split))
    try:
        text = path.read_text(encoding="utf-8").replace(",", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if lines[:1] == [["image_id", "partition"]]:
        del lines[0]
    bad = [line for line in lines if len(line) != 2 or line[1] not in {"0", "1", "2"}]
    if bad:
        raise ValueError(
            f"{path}, {' '.join(bad[0])!r}: expected a picture's name and 0, 1 or 2, as in"
            f" {CELEBA_LISTS[0]}"
        )
    names = [line[0] for line in lines if line[1] == wanted]
    position: dict[str, int] = {}
    for i in range(len(source)):
        name = PurePosixPath(source.name(i)).name
        if name in position:
            raise ValueError(
                f"{source.where} has several pictures {name}; name the folder that holds those of"
                f" {path.name} only"
            )
        position[name] = i
    missing = [name for name in names if name not in position]
    if missing:
        raise ValueError(
            f"{path} names {len(missing)} pictures for {split} that are not in {source.where}, the"
            f" first is {missing[0]}; was it unpacked whole?"
        )
    return [position[name] for name in names]


def _indices(path: Path) -> dict[str, np.ndarray]:
    """The arrays `train` and `test`, from upstream's torch.save file or from our npz."""
    try:
        if path.suffix == ".pt":
            read = pickles.read_torch(path)
        else:
            with np.load(path, allow_pickle=False) as archive:
                read = dict(archive)
        halves = {"train": read["train"], "validation": read["test"]}
        if any(v.ndim != 1 or v.dtype.kind not in "iu" for v in halves.values()):
            raise ValueError("train and test are not rows of whole numbers")
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} is no file of the indices train and test: {type(error).__name__}: {error}"
        ) from None
    return halves


def _of_indices(
    source: Source, path: Path, halves: dict[str, np.ndarray], split: str
) -> list[int]:
    """An index is the number that a picture's name is (00017.png), or else its position."""
    if split not in halves:
        raise ValueError(f"{path} knows no {split}; expected train or validation")
    every = np.concatenate(list(halves.values()))
    if len(np.unique(every)) != len(every):
        raise ValueError(f"{path} holds an index twice; the halves would share a picture")
    stems = [PurePosixPath(source.name(i)).stem for i in range(len(source))]
    numbers = [int(s) if s.isdecimal() else math.nan for s in stems]
    if any(map(math.isnan, numbers)):
        numbers = list(range(len(source)))
    position = {number: i for i, number in enumerate(numbers)}
    missing = [i for i in halves[split].tolist() if i not in position]
    if missing or len(position) != len(source):
        what = f"picture {missing[0]}" if missing else "a number for each picture"
        raise ValueError(
            f"{path} counts {len(every)} pictures, {source.where} holds {len(source)} and lacks"
            f" {what}; use the file that was made for them"
        )
    return [position[i] for i in halves[split].tolist()]


def _drawn(source: Source, out: Path, seed: int, dry_run: bool) -> dict[str, list[int]]:
    """Nine of ten at random for training (63000 of 70000), kept for the other half's turn."""
    # RandomState's stream is frozen by numpy, so a seed gives one split everywhere.
    order = np.random.RandomState(seed).permutation(len(source))
    cut = len(source) * 9 // 10
    halves = {"train": order[:cut], "test": order[cut:]}
    path = out / INDEX_FILES[1]
    by_name = {"train": halves["train"], "validation": halves["test"]}
    positions = {name: _of_indices(source, path, by_name, name) for name in by_name}
    if not dry_run:
        with runtime.written_whole(path) as temporary:
            np.savez(temporary, train=halves["train"], test=halves["test"])
    return positions

"""Labels by attribute: the data set's classes, what follows of them, or a column of a file.

`class` is the data set's own; the digits have `parity` (even, odd) and `loop` (whether the written
digit has one: 0, 6, 8, 9) besides. Other attributes come from a folder with `train.csv` and
`validation.csv`: a heading of names, a row per image in the order of the data set, class numbers
from 0 on; an empty field is no label.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Attributes of the digits that follow from the class: names of their classes, class of each digit.
DERIVED: dict[str, tuple[tuple[str, ...], list[int]]] = {
    "parity": (("even", "odd"), [digit % 2 for digit in range(10)]),
    "loop": (("open", "loop"), [int(digit in (0, 6, 8, 9)) for digit in range(10)]),
}


@dataclass(frozen=True)
class Labels:
    """The labels of one attribute."""

    name: str
    values: Tensor  # (N,) class numbers, -1 = unlabelled
    classes: tuple[str, ...]  # the classes' names

    def number(self, text: str) -> int:
        """The class that is called so, or has this number.

        Raises:
            ValueError: there is none.
        """
        return class_number(self.name, self.classes, text)


def class_number(name: str, classes: Sequence[str], text: str) -> int:
    """The class that is called `text`, or has this number; ValueError if there is none."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    raise ValueError(f"{name}={text}: expected one of {', '.join(classes[:20])}")


def class_names(name: str, count: int) -> tuple[str, ...]:
    """What an attribute's classes are called where its data is not at hand."""
    words, _ = DERIVED.get(name, ((), []))
    return words if len(words) == count else tuple(map(str, range(count)))


def load(
    names: Sequence[str],
    dataset: str,
    own: Tensor | None,
    count: int,
    *,
    train: bool,
    folder: Path | None = None,
) -> list[Labels]:
    """The labels of `count` images of one half of a data set, an entry per name.

    Args:
        own: the class labels that come with the images, if any do.
        folder: of csv files; their columns come before what the data set has itself.

    Raises:
        ValueError: an unknown attribute, a file that is missing or does not fit.
    """
    columns: dict[str, Labels] = {}
    if own is not None:
        classes = tuple(str(number) for number in range(int(own.max()) + 1))
        columns["class"] = Labels("class", own.long(), classes)
        if dataset == "digits":
            columns |= {
                name: Labels(name, torch.tensor(of)[own.long()], words)
                for name, (words, of) in DERIVED.items()
            }
    if folder is not None:
        columns |= _read(folder / f"{'train' if train else 'validation'}.csv", count)
    unknown = [name for name in names if name not in columns]
    if unknown:
        raise ValueError(
            f"no labels for the attribute {unknown[0]!r}; {dataset} has"
            f" {', '.join(columns) or 'none'}: give --labels FOLDER with train.csv and"
            " validation.csv, a column per attribute"
        )
    return [columns[name] for name in names]


def _read(path: Path, count: int) -> dict[str, Labels]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            heading, *rows = list(csv.reader(file)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table of labels: {error}") from None
    if len(rows) != count:
        raise ValueError(f"{path} has {len(rows)} rows below its heading for {count} images")
    columns = {}
    for number, name in enumerate(heading):
        try:
            values = [int(row[number]) if row[number].strip() else -1 for row in rows]
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, column {name!r}: expected whole numbers or empty fields ({error})"
            ) from None
        if min(values) < -1 or max(values) < 0:
            raise ValueError(
                f"{path}, column {name!r}: class numbers from {min(values)} to {max(values)},"
                " expected them to begin at 0"
            )
        classes = tuple(str(value) for value in range(max(values) + 1))
        columns[name] = Labels(name, torch.tensor(values), classes)
    return columns

"""The tables of a `bench.json` in Markdown, so that nobody copies numbers by hand. No torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebm_prior.commands.bench.shapes import SHAPES
from ebm_prior.files import written_whole

MISSING = "-"


def read(path: Path) -> dict[str, Any]:
    """A `bench.json`.

    Raises:
        ValueError: it is none.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--table {path}: {error}; expected a bench.json") from None
    if not isinstance(report, dict) or not {"shapes", "counts", "machine"} <= report.keys():
        raise ValueError(f"--table {path}: not the bench.json that `ebm_prior bench` writes")
    return report


def markdown(report: Mapping[str, Any]) -> str:
    """Machine, times, counts and shares."""
    machine = report["machine"]
    used = f", {machine['threads']} thread(s)" if "threads" in machine else ""
    clock = {"process": "process time", "wall": "wall time"}[report["clock"]]
    head = (
        f"{machine['name']}{used}, PyTorch {machine['torch']}; {clock}, medians with"
        " [smallest, largest]."
    )
    parts = [head, _times(report), _counts(report), _shares(report)]
    return "\n\n".join(parts) + "\n"


def into(document: Path, source: Path, text: str) -> None:
    """Put a table where the document has a place for that of this file.

    The place is between `<!-- table: NAME -->` and `<!-- end -->`, with the file's path from the
    document's folder as NAME.

    Raises:
        ValueError: the document cannot be read, or has no such place.
    """
    try:
        before = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--into {document}: {error.strerror}") from None
    found = dict(places(before))
    name = os.path.relpath(source, document.parent).replace(os.sep, "/")
    if name not in found:
        raise ValueError(
            f"--into {document} has no place for {name}; it has {', '.join(found) or 'none'}"
        )
    start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
    after = before.replace(f"{start}{found[name]}{end}", f"{start}{text}{end}")
    with written_whole(document) as temporary:
        temporary.write_text(after, encoding="utf-8")


def places(text: str) -> list[tuple[str, str]]:
    """The tables of a document: file and text."""
    return re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)


def _times(report: Mapping[str, Any]) -> str:
    heads = ["shape, batch", "fast path", "reference s", "plain s", "fast s", "ratio", "aim"]
    heads += ["images/s, reference", "fast", "agreement"]
    rows = []
    for name, by_precision in report["shapes"].items():
        settings = report["settings"][name]
        for precision, row in by_precision.items():
            ranges, agreement = row["ranges_s"], row["agreement"]
            off = f"max du {agreement['max_du']:.1e}"
            if precision != "float32":
                off = f"gradient off by {agreement['gradient_error']:.2%}"
            rows.append(
                [
                    f"{name}, {settings['batch_size']}",
                    precision,
                    *(_spread(row[f"{p}_s"], ranges[p]) for p in ("reference", "plain", "fast")),
                    f"{_spread(row['ratio'], row['ratio_of_rounds'])}",
                    _target(name, report["machine"]["device"], precision),
                    f"{row['images_per_s']['reference']:.3g}",
                    f"{row['images_per_s']['fast']:.3g}",
                    off,
                ]
            )
    return _table(heads, rows)


def _counts(report: Mapping[str, Any]) -> str:
    heads = ["shape", "path", "launches", "GFLOP/image", "GB/image + fixed"]
    heads += ["saved MB/image", "peak MB/image", "host waits in 2 steps"]
    rows = [
        [
            name,
            path,
            f"{row['launches']}{_at_most(name, 'launches', path)}",
            f"{row['gflop_per_image']:.4g}",
            f"{row['gb_moved_per_image']:.3g} + {row['gb_moved_fixed']:.3g}",
            f"{row['saved_mb_per_image']:.4g}{_at_most(name, 'saved_mb', path)}",
            f"{row['peak_mb_per_image']:.4g}",
            f"{row.get('host_waits_in_2_steps', MISSING)}",
        ]
        for name, paths in report["counts"].items()
        for path, row in paths.items()
    ]
    return _table(heads, rows)


def _shares(report: Mapping[str, Any]) -> str:
    heads = ["shape", "fast path", "estimated s", "its share of the measured", "operations s"]
    heads += ["bytes s", "share of the reference"]
    rows = []
    for name, by_precision in report["shapes"].items():
        for precision, row in by_precision.items():
            fast = row["roofline"]["fast"]
            rows.append(
                [
                    name,
                    precision,
                    f"{fast['estimated_s']:.3g}",
                    f"{fast['share']:.0%}",
                    f"{fast['compute_s']:.3g}",
                    f"{fast['memory_s']:.3g}",
                    f"{row['roofline']['reference']['share']:.0%}",
                ]
            )
    rates = report["rates"]
    told = (
        f"By count at {rates['tflops_float32']:.3g} (float32) and {rates['tflops_bf16']:.3g}"
        f" (bf16) TFLOP/s, {rates['gb_per_s']:.3g} GB/s; {rates['source']}."
    )
    return f"{told}\n\n{_table(heads, rows)}"


def _at_most(shape: str, kind: str, path: str) -> str:
    target = _target(shape, kind, path)
    return "" if target == MISSING else f" (aim {target})"


def _target(shape: str, kind: str, name: str) -> str:
    """What was set out to be reached, if anything was."""
    known = SHAPES[shape].targets.get(kind, {}) if shape in SHAPES else {}
    return f"{known[name]:g}" if name in known else MISSING


def _spread(middle: float, ends: Sequence[float]) -> str:
    low, high = ends
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

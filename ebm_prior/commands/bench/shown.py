"""The picture of a bench: seconds of each path by shape, then launches and memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ebm_prior.commands.shared import figures

COUNTED = {
    "launches": "launches per step",
    "saved_mb_per_image": "MB kept for the backward pass, per image",
}


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """A panel of seconds per shape with the ratios, two panels of counts."""
    panels: dict[str, figures.Bars] = {}
    for name, rows in report["shapes"].items():
        size = report["settings"][name]["batch_size"]
        panels[f"{name}: seconds per step, batch {size}"] = _seconds(rows)
    for key, title in COUNTED.items():
        panels[title] = {
            f"{name}: {path_}": (row[key], row[key], row[key], f"{row[key]:.0f}")
            for name, paths in report["counts"].items()
            for path_, row in paths.items()
        }
    machine = report["machine"]
    figures.bar_panels(path, panels, title=f"A Langevin step on {machine['name']}")


def _seconds(rows: Mapping[str, Any]) -> figures.Bars:
    """Label -> value, low, high and what to write on it."""
    first = next(iter(rows.values()))
    bars: figures.Bars = {}
    for name in ("reference", "plain"):
        bars[name] = _bar(first[f"{name}_s"], first["ranges_s"][name])
    for precision, row in rows.items():
        value, low, high, note = _bar(row["fast_s"], row["ranges_s"]["fast"])
        bars[f"fast {precision}"] = (value, low, high, f"{note}, {row['ratio']:.2f}x")
    return bars


def _bar(value: float, ends: tuple[float, float]) -> tuple[float, float, float, str]:
    return (value, *ends, f"{value:.3g}")

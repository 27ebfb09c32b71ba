"""What `ood` reports: numbers, figures, and in words whether the scores get better with k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebm_prior.commands.ood.scoring import CONTROL, Scores
from ebm_prior.commands.ood.sets import OWN
from ebm_prior.commands.shared import figures
from ebm_prior.detection import Placements, detection, mean_auroc

CLEAR = 2.0  # standard errors from which a difference counts
NAMES = {CONTROL: "control, |u|²/2"}


def contents(scores: Mapping[str, Scores], ks: Sequence[int]) -> dict[str, Any]:
    """The numbers of `report.json`.

    Args:
        scores: set -> kind (scheme or control) -> (n, len(ks)).
    """
    kinds = list(scores[OWN])
    rows = {kind: _kind(scores, kind, len(ks)) for kind in kinds}
    return {
        "k": list(ks),
        "scheme": {kind: rows[kind] for kind in kinds if kind != CONTROL},
        CONTROL: rows[CONTROL],
        "rises_with_k": {kind: _rise(scores, kind, ks) for kind in kinds},
        "above_control": {
            kind: _above_control(scores, kind, rows) for kind in kinds if kind != CONTROL
        },
    }


def _foreign(scores: Mapping[str, Scores]) -> list[str]:
    return [name for name in scores if name != OWN]


def _placed(scores: Mapping[str, Scores], name: str, kind: str, column: int) -> Placements:
    own, foreign = (scores[which][kind][:, column] for which in (OWN, name))
    return Placements.of(own, foreign)


def _kind(scores: Mapping[str, Scores], kind: str, columns: int) -> dict[str, Any]:
    """AUROC and the others per k, of each set and on average."""
    sets: dict[str, dict[str, list[float]]] = {}
    for name in _foreign(scores):
        found = [
            detection(scores[OWN][kind][:, c], scores[name][kind][:, c]) for c in range(columns)
        ]
        errors = [mean_auroc([_placed(scores, name, kind, c)])[1] for c in range(columns)]
        sets[name] = {
            "auroc": [one.auroc for one in found],
            "auroc_error": errors,
            "auprc": [one.auprc for one in found],
            "fpr80": [one.fpr80 for one in found],
        }
    means = [
        mean_auroc([_placed(scores, name, kind, c) for name in _foreign(scores)])
        for c in range(columns)
    ]
    return {
        "auroc": [mean for mean, _ in means],
        "auroc_error": [error for _, error in means],
        "sets": sets,
    }


def _difference(
    scores: Mapping[str, Scores], names: Sequence[str], to: tuple[str, int], of: tuple[str, int]
) -> dict[str, Any]:
    """Mean AUROC of one (kind, column) minus that of another on the same images."""
    gain, error = mean_auroc(
        [_placed(scores, name, *to) - _placed(scores, name, *of) for name in names]
    )
    clear = abs(gain) > CLEAR * error
    return {"difference": gain, "error": error, "clear": clear}


def _rise(scores: Mapping[str, Scores], kind: str, ks: Sequence[int]) -> dict[str, Any]:
    """From the smallest k to the largest, on average over the sets and for each."""
    if len(ks) < 2:
        return {"verdict": "only one k"}

    def of(names: Sequence[str]) -> dict[str, Any]:
        row = _difference(scores, names, (kind, len(ks) - 1), (kind, 0))
        verdict = "no clear change"
        if row["clear"]:
            verdict = "rises" if row["difference"] > 0 else "falls"
        return {**row, "verdict": verdict}

    names = _foreign(scores)
    return {
        "from_k": ks[0],
        "to_k": ks[-1],
        **of(names),
        "sets": {name: of([name]) for name in names},
    }


def _above_control(
    scores: Mapping[str, Scores], kind: str, rows: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The scheme's best k against the control's best k, on average over the sets."""
    best = {which: int(np.argmax(rows[which]["auroc"])) for which in (kind, CONTROL)}
    row = _difference(scores, _foreign(scores), (kind, best[kind]), (CONTROL, best[CONTROL]))
    verdict = "no clear difference"
    if row["clear"]:
        verdict = "above" if row["difference"] > 0 else "below"
    return {**row, "verdict": verdict}


# --- in words


def words(content: Mapping[str, Any]) -> str:
    """The table and what it says, for the terminal."""
    ks, rows = content["k"], {**content["scheme"], CONTROL: content[CONTROL]}
    lines = []
    for kind, row in rows.items():
        lines.append(f"AUROC, {NAMES.get(kind, kind)}")
        for name, values in [(n, s["auroc"]) for n, s in row["sets"].items()] + [
            ("mean", row["auroc"])
        ]:
            lines.append(f"  {name:<12}" + "".join(f"  {value:.3f}" for value in values))
    lines.insert(0, "columns: k = " + ", ".join(map(str, ks)))
    for kind in rows:
        lines.append(_rise_in_words(kind, content["rises_with_k"][kind]))
    for kind, row in content["above_control"].items():
        better = {
            "above": "better than the control, which needs no prior",
            "below": "worse than the control, which needs no prior",
        }.get(row["verdict"], "not clearly different from the control, which needs no prior")
        lines.append(
            f"At its best k {kind} is {better}"
            f" ({row['difference']:+.3f} +- {row['error']:.3f} on average)."
        )
    return "\n".join(lines)


def _rise_in_words(kind: str, row: Mapping[str, Any]) -> str:
    name = NAMES.get(kind, kind)
    if "sets" not in row:
        return f"{name}: only one k, so nothing is said about k."
    verdict = {
        "rises": "rises with k",
        "falls": "does not rise with k, it falls",
        "no clear change": "does not clearly change with k",
    }[row["verdict"]]
    rising = [name for name, one in row["sets"].items() if one["verdict"] == "rises"]
    return (
        f"{name}: mean AUROC {verdict} ({row['difference']:+.3f} +- {row['error']:.3f} from"
        f" k = {row['from_k']} to {row['to_k']}); it rises for"
        f" {', '.join(rising) if rising else 'no'} of {len(row['sets'])} sets."
    )


# --- figures


def draw(
    out: Path, scores: Mapping[str, Scores], content: Mapping[str, Any], own_name: str
) -> None:
    """`auroc.png`, `auroc_<scheme>.png` and `histograms_<scheme>.png`."""
    ks, rows = content["k"], {**content["scheme"], CONTROL: content[CONTROL]}
    count = len(scores[OWN][CONTROL])
    against = f"{own_name} ({count} held-out images) against {', '.join(_foreign(scores))}"
    xlabel = "k: E_>k sums the layers above k"
    curves = {NAMES.get(kind, kind): np.array(row["auroc"]) for kind, row in rows.items()}
    errors = {NAMES.get(k, k): CLEAR * np.array(row["auroc_error"]) for k, row in rows.items()}
    figures.lines(
        out / "auroc.png",
        ks,
        curves,
        band={kind: (y - errors[kind], y + errors[kind]) for kind, y in curves.items()},
        hline={"chance": 0.5},
        title=f"AUROC, mean over the sets with two standard errors. {against}",
        xlabel=xlabel,
        ylabel="AUROC",
    )
    for kind, row in content["scheme"].items():
        figures.lines(
            out / f"auroc_{kind}.png",
            ks,
            {name: one["auroc"] for name, one in row["sets"].items()},
            hline={"chance": 0.5},
            title=f"AUROC of the {kind} scheme, each set. {own_name}, {count} held-out images",
            xlabel=xlabel,
            ylabel="AUROC",
        )
    for kind, row in content["scheme"].items():
        useful = max(range(1, len(ks)), key=row["auroc"].__getitem__, default=0)
        panels = {
            f"{name}, k = {ks[c]}: AUROC {row['sets'][name]['auroc'][c]:.3f}": {
                own_name: scores[OWN][kind][:, c],
                name: scores[name][kind][:, c],
            }
            for c in sorted({0, useful})
            for name in _foreign(scores)
        }
        figures.histograms(
            out / f"histograms_{kind}.png",
            panels,
            xlabel="E_>k",
            title=f"Scores of the {kind} scheme at the smallest k and at the best other one;"
            f" {own_name}, {count} held-out images; larger: more foreign",
        )

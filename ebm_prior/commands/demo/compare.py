"""The demo itself: train, measure, and say in words and pictures what came out."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ebm_prior
from ebm_prior.commands.demo import Settings
from ebm_prior.commands.demo.measure import FIT_DRAWS, KINDS, draw, table
from ebm_prior.commands.demo.training import Job
from ebm_prior.commands.shared.classifier import train_classifier
from ebm_prior.commands.shared.measure import (
    CONFIDENT,
    NUM_COMPONENTS,
    ClassifierRuler,
    PixelComponents,
)
from ebm_prior.commands.shared.panels import save_panels
from ebm_prior.commands.shared.trainings import train
from ebm_prior.files import written_whole
from ebm_prior.prior import EBMPrior
from nvae import checkpoint, data


def run(settings: Settings, backbone_kl1: Path) -> None:
    """Write `report.json`, `gaussian_vs_ebm.png` and `prior.safetensors`; print the table."""
    started = time.perf_counter()
    backbone = settings.checkpoint
    kl_weights = [kl_weight(path) for path in (backbone, backbone_kl1)]
    torch.set_num_threads(1)
    digits, held_out = (data.load("digits", None, train=half) for half in (True, False))
    x, x_held_out = (
        torch.stack([half[i] for i in range(len(half))]) for half in (digits, held_out)
    )
    if settings.num_samples > len(x):
        raise ValueError(
            f"--num_samples {settings.num_samples}: expected at most the {len(x)} training images"
        )
    assert digits.labels is not None
    classifier = train_classifier(x, digits.labels, seed=0)
    hits = classifier(x_held_out).argmax(1) == held_out.labels
    reference = torch.cat([x, x_held_out])
    ruler = ClassifierRuler(classifier, PixelComponents.of(reference), reference)

    steps, first = settings.iterations, settings.seeds[0]
    jobs = [Job(backbone, seed, settings.out / f"seed-{seed}", steps) for seed in settings.seeds]
    extra = Job(backbone_kl1, first, settings.out / f"kl1-seed-{first}", steps)
    rows: dict[Path, dict[str, Any]] = {}
    for job in train([*jobs, extra], settings.jobs, steps):
        prior = ebm_prior.fast(ebm_prior.load(job.prior, checkpoint.load(job.checkpoint)))
        assert isinstance(prior, EBMPrior)
        samples = draw(prior, x, settings.num_samples, job.seed)
        rows[job.out] = {"seed": job.seed, **table(ruler, samples)}
        if job is jobs[0]:
            save_picture(settings.out / "gaussian_vs_ebm.png", x_held_out, samples, rows[job.out])

    report = {
        "seconds": round(time.perf_counter() - started, 1),
        "kl_weight": kl_weights[0],
        "runs": [rows[job.out] for job in jobs],
        "at_kl_weight_1": {
            "kl_weight": kl_weights[1],
            "runs": [rows[extra.out]],
        },
        "real": {"confident": ruler.measure(x_held_out)["confident"]},
        "protocol": {
            "frechet": f"{classifier.num_features} pre-activations of a convolutional digit"
            f" classifier trained on the {len(x)} training digits",
            "frechet_pixels": f"{NUM_COMPONENTS} leading principal components of the pixels",
            "confident": f"share of samples with a class of probability above {CONFIDENT}",
            "classifier_accuracy_held_out": round(float(hits.float().mean()), 4),
            "reference": f"all {len(reference)} digits; backbone and prior saw {len(x)} of them",
            "samples_of_each_kind": settings.num_samples,
            "image": "one draw of the pixel distribution, temperature 1",
            "fitted_gaussian": f"full covariance, {FIT_DRAWS} posterior draws per training image",
            "no_model_chain": "the EBM's chain with f = 0",
            "training": f"preset digits, {settings.iterations} iterations, last iterate",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        },
    }
    with written_whole(settings.out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    with written_whole(settings.out / "prior.safetensors") as temporary:
        shutil.copyfile(jobs[0].prior, temporary)
    print(told(report))
    print(f"\nwrote {settings.out}/report.json, gaussian_vs_ebm.png, prior.safetensors")


def kl_weight(path: Path) -> float:
    """The KL weight a checkpoint was trained with.

    Raises:
        ValueError: it is not an NVAE of the digits.
    """
    read = checkpoint.read(path)
    if read.config.dataset != "digits":
        raise ValueError(f"{path} is an NVAE of {read.config.dataset}, expected one of the digits")
    return float(read.args.get("kl_weight", 1.0))


def save_picture(
    path: Path, real: Tensor, samples: dict[str, Tensor], row: dict[str, Any]
) -> None:
    """A panel of every kind, two beside each other; the first images, none picked by hand."""
    panels = {}
    for kind, x in {**samples, "real": real}.items():
        value = f", FD {row['frechet'][kind]:.1f}" if kind in samples else ""
        panels[KINDS.get(kind, "real digits, held out") + value] = x
    save_panels(path, panels)


def told(report: dict[str, Any]) -> str:
    """The numbers as a table, and in words no more than they show."""
    heads = ["", "seed", *(label.replace(" prior", "") for label in KINDS.values())]
    lines = ["{:<24}{:>5}".format(*heads[:2]) + "".join(f"{head:>17}" for head in heads[2:])]
    for name, runs in (
        (f"KL weight {report['kl_weight']:g}", report["runs"]),
        (f"KL weight {report['at_kl_weight_1']['kl_weight']:g}", report["at_kl_weight_1"]["runs"]),
    ):
        lines.append(name)
        for quantity, title in (
            ("frechet", "Fréchet, classifier"),
            ("frechet_pixels", "Fréchet, pixels"),
            ("confident", f"share above {CONFIDENT}"),
        ):
            for row in runs:
                values = "".join(f"{row[quantity][kind]:>17.4g}" for kind in KINDS)
                lines.append(f"  {title:<22}{row['seed']:>5}{values}")
    lines += ["", *sentences(report["runs"], report["kl_weight"]), ""]
    lines += sentences(**report["at_kl_weight_1"])
    lines.append(f"{report['seconds']:.0f} s in all.")
    return "\n".join(lines)


def sentences(runs: Sequence[dict[str, Any]], kl_weight: float) -> list[str]:
    """What the Fréchet distances in classifier features say, seed by seed."""

    def ratios(kind: str, to: str) -> str:
        values = sorted(row["frechet"][kind] / row["frechet"][to] for row in runs)
        return " to ".join(f"{value:.2f}" for value in dict.fromkeys((values[0], values[-1])))

    def share(kind: str) -> float:
        return sum(row["confident"][kind] for row in runs) / len(runs)

    def ahead(control: str) -> str:
        return f"{sum(r['frechet']['ebm'] < r['frechet'][control] for r in runs)} of {len(runs)}"

    return [
        f"Backbone with KL weight {kl_weight:g}, {len(runs)} seed(s). Fréchet distance of EBM"
        f" samples: {ratios('ebm', 'gaussian')} of the Gaussian prior's.",
        f"Controls: the same chain without a model (f = 0) {ratios('no_model_chain', 'gaussian')},"
        f" a fitted Gaussian {ratios('fitted_gaussian', 'gaussian')}. The EBM prior is below the"
        f" chain in {ahead('no_model_chain')} and below the fitted Gaussian in"
        f" {ahead('fitted_gaussian')}.",
        f"Samples the classifier is sure of: {share('gaussian'):.0%} from the Gaussian prior,"
        f" {share('ebm'):.0%} from the EBM prior, {share('reconstruction'):.0%} of"
        " reconstructions.",
    ]

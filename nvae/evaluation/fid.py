"""Mode `evaluate_fid`: FID, KID and IS of samples, and FID of reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvae import feature_networks, features, metrics
from nvae.digest import sha256
from nvae.evaluation import blocks, posterior, source
from nvae.evaluation.job import Job
from nvae.features import FeatureNetwork, Features


def run(job: Job) -> None:
    """Print upstream's line and write `report.json`."""
    settings, here = job.settings, job.here
    network = feature_networks.network(settings.inception, settings.features).to(here.device)
    dataset = job.model.config.dataset
    path = metrics.path_of(settings.fid_dir, dataset, network.label)
    reference = _reference(job, path)
    metrics.check_same_features(reference, network.label, network.num_features)

    found = {job.prior: _features(job, network, settings.num_samples, job.draw, "samples")}
    held: source.Source | None = None
    if settings.num_reconstructions:
        held = source.load(settings.data, job.model.config, train=settings.eval_on_train)
        images = held

        def again(block: blocks.Block) -> Tensor:
            return posterior.reconstructions(job, images, block)[1]

        count = min(settings.num_reconstructions, len(held))
        found["reconstruction"] = _features(job, network, count, again, "reconstructions")
    if not here.is_main:
        return

    numbers: dict[str, Any] = {}
    for name, whole in found.items():
        assert whole is not None
        numbers[name] = measured(reference, whole, network.label, settings.seed)
        tell("" if name == job.prior else f"{name} ", numbers[name], network.label)
    protocol = {
        **features.described(network),
        "reference": str(path),
        "reference_sha256": sha256(path),
        "reference_protocol": reference.protocol,
        "num_samples": settings.num_samples,
        "temperature": job.temperature,
        "batch_size": job.batch_size,
        "pixels": settings.pixels,
        "num_reconstructions": min(settings.num_reconstructions, len(held)) if held else 0,
        "reconstructed": held.name if held else None,
        **metrics.PROTOCOL,
    }
    job.report({**numbers, "protocol": protocol})


def measured(
    reference: metrics.Statistics, found: Features, label: str, seed: int
) -> dict[str, float]:
    """Every number that reference and features allow, under the names of the features."""
    whole = metrics.Statistics.of(found.pooled, label=label)
    numbers = {metrics.key("fid", label): metrics.frechet(reference, whole)}
    if reference.sample is not None:
        mean, deviation = metrics.kernel_distance(reference.sample, found.pooled, seed)
        name = metrics.key("kid", label)
        numbers |= {name: mean, f"{name}_std": deviation}
    if found.logits is not None and len(found.logits) >= 2 * metrics.IS_SPLITS:
        mean, deviation = metrics.inception_score(found.logits, seed)
        numbers |= {"is": mean, "is_std": deviation}
    return numbers


def _features(
    job: Job,
    network: FeatureNetwork,
    count: int,
    make: Callable[[blocks.Block], Tensor],
    what: str,
) -> Features | None:
    """Features of `count` images in their order, on the main process; None on the others."""
    parts = {
        block.number: network(make(block))
        for block in blocks.mine(count, job.batch_size, job.here, what)
    }
    return joined(blocks.gathered(parts, job.here))


def joined(parts: dict[int, Features] | None) -> Features | None:
    """The features of all blocks in one."""
    if parts is None:
        return None
    logits = [part.logits for part in parts.values() if part.logits is not None]
    pooled = torch.cat([part.pooled for part in parts.values()])
    return Features(pooled, torch.cat(logits) if logits else None)


def _reference(job: Job, path: Any) -> metrics.Statistics:
    if path.is_file():
        return metrics.read(path)
    settings, dataset = job.settings, job.model.config.dataset
    network = f" --inception {settings.inception}" if settings.inception else ""
    if settings.features != features.FID:
        network += f" --features {settings.features}"
    raise ValueError(
        f"no reference statistics {path}; write them once: python -m nvae.fid_stats --dataset"
        f" {dataset} --data DATA --fid_dir {settings.fid_dir}{network}"
    )


def tell(prefix: str, numbers: dict[str, float], label: str) -> None:
    """Print the distance: upstream's line where it is FID, else with a caution."""
    name = metrics.key("fid", label)
    caution = ""
    if label.startswith("random"):
        caution = " (features of a random network: not comparable with any FID)"
    elif label != features.FID:
        caution = f" (features of an earlier layer, {label} values: not FID)"
    print(f"{prefix}{name} is {numbers[name]:f}{caution}")

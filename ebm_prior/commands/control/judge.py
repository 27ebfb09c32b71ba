"""Who says whether a sample obeys: classifiers of pixels, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebm_prior import parallel
from ebm_prior.commands.shared.arguments import written_signs
from ebm_prior.commands.shared.classifier import SmallClassifier, classify, train_classifier
from ebm_prior.commands.shared.labels import Labels
from ebm_prior.commands.shared.session import Job
from ebm_prior.prior import EBMPrior

TINY = 8  # pixels up to which classifiers are trained on the CPU: the same on every machine


@dataclass(frozen=True)
class Judge:
    """A pixel classifier per attribute, trained on the labelled training images.

    Attributes:
        report: per attribute, how far the classifiers of pixels and of latents can be trusted.
        spread: per attribute and class, the deviation of held-out images from the class's mean.
    """

    networks: dict[str, SmallClassifier]
    report: dict[str, dict[str, Any]]
    spread: dict[str, list[float | None]]

    @classmethod
    def trained(cls, job: Job, prior: EBMPrior, images: Tensor, labels: list[Labels]) -> Judge:
        """Train the classifiers, and try them and the prior's own on held-out images.

        Args:
            images, labels: those for training, a `Labels` per attribute of the prior.
        """
        held_out, truths = job.labelled(False, [each.name for each in labels])
        networks = {}
        for attribute, each in zip(prior.config.attributes, labels, strict=True):
            networks[each.name] = _trained(job, images, each.values, attribute.classes)
        latent = _latent_accuracy(job, prior, held_out, truths)
        report, spread = {}, {}
        for each, truth in zip(labels, truths, strict=True):
            known = truth.values >= 0
            values, shown = truth.values[known], held_out[known]
            seen = classify(networks[each.name], shown).argmax(1)
            report[each.name] = {
                "pixel_classifier": share(seen == values),
                **latent[each.name],
                "most_frequent_class": share(values == values.mode().values),
                "held_out_images": len(values),
                "training_images": int((each.values >= 0).sum()),
            }
            spread[each.name] = [
                deviation(shown[values == value]) for value in range(len(each.classes))
            ]
        return cls(networks, report, spread)

    def see(self, name: str, images: Tensor) -> Tensor:
        """(N,): the most probable class of each image."""
        return classify(self.networks[name], images).argmax(1)

    def shares(self, name: str, images: Tensor) -> list[float]:
        """The share of each class among the images."""
        seen = self.see(name, images)
        return [share(seen == value) for value in range(len(self.spread[name]))]


def deviation(images: Tensor) -> float | None:
    """Root of the pixels' summed variance: how different images are; None for fewer than 2."""
    if len(images) < 2:
        return None
    return float(images.flatten(1).var(0).sum().sqrt())


def share(hits: Tensor) -> float:
    """The share of True."""
    return round(float(hits.double().mean()), 4)


def _trained(job: Job, images: Tensor, values: Tensor, classes: int) -> SmallClassifier:
    known = values >= 0
    shape = images.shape[1:]
    network = train_classifier(
        images[known],
        values[known],
        seed=0,
        num_classes=classes,
        flip=not written_signs(job.dataset),
        device="cpu" if max(shape[1:]) <= TINY else job.here.device,
    )
    # Processes judge with the same weights, to the last bit.
    network.load_state_dict(parallel.collect(network.state_dict())[0])
    return network


def _latent_accuracy(
    job: Job, prior: EBMPrior, images: Tensor, truths: list[Labels]
) -> dict[str, dict[str, float]]:
    """Of the prior's own classifiers on posterior latents: as they are, and as in training."""
    u = job.infer(images, "control")
    widths = [attribute.classes for attribute in prior.config.attributes]

    def logits(noisy: bool) -> list[Tensor]:
        def make(first: int, count: int) -> Tensor:
            block = u[first : first + count].to(job.here.device)
            if noisy:
                block = prior.perturb(block, 0, job.generator("control noise", first))
            return torch.cat(prior.class_logits(block), dim=1)

        return list(job.blocks(len(u), "latents", make).split(widths, dim=1))

    found: dict[str, dict[str, float]] = {each.name: {} for each in truths}
    for key, noisy in (("latent_classifier", False), ("latent_classifier_1%_noise", True)):
        for each, votes in zip(truths, logits(noisy), strict=True):
            known = each.values >= 0
            found[each.name][key] = share(votes.argmax(1)[known] == each.values[known])
    return found

"""What commands measure images with: a Fréchet distance in features that fit the data set.

On the digits, and wherever asked for, the features are those of a small classifier trained on the
spot; elsewhere FID's Inception network from a local file, or a random network. A ruler looks at
images block by block and keeps features only, so that any number of images can be measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior import parallel
from ebm_prior.commands.shared.arguments import written_signs
from ebm_prior.commands.shared.classifier import SmallClassifier, accuracy, train_classifier
from ebm_prior.commands.shared.subset import Images
from nvae import metrics
from nvae.features import FID, FeatureNetwork, Features, described

if TYPE_CHECKING:
    from ebm_prior.commands.shared.session import Job

CONFIDENT = 0.95  # the classifier's probability from which an image counts as legible
NUM_COMPONENTS = 32
BLOCK = 2000  # images in memory at once


class Seen(NamedTuple):
    """What a ruler keeps of images; on the CPU."""

    features: Tensor  # (N, F)
    logits: Tensor | None = None  # (N, C), of classes
    pixels: Tensor | None = None  # (N, P), components of the pixels


def joined(parts: Iterable[Seen]) -> Seen:
    """The blocks in one."""
    features, logits, pixels = zip(*parts, strict=True)
    return Seen(
        torch.cat(features),
        None if logits[0] is None else torch.cat(logits),
        None if pixels[0] is None else torch.cat(pixels),
    )


class Ruler(ABC):
    """Measures images against the reference it was made with.

    Attributes:
        name: the key of the distance in reports: frechet, fid, fid_768, fid_random.
        title: the distance in words, for tables and figures.
        statistics: those of the reference's features.
        protocol: what a report says of network and reference.
    """

    name: str
    title: str
    statistics: metrics.Statistics
    protocol: dict[str, Any]

    @abstractmethod
    def look(self, images: Tensor) -> Seen:
        """Features of images (N, C, H, W) in [0, 1]."""

    @abstractmethod
    def numbers(self, seen: Seen, seed: int = 0) -> dict[str, float]:
        """Every number that can be said of the images; the distance is the one called `name`."""

    def measure(self, images: Tensor, seed: int = 0) -> dict[str, float]:
        """`numbers` of images."""
        return self.numbers(self.look(images), seed)

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F)."""
        return self.look(images).features

    def distance(self, images: Tensor) -> float:
        """The Fréchet distance to the reference."""
        return self.frechet(self.look(images))

    def frechet(self, seen: Seen) -> float:
        """The Fréchet distance of what was seen to the reference."""
        return metrics.frechet(self.statistics, metrics.Statistics.of(seen.features))

    def classify(self, images: Tensor) -> Tensor | None:
        """(N, classes) logits where the ruler knows the classes of the data set, else None."""
        return None

    @staticmethod
    def of(
        job: Job,
        images: Images | None = None,
        labels: Tensor | None = None,
        *,
        inception: str | None = None,
        features: str | None = None,
        fid_dir: str | None = None,
    ) -> Ruler:
        """The ruler of a job's data set.

        Args:
            images: training images, the reference; by default all of the job's. On the digits
                those held out are added, as in the demo.
            labels: of the images, where a classifier is to be trained on them.
            features: classifier, random, or the number of Inception features (`inception`). By
                default classifier for the digits, elsewhere 2048.
            fid_dir: read the reference statistics from here (`python -m nvae.fid_stats`).

        Raises:
            ValueError: no weights, no labels or no statistics.
        """
        digits = job.dataset == "digits"
        features = features or ("classifier" if digits else FID)
        if features != "classifier":
            return _network_ruler(job, images, inception, features, fid_dir)
        if images is None:
            images, labels = job.chosen(train=True)
        if labels is None:
            raise ValueError(
                f"{job.dataset} has no labels to train a classifier with; give --features random,"
                " or --inception FILE --features 2048"
            )
        held_out, their_labels = job.images(train=False) if digits else (None, None)
        return _classifier_ruler(job, images[:], labels, held_out, their_labels)


@dataclass(frozen=True)
class PixelComponents:
    """The leading principal components of the reference images' pixels."""

    mean: Tensor
    directions: Tensor  # (pixels, components)

    @classmethod
    def of(cls, images: Tensor, components: int = NUM_COMPONENTS) -> PixelComponents:
        """Find them by singular value decomposition of the centred pixels."""
        flat = images.flatten(1)
        mean = flat.mean(0)
        _, _, rows = torch.linalg.svd(flat - mean, full_matrices=False)
        return cls(mean, rows[:components].T)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, components)."""
        return (x.flatten(1) - self.mean) @ self.directions


class ClassifierRuler(Ruler):
    """Features of a classifier of the data set and, if given, components of the pixels."""

    name = "frechet"
    title = "Fréchet distance, classifier features"

    def __init__(
        self,
        classifier: SmallClassifier,
        components: PixelComponents | None,
        reference: Tensor,
        protocol: dict[str, Any] | None = None,
    ) -> None:
        self.classifier, self.components = classifier, components
        self.protocol = protocol or {}
        seen = self.look(reference)
        self.statistics = metrics.Statistics.of(seen.features)
        self.pixels = seen.pixels

    @torch.no_grad()
    def look(self, images: Tensor) -> Seen:
        device = next(self.classifier.parameters()).device
        parts = []
        for x in images.split(BLOCK):
            features = self.classifier.features(x.to(device))
            logits = self.classifier.head(features).cpu()
            pixels = self.components.features(x.cpu()) if self.components else None
            parts.append(Seen(features.cpu(), logits, pixels))
        return joined(parts)

    def numbers(self, seen: Seen, seed: int = 0) -> dict[str, float]:
        """Fréchet distance in both spaces, and the share of legible images."""
        found = {self.name: self.frechet(seen)}
        if self.pixels is not None and seen.pixels is not None:
            found["frechet_pixels"] = metrics.frechet_distance(self.pixels, seen.pixels)
        assert seen.logits is not None
        sure = seen.logits.softmax(1).amax(1) > CONFIDENT
        return {**found, "confident": float(sure.float().mean())}

    def classify(self, images: Tensor) -> Tensor | None:
        return self.look(images).logits


class NetworkRuler(Ruler):
    """Features of FID's Inception network, which alone give FID, or of a random one."""

    def __init__(
        self,
        network: FeatureNetwork,
        statistics: metrics.Statistics,
        protocol: dict[str, Any] | None = None,
    ) -> None:
        self.network, self.statistics, self.protocol = network, statistics, protocol or {}
        self.name = metrics.key("fid", network.label)
        kind = network.label.partition("-")[0]
        self.title = "FID" if kind == FID else f"Fréchet distance, {kind} features (not FID)"

    def look(self, images: Tensor) -> Seen:
        found = self.network(images)
        return Seen(found.pooled, found.logits)

    def numbers(self, seen: Seen, seed: int = 0) -> dict[str, float]:
        """The distance, KID where the reference keeps features, IS where there are logits."""
        from nvae.evaluation import fid

        found = Features(seen.features, seen.logits)
        return fid.measured(self.statistics, found, self.network.label, seed)


def _classifier_ruler(
    job: Job,
    images: Tensor,
    labels: Tensor,
    held_out: Tensor | None,
    held_out_labels: Tensor | None,
) -> ClassifierRuler:
    shape = images.shape[1:]
    # Tiny images: always on the CPU, so that the ruler is the same on every machine.
    tiny = max(shape[1:]) <= 8
    device = "cpu" if tiny else job.here.device
    flip = shape[0] == 3 and not written_signs(job.dataset)
    classifier = train_classifier(images, labels, seed=0, flip=flip, device=device)
    # Processes measure with the same weights, to the last bit.
    classifier.load_state_dict(parallel.collect(classifier.state_dict())[0])
    reference = images if held_out is None else torch.cat([images, held_out])
    protocol: dict[str, Any] = {
        "features": f"{classifier.num_features} pre-activations of a convolutional classifier"
        f" trained on the {len(images)} training images of {job.dataset}",
        "confident": f"share of samples with a class of probability above {CONFIDENT}",
        "reference": f"{len(reference)} images",
    }
    if held_out is not None and held_out_labels is not None:
        share = accuracy(classifier, held_out, held_out_labels)
        protocol["classifier_accuracy_held_out"] = round(share, 4)
    if tiny:
        protocol["frechet_pixels"] = f"{NUM_COMPONENTS} leading principal components of the pixels"
    components = PixelComponents.of(reference) if tiny else None
    return ClassifierRuler(classifier, components, reference, protocol)


def _pooled(job: Job, network: FeatureNetwork, images: Images) -> Tensor:
    """Features (N, F) of the reference, block by block, each process its share."""
    firsts = range(0, len(images), BLOCK)
    mine = firsts[job.here.rank :: job.here.world_size]
    found = {first: network(images[first : first + BLOCK]).pooled for first in mine}
    every = {first: x for part in parallel.collect(found) for first, x in part.items()}
    return torch.cat([every[first] for first in firsts])


def _network_ruler(
    job: Job, images: Images | None, inception: str | None, features: str, fid_dir: str | None
) -> NetworkRuler:
    from nvae import feature_networks
    from nvae.digest import sha256

    network = feature_networks.network(inception, features).to(job.here.device)
    protocol = {**described(network), **metrics.PROTOCOL}
    if fid_dir is not None:
        path = metrics.path_of(fid_dir, job.dataset, network.label)
        statistics = metrics.read(path)
        metrics.check_same_features(statistics, network.label, network.num_features)
        protocol |= {
            "reference": str(path),
            "reference_sha256": sha256(path),
            "reference_protocol": statistics.protocol,
        }
        return NetworkRuler(network, statistics, protocol)
    if images is None:
        images, _ = job.chosen(train=True)
    pooled = _pooled(job, network, images)
    statistics = metrics.Statistics.of(pooled, label=network.label, sample=pooled)
    reference = f"{len(images)} training images of {job.dataset}"
    return NetworkRuler(network, statistics, {**protocol, "reference": reference})

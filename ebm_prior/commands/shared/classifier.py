"""A small convolutional classifier of a data set: its features measure, its classes judge."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 8  # pixels; images up to this size need no more than two convolutions
BATCHES = 3000  # of training, about, for sets so large that few epochs are enough


class SmallClassifier(nn.Module):
    """Convolutions that halve the map to about 4x4, doubling the width; a linear layer; a head.

    Features are the pre-activations of the linear layer. Images of at most 8x8 pixels have one
    convolution per size and 32 features, larger ones two with batch norm and 128 features.
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), num_classes: int = 10) -> None:
        super().__init__()
        channels, *size = shape
        width, small = 24, max(size) <= SMALL
        self.num_features = 32 if small else 128
        body: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
        for _ in range(max(1, round(math.log2(min(size) / 4)))):
            body += [nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)]
            if not small:
                body += [nn.BatchNorm2d(2 * width), nn.SiLU()]
                body += [nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width)]
            body += [nn.SiLU()]
            width, size = 2 * width, [-(-side // 2) for side in size]
        inner = width * math.prod(size)
        self.body = nn.Sequential(*body, nn.Flatten(), nn.Linear(inner, self.num_features))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(self.num_features, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1] -> (B, num_features), before the activation."""
        return self.body(2 * x - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_classes) logits."""
        return self.head(self.features(x))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    num_classes: int | None = None,
    epochs: int | None = None,
    batch_size: int = 100,
    flip: bool = False,
    device: torch.device | str = "cpu",
) -> SmallClassifier:
    """Train the classifier from scratch: Adam 2e-3 with a cosine, pixel noise of 0.05.

    Seconds for the digits, minutes for tens of thousands of colour images on a CPU. Random numbers
    come from the CPU, so that they do not depend on the device.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: (N,) long, 0 to num_classes - 1.
        num_classes: by default one more than the largest label.
        epochs: by default 30, of large sets fewer: about 3000 batches, at least 6 epochs.
        flip: flip images at random; not for written signs.

    Raises:
        ValueError: labels that do not go with the images.
    """
    labels = labels.long()
    if labels.shape != images.shape[:1] or not len(labels) or labels.min() < 0:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for images {tuple(images.shape)}; expected one"
            " label of at least 0 for each image"
        )
    classes = num_classes or int(labels.max()) + 1
    batches = -(-len(images) // batch_size)
    epochs = epochs or max(6, min(30, BATCHES // batches))
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = images.shape[1:]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = SmallClassifier((channels, height, width), classes).to(device).train()
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=generator).split(batch_size):
                x = images[index].cpu()
                noisy = x + 0.05 * torch.randn(x.shape, generator=generator)
                if flip:
                    flipped = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
                    noisy = torch.where(flipped, noisy.flip(-1), noisy)
                loss = F.cross_entropy(network(noisy.to(device)), labels[index].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def classify(network: SmallClassifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """(N, C, H, W) -> (N, num_classes) logits on the CPU, in blocks."""
    device = next(network.parameters()).device
    return torch.cat([network(x.to(device)).cpu() for x in images.split(batch_size)])


def accuracy(network: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose most probable class is their label."""
    return float((classify(network, images).argmax(1) == labels.cpu()).float().mean())

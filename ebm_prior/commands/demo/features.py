"""The two feature spaces in which the demo measures digits: a classifier's and the pixels' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 32


class DigitClassifier(nn.Module):
    """A small convolutional classifier of 8x8 digits; features are a layer's pre-activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * 16, NUM_FEATURES),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(NUM_FEATURES, 10))

    def features(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) images in [0, 1] -> (B, 32), before the activation."""
        return self.body(2 * x - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, 10) logits."""
        return self.head(self.features(x))


def train_classifier(
    images: Tensor, labels: Tensor, *, seed: int, epochs: int = 30, batch_size: int = 100
) -> DigitClassifier:
    """Train the classifier from scratch: Adam 2e-3 with a cosine, pixel noise of 0.05. Seconds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitClassifier()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch_size):
            x = images[index]
            noisy = x + 0.05 * torch.randn(x.shape, generator=generator)
            loss = F.cross_entropy(network(noisy), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class PixelComponents:
    """The leading principal components of the reference images' pixels."""

    mean: Tensor
    directions: Tensor  # (pixels, components)

    @classmethod
    def of(cls, images: Tensor, components: int = NUM_FEATURES) -> PixelComponents:
        """Find them by singular value decomposition of the centred pixels."""
        flat = images.flatten(1)
        mean = flat.mean(0)
        _, _, rows = torch.linalg.svd(flat - mean, full_matrices=False)
        return cls(mean, rows[:components].T)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, components)."""
        return (x.flatten(1) - self.mean) @ self.directions

"""What the image metrics compare: features of images under a network.

FID's Inception network (`nvae.inception`) if its weights are at hand, else a small random one.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FID = "2048"  # the label of the features that FID is defined with
CHUNK = 50  # images at once; at 299x299 pixels each needs about 10 MB


class Features(NamedTuple):
    pooled: Tensor  # (B, F)
    logits: Tensor | None  # (B, 1008) without the bias, as the Inception Score is defined


class FeatureNetwork(nn.Module):
    """Images (B, 1 or 3, H, W) in [0, 1] to features, always in float32.

    `label` names the features wherever their numbers are told; `sha256` is that of the weights'
    file (of the weights themselves, if there is no file).
    """

    label: str
    sha256: str
    num_features: int

    def features(self, x: Tensor) -> Features:
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        device = next(self.parameters()).device
        parts = []
        # TensorFloat-32 would keep only 10 bits of the mantissa in each convolution.
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            for chunk in images.split(CHUNK):
                x = chunk.to(device, torch.float32).clamp(0, 1)
                parts.append(self.features(x.expand(-1, 3, -1, -1)))
        pooled = torch.cat([part.pooled.cpu() for part in parts])
        logits = [part.logits.cpu() for part in parts if part.logits is not None]
        return Features(pooled, torch.cat(logits) if logits else None)


class RandomNetwork(FeatureNetwork):
    """Four random convolutions of fixed seed at the images' own resolution, 512 features.

    Per channel the mean and the deviation over positions. Good for comparing models with each
    other on one data set; the numbers mean nothing beside anybody else's.
    """

    WIDTHS = (32, 64, 80, 80)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers, channels = [], 3
        for width in self.WIDTHS:
            layer = nn.Conv2d(channels, width, 3, padding=1)
            gain = (2 / (9 * channels)) ** 0.5
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * gain
            layer.bias = nn.Parameter(torch.randn(width, generator=generator) * 0.1)
            layers.append(layer)
            channels = width
        self.layers = nn.ModuleList(layers)
        self.requires_grad_(False)
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.numpy().tobytes())
        self.num_features, self.sha256 = 2 * sum(self.WIDTHS), digest.hexdigest()
        # Another stream of random numbers is another network: the label shows it.
        self.label = f"random-{self.sha256[:12]}"

    def features(self, x: Tensor) -> Features:
        x = 2 * x - 1
        found = []
        for layer in self.layers:
            x = F.relu(layer(x))
            found += [x.mean((2, 3)), x.flatten(2).std(2, correction=0)]
            if min(x.shape[2:]) > 2:
                x = F.avg_pool2d(x, 2)
        return Features(torch.cat(found, 1), None)


def network(inception: str | None, features: str) -> FeatureNetwork:
    """The network that the flags `--inception` and `--features` name.

    Raises:
        ValueError: features other than random without a file, or what `load` refuses.
    """
    if features == "random":
        return RandomNetwork().eval()
    if inception is None:
        raise ValueError(
            f"--features {features} need the weights of FID's Inception network, a local file:"
            " --inception pt_inception-2015-12-05.pth (or .safetensors); without it --features"
            " random gives numbers for relative use, not comparable with any FID"
        )
    from nvae import inception as fid_network

    return fid_network.load(inception, int(features))


def described(network: FeatureNetwork) -> dict[str, object]:
    """What a report says of the network."""
    label = network.label
    return {
        "features": label,
        "num_features": network.num_features,
        "network": "random convolutions" if label.startswith("random") else "Inception 2015-12-05",
        "network_sha256": network.sha256,
        "comparable": label == FID,
    }

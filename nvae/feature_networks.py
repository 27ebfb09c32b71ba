"""Networks whose features are compared: FID's Inception if its file is there, or a random one."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae import inception as fid_network
from nvae.features import FeatureNetwork, Features


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
    return fid_network.load(inception, int(features))


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

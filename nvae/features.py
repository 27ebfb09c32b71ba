"""What the image metrics compare: features of images under a network."""

from __future__ import annotations

from typing import NamedTuple

import torch
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

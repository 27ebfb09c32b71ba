"""Re-estimation of the BatchNorm statistics from prior samples (contract 5.3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nvae.model import AutoEncoder

_CHECK_EVERY = 50  # each check waits for the device


@torch.no_grad()
def readjust(
    model: AutoEncoder,
    *,
    temperature: float,
    iterations: int = 500,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> None:
    """Draw prior samples in training mode, so that BN's running statistics become theirs.

    Only layers on the generating path change; with momentum 0.05 the result is an average over
    about the last 60 batches, and depends on the noise. Runs in float32, outside autocast. The
    model is left in eval mode.

    Raises:
        ValueError: a statistic became infinite or NaN; the old ones are put back.
    """
    if iterations < 1 or batch_size < 1:
        raise ValueError(
            f"got {iterations} iterations of {batch_size} samples, expected at least 1 of 1"
        )
    layers = model.batch_norms()
    before = {name: [b.clone() for b in layer.buffers()] for name, layer in layers}
    steps: Iterable[int] = range(1, iterations + 1)
    if progress:
        from tqdm import tqdm

        steps = tqdm(steps, desc="re-estimating BatchNorm")
    device = model.prior_ftr0.device.type
    model.train()
    try:
        with torch.autocast(device, enabled=False):
            for step in steps:
                model.sample(batch_size, temperature, generator=generator)
                if step % _CHECK_EVERY == 0 or step == iterations:
                    _check_finite(model, step)
    except ValueError:
        for name, layer in layers:
            for buffer, old in zip(layer.buffers(), before[name], strict=True):
                buffer.copy_(old)
        raise
    finally:
        model.eval()


def _check_finite(model: AutoEncoder, step: int) -> None:
    for name, layer in model.batch_norms():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        if not (layer.running_mean.isfinite().all() and layer.running_var.isfinite().all()):
            raise ValueError(
                f"BatchNorm re-estimation: the statistics of {name} are not finite after"
                f" {step} batches; the weights or the temperature are at fault. The old statistics"
                " were kept"
            )

"""How probable are images under the model: ELBO and importance-weighted bound (contract 6.6)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nvae import distributed, losses
from nvae.arch import DataSet
from nvae.model import AutoEncoder
from nvae.seeds import seeded
from nvae.training.interrupt import leave_signals


class Likelihood(NamedTuple):
    """Means over images, in nats per image and in bits per value of an image."""

    nelbo: float
    neg_log_p: float
    nelbo_bpd: float
    neg_log_p_bpd: float
    images: int


def bits_per_dim(data: DataSet) -> float:
    """The factor from nats per image to bits per dimension, 1 / (ln 2 * number of values)."""
    return 1 / (math.log(2) * data.num_output)


@torch.no_grad()
def bounds(
    model: AutoEncoder, x: Tensor, k: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""NELBO and the importance-weighted bound on -log p(x), each (B,), in float32.

    .. math:: \overline{-\log p(x|z) + \sum_i KL_i}, \quad
              \ln k - \mathrm{logsumexp}_k(\log p(x, z) - \log q(z | x))

    The encoder runs once, the walk `k` times with fresh noise; the model is in eval mode.

    Args:
        x: (B, C, H, W) in [0, 1], at full bit depth.
    """
    data = model.config.data
    nelbo, log_weights = [], []
    with torch.autocast(x.device.type, enabled=False):
        x = losses.reduce_bits(x, model.config.num_x_bits)
        bottom_up = model.encode(x)
        for _ in range(k):
            result = model.posterior_pass(bottom_up, generator=generator)
            output = model.decoder_output(result.logits)
            reconstruction = losses.reconstruction_loss(output, x, data.border)
            nelbo.append(reconstruction + torch.stack(result.kl_all).sum(0))
            log_weights.append(
                losses.log_importance_weight(reconstruction, result.log_q, result.log_p)
            )
    bound = math.log(k) - torch.stack(log_weights).logsumexp(0)
    return torch.stack(nelbo).mean(0), bound


def importance_weighted(
    model: AutoEncoder,
    images: Dataset[Tensor],
    k: int,
    *,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    progress: bool = False,
) -> Likelihood:
    """NELBO and IW bound of a data set with `k` importance samples, each image counted once.

    Blocks of `batch_size` images are dealt out to the processes; noise belongs to the block, so
    their number changes nothing but rounding. (Upstream repeats images until all processes have
    the same number.) The model's mode is put back at the end.

    Raises:
        ValueError: no images, or `k` below 1.
    """
    sized: Any = images  # `Dataset` promises no length, those with positions have one
    count = len(sized)
    if count < 1 or k < 1 or batch_size < 1:
        raise ValueError(
            f"got {count} images in batches of {batch_size} and {k} importance samples; expected"
            " at least one of each"
        )
    mine = range(distributed.rank(), math.ceil(count / batch_size), distributed.world_size())
    blocks: Any = DataLoader(
        images,
        batch_sampler=[
            list(range(block * batch_size, min((block + 1) * batch_size, count))) for block in mine
        ],
        num_workers=workers,
        worker_init_fn=leave_signals,
        generator=seeded("cpu", seed),  # else the loader draws from PyTorch's own
    )
    if progress:
        from tqdm import tqdm

        blocks = tqdm(blocks, desc=f"{k} importance samples", unit="batch", leave=False)
    device, was_training = model.prior_ftr0.device, model.training
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for block, x in zip(mine, blocks, strict=True):
        generator = seeded(device, seed, block)
        nelbo, bound = bounds(model, x.to(device), k, generator=generator)
        sums += torch.stack([nelbo, bound]).double().sum(1)
    model.train(was_training)
    nelbo_mean, bound_mean = (distributed.total(sums) / count).tolist()
    factor = bits_per_dim(model.config.data)
    return Likelihood(nelbo_mean, bound_mean, factor * nelbo_mean, factor * bound_mean, count)

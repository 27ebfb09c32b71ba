"""Small NVAEs with random weights, and their checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from ebm_prior.config import PriorConfig
from ebm_prior.prior import EBMPrior
from nvae import checkpoint
from nvae.arch import ModelConfig
from nvae.model import AutoEncoder


def vae(seed=0, dataset="digits", num_latent=2, **further):
    """Latents of one group at each of two scales, in eval mode."""
    config = ModelConfig(
        dataset=dataset,
        num_latent_scales=2,
        num_groups_per_scale=1,
        num_latent_per_group=num_latent,
        num_channels_enc=8,
        num_channels_dec=8,
        num_preprocess_blocks=1,
        num_postprocess_blocks=1,
        num_preprocess_cells=1,
        num_postprocess_cells=1,
        num_mixture_dec=2,
        res_dist=True,
        **further,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoEncoder(config).eval()


class Upstream(nn.Module):
    """A stranger with NVAE's state dict: the same tree, another class, upstream's `sample`."""

    def __init__(self, model):
        super().__init__()
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)
        self.__dict__["inner"] = model
        self.eval()

    def sample(self, num_samples, t):
        return self.inner.sample(num_samples, t)

    def decoder_output(self, logits):
        return self.inner.decoder_output(logits)


def written(path, model):
    """The model's checkpoint, as upstream would write it."""
    checkpoint.write(path, checkpoint.Checkpoint(model.state_dict(), model.config, {}))
    return path


def prior(backbone, seed=0, **settings):
    """A cheap prior with random MLP energies."""
    settings = {
        "network": "mlp",
        "width": 8,
        "spectral_norm": False,
        "num_steps": 2,
        "b2": 0.05,
        "energy_scale": "none",
        "step_rule": "plain",
        **settings,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EBMPrior(backbone, PriorConfig(shapes=backbone.layout.shapes, **settings))

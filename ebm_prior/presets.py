"""The settings of training by name: a dict per row of the paper, source and number beside it.

No torch here, so that `--help` and `--dry_run` answer at once. Every value has a flag of its name
in `ebm_prior train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Network A with the released configuration; what the other rows start from.
_PUBLISHED: dict[str, Any] = {
    "network": "residual",
    "width": 128,
    "depth": 2,  # of `mlp` only
    "spectral_norm": True,
    "max_T": 3,
    "num_steps": 50,
    "b2": 3e-5,
    "energy_scale": "step",
    "step_rule": "cumulative",
    "last_step_kernel": False,
    "label_steps": 1,  # this and the next two: of priors with attributes
    "per_layer_classes": False,
    "label_weight": 1.0,
    "sampler": "",  # of joint and ncp; empty: the first of `config.SAMPLERS`
    "joint_logdet": "exact",
    "context": True,  # this and the next: of ncp
    "proposals": 256,
    "rank": 0,  # this and the next: of fitted
    "draws": 4,
    "batch_size": 25,  # per process; published on 2 GPUs
    "lr": 4e-5,
    "beta1": 0.99,
    "beta2": 0.999,
    "weight_decay": 3e-5,
    "lr_schedule": "epoch",  # lr * lr_decay ** epoch
    "lr_decay": 0.9,
    "epochs": 200,  # at most: the authors keep the state with the best FID on the way
    "iterations": None,
    "ema": 0.0,
    "grad_clip": 0.0,
    "squared_penalty": 0.0,
    "bn_readjust": True,  # 500 batches from the Gaussian prior at temperature 1
    "bn_iterations": 500,
}

_SIXTY_FOUR: dict[str, Any] = {
    **_PUBLISHED,
    "batch_size": 32,
    "lr_decay": 0.95,
    "epochs": 100,
}

# Latents of thousands of values at most, on a CPU: chains that sample the density as written.
_SMALL: dict[str, Any] = {
    **_PUBLISHED,
    "spectral_norm": False,  # with it, nothing was learned in 200 iterations
    "energy_scale": "none",
    "step_rule": "plain",
    "beta1": 0.9,
    "weight_decay": 0.0,
    "lr_schedule": "linear",  # from lr to lr * lr_decay
    "lr_decay": 0.1,
    "epochs": None,
    "ema": 0.98,
    "squared_penalty": 0.003,  # keeps f from growing without bound; learns faster too
    "bn_readjust": False,
}

# What the kinds of prior change in every row (contract, baselines.md).
_KINDS: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "joint": {  # as the predecessor was released: b2 is its step size
        "max_T": 1,
        "num_steps": 10,
        "b2": 1e-5,
        "energy_scale": "none",
        "step_rule": "plain",
        "lr": 2e-5,
        "epochs": None,
        "iterations": 6500,
    },
    "ncp": {
        "max_T": 1,
        "num_steps": 30,  # this and the next: of its sampler langevin
        "b2": 0.1,
        "spectral_norm": False,
        "lr": 1e-3,
        "beta1": 0.9,
        "weight_decay": 0.0,
        "lr_schedule": "cosine",
        "lr_decay": 0.01,
        "epochs": 100,
    },
    "fitted": {"bn_readjust": False},
}

#: `data` is the data set the row is for, `source` where its settings come from, `paper` what the
#: paper reports for it, `settings` the values, `kinds` what other kinds of prior change in them.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "data": "cifar10",
        "source": "released configuration and code",
        "paper": "FID 8.93, IS 9.03 (Gaussian prior FID 37.73, reconstructions 0.68); Table 1",
        "settings": _PUBLISHED,
    },
    "celeba256": {
        "data": "celeba_256",
        # The release lacks the switch for spectral norm: on, as in its CIFAR-10 network.
        "source": "released configuration and evaluation script; spectral_norm is our choice",
        "paper": "FID 8.78 (Gaussian prior 30.25, reconstructions 1.64); Table 2",
        "settings": {
            **_PUBLISHED,
            "network": "conv",
            "width": 64,
            "num_steps": 30,
            "b2": 2e-5,
            "batch_size": 2,
            "lr_decay": 0.98,
            "bn_readjust": False,
        },
    },
    "church64": {
        "data": "lsun_church_64",
        "source": "our choice; the paper gives the result alone",
        "paper": "FID 7.34 (Gaussian prior 38.13, reconstructions 2.45); Table 2",
        "settings": _SIXTY_FOUR,
    },
    "celeba64": {
        "data": "celeba_64",
        "source": "our choice; the paper shows images alone",
        "paper": "no number; images in Figure 4",
        "settings": _SIXTY_FOUR,
    },
    "hvae": {
        "data": "cifar10",
        "source": "our choice; the paper says that the VAE is small, and gives the result",
        "paper": "FID 35.13 (Gaussian prior 81.44); Figure 8",
        "settings": {
            **_PUBLISHED,
            "width": 96,
            "batch_size": 128,
            "lr": 1e-4,
            "lr_decay": 0.95,
            "epochs": 40,
            "bn_readjust": False,
        },
    },
    "hvae_small": {
        "data": "cifar10",
        "source": "our choice, for minutes on a CPU",
        "paper": "no number",
        "settings": {
            **_SMALL,
            "network": "map",
            "width": 64,
            "num_steps": 10,
            "b2": 0.3,
            "batch_size": 64,
            "lr": 5e-4,  # at 1e-3 the guard halves it within 40 steps
            "grad_clip": 1.0,
            "squared_penalty": 0.01,
            "iterations": 400,
        },
        "kinds": {
            "joint": {"max_T": 1, "num_steps": 15, "b2": 0.15, "iterations": 200},
            "ncp": {"max_T": 1, "squared_penalty": 0.0, "lr": 1e-3, "iterations": 300},
            "fitted": {"draws": 1},
        },
    },
    "digits": {
        "data": "digits",
        "source": "our choice, measured on 8x8 digits",
        "paper": "no number; the demo's Fréchet distance is 0.15 to 0.24 of the Gaussian's",
        "settings": {
            **_SMALL,
            "network": "mlp",
            "width": 256,
            "num_steps": 8,
            "b2": 0.4,
            "batch_size": 128,
            "lr": 2e-3,
            "iterations": 1000,
        },
        "kinds": {
            "joint": {"max_T": 1, "num_steps": 20, "b2": 0.3, "iterations": 500},
            "ncp": {"max_T": 1, "squared_penalty": 0.0, "iterations": 1000},
            "fitted": {},
        },
    },
}

#: Those of the settings that define the prior itself, its `PriorConfig`.
PRIOR_SETTINGS = (
    "network",
    "width",
    "depth",
    "spectral_norm",
    "max_T",
    "num_steps",
    "b2",
    "energy_scale",
    "step_rule",
    "last_step_kernel",
    "label_steps",
    "per_layer_classes",
    "sampler",
    "joint_logdet",
    "proposals",
    "rank",
)


def resolved(preset: str, given: Mapping[str, Any], kind: str = "diffusion") -> dict[str, Any]:
    """The preset's settings with those in `given` in their place; None means not given.

    Another kind of prior changes some: `kinds` of the preset says which, or else `_KINDS`.

    The length of a run is one choice: `iterations` replaces the preset's `epochs` and the other
    way round.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
    row = PRESETS[preset]
    settings = row["settings"] | row.get("kinds", _KINDS).get(kind, {})
    chosen = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(chosen.keys() - settings.keys())
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; known: {', '.join(settings)}")
    if {"iterations", "epochs"} <= chosen.keys():
        raise ValueError("got iterations and epochs; give the length of the run in one of them")
    if {"iterations", "epochs"} & chosen.keys():
        settings |= {"iterations": None, "epochs": None}
    return settings | chosen

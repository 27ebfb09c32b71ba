"""Train an NVAE: one process, float32, upstream's losses and schedules (contract chapter 6).

It made the checkpoint of the digits that ships with the project. Of upstream's flags it has those
that define the model, the losses and the schedules.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvae import runtime
from nvae.arch import ARCHITECTURES, DATA_SETS, ModelConfig

if TYPE_CHECKING:
    import torch

    from nvae.model import AutoEncoder

# name -> (default, help); switches have the default False. Names and defaults are upstream's.
MODEL_FLAGS: dict[str, tuple[int | bool, str]] = {
    "num_nf": (0, "normalising-flow cells per group"),
    "num_x_bits": (8, "bit depth of colour images"),
    "num_latent_scales": (1, "resolutions with latents"),
    "num_groups_per_scale": (10, "groups at the highest resolution"),
    "num_latent_per_group": (20, "channels of each z"),
    "ada_groups": (False, "half as many groups at each lower resolution"),
    "min_groups_per_scale": (1, "floor for --ada_groups"),
    "num_channels_enc": (32, "width of the encoder at full resolution"),
    "num_preprocess_blocks": (2, "halvings before the latents"),
    "num_preprocess_cells": (3, "cells per block"),
    "num_cell_per_cond_enc": (1, "encoder cells per group"),
    "num_channels_dec": (32, "width of the decoder at full resolution"),
    "num_postprocess_blocks": (2, "doublings after the latents"),
    "num_postprocess_cells": (3, "cells per block"),
    "num_cell_per_cond_dec": (1, "decoder cells per group"),
    "num_mixture_dec": (10, "mixture components; 1 is the Gaussian decoder for colour images"),
    "use_se": (False, "squeeze and excitation"),
    "res_dist": (False, "residual posteriors"),
}
TRAINING_FLAGS: dict[str, tuple[int | float | bool, str]] = {
    "batch_size": (200, "images per step"),
    "learning_rate": (1e-2, "peak rate of Adamax"),
    "learning_rate_min": (1e-4, "floor of the cosine"),
    "weight_decay": (3e-4, "L2 term inside Adamax"),
    "weight_decay_norm": (0.0, "coefficient of the spectral and the BN term"),
    "weight_decay_norm_init": (10.0, "its start value when annealed"),
    "weight_decay_norm_anneal": (False, "anneal it geometrically with the KL coefficient"),
    "epochs": (200, "passes over the data"),
    "warmup_epochs": (5, "linear warm-up of the learning rate"),
    "kl_anneal_portion": (0.3, "KL ramp, fraction of all iterations"),
    "kl_const_portion": (0.0001, "flat part before the ramp"),
    "kl_const_coeff": (0.0001, "lower bound of the KL coefficient"),
    "seed": (1, "of weights, order and noise"),
}


def parser() -> argparse.ArgumentParser:
    """Upstream's flags of model, losses and schedules, and ours in a second group."""
    result = argparse.ArgumentParser(
        prog="python -m nvae.train",
        description="Train an NVAE in one process; writes ROOT/eval-SAVE/checkpoint.pt.",
        epilog="example, a small model of scikit-learn's digits in three minutes:\n"
        "  bash scripts/train_nvae_digits.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    theirs = result.add_argument_group("NVAE's flags")
    theirs.add_argument("--root", default="/tmp/nasvae/expr", help="parent of runs (%(default)s)")
    theirs.add_argument("--save", default="exp", help="name of the run (%(default)s)")
    theirs.add_argument(
        "--dataset", default="mnist", choices=sorted(DATA_SETS), help="(%(default)s)"
    )
    theirs.add_argument("--data", default="/tmp/nasvae/data", help="its folder (%(default)s)")
    theirs.add_argument(
        "--arch_instance",
        default="res_mbconv",
        choices=sorted(ARCHITECTURES),
        help="(%(default)s)",
    )
    for name, (default, text) in {**MODEL_FLAGS, **TRAINING_FLAGS}.items():
        if default is False:
            theirs.add_argument(f"--{name}", action="store_true", help=text)
        else:
            theirs.add_argument(
                f"--{name}", type=type(default), default=default, help=f"{text} (%(default)s)"
            )
    ours = result.add_argument_group("our flags")
    ours.add_argument(
        "--kl_weight",
        type=float,
        default=1.0,
        help="multiplies the KL term throughout; 1 is the evidence lower bound (%(default)s)",
    )
    ours.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N"
    )
    ours.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    return result


def train(args: argparse.Namespace) -> None:
    """Train from scratch and write the checkpoint of the last epoch."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from nvae import checkpoint, data, losses
    from nvae.model import AutoEncoder

    config = ModelConfig.from_args(vars(args))
    device = runtime.pick_device(args.device)
    target = Path(args.root) / f"eval-{args.save}" / "checkpoint.pt"
    if target.exists():
        raise ValueError(f"{target} exists already; give another --save, or move it away")
    torch.manual_seed(args.seed)
    # A generator of its own: the order of the images does not hang on how noise is drawn.
    loader = DataLoader(
        data.load(args.dataset, _folder(args), train=True, config=config),
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(args.seed),
    )
    iterations = len(loader)
    if not iterations:
        raise ValueError(f"--batch_size {args.batch_size} is more than the images there are")
    total = iterations * args.epochs
    model = AutoEncoder(config).to(device)
    optimizer = torch.optim.Adamax(
        model.parameters(), lr=args.learning_rate, eps=1e-3, weight_decay=args.weight_decay
    )
    spectral = losses.SpectralNorm(model) if args.weight_decay_norm else None
    alpha = losses.kl_alpha(config.groups_per_scale).to(device)
    border = 2 if args.dataset in ("mnist", "omniglot") else 0

    bar = tqdm(range(args.epochs), desc="training", unit="epoch")
    for epoch in bar:
        model.train()
        seen: dict[str, torch.Tensor] = {}
        for index, x in enumerate(loader):
            step = epoch * iterations + index
            rate = losses.learning_rate(
                step,
                iterations_per_epoch=iterations,
                epochs=args.epochs,
                warmup_epochs=args.warmup_epochs,
                peak=args.learning_rate,
                floor=args.learning_rate_min,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = losses.reduce_bits(x.to(device), config.num_x_bits)
            result = model(x)
            beta = losses.kl_coefficient(
                step, total, args.kl_anneal_portion, args.kl_const_portion, args.kl_const_coeff
            )
            output = model.decoder_output(result.logits)
            reconstruction = losses.reconstruction_loss(output, x, border)
            kl = losses.balance_kl(result.kl_all, beta, alpha)
            loss = (reconstruction + args.kl_weight * kl.total).mean()
            if spectral is not None:
                first = args.weight_decay_norm_init if args.weight_decay_norm_anneal else None
                weight = losses.norm_coefficient(beta, args.weight_decay_norm, first)
                loss = loss + weight * (spectral() + losses.batch_norm_term(model))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for name, value in (("rec", reconstruction), ("kl", sum(result.kl_all))):
                seen[name] = seen.get(name, 0) + value.detach().mean() / iterations
        shown = {name: float(value) for name, value in seen.items()}
        if not all(abs(value) < float("inf") for value in shown.values()):
            raise ValueError(
                f"training diverged in epoch {epoch + 1}: {shown}; use a lower --learning_rate or"
                " a larger --weight_decay_norm"
            )
        bar.set_postfix({name: f"{value:.1f}" for name, value in shown.items()})
    checkpoint.write(
        target,
        checkpoint.Checkpoint(
            state_dict=_on_cpu(model),
            config=config,
            args=_recorded(args),
            epoch=args.epochs,
            global_step=total,
        ),
    )
    print(f"wrote {target}; next: python -m nvae.evaluate --checkpoint {target} --save OUT")


def _folder(args: argparse.Namespace) -> str | None:
    """The digits come with scikit-learn."""
    return None if args.dataset == "digits" else args.data


def _on_cpu(model: AutoEncoder) -> OrderedDict[str, torch.Tensor]:
    return OrderedDict((name, value.cpu()) for name, value in model.state_dict().items())


def _recorded(args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint tells of its training: no folders, no device of the machine."""
    left_out = ("root", "save", "data", "device", "dry_run")
    return {name: value for name, value in vars(args).items() if name not in left_out}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = parser().parse_args(argv)
    if args.dry_run:
        print(json.dumps(vars(args), indent=2))
        return 0
    return runtime.exit_status(lambda: train(args))


if __name__ == "__main__":
    sys.exit(main())

"""The command line of `python -m nvae.train`: upstream's flags, and ours in a second group.

Names, types, defaults and meanings of the first group are those of NVAE's `train.py`. Does not
import torch, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from nvae.arch import ARCHITECTURES, DATA_SETS, ModelConfig

EXAMPLES = """\
examples:
  a small model of scikit-learn's digits in minutes on one core:
    bash scripts/train_nvae_digits.sh

  the published CIFAR-10 model on the GPUs of this machine, going on if it was stopped:
    DATA=data/cifar10 OUT=runs bash scripts/train_nvae_cifar10.sh

  two machines with 8 GPUs each (the second with --node_rank 1):
    python -m nvae.train --dataset cifar10 --data data/cifar10 --root runs \\
        --num_proc_node 2 --node_rank 0 --num_process_per_node 8 --master_address host0
"""


def _flag(default: Any, text: str, **more: Any) -> Any:
    """One of upstream's flags."""
    return field(default=default, metadata={"help": text, **more})


def _ours(default: Any, text: str, **more: Any) -> Any:
    """One that upstream does not have."""
    return _flag(default, text, ours=True, **more)


@dataclass(frozen=True)
class Settings:
    """The command line, one field per flag."""

    root: str = _flag("/tmp/nasvae/expr", "parent directory of all runs")
    save: str = _flag("exp", "name of the run; it goes to ROOT/eval-SAVE")
    dataset: str = _flag("mnist", "data set", choices=sorted(DATA_SETS))
    data: str = _flag("/tmp/nasvae/data", "its folder")
    arch_instance: str = _flag("res_mbconv", "cells", choices=sorted(ARCHITECTURES))
    num_nf: int = _flag(0, "normalising-flow cells per group")
    num_x_bits: int = _flag(8, "bit depth of colour images")
    num_latent_scales: int = _flag(1, "resolutions with latents")
    num_groups_per_scale: int = _flag(10, "groups at the highest resolution")
    num_latent_per_group: int = _flag(20, "channels of each z")
    ada_groups: bool = _flag(False, "half as many groups at each lower resolution")
    min_groups_per_scale: int = _flag(1, "floor for --ada_groups")
    num_channels_enc: int = _flag(32, "width of the encoder at full resolution")
    num_preprocess_blocks: int = _flag(2, "halvings before the latents")
    num_preprocess_cells: int = _flag(3, "cells per block")
    num_cell_per_cond_enc: int = _flag(1, "encoder cells per group")
    num_channels_dec: int = _flag(32, "width of the decoder at full resolution")
    num_postprocess_blocks: int = _flag(2, "doublings after the latents")
    num_postprocess_cells: int = _flag(3, "cells per block")
    num_cell_per_cond_dec: int = _flag(1, "decoder cells per group")
    num_mixture_dec: int = _flag(10, "mixture components; 1: Gaussian decoder for colour images")
    use_se: bool = _flag(False, "squeeze and excitation")
    res_dist: bool = _flag(False, "residual posteriors")
    batch_size: int = _flag(200, "images per process and step")
    learning_rate: float = _flag(1e-2, "peak rate of Adamax")
    learning_rate_min: float = _flag(1e-4, "floor of the cosine")
    weight_decay: float = _flag(3e-4, "L2 term inside Adamax")
    weight_decay_norm: float = _flag(0.0, "coefficient of the spectral and the BN term")
    weight_decay_norm_init: float = _flag(10.0, "its start value when annealed")
    weight_decay_norm_anneal: bool = _flag(
        False, "anneal it geometrically with the KL coefficient"
    )
    epochs: int = _flag(200, "passes over the data")
    warmup_epochs: int = _flag(5, "linear warm-up of the learning rate")
    fast_adamax: bool = _flag(False, "accepted; PyTorch's Adamax updates all tensors at once")
    kl_anneal_portion: float = _flag(0.3, "KL ramp, fraction of all iterations")
    kl_const_portion: float = _flag(0.0001, "flat part before the ramp")
    kl_const_coeff: float = _flag(0.0001, "lower bound of the KL coefficient")
    cont_training: bool = _flag(
        False, "go on from last.pt, or without one from checkpoint.pt; one of them must be there"
    )
    num_proc_node: int = _flag(1, "machines")
    node_rank: int = _flag(0, "number of this machine")
    local_rank: int = _flag(0, "accepted; torchrun tells each process its rank")
    global_rank: int = _flag(0, "accepted, like --local_rank")
    num_process_per_node: int = _flag(
        1, "processes (GPUs) on each machine; more than 1 starts them through torchrun"
    )
    master_address: str = _flag("127.0.0.1", "address of machine 0, where all meet at port 6020")
    seed: int = _flag(1, "of weights, order and noise")

    resume: str = _ours(
        "never",
        "auto: like --cont_training, but begin if nothing is there",
        choices=["never", "auto"],
    )
    kl_weight: float = _ours(
        1.0, "multiplies the KL term throughout; 1 is the evidence lower bound"
    )
    kl_balance: str = _ours(
        "union",
        "images that the KL balancing measures: of all processes, or as upstream of each its own",
        choices=["union", "local"],
    )
    amp: str = _ours(
        "auto",
        "mixed precision; auto: fp16 with loss scaling on a GPU, as upstream, off on the CPU",
        choices=["auto", "off", "bf16", "fp16"],
    )
    micro_batch: int = _ours(
        0,
        "images per process and forward pass; gradients add up to --batch_size. BatchNorm and KL"
        " balancing see the micro batch (of all processes). 0: the whole batch",
    )
    workers: int = _ours(
        -1, "processes that read images; they change no number. -1: up to 8 on a GPU, else none"
    )
    iw_samples: int = _ours(10, "importance samples of the evaluations in between; 0: none")
    final_iw_samples: int = _ours(1000, "importance samples of the last evaluation; 0: none")
    log_every: int = _ours(100, "steps between logged scalars; pictures come ten times as rarely")
    save_every: int = _ours(1000, "steps between writings of last.pt; epochs end with one too")
    max_steps: int = _ours(0, "stop after this step of the schedules; 0: at their end")
    max_skips: int = _ours(10, "steps with NaN to skip among 1000 before going back")
    max_rollbacks: int = _ours(
        3, "times to go back to last.pt with half the learning rate before giving up"
    )
    device: str = _ours("auto", "auto (a GPU if there is one), cpu, cuda, cuda:N")

    def __post_init__(self) -> None:
        for name, low in (
            ("batch_size", 1),
            ("epochs", 1),
            ("warmup_epochs", 0),
            ("learning_rate", 0),
            ("learning_rate_min", 0),
            ("weight_decay", 0),
            ("weight_decay_norm", 0),
            ("kl_anneal_portion", 0),
            ("kl_const_portion", 0),
            ("kl_const_coeff", 0),
            ("kl_weight", 0),
            ("num_proc_node", 1),
            ("node_rank", 0),
            ("num_process_per_node", 1),
            ("seed", 0),
            ("micro_batch", 0),
            ("workers", -1),
            ("iw_samples", 0),
            ("final_iw_samples", 0),
            ("log_every", 1),
            ("save_every", 1),
            ("max_steps", 0),
            ("max_skips", 0),
            ("max_rollbacks", 0),
        ):
            value = getattr(self, name)
            if not low <= value < math.inf:
                raise ValueError(f"--{name} {value}: expected a number of at least {low}")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise ValueError(
                f"--micro_batch {self.micro_batch}: expected a divisor of --batch_size"
                f" {self.batch_size}"
            )
        if self.node_rank >= self.num_proc_node:
            raise ValueError(
                f"--node_rank {self.node_rank}: expected less than --num_proc_node"
                f" {self.num_proc_node}"
            )
        if self.weight_decay_norm_anneal and not (
            self.weight_decay_norm > 0 and self.weight_decay_norm_init > 0
        ):
            raise ValueError(
                "--weight_decay_norm_anneal needs --weight_decay_norm and --weight_decay_norm_init"
                f" above 0, got {self.weight_decay_norm} and {self.weight_decay_norm_init}"
            )
        self.model_config()

    @property
    def folder(self) -> str:
        """Where the run writes."""
        return f"{self.root}/eval-{self.save}"

    @property
    def micro(self) -> int:
        """Images per process and forward pass."""
        return self.micro_batch or self.batch_size

    def model_config(self) -> ModelConfig:
        return ModelConfig.from_args(asdict(self))

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint keeps: upstream's fields, and of ours those that make numbers."""
        ours = ("kl_weight", "kl_balance", "amp", "micro_batch")
        kept = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if "ours" not in f.metadata or f.name in ours
        }
        return {**kept, "save": self.folder, "distributed": True}


def parser() -> argparse.ArgumentParser:
    """Upstream's training flags and ours."""
    result = argparse.ArgumentParser(
        prog="python -m nvae.train",
        description="Train an NVAE; writes ROOT/eval-SAVE: checkpoint.pt as upstream's, last.pt to"
        " go on from, logs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    theirs = result.add_argument_group("NVAE's flags")
    ours = result.add_argument_group("our flags")
    for entry in fields(Settings):
        group = ours if "ours" in entry.metadata else theirs
        text, default = entry.metadata["help"], entry.default
        if default is False:
            group.add_argument(f"--{entry.name}", action="store_true", help=text)
            continue
        group.add_argument(
            f"--{entry.name}",
            type=type(default),
            default=default,
            choices=entry.metadata.get("choices"),
            help=f"{text} (%(default)s)",
        )
    ours.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    return result


def settings(argv: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """Parse the command line; also whether it is a dry run.

    Raises:
        ValueError: a value out of range, or flags that do not fit each other.
    """
    namespace = parser().parse_args(argv)
    names = [entry.name for entry in fields(Settings)]
    return Settings(**{name: getattr(namespace, name) for name in names}), namespace.dry_run

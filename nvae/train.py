"""Train an NVAE: upstream's flags, losses, schedules and files (contract chapters 5 and 6).

The same run on one process or many, with all of a batch in common: its order, flips and noise
belong to the seed and the step, BatchNorm's statistics and the KL balancing to the union of the
processes' batches. Two things differ from upstream: processes there draw the same noise for their
different images, and balance with their own ones (`--kl_balance local` does that).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nvae import runtime
from nvae.training.settings import Settings, settings

if TYPE_CHECKING:
    from nvae.training.trainer import Trainer

PORT = 6020  # upstream's, where the processes of several machines meet
WORKERS = 8  # upstream's


def train(settings: Settings) -> int:
    """Train, or go on training; 0 when done, 128 + signal when stopped by one."""
    with runtime.started(settings.device) as here, runtime.kept(settings.folder, here):
        trainer = _prepared(settings, here)
        stopped_by = trainer.run()
        if here.is_main:
            path = f"{settings.folder}/checkpoint.pt"
            if trainer.step < trainer.total:
                print(
                    f"stopped after step {trainer.step} of {trainer.total}, --resume auto goes on"
                )
            print(f"wrote {path}; next: python -m nvae.evaluate --checkpoint {path} --save OUT")
        return 128 + stopped_by if stopped_by else 0


def _prepared(settings: Settings, here: runtime.Runtime) -> Trainer:
    """The trainer, at its beginning or where the run stopped."""
    from nvae import data, distributed
    from nvae.training import state
    from nvae.training.trainer import Trainer

    folder = Path(settings.folder)
    there = [name for name in (state.LAST, state.CHECKPOINT) if (folder / name).exists()]
    seen = distributed.collect(there)
    if any(names != seen[0] for names in seen):
        told = "; ".join(
            f"process {rank} {', '.join(names) or 'nothing'}" for rank, names in enumerate(seen)
        )
        raise ValueError(
            f"the processes do not see the same files of the run in {folder}: {told}; give all"
            " machines one --root that they share"
        )
    if settings.cont_training and not there:
        raise ValueError(
            f"--cont_training: neither {state.LAST} nor {state.CHECKPOINT} is in {folder}; leave"
            " the flag out to begin, or use --resume auto"
        )
    going_on = settings.cont_training or (settings.resume == "auto" and bool(there))
    if there and not going_on:
        raise ValueError(
            f"{folder / there[0]} exists already; --resume auto goes on with it; to begin anew"
            " give another --save, or move it away"
        )
    if settings.workers < 0:
        on_gpu = here.device.type == "cuda"
        settings = replace(settings, workers=min(WORKERS, os.cpu_count() or 1) if on_gpu else 0)
    # The digits come with scikit-learn.
    root = None if settings.dataset == "digits" else settings.data
    config = settings.model_config()
    images = data.load(settings.dataset, root, train=True, augment=True, config=config)
    measured = settings.iw_samples or settings.final_iw_samples
    held_out = data.load(settings.dataset, root, train=False, config=config) if measured else None
    distributed.wait()  # all have looked before one writes
    if here.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        state.clear_litter(folder)
        with runtime.written_whole(folder / "args.json") as temporary:
            temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
    trainer = Trainer(settings, here, images, held_out)
    if going_on:
        told = trainer.resume()
        if here.is_main:
            print(told, file=sys.stderr)
    return trainer


def _launch(settings: Settings, arguments: Sequence[str]) -> NoReturn:
    """Become the torchrun that starts the processes of this machine; signals then reach it."""
    meet = ["--standalone"]
    if settings.num_proc_node > 1:
        meet = [
            f"--nnodes={settings.num_proc_node}",
            f"--node_rank={settings.node_rank}",
            f"--master_addr={settings.master_address}",
            f"--master_port={PORT}",
        ]
    count = f"--nproc_per_node={settings.num_process_per_node}"
    command = ["-m", "torch.distributed.run", *meet, count, "-m", "nvae.train", *arguments]
    os.execv(sys.executable, [sys.executable, *command])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    found, dry_run = settings(argv)
    if dry_run:
        print(json.dumps(asdict(found), indent=2))
        return 0
    wanted, there = found.num_process_per_node * found.num_proc_node, os.environ.get("WORLD_SIZE")
    if wanted > 1 and there is None:
        _launch(found, sys.argv[1:] if argv is None else argv)
    if wanted > 1 and there != str(wanted):
        raise ValueError(
            f"--num_process_per_node and --num_proc_node speak of {wanted} processes, but"
            f" WORLD_SIZE of {there}; under torchrun leave both flags out"
        )
    return train(found)


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))

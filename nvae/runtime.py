"""Where a command runs: device, processes, files written whole, errors told in one line.

Used by the commands of both packages. Importing it does not import torch, so that `--help`
answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


LOCK = ".lock"


@dataclass(frozen=True)
class Runtime:
    """This process among its fellows, and the device it computes on."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, draws bars and writes files."""
        return self.rank == 0


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """`auto` is CUDA where there is a GPU, else the CPU.

    Raises:
        ValueError: CUDA was asked for by name and there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"--device {name}: this PyTorch sees no CUDA device; use --device cpu, or install"
                " a CUDA build of PyTorch and its driver"
            )
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)"
                f" and process {local_rank} asked for number {device.index};"
                " start no more processes than there are GPUs"
            )
    return device


def this_process(device: str = "auto") -> Runtime:
    """This process among those torchrun started, without joining a group."""
    import torch

    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    if world_size > 1 and device.startswith("cuda:"):
        raise ValueError(
            f"--device {device} would put all {world_size} processes on one GPU; give --device"
            " cuda, and each takes its own"
        )
    runtime = Runtime(pick_device(device, local_rank), rank, local_rank, world_size)
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)
    return runtime


@contextlib.contextmanager
def started(device: str = "auto") -> Iterator[Runtime]:
    """Join the process group if torchrun started one (WORLD_SIZE > 1), and leave it at the end."""
    import torch

    runtime = this_process(device)
    if runtime.world_size == 1:
        yield runtime
        return
    backend = "nccl" if runtime.device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield runtime
        # Nobody leaves while another still computes: gloo can abort a process whose peer has gone.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def kept(folder: str | os.PathLike[str], here: Runtime) -> Iterator[None]:
    """Keep a folder to this run: two in one would overwrite each other's files.

    The lock is the system's, on a file that stays; a killed process holds nothing.

    Raises:
        ValueError: another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    if not here.is_main:
        yield
        return
    path, new = Path(folder), not Path(folder).exists()
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {folder}; wait for it, stop it, or give another"
                " folder"
            ) from None
        try:
            yield
        finally:
            if new and [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()  # refused before anything was written: leave no trace
                path.rmdir()


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path`; at the end flush it to disk and rename it over `path`.

    A crash, a kill or a full disk leaves the old file as it was and no half-written new one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp and some writers make files private; a result is as readable as the umask says.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; what a user can cause becomes one line on stderr and status 2, no traceback.

    `EBM_DEBUG=1` shows the traceback.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print("stopped by the user", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("EBM_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # PyTorch's own kind, told by its name: this module does not import torch.
        full = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if os.environ.get("EBM_DEBUG") or not full:
            raise
        reason = str(error).splitlines()[0]
        print(f"error: {reason}; a smaller --batch_size needs less memory", file=sys.stderr)
        return 2

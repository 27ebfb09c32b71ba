"""What every test shares: one thread, a fixed seed, and the golden folders.

`GOLDENS=dir1:dir2` adds further golden folders to the subset kept in `tests/golden`: every
subfolder with a `case.json` is an NVAE case, files with the names of the EBM contract are EBM
goldens. `SEED=1` runs the random tests with other numbers.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start

import torch

# The server of such processes imports once what each of them needs; optimisers need the second.
multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])

GOLDEN = Path(__file__).parent / "golden"


def golden_roots() -> list[Path]:
    """The folder of the repository first, then those named in `GOLDENS`."""
    extra = [Path(p) for p in os.environ.get("GOLDENS", "").split(os.pathsep) if p]
    for root in extra:
        if not root.is_dir():
            raise ValueError(f"GOLDENS names {root}, which is not a folder; unset it or mend it")
    return [GOLDEN / "nvae", GOLDEN / "ebm", *extra]


def nvae_cases() -> list[Path]:
    """Folders of NVAE cases; a name that occurs twice is taken once."""
    found = {
        c.parent.name: c.parent for r in golden_roots() for c in sorted(r.glob("*/case.json"))
    }
    return [found[name] for name in sorted(found)]


def golden_files(pattern: str) -> list[Path]:
    """Golden files by name, e.g. ``net_*.npz``; a name that occurs twice is taken once."""
    found = {f.name: f for r in golden_roots() for f in sorted(r.glob(pattern))}
    return [found[name] for name in sorted(found)]


def needs_digits() -> None:
    """Skip what needs scikit-learn's images, without a second for the import of scikit-learn."""
    if find_spec("sklearn") is None:
        pytest.skip("the digits come with scikit-learn", allow_module_level=True)


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("SEED", "0"))


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed(seed: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    yield
    torch.set_num_threads(threads)

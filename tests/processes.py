"""Several processes of one run, as torchrun would start them, without its ten seconds.

They are forked from a server that has imported PyTorch (see `conftest`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def together(function: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Call `function(rank, *arguments)` in each process of a group that none has joined yet.

    It must belong to a module and not to a test. Raises what a process raises.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _process, (function, count, port, arguments), count, start_method="forkserver"
    )


def _process(
    rank: int, function: Callable[..., None], count: int, port: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    function(rank, *arguments)

"""What one evaluation costs, counted: launches, operations, bytes moved, bytes held, host waits.

Counted where PyTorch hands an operation to a device, so that it needs no such device: on the CPU
the numbers are those of a GPU that runs the same operations eagerly.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operations that start nothing on the device. Views are told by their schema beside these.
_NO_KERNEL = {
    "aten::_unsafe_view",
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::_local_scalar_dense",  # a wait of the host, counted as such
}
# Operations whose result the host waits for on any device.
_WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2")
_CUDA_WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


class Work(NamedTuple):
    """One launch: its floating point operations, the bytes it reads and writes, its precision."""

    flops: int
    moved: int
    half: bool  # in bfloat16 or float16


class Bytes(NamedTuple):
    """Of tensors that depend on the images, and of all others (weights made ready, constants)."""

    images: int = 0
    fixed: int = 0


class Meter(TorchDispatchMode):
    """Counts the operations inside its `with`, in backward passes too, and the tensors they make.

    A launch is an operation that computes, copies or fills: views, metadata, allocations and
    reads by the host are none. The backward of a convolution is one, whatever it returns.

    Bytes moved are those of every operand and result, so nothing is taken to be fused or cached.
    Bytes held are those of the storages made inside and still alive, whoever keeps them: the
    autograd graph, a Python object or a variable. Inputs and weights were there before. `peak` is
    the largest number of either kind, which need not be at the same moment.

    Args:
        images: tensors of the images; what is computed from them, or drawn, depends on them.
    """

    def __init__(self, *images: Tensor) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.names: Counter[str] = Counter()
        self.moved = Bytes()
        self.peak = Bytes()
        self._live: dict[int, int] = {}
        self._depend = {_key(tensor) for tensor in images}
        self._held = [0, 0]  # fixed, images

    @property
    def launches(self) -> int:
        return len(self.work)

    @property
    def flops(self) -> int:
        """Of convolutions and matrix products; a multiplication with its addition is two."""
        return sum(work.flops for work in self.work)

    @property
    def held(self) -> Bytes:
        """Of the tensors made so far that are alive now."""
        return Bytes(self._held[1], self._held[0])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(result)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        depends = drawn or any(_key(tensor) in self._depend for tensor in given)
        known = {_key(tensor) for tensor in given}
        for tensor in made:
            self._hold(tensor, depends, new=_key(tensor) not in known)
        if _computes(func):
            self._count(func, args, kwargs, result, given, made)
        return result

    def _count(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        result: Any,
        given: list[Tensor],
        made: list[Tensor],
    ) -> None:
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
        moved = [0, 0]
        for tensor in (*given, *made):
            moved[_key(tensor) in self._depend] += _size(tensor)
        half = bool(given) and given[0].dtype in (torch.bfloat16, torch.float16)
        self.work.append(Work(flops, sum(moved), half))
        self.names[func._schema.name] += 1
        self.moved = Bytes(self.moved.images + moved[1], self.moved.fixed + moved[0])

    def _hold(self, tensor: Tensor, depends: bool, *, new: bool) -> None:
        """Note the tensor's storage until it is freed; one written in place may now depend."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if new and key not in self._live and size:
            self._live[key] = size
            self._depend.discard(key)  # an address may be used again
            self._held[0] += size
            weakref.finalize(storage, self._free, key).atexit = False
        if depends and key not in self._depend:
            self._depend.add(key)
            moved = self._live.get(key, 0)
            self._held[0] -= moved
            self._held[1] += moved
        self.peak = Bytes(*map(max, self.peak, self.held))

    def _free(self, key: int) -> None:
        self._held[key in self._depend] -= self._live.pop(key)


def _computes(func: Any) -> bool:
    schema = func._schema
    if schema.name in _NO_KERNEL:
        return False
    returns = [r.alias_info for r in schema.returns]
    is_view = bool(returns) and all(info is not None and not info.is_write for info in returns)
    return not is_view


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes that reading all of it touches: an expanded tensor's are those of its storage."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def waits(run: Callable[[], object], device: torch.device) -> dict[str, int]:
    """How often the host waits for the device inside `run`, by the name of what makes it wait.

    On CUDA both what is asked for and what the runtime does are named, so that a wait may occur
    under two names.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    found = Counter(event.name for event in profile.events() or [])
    return {name: found[name] for name in (*_WAITS, *_CUDA_WAITS) if found[name]}


def waited(run: Callable[[], object], device: torch.device) -> int:
    """How often in all: as asked for, or as the runtime did, whichever is more."""
    found = waits(run, device)
    return max(sum(found.get(name, 0) for name in names) for names in (_WAITS, _CUDA_WAITS))

"""NVAE (arXiv 2007.03898), written from its observable behaviour; reads and writes its files.

Names are looked up on first use, so `import nvae` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvae.arch import ModelConfig
    from nvae.checkpoint import load
    from nvae.model import AutoEncoder

__all__ = ["AutoEncoder", "ModelConfig", "load"]

_HOME = {
    "AutoEncoder": "nvae.model",
    "ModelConfig": "nvae.arch",
    "load": "nvae.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nvae' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

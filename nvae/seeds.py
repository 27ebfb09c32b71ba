"""Random numbers that belong to a key, not to a process."""

from __future__ import annotations

import numpy as np
import torch


def seeded(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose numbers belong to this key, for example (seed, block).

    Keys that differ only by zeros at their end are the same key.
    """
    return torch.Generator(device).manual_seed(derived(*key))


def derived(*key: int) -> int:
    """A seed made of the numbers of a key; similar keys give unrelated seeds."""
    (state,) = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(state) % 2**63

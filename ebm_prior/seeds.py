"""Random numbers that belong to a key: a seed, and what the draw is for."""

from __future__ import annotations

import numpy as np
import torch


def seeded(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose numbers belong to this key and to no other."""
    # With its length: to numpy (0, 1) and (0, 1, 0) are the same key.
    (state,) = np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state) % 2**63)

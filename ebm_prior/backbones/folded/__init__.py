"""The frozen, folded copy of NVAE's top-down walk: the fast map T, the same to rounding."""

"""What README promises in Python does run."""

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_the_backbone_of_ones_own_trains_and_samples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [text for text in blocks if "class MyBackbone" in text]
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["x"].shape == (16, 12)
    assert torch.isfinite(names["x"]).all()
    assert all(p.grad is not None for p in names["prior"].energies.parameters())
    # The reader's T and its inverse are inverse to each other.
    u = torch.randn(5, 12)
    backbone = names["prior"].backbone
    torch.testing.assert_close(backbone.to_u(backbone.to_z(u)), u)

"""Re-estimation of BatchNorm, and its statistics over several processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nvae import batchnorm
from nvae.layers import BatchNormSwish, SyncedBatchNorm2d
from nvae.model import AutoEncoder
from tests.nvae.small_models import SMALL
from tests.processes import together

CONFIG = replace(SMALL, num_latent_scales=2, num_groups_per_scale=1)


def test_only_the_generating_path_changes() -> None:
    model = AutoEncoder(CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batchnorm.readjust(model, temperature=1.0, iterations=3, batch_size=4)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert not model.training
    assert changed
    for key in changed:
        assert key.startswith(("dec_tower.", "post_process."))
        assert key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    assert all(
        int(v) == 3 * k.startswith(("dec_tower.", "post_process."))
        for k, v in model.state_dict().items()
        if k.endswith("num_batches_tracked")
    )


def test_a_broken_layer_is_named_and_the_old_statistics_stay() -> None:
    model = AutoEncoder(CONFIG)
    names = [name for name, _ in model.batch_norms() if name.startswith("dec_tower")]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    index = int(names[2].split(".")[1])
    with torch.no_grad():
        model.get_submodule(f"dec_tower.{index}._ops.0.conv.2.conv.0").weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"statistics of dec_tower\.\d+\S+ are not finite after"):
        batchnorm.readjust(model, temperature=1.0, iterations=2)
    assert not model.training
    for name, layer in model.batch_norms():
        for buffer, value in layer.named_buffers():
            assert torch.equal(value, before[f"{name}.{buffer}"])


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 iterations"):
        batchnorm.readjust(AutoEncoder(CONFIG), temperature=1.0, iterations=0)


def test_a_wider_temperature_widens_the_statistics() -> None:
    variances = []
    for temperature in (0.1, 1.0):
        torch.manual_seed(0)
        model = AutoEncoder(CONFIG)
        generator = torch.Generator().manual_seed(1)
        batchnorm.readjust(
            model, temperature=temperature, iterations=60, batch_size=8, generator=generator
        )
        first = next(m for n, m in model.batch_norms() if n.startswith("dec_tower"))
        assert first.running_var is not None
        variances.append(float(first.running_var.mean()))
    assert variances[1] > variances[0]


def _worker(rank: int, folder: str, device: str) -> None:
    torch.distributed.init_process_group("gloo")
    layer = BatchNormSwish(3).double().to(device)
    # Unequal shares: 4 images here, 2 there.
    x = torch.load(f"{folder}/x.pt")[[slice(0, 4), slice(4, 6)][rank]]
    x = x.to(device).requires_grad_()
    out = layer(x)
    (out * torch.arange(out.shape[1], device=device)[:, None, None]).square().sum().backward()
    weight_grads = torch.stack([layer.weight.grad, layer.bias.grad])
    torch.distributed.all_reduce(weight_grads)
    buffers = {name: buffer.cpu() for name, buffer in layer.named_buffers()}
    assert x.grad is not None
    result = (out.detach().cpu(), x.grad.cpu(), weight_grads.cpu(), buffers)
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_together_are_one_large_batch(tmp_path: Path, device: str) -> None:
    x = torch.randn(6, 3, 5, 5, dtype=torch.float64) * 3 + 10
    torch.save(x, tmp_path / "x.pt")
    together(_worker, str(tmp_path), device)
    layer = nn.Sequential(
        nn.BatchNorm2d(3, eps=1e-5, momentum=0.05, dtype=torch.float64), nn.SiLU()
    )
    out = layer(x.requires_grad_())
    (out * torch.arange(3)[:, None, None]).square().sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), out.detach())
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), x.grad)
    for part in parts:
        torch.testing.assert_close(
            part[2], torch.stack([layer[0].weight.grad, layer[0].bias.grad])
        )
        for name, buffer in layer[0].named_buffers():
            torch.testing.assert_close(part[3][name], buffer)


def test_momentum_is_a_twentieth_and_the_running_variance_unbiased() -> None:
    layer, x = SyncedBatchNorm2d(2), torch.randn(3, 2, 4, 4)
    layer.train()(x)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    torch.testing.assert_close(layer.running_mean, 0.05 * x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(layer.running_var, 0.95 + 0.05 * x.var(dim=(0, 2, 3)))

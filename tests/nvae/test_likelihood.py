"""ELBO and importance-weighted bound of a data set."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch

from nvae import likelihood, losses
from nvae.arch import DATA_SETS
from nvae.likelihood import importance_weighted
from nvae.model import AutoEncoder
from tests.nvae.small_models import SMALL
from tests.processes import together

CONFIG = SMALL


def digits(count: int = 10) -> list[torch.Tensor]:
    return list(torch.randint(17, (count, 1, 8, 8)) / 16)


def test_with_one_sample_the_bound_is_one_draw_of_the_weight() -> None:
    model = AutoEncoder(CONFIG).eval()
    x = torch.stack(digits())
    nelbo, bound = likelihood.bounds(model, x, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result = model(x, generator=torch.Generator().manual_seed(3))
    reconstruction = losses.reconstruction_loss(model.decoder_output(result.logits), x)
    torch.testing.assert_close(nelbo, reconstruction + sum(result.kl_all))
    torch.testing.assert_close(bound, reconstruction + result.log_q - result.log_p)


def test_more_samples_tighten_the_bound_and_leave_the_elbo() -> None:
    torch.manual_seed(1)
    model = AutoEncoder(CONFIG)
    images = digits(60)
    one = importance_weighted(model, images, 1, batch_size=20)
    many = importance_weighted(model, images, 30, batch_size=20)
    assert many.neg_log_p < one.neg_log_p - 0.1
    assert many.neg_log_p < many.nelbo
    assert many.nelbo == pytest.approx(one.nelbo, rel=0.05)
    assert many.nelbo_bpd == pytest.approx(many.nelbo / (64 * math.log(2)))
    assert many.images == 60
    assert model.training


def test_every_image_counts_once_whatever_the_last_batch_holds() -> None:
    model = AutoEncoder(CONFIG).eval()
    images = digits(7)
    got = importance_weighted(model, images, 2, batch_size=3, seed=5)
    parts = [
        likelihood.bounds(
            model, torch.stack(images[i : i + 3]), 2, generator=likelihood.seeded("cpu", 5, i // 3)
        )
        for i in (0, 3, 6)
    ]
    expected = [float(torch.cat(p).mean()) for p in zip(*parts, strict=True)]
    assert [got.nelbo, got.neg_log_p] == pytest.approx(expected)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0 images"):
        importance_weighted(AutoEncoder(CONFIG), [], 1, batch_size=2)


def test_bits_per_dimension_count_the_values_of_an_image() -> None:
    assert likelihood.bits_per_dim(DATA_SETS["mnist"]) == pytest.approx(1 / (784 * math.log(2)))
    assert likelihood.bits_per_dim(DATA_SETS["cifar10"]) == pytest.approx(1 / (3072 * math.log(2)))


def _worker(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    model, images = torch.load(f"{folder}/in.pt", weights_only=False)
    torch.save(importance_weighted(model, images, 3, batch_size=2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    model, images = AutoEncoder(CONFIG), digits(5)
    torch.save((model, images), tmp_path / "in.pt")
    together(_worker, str(tmp_path))
    alone = importance_weighted(model, images, 3, batch_size=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert tuple(found) == pytest.approx(tuple(alone))


class _Calm(torch.utils.data.Dataset[torch.Tensor]):
    """Images that can only be read where a signal to the group does no harm."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        for number in (signal.SIGINT, signal.SIGTERM):
            assert signal.getsignal(number) == signal.SIG_IGN
        return torch.full((1, 8, 8), 0.5)


def test_a_signal_to_the_group_leaves_the_readers_of_an_evaluation() -> None:
    model = AutoEncoder(CONFIG)
    assert importance_weighted(model, _Calm(), 1, batch_size=2, workers=1).images == 4

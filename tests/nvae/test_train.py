"""`nvae.train`: flags, batches, gradients, going on, several processes, NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nvae import checkpoint, data, distributed, losses, runtime, train
from nvae.model import AutoEncoder
from nvae.training import batches, guard, monitor, state
from nvae.training.objective import Objective
from nvae.training.settings import Settings, parser, settings
from tests.conftest import nvae_cases
from tests.nvae.test_golden import Case
from tests.processes import together

ROOT = Path(__file__).parents[2]
# The contract's table of flags (5.1): name -> default; switches are False.
UPSTREAM: dict[str, Any] = dict(
    root="/tmp/nasvae/expr", save="exp", dataset="mnist", data="/tmp/nasvae/data", batch_size=200,
    learning_rate=1e-2, learning_rate_min=1e-4, weight_decay=3e-4, weight_decay_norm=0.0,
    weight_decay_norm_init=10.0, weight_decay_norm_anneal=False, epochs=200, warmup_epochs=5,
    fast_adamax=False, arch_instance="res_mbconv", kl_anneal_portion=0.3, kl_const_portion=0.0001,
    kl_const_coeff=0.0001, num_nf=0, num_x_bits=8, num_latent_scales=1, num_groups_per_scale=10,
    num_latent_per_group=20, ada_groups=False, min_groups_per_scale=1, num_channels_enc=32,
    num_preprocess_blocks=2, num_preprocess_cells=3, num_cell_per_cond_enc=1, num_channels_dec=32,
    num_postprocess_blocks=2, num_postprocess_cells=3, num_cell_per_cond_dec=1,
    num_mixture_dec=10, use_se=False, res_dist=False, cont_training=False, num_proc_node=1,
    node_rank=0, local_rank=0, global_rank=0, num_process_per_node=1,
    master_address="127.0.0.1", seed=1,
)  # fmt: skip
TINY: dict[str, Any] = dict(
    save="run", dataset="digits", device="cpu", arch_instance="res_bnswish", num_nf=1,
    num_groups_per_scale=2, num_latent_per_group=2, num_channels_enc=4, num_channels_dec=4,
    num_preprocess_blocks=1, num_preprocess_cells=1, num_postprocess_blocks=1,
    num_postprocess_cells=1, num_mixture_dec=1, use_se=True, res_dist=True, batch_size=10,
    epochs=2, warmup_epochs=1, weight_decay_norm=1e-2, weight_decay_norm_anneal=True,
    iw_samples=0, final_iw_samples=0, log_every=1,
)  # fmt: skip


def tiny(folder: Path, **changes: Any) -> Settings:
    return Settings(root=str(folder), **{**TINY, **changes})


def digits(count: int = 40) -> list[Tensor]:
    return list(torch.randint(17, (count, 1, 8, 8), generator=torch.Generator()) / 16)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Forty images for every half of every data set."""
    images = digits()
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: images)
    return images


def weights(folder: Path, save: str = "run") -> OrderedDict[str, Tensor]:
    return checkpoint.read(folder / f"eval-{save}" / "checkpoint.pt").state_dict


def equal(a: OrderedDict[str, Tensor], b: OrderedDict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def logged(folder: Path, save: str = "run", key: str = "train/nelbo_iter") -> list[float]:
    lines = (folder / f"eval-{save}" / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


# --- the command line


def test_flags_and_defaults_are_upstreams() -> None:
    found = vars(parser().parse_args([]))
    assert {name: found[name] for name in UPSTREAM} == UPSTREAM
    assert all(type(found[name]) is type(value) for name, value in UPSTREAM.items())
    theirs = {f.name for f in dataclasses.fields(Settings) if "ours" not in f.metadata}
    assert theirs == UPSTREAM.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 0", "--batch_size 0: expected a number of at least 1"),
        ("--learning_rate nan", "--learning_rate nan: expected"),
        ("--batch_size 10 --micro_batch 4", "--micro_batch 4: expected a divisor of"),
        ("--weight_decay_norm_anneal", "needs --weight_decay_norm and"),
        ("--node_rank 1", "expected less than --num_proc_node"),
        ("--num_groups_per_scale 0", "num_groups_per_scale: got 0"),
    ],
)
def test_a_bad_value_is_one_clear_line(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(flags.split())


def test_several_processes_and_machines_start_through_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[list[str]] = []

    class Replaced(Exception):
        pass

    def execv(path: str, arguments: list[str]) -> None:
        called.append(arguments[1:])
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    flags = ["--dataset", "digits", "--num_process_per_node", "2"]
    with pytest.raises(Replaced):
        train.main(flags)
    start = ["-m", "torch.distributed.run"]
    assert called[-1] == [*start, "--standalone", "--nproc_per_node=2", "-m", "nvae.train", *flags]
    with pytest.raises(Replaced):
        train.main([*flags, "--num_proc_node", "3", "--node_rank", "1"])
    meet = ["--nnodes=3", "--node_rank=1", "--master_addr=127.0.0.1", "--master_port=6020"]
    assert called[-1][:6] == start + meet
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"speak of 2 processes, but WORLD_SIZE of 4; under"):
        train.main(flags)


# --- batches


class Shares:
    """Make this process the `rank`-th of `world` for `distributed`'s callers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)


def test_one_process_reads_in_the_order_of_a_shuffling_loader() -> None:
    images = [torch.tensor(float(i)) for i in range(11)]
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(images, 2, shuffle=True, drop_last=True, generator=generator)  # type: ignore[arg-type]
    ours = batches.Batches(images, 2, seed=5, micro=2)  # type: ignore[arg-type]
    for epoch in range(3):
        assert [x.tolist() for x in ours.epoch(epoch)] == [x.tolist() for x in loader]


@pytest.mark.parametrize("micro", [2, 4])
def test_processes_share_the_batch_that_one_would_read(
    monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    images = [torch.tensor(float(i)) for i in range(37)]
    alone = list(
        batches.Batches(images, 12, seed=5, micro=3 * micro).epoch(1)  # type: ignore[arg-type]
    )
    shares = []
    for rank in range(3):
        Shares(monkeypatch, rank, 3)
        ours = batches.Batches(images, 4, seed=5, micro=micro)  # type: ignore[arg-type]
        shares.append(list(ours.epoch(1, start=1)))
    for whole, *parts in zip(alone[1:], *shares, strict=True):
        pieces = zip(*(part.split(micro) for part in parts), strict=True)
        assert torch.equal(whole, torch.cat([torch.cat(piece) for piece in pieces]))


class Random(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(()) + index


def test_flips_belong_to_epoch_and_image_and_leave_the_noise_alone() -> None:
    before = torch.get_rng_state()
    first = batches.Batches(Random(), 4, seed=1, micro=4)
    plain = {int(v): v for x in first.epoch(0) for v in x}
    late = batches.Batches(Random(), 3, seed=1, micro=3, workers=1)
    again = {int(v): v for x in late.epoch(0, start=2) for v in x}
    assert len(again) == 6
    assert all(torch.equal(plain[i], v) for i, v in again.items())
    other = {int(v): v for x in first.epoch(1) for v in x}
    assert all(not torch.equal(plain[i], other[i]) for i in plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch_size 41 for each of 1 processes is more than"):
        batches.Batches(digits(), 41, seed=0, micro=41)  # type: ignore[arg-type]


# --- gradients


def objective(folder: Path, **changes: Any) -> Objective:
    torch.manual_seed(0)
    chosen = tiny(folder, **changes)
    model = AutoEncoder(chosen.model_config()).train()
    return Objective(model, model, chosen, 100, contextlib.nullcontext)


def test_micro_batches_add_up_to_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(self: Objective, images: int) -> list[Tensor]:
        return [torch.zeros(images, *shape) for shape in self.model.latent_shapes]

    monkeypatch.setattr(Objective, "noise", noise)
    x = torch.stack(digits(6))
    found = []
    for micro in (6, 2):  # no BatchNorm, no balancing: nothing looks across the batch
        made = objective(tmp_path, arch_instance="res_elu", batch_size=6, micro_batch=micro)
        made.model(x)  # initialises by the first batch it sees
        start = losses.SpectralNorm(made.model, generator=torch.Generator().manual_seed(1))
        made.spectral = start
        done = made.backward(x, 60, lambda loss: loss)
        found.append([done.loss, *(p.grad for p in made.model.parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", nvae_cases(), ids=lambda folder: folder.name)
def test_golden_step_of_the_objective(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(folder)
    model, x, expected = case.model().train(), case.x(), case.expected
    monkeypatch.setattr(Objective, "noise", lambda self, images: case.normals("eps"))
    monkeypatch.setattr(losses, "reduce_bits", lambda x, bits: x)  # it is reduced already
    chosen = Settings(
        **{**vars(case.config), "batch_size": len(x)},
        weight_decay_norm=0.01,
        kl_anneal_portion=1.0,
        kl_const_portion=0.0,
    )
    made = Objective(model, model, chosen, 10, contextlib.nullcontext)
    start = {
        (r, c): tuple(torch.from_numpy(expected[f"spectral_start_{v}_{r}x{c}"]) for v in "uv")
        for r, c in losses.SpectralNorm(model).groups
    }
    made.spectral = losses.SpectralNorm(model, start=start)  # type: ignore[arg-type]
    done = made.backward(x, 3, lambda loss: loss)
    assert done.beta == pytest.approx(0.3)
    assert float(done.loss) == pytest.approx(float(expected["step_loss"][0]), rel=1e-5)
    norms = [math.nan if p.grad is None else float(p.grad.norm()) for p in model.parameters()]
    wanted = torch.from_numpy(expected["step_grad_norm_per_parameter"]).double()
    error = (torch.tensor(norms, dtype=torch.float64) - wanted).abs().nan_to_num(0)
    assert float(error.max() / wanted.nan_to_num(0).max()) < 1e-4


# --- a whole run


def test_a_run_writes_upstreams_files_and_tags(few: list[Tensor], tmp_path: Path) -> None:
    chosen = tiny(tmp_path, iw_samples=2, final_iw_samples=3)
    assert train.train(chosen) == 0
    folder = tmp_path / "eval-run"
    written = checkpoint.read(folder / "checkpoint.pt")
    assert (written.epoch, written.global_step) == (2, 8)
    assert written.args.keys() >= UPSTREAM.keys() | {"distributed", "num_total_iter"}
    assert written.args["save"] == str(folder)
    assert written.args["num_total_iter"] == 8
    model = checkpoint.load(folder / "checkpoint.pt")
    group = written.optimizer["param_groups"][0]
    assert len(written.optimizer["state"]) == len(group["params"]) == len([*model.parameters()])
    assert (group["eps"], group["initial_lr"], group["betas"]) == (1e-3, 1e-2, (0.9, 0.999))
    assert written.scheduler["T_max"] == 0.0
    assert written.scheduler["base_lrs"] == [1e-2]

    events = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    tags = "norm_loss bn_loss norm_coeff nelbo_avg lr nelbo_iter kl_iter recon_iter nelbo".split()
    wanted = [f"train/{tag}" for tag in tags]
    wanted += ["kl_coeff/coeff", "kl_coeff/layer_1", "kl_vals/layer_1", "kl/active_0"]
    wanted += ["kl/total_active", "val/neg_log_p", "val/nelbo", "val/bpd_log_p", "val/bpd_elbo"]
    wanted += [f"generated_{t}" for t in (0.7, 0.8, 0.9, 1.0)]
    assert [tag for tag in wanted if tag.encode() not in events] == []
    assert len(logged(tmp_path)) == 8
    assert len(logged(tmp_path, key="val/bpd_elbo")) == 3  # two epochs and the end
    assert "held out, 3 importance samples" in (folder / "log.txt").read_text()


def test_looking_at_a_run_does_not_change_it(few: list[Tensor], tmp_path: Path) -> None:
    for save, seen in (("a", 0), ("b", 1)):
        train.train(tiny(tmp_path, save=save, iw_samples=seen, save_every=1 + 7 * seen))
    assert equal(weights(tmp_path, "a"), weights(tmp_path, "b"))


def test_a_second_run_does_not_overwrite_the_first(few: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--cont_training: neither last"):
        train.train(tiny(tmp_path, cont_training=True))
    train.train(tiny(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="exists already; --resume auto goes on with it"):
        train.train(tiny(tmp_path))
    with pytest.raises(ValueError, match=r"learning_rate 0\.01 \(now 0\.02\)"):
        train.train(tiny(tmp_path, resume="auto", learning_rate=0.02))


def test_a_stopped_run_goes_on_bit_for_bit(few: list[Tensor], tmp_path: Path) -> None:
    train.train(tiny(tmp_path, save="whole"))
    for steps in (3, 4, 6, 0):  # within an epoch, at its end, within the next, to the end
        train.train(tiny(tmp_path, resume="auto", max_steps=steps))
    assert equal(weights(tmp_path), weights(tmp_path, "whole"))
    assert logged(tmp_path) == logged(tmp_path, "whole")


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 at whatever moment it is, of a process that saves after every second step."""
    flags = dict(epochs=1, batch_size=50, save_every=2, max_steps=8)
    chosen = {**TINY, **flags, "root": str(tmp_path), "resume": "auto"}
    words = [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in chosen.items()
    ]
    command = [sys.executable, "-m", "nvae.train", *words]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as many threads as the tests: same bits
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last, patience = tmp_path / "eval-run" / "last.pt", time.monotonic() + 60
    while not last.exists() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = state.read(last.parent)
    assert found is not None
    assert 0 < found["step"]
    (last.parent / ".last.pt.xyz.pt").touch()  # what a kill in the midst of writing leaves
    train.train(tiny(tmp_path, **flags, resume="auto"))
    assert not list(last.parent.glob(".last.pt*"))
    train.train(tiny(tmp_path, **flags, save="whole"))
    assert equal(weights(tmp_path), weights(tmp_path, "whole"))


def test_a_signal_stops_after_the_step_and_saves(
    few: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Objective.backward

    def interrupted(self: Objective, x: Tensor, step: int, scale: Any) -> Any:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return backward(self, x, step, scale)

    monkeypatch.setattr(Objective, "backward", interrupted)
    assert train.train(tiny(tmp_path)) == 128 + signal.SIGTERM
    found = state.read(tmp_path / "eval-run")
    assert found is not None
    assert found["step"] == 6


def test_upstreams_checkpoint_is_gone_on_with(
    few: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in nvae_cases() if "no_se_mbconv_sep" in case.name)
    theirs = checkpoint.read(case / "checkpoint.pt")
    images = list(torch.rand(6, *theirs.config.image_shape))
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: images)
    folder = tmp_path / "eval-theirs"
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes((case / "checkpoint.pt").read_bytes())
    chosen = Settings(
        **vars(theirs.config),
        root=str(tmp_path),
        save="theirs",
        batch_size=2,
        cont_training=True,
        max_steps=3 * theirs.epoch + 1,
        iw_samples=0,
        final_iw_samples=0,
        device="cpu",
    )
    train.train(chosen)
    ours = checkpoint.read(folder / "checkpoint.pt")
    assert (ours.epoch, ours.global_step) == (theirs.epoch, 3 * theirs.epoch + 1)
    # The file kept in the repository has no moments, the whole one has.
    moments = [c.optimizer["state"].get(0, {"step": 0}) for c in (theirs, ours)]
    assert float(moments[1]["step"]) == float(moments[0]["step"]) + 1
    assert theirs.args.keys() <= ours.args.keys()
    (folder / "last.pt").unlink()
    with pytest.raises(ValueError, match=r"num_channels_enc \d+ \(now 16\)"):
        train.train(dataclasses.replace(chosen, num_channels_enc=16))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_stays_close(few: list[Tensor], tmp_path: Path, amp: str) -> None:
    for kind in ("off", amp):
        train.train(tiny(tmp_path, save=kind, amp=kind, max_steps=3))
    torch.testing.assert_close(
        torch.tensor(logged(tmp_path, amp)),
        torch.tensor(logged(tmp_path, "off")),
        rtol=0.02,
        atol=0.0,
    )
    found = state.read(tmp_path / f"eval-{amp}")
    assert found is not None
    assert bool(found["learned"]["scaler"]) == (amp == "fp16")


# --- schedules of what is shown


def test_evaluations_and_checkpoints_are_as_rare_as_upstreams() -> None:
    assert all(monitor.evaluation_due(epoch, 50) for epoch in range(50))
    assert [e for e in range(90) if monitor.evaluation_due(e, 90)] == [0, 20, 40, 60, 80, 89]
    assert all(monitor.checkpoint_due(epoch, 100) for epoch in range(100))
    assert [e for e in range(8) if monitor.checkpoint_due(e, 400)] == [0, 4]
    assert monitor.checkpoint_due(399, 400)


def test_tiles_lie_row_by_row() -> None:
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 2, 2)
    tiled = monitor.tiled(images)
    assert tiled.shape == (3, 4, 4)
    assert tiled[0, ::2, ::2].tolist() == [[0, 1], [2, 3]]


# --- NaN


def test_a_lost_step_is_skipped_and_leaves_no_trace(few: list[Tensor], tmp_path: Path) -> None:
    few[7] = torch.full_like(few[7], torch.nan)
    train.train(tiny(tmp_path))
    told = (tmp_path / "eval-run" / "log.txt").read_text()
    assert "not finite: the images; skipped (1 of 10)" in told
    assert "not finite: the images; skipped (2 of 10)" in told
    assert len(logged(tmp_path)) == 6
    found = weights(tmp_path)
    assert all(value.isfinite().all() for value in found.values())
    tracked = {int(v) for k, v in found.items() if k.endswith("num_batches_tracked")}
    assert tracked == {6}


def test_a_diverging_run_goes_back_and_then_stops_with_step_and_layer(
    few: list[Tensor], tmp_path: Path
) -> None:
    chosen = tiny(
        tmp_path, learning_rate=1e12, epochs=5, save_every=1, max_skips=1, max_rollbacks=1
    )
    with pytest.raises(
        ValueError,
        match=r"diverged at step \d+: not finite: the output of \S+; 1 steps were skipped after 1"
        r" returns to an earlier state\. The last good state, of step 1, is in last\.pt",
    ):
        train.train(chosen)
    told = (tmp_path / "eval-run" / "log.txt").read_text()
    assert "back to the weights of step 1, learning rate from now on times 0.5" in told
    found = state.read(tmp_path / "eval-run")
    assert found is not None
    assert all(value.isfinite().all() for value in found["learned"]["model"].values())


def test_the_first_fault_is_named() -> None:
    model = torch.nn.Sequential(
        OrderedDict(a=torch.nn.Linear(2, 2), b=torch.nn.Linear(2, 2), c=torch.nn.Linear(2, 2))
    )
    x = torch.ones(1, 2)

    def again() -> Any:
        yield {guard.IMAGES: x, "the loss": model(x).sum()}

    assert "while all of the forward pass is finite" in guard.first_fault(model, again)
    model.a.weight.grad = torch.full((2, 2), torch.inf)
    model.b.weight.grad = torch.full((2, 2), torch.nan)
    assert guard.first_fault(model, again) == "the gradient of b.weight"
    with torch.no_grad():
        model.a.bias.fill_(10)
        model.b.weight.fill_(3e38)
    assert guard.first_fault(model, again) == "the output of b"
    with torch.no_grad():
        model.c.bias.fill_(torch.nan)
    assert guard.first_fault(model, again) == "the weights c.bias"


def test_skips_are_counted_among_the_last_steps_only() -> None:
    watch = guard.Guard(max_skips=2, max_rollbacks=1)
    assert [watch.forgives(step) for step in (1, 500, 1100, 1200)] == [True, True, True, False]
    assert watch.may_go_back()
    assert (watch.lr_factor, watch.skipped) == (0.5, [])
    assert not watch.may_go_back()


# --- several processes

SHORT = {"epochs": 2, "num_groups_per_scale": 1}  # each normalisation waits for all processes


def _half_the_batch(rank: int, folder: str) -> None:
    images = digits(64)
    data.load = lambda *args, **kwargs: images  # type: ignore[assignment]
    train.train(tiny(Path(folder), **SHORT, save="two", batch_size=8, micro_batch=4))


def _one_image_lost(rank: int, folder: str) -> None:
    images = digits(64)
    images[7] = torch.full_like(images[7], torch.nan)
    data.load = lambda *args, **kwargs: images  # type: ignore[assignment]
    train.train(tiny(Path(folder), **SHORT | {"epochs": 1}, save="lost", batch_size=8))


def test_two_processes_with_half_the_batch_give_the_same_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(_half_the_batch, str(tmp_path))
    together(_one_image_lost, str(tmp_path))
    images = digits(64)
    monkeypatch.setattr(data, "load", lambda *args, **kwargs: images)
    train.train(tiny(tmp_path, **SHORT, save="one", batch_size=16, micro_batch=8))
    one, two = (torch.tensor(logged(tmp_path, save)) for save in ("one", "two"))
    assert len(one) == 8
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0.0)
    told = (tmp_path / "eval-lost" / "log.txt").read_text()
    assert "not finite: the images on process " in told
    lost = weights(tmp_path, "lost")
    assert all(value.isfinite().all() for value in lost.values())


def test_processes_that_do_not_share_the_folder_are_refused(
    few: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(tiny(tmp_path, max_steps=2))
    monkeypatch.setattr(distributed, "collect", lambda value: [value, []])
    with pytest.raises(
        ValueError, match=r"process 0 last\.pt, checkpoint\.pt; process 1 nothing;"
    ):
        train.train(tiny(tmp_path, resume="auto"))


def test_processes_that_do_not_see_one_last_state_do_not_go_back_apart(
    few: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(value: Any) -> list[Any]:
        return [value, None] if isinstance(value, int) else [value]

    monkeypatch.setattr(distributed, "collect", apart)
    with pytest.raises(ValueError, match=r"do not see the same last\.pt"):
        train.train(tiny(tmp_path, learning_rate=1e12, max_skips=0, save_every=1, epochs=5))


CIFAR10: dict[str, Any] = {
    **TINY, "dataset": "cifar10", "arch_instance": "res_mbconv", "num_latent_scales": 2,
    "num_mixture_dec": 10, "num_channels_enc": 8, "num_channels_dec": 8,
    "data": os.environ.get("CIFAR10", ""), "max_steps": 300,
}  # fmt: skip


def _cifar10_process(rank: int, folder: str) -> None:
    train.train(Settings(root=folder, **{**CIFAR10, "save": "two", "batch_size": 8}))


@pytest.mark.slow
@pytest.mark.skipif("CIFAR10" not in os.environ, reason="CIFAR10 names no folder")
def test_three_hundred_steps_on_cifar10_are_those_of_two_processes(tmp_path: Path) -> None:
    together(_cifar10_process, str(tmp_path))
    train.train(Settings(root=str(tmp_path), **{**CIFAR10, "save": "one", "batch_size": 16}))
    one, two = (torch.tensor(logged(tmp_path, save)) for save in ("one", "two"))
    assert len(one) == 300
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0.0)


def test_the_union_or_the_own_batch_balances_the_kl() -> None:
    kl = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    alpha = torch.ones(2)
    own = losses.balance_kl(kl, 0.5, alpha)
    pooled = losses.balance_kl(kl, 0.5, alpha, lambda size: torch.full_like(size, 2.0))
    assert own.weights[0] < own.weights[1]
    torch.testing.assert_close(pooled.weights, torch.ones(2))


def test_the_device_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device toaster"):
        train.train(tiny(tmp_path, device="toaster"))
    assert runtime.this_process("cpu").is_main

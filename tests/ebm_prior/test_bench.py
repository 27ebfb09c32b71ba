"""The bench: its counters, the reference-style step, what it times, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ebm_prior.base import frozen
from ebm_prior.commands import main
from ebm_prior.commands.bench import roofline, shapes, table, timing
from ebm_prior.commands.bench.counting import Bytes, Meter, Work, waited, waits
from ebm_prior.commands.bench.paths import InReferenceStyle, Plain
from ebm_prior.commands.bench.reference import Reference, Swish
from ebm_prior.commands.bench.shapes import SHAPES
from ebm_prior.frozen import fast
from ebm_prior.spectral_norm import SpectralNorm
from ebm_prior.steps import Steps
from nvae.arch import ModelConfig
from tests.ebm_prior import small_vaes

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    prior = shapes.build(SHAPES["tiny"], 0, CPU)
    with frozen(prior.energies):
        yield prior


@pytest.fixture
def u_next(tiny, generator):
    return torch.randn(3, tiny.layout.dim, generator=generator)


# --- counters


def test_a_launch_is_what_computes_copies_or_fills():
    x, w = torch.ones(3, 4), torch.ones(5, 4)
    with Meter(x) as meter:
        y = x.view(12).unsqueeze(0).expand(2, 12)  # views
        torch.empty(7)  # memory alone
        y = y + 1  # 1
        y.mul_(2)  # 2
        F.linear(x, w)  # 3: one product, its transposition is a view
        torch.zeros(4)  # 4
        y.sum().item()  # 5: the sum; reading it is no launch
    assert meter.launches == 5, meter.names
    assert meter.flops == 2 * 3 * 4 * 5


def test_a_convolution_has_one_launch_each_way():
    x, w = torch.randn(2, 6, 8, 8, requires_grad=True), torch.randn(6, 1, 5, 5)
    with Meter(x) as meter, FlopCounterMode(display=False) as counter:
        y = F.conv2d(x, w, padding=2, groups=6)
        assert meter.launches == 1
        torch.autograd.grad(y, x, torch.ones_like(y))
    assert dict(meter.names) == {
        "aten::convolution": 1,
        "aten::ones_like": 1,
        "aten::convolution_backward": 1,
    }
    assert meter.flops == counter.get_total_flops() == 2 * 2 * 25 * y.numel()


def test_bytes_are_told_apart_by_whether_they_depend_on_the_images():
    x, w = torch.ones(2, 6), torch.ones(6)
    with Meter(x) as meter:
        a = x * w  # reads 48 and 24, writes 48
        assert meter.held == Bytes(48, 0)
        assert meter.moved == Bytes(96, 24)
        b = w + 1
        assert meter.held == Bytes(48, 24)
        del a
        assert meter.held == Bytes(0, 24)
        b.add_(x[0])  # from now on b depends on x
        assert meter.held == Bytes(24, 0)
        c = torch.randn(4)  # noise is drawn per image
        assert meter.held == Bytes(40, 0)
    assert meter.peak == Bytes(48, 24)
    assert c.numel() == 4


def test_what_a_python_function_keeps_for_its_backward_pass_is_held():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x * 2
            return x + 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.kept

    x = torch.ones(10, requires_grad=True)
    with Meter(x) as meter:
        y = Keeps.apply(x)
        assert meter.held == Bytes(80, 0)
        del y
        assert meter.held == Bytes(0, 0)


def test_waits_of_the_host_are_seen():
    x = torch.ones(3)
    assert waits(lambda: x.sum() + 1, CPU) == {}
    told = waits(lambda: (x.sum().item(), bool(x[0] > 0), x.nonzero()), CPU)
    assert told == {"aten::_local_scalar_dense": 2, "aten::nonzero": 1}
    assert waited(x.max().item, CPU) == 1


def test_the_estimate_takes_the_slower_of_computing_and_moving():
    rates = roofline.Rates(float32=10.0, bf16=20.0, bandwidth=100.0, source="by hand")
    work = [Work(40, 100, False), Work(40, 1000, True), Work(0, 50, False)]
    found = roofline.against(work, rates, 20.0, "cuda")
    assert found["estimated_s"] == pytest.approx(4 + 10 + 0.5)
    assert found["share"] == pytest.approx(14.5 / 20)
    assert (found["compute_s"], found["memory_s"]) == pytest.approx((6.0, 11.5))
    assert found["launch_s"] == pytest.approx(3 * roofline.LAUNCH)
    assert "launch_s" not in roofline.against(work, rates, 20.0, "cpu")
    rates = roofline.measured(CPU, "process", size=64)
    assert min(rates.float32, rates.bf16, rates.bandwidth) > 0


def test_paths_are_timed_in_turn_after_a_warm_up():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "xyz"}
    found = timing.interleaved(runs, 3, CPU, warm_up=2)
    assert calls == list("xyz" * 5)
    assert [len(times.process) for times in found.values()] == [3, 3, 3]
    assert [len(times.wall) for times in found.values()] == [3, 3, 3]
    assert timing.clock_of(CPU, 1) == "process"
    assert timing.clock_of(CPU, 2) == "wall"


# --- the reference-style step


def test_swish_as_a_function_is_silu(generator):
    x = torch.randn(9, dtype=torch.float64, generator=generator).requires_grad_()
    torch.testing.assert_close(Swish.apply(x), F.silu(x))
    assert torch.autograd.gradcheck(Swish.apply, x)


def test_the_reference_style_step_is_the_plain_one(tiny, u_next, generator):
    noise = torch.randn(u_next.shape, generator=generator)
    u = u_next + 0.1
    for t in range(tiny.config.max_T):
        reference = Reference(tiny, t, u_next)
        split = tiny.layout.split
        moved = tiny.layout.join(reference.step(split(u), split(noise)))
        expected = Plain(tiny, t, u_next, seed=0).step(u, noise)
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
        assert len(reference.logged) == tiny.layout.num_layers
        # The step is small: what a wrong backward pass changes is seen in the gradient alone.
        leaves = [part.detach().requires_grad_() for part in split(u)]
        found = torch.autograd.grad(reference.energies(leaves).sum(), leaves)
        expected = Plain(tiny, t, u_next, seed=0).gradient_of_f(u)
        off = tiny.layout.join(found) - expected
        assert off.norm() < 1e-5 * expected.norm()


def test_the_reference_style_does_what_a_step_does_not_need(tiny, u_next):
    reference, plain = (kind(tiny, 0, u_next, 0) for kind in (InReferenceStyle, Plain))
    with Meter(u_next) as spent:
        reference.advance(1)
    with Meter(u_next) as needed:
        plain.advance(1)
    assert spent.names["aten::silu"] == needed.names["aten::silu"] - 8  # of 4 cells
    assert spent.names["aten::native_batch_norm"] == 5 * 4  # one cell more: the image's
    assert spent.launches > needed.launches
    assert spent.flops > needed.flops
    assert reference.u.isfinite().all()


def test_no_chain_waits_for_the_device_but_that_in_reference_style(tiny, u_next):
    steps, layers = 3, tiny.layout.num_layers
    for prior in (tiny, fast(tiny)):
        prior.reverse(0, u_next, num_steps=1)  # what is made once is made here
        assert waits(lambda prior=prior: prior.reverse(0, u_next, num_steps=steps), CPU) == {}
    reference = InReferenceStyle(tiny, 0, u_next, 0)
    told = waits(lambda: reference.chain(steps), CPU)
    assert told == {"aten::_local_scalar_dense": steps * layers}


# --- the shapes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b"])
def test_the_published_shapes_keep_within_their_launches_and_memory(name):
    shape = SHAPES[name]
    prior = shapes.build(shape, 0, CPU)
    u = torch.randn(1, prior.layout.dim)
    for recompute in (False, True):
        path = Plain(fast(prior, Steps(recompute=recompute)), 0, u, 0)
        path.advance(1)  # what is made once is made here
        label = "fast float32, recomputed" if recompute else "fast float32"
        if not recompute and "launches" in shape.targets:
            with Meter(u) as step:
                path.advance(1)
            assert step.launches <= shape.targets["launches"][label]
        leaf = u.clone().requires_grad_()
        with Meter(leaf) as forward, frozen(prior.energies):
            f = path.force([leaf])
            saved = forward.held.images
        del f
        assert 0 < saved / 1e6 <= shape.targets["saved_mb"][label]


def test_the_shapes_are_the_published_ones():
    latents = {name: ModelConfig(**shape.vae).latent_shapes for name, shape in SHAPES.items()}
    assert latents["a"] == [(20, 16, 16)] * 30
    assert latents["c"] == [(20, 16, 16)] * 10
    sides = [8] * 4 + [16] * 4 + [32] * 4 + [64] * 8
    assert latents["b"] == [(20, side, side) for side in sides + [128] * 16]
    assert latents["q"] == [(20, side, side) for side in [8] * 4 + [16] * 4 + [32] * 8 + [64] * 16]
    config = shapes.config("celeba256", ((20, 8, 8),))
    assert (config.network, config.width, config.max_T, config.num_steps) == ("conv", 64, 3, 30)
    assert SHAPES["b"].batch_size(None) == 1
    assert SHAPES["b"].batch_size(150 * 10**9) == 8
    assert SHAPES["b"].batch_size(80 * 10**9) == 4
    assert SHAPES["b"].batch_size(10**9) == 1


def test_a_seed_gives_the_same_settled_weights_and_leaves_the_generator_alone(tiny):
    before = torch.random.get_rng_state()
    again = shapes.build(SHAPES["tiny"], 0, CPU)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, value in tiny.energies.state_dict().items():
        assert torch.equal(value, again.energies.state_dict()[name]), name
    for module in again.energies.modules():
        if isinstance(module, SpectralNorm):
            assert not module.training
            largest = torch.linalg.matrix_norm(module.normalised_weight().flatten(1), 2)
            assert 0.99 < largest < 1.3


# --- the command


def test_the_bench_times_counts_and_shows_every_path(tmp_path, capsys):
    out = tmp_path / "bench"
    flags = ["--shapes", "tiny", "--repeats", "2", "--trace", "--device", "cpu"]
    assert main(["bench", "--out", str(out), *flags]) == 0
    report = json.loads((out / "bench.json").read_text())
    assert list(report["shapes"]) == ["tiny"]
    assert list(report["shapes"]["tiny"]) == ["float32", "bf16"]
    for row in report["shapes"]["tiny"].values():
        assert row["ratio"] == row["reference_s"] / row["fast_s"]
        assert row["ratio_to_plain"] == row["plain_s"] / row["fast_s"]
        for path in ("reference", "plain", "fast"):
            low, high = row["ranges_s"][path]
            assert 0 < low <= row[f"{path}_s"] <= high
            assert row["images_per_s"][path] == pytest.approx(2 / (3 * 50 * row[f"{path}_s"]))
            assert row["roofline"][path]["share"] > 0
    float32, bf16 = (report["shapes"]["tiny"][name] for name in ("float32", "bf16"))
    assert float32["agreement"]["max_du"] <= 1e-5
    assert float32["agreement"]["gradient_error"] < 1e-4 < bf16["agreement"]["gradient_error"]
    assert bf16["agreement"]["gradient_error"] < 5e-3
    assert float32["reference_s"] == bf16["reference_s"]

    counts = report["counts"]["tiny"]
    names = ["reference", "plain", "fast float32", "fast bf16", "fast float32, recomputed"]
    assert list(counts) == names
    assert counts["reference"]["host_waits_in_2_steps"] == 2 * 4
    assert counts["plain"]["host_waits_in_2_steps"] == 0
    assert counts["fast bf16"]["host_waits_in_2_steps"] == 0
    saved = [counts[name]["saved_mb_per_image"] for name in names[1:]]
    assert saved[0] > saved[1] > saved[2] > saved[3] > 0
    assert counts["plain"]["peak_mb_per_image"] >= saved[0]
    assert counts["fast float32"]["launches"] < counts["plain"]["launches"]
    settings = report["settings"]["tiny"]
    assert settings["gflop_executed"] > counts["plain"]["gflop_per_image"]
    assert settings["gflop_needed"] <= counts["plain"]["gflop_per_image"]
    assert report["machine"]["threads"] == 1

    with Image.open(out / "bench.png") as picture:
        assert picture.width > 1000
    traces = json.loads((out / "trace_summary.json").read_text())["tiny"]
    assert 1 <= len(traces["plain"]) <= 15
    assert traces["plain"][0]["ms"] >= traces["plain"][-1]["ms"]
    told = capsys.readouterr().out
    assert f"| {counts['fast bf16']['launches']} |" in told
    assert told == (out / "bench.md").read_text()

    # The tables of the file, alone and into a document.
    assert main(["bench", "--table", str(out / "bench.json")]) == 0
    assert capsys.readouterr().out == told
    document = tmp_path / "page.md"
    document.write_text("# A\n<!-- table: bench/bench.json -->\nold\n<!-- end -->\nafter\n")
    into = ["--table", str(out / "bench.json"), "--into", str(document)]
    assert main(["bench", *into]) == 0
    assert document.read_text() == (
        f"# A\n<!-- table: bench/bench.json -->\n{told}<!-- end -->\nafter\n"
    )
    document.write_text("nothing\n")
    assert main(["bench", *into]) == 2
    assert "has no place for bench/bench.json" in capsys.readouterr().err


def test_the_users_own_vae_gets_a_prior_of_a_preset(tmp_path):
    from ebm_prior.commands.bench import job

    path = small_vaes.written(tmp_path / "vae.pt", small_vaes.vae())
    args = _parsed(tmp_path, "--checkpoint", str(path), "--preset", "digits")
    prior = job._own(args, CPU)
    assert prior.config.network == "mlp"
    assert prior.config.preset == "digits"
    assert job._names(args) == ["own"]


def _parsed(out, *flags):
    from ebm_prior.commands import parser

    return parser(["bench"]).parse_args(["bench", "--out", str(out), *flags])


def test_the_tables_of_the_page_are_those_of_its_files():
    page = ROOT / "docs" / "performance.md"
    places = table.places(page.read_text(encoding="utf-8"))
    expected = {"bench/cpu.json", "bench/cpu-b.json", "bench/gpu.json"}
    assert {name for name, _ in places} == expected
    for name, text in places:
        source = page.parent / name
        expected = table.markdown(table.read(source)) if source.exists() else "Not measured yet.\n"
        assert text == expected, f"python -m ebm_prior bench --table docs/{name} --into {page}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one of --out"),
        (["--out", "new", "--table", "x.json"], "give one of --out"),
        (["--table", __file__], "not the bench.json|expected a bench.json"),
        (["--out", "new", "--into", "x.md"], "goes with --table"),
        (["--out", "new", "--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--out", "new", "--threads", "0"], "--threads 0: expected at least 1"),
        (["--out", "new", "--batch_size", "0"], "--batch_size 0: expected at least 1"),
        (["--out", "new", "--prior", __file__], "give it as --checkpoint"),
        (["--out", "new", "--checkpoint", __file__], "either --prior FILE or --preset NAME"),
        (["--out", "new", "--checkpoint", "gone", "--preset", "digits"], "no such file"),
        (
            ["--out", "new", "--without", "tower", "--recompute"],
            "give --precisions float32, without --recompute",
        ),
        (["--out", "new", "--without", "tower"], "give --precisions float32, without --recompute"),
    ],
)
def test_what_cannot_work_is_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert any(part in line for part in message.split("|"))
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["bench", "--out", str(tmp_path / "new")]) == 2
    assert "run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--without", "speed"], ["--shapes", "z"]])
def test_names_that_there_are_not_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--out", "new", *flags])
    assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err

"""The shell scripts, run with a stand-in for Python that prints what it was asked to run."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from nvae.training.settings import settings

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
COMMANDS = [path for path in SCRIPTS if path.name != "environment.sh"]
TRAINING = [path for path in SCRIPTS if path.name.startswith("train_ebm_")]
NVAE = [path for path in SCRIPTS if path.name.startswith("train_nvae_")]
NVAE.remove(ROOT / "scripts/train_nvae_digits.sh")  # it makes an asset and an environment
# Script -> the published flags it has; the small one is our own.
PUBLISHED = {
    "train_nvae_mnist": "mnist",
    "train_nvae_cifar10": "cifar10",
    "train_nvae_celeba64": "celeba_64",
    "train_nvae_imagenet32": "imagenet_32",
    "train_nvae_celeba256": "celeba_256",
    "train_nvae_ffhq": "ffhq",
    "train_nvae_church64": "vaebm_lsun_church_64",
}
PATHS = {"CHECKPOINT": "c.pt", "DATA": "a folder", "OUT": "run", "PRIOR": "p.safetensors"}
STAND_IN = r"""#!/bin/sh
case "$1" in
    -) exit 0 ;;                        # "have you PyTorch?" comes on stdin
    -c) case "$2" in *"${LACKS:-nothing}"*) exit 1 ;; esac
        echo "${FAKE_GPUS:-1}" ;;       # "how many processes?"
    *) printf '%s|' "$@" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Run a script with nothing in its environment but what is given and the stand-in."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def call(script, *args, **variables):
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
        return subprocess.run(
            ["bash", str(script), *args], env=environment, capture_output=True, text=True
        )

    return call


def option(shown, name):
    """The word after an option in what the stand-in printed."""
    words = shown.split("|")
    return words[words.index(name) + 1]


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_bash_can_read_the_script(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem)
def test_help_prints_the_header_comment_and_nothing_else(run, script):
    for flag in ("-h", "--help"):
        told = run(script, flag)
        assert told.returncode == 0
        assert told.stderr == ""
        assert len(told.stdout.splitlines()[0]) > 20
        assert "set -euo" not in told.stdout
        assert not any(line.startswith("#") for line in told.stdout.splitlines())


@pytest.mark.parametrize("script", [*TRAINING, ROOT / "scripts/sample.sh"], ids=lambda p: p.stem)
def test_every_variable_that_is_not_set_is_named(run, script):
    needed = ["CHECKPOINT", "OUT", "PRIOR" if script.stem == "sample" else "DATA"]
    told = run(script)
    assert told.returncode == 2
    for name in needed:
        assert f"error: {name} is not set; expected" in told.stderr
    told = run(script, CHECKPOINT="c.pt")
    assert told.returncode == 2
    assert "CHECKPOINT is not set" not in told.stderr


@pytest.mark.parametrize("script", TRAINING, ids=lambda path: path.stem)
def test_training_without_a_gpu_is_one_plain_process(run, script):
    told = run(script, "--seed", "3", **PATHS)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("-m|ebm_prior|train|")
    assert "torch.distributed" not in told.stdout
    assert option(told.stdout, "--preset") == script.stem.removeprefix("train_ebm_")
    assert option(told.stdout, "--data") == "a folder"
    assert told.stdout.endswith("--seed|3|")


@pytest.mark.parametrize("script", NVAE, ids=lambda path: path.stem)
def test_training_an_nvae_needs_data_and_a_place_and_is_one_plain_process_without_a_gpu(
    run, script
):
    told = run(script, OUT="runs")
    assert told.returncode == 2
    assert "error: DATA is not set; expected" in told.stderr
    assert "OUT is not set" not in told.stderr
    told = run(script, "--seed", "3", **PATHS)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("-m|nvae.train|")
    assert option(told.stdout, "--data") == "a folder"
    assert option(told.stdout, "--root") == "run"
    assert option(told.stdout, "--save") == script.stem.removeprefix("train_nvae_")
    assert option(told.stdout, "--resume") == "auto"
    assert told.stdout.endswith("--seed|3|")
    arguments = told.stdout.split("|")[2:-1]
    settings(arguments)  # every flag exists, all fit each other
    assert "|-m|torch.distributed.run|" in "|" + run(script, FAKE_GPUS="8", **PATHS).stdout


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_flags(run, name):
    told = run(ROOT / f"scripts/{name}.sh", **PATHS)
    ours, _ = settings(told.stdout.split("|")[2:-1])
    path = ROOT / f"tests/golden/nvae/manifests/{PUBLISHED[name]}.json.gz"
    flags = json.loads(gzip.decompress(path.read_bytes()))["command_line_flags"]
    theirs, _ = settings(flags.split() if isinstance(flags, str) else flags)
    launched = {"root", "save", "data", "resume", "num_process_per_node", "num_proc_node"}
    differing = {field for field, value in asdict(theirs).items() if asdict(ours)[field] != value}
    assert differing <= launched
    batch = ours.batch_size * theirs.num_process_per_node * theirs.num_proc_node
    assert f"the {batch} images of a step" in (ROOT / f"scripts/{name}.sh").read_text()


def test_there_is_one_process_per_gpu_unless_told_otherwise(run):
    script = ROOT / "scripts/sample.sh"
    four = run(script, FAKE_GPUS="4", **PATHS).stdout
    assert four.startswith("-m|torch.distributed.run|")
    assert option(four, "--nproc_per_node") == "4"
    assert "--standalone" in four
    assert "|-m|ebm_prior|sample|" in four
    two = run(script, FAKE_GPUS="4", NPROC="2", **PATHS).stdout
    assert option(two, "--nproc_per_node") == "2"
    one = run(script, FAKE_GPUS="4", NPROC="1", **PATHS).stdout
    assert one.startswith("-m|ebm_prior|sample|")


def test_several_machines_need_an_address_and_pass_it_on(run):
    script = ROOT / "scripts/train_ebm_cifar10.sh"
    told = run(script, NNODES="2", **PATHS)
    assert told.returncode == 2
    assert "MASTER_ADDR is not set" in told.stderr
    assert "NODE_RANK is not set" in told.stderr

    by_hand = {"MASTER_ADDR": "node0", "MASTER_PORT": "2345", "NODE_RANK": "1"}
    shown = run(script, NNODES="2", NPROC="8", **by_hand, **PATHS).stdout
    assert option(shown, "--nnodes") == "2"
    assert option(shown, "--node_rank") == "1"
    assert option(shown, "--master_addr") == "node0"
    assert option(shown, "--master_port") == "2345"
    assert "--standalone" not in shown

    shown = run(script, NNODES="2", RDZV_ENDPOINT="node0:99", RDZV_ID="x", **PATHS).stdout
    assert option(shown, "--rdzv_endpoint") == "node0:99"
    assert option(shown, "--rdzv_id") == "x"


def test_the_bench_for_a_gpu_is_of_the_published_shapes(run):
    told = run(ROOT / "scripts/bench_gpu.sh", "--batch_size", "4", OUT="run")
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("-m|ebm_prior|bench|--device|cuda|--shapes|a|b|")
    assert told.stdout.endswith("--out|run|--batch_size|4|")
    assert "OUT is not set" in run(ROOT / "scripts/bench_gpu.sh").stderr


def test_a_python_that_has_pytorch_is_used_as_it_is(run):
    told = run(ROOT / "scripts/demo.sh", "--out", "here")
    assert told.stdout == "-m|ebm_prior|demo|--out|here|"


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ('case "$*" in *version_info*) exit 0 ;; *) exit 1 ;; esac', "apt install python3-venv"),
        ("exit 1", "no Python 3.10 or newer"),
    ],
)
def test_a_machine_that_cannot_make_an_environment_hears_why(run, tmp_path, python, message):
    copy = tmp_path / "checkout"
    for name in ("setup.py", "constraints/cpu.txt", "ebm_prior/_version.py", "scripts"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if name == "scripts" else shutil.copy)(ROOT / name, copy / name)
    poor = tmp_path / "poor"
    poor.write_text(f"#!/bin/sh\n{python}\n")
    poor.chmod(0o755)
    told = run(copy / "scripts/demo.sh", PYTHON=str(poor))
    assert told.returncode == 2
    assert message in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_training_needs_pytorch_and_installs_none(run, tmp_path):
    told = run(ROOT / "scripts/sample.sh", **PATHS, PYTHON=str(tmp_path / "absent"))
    assert told.returncode == 2
    assert "no PyTorch 2.10 or newer" in told.stderr


def test_the_suite_runs_in_parallel_where_it_can_and_arguments_have_the_last_word(run):
    several = run(ROOT / "scripts/test.sh", "-n", "0", "-k", "golden").stdout
    assert several.endswith("-m|pytest|-n|auto|--maxprocesses|8|--dist|worksteal|-n|0|-k|golden|")
    one = run(ROOT / "scripts/test.sh", "-k", "golden", LACKS="import xdist").stdout
    assert one.endswith("-m|pytest|-k|golden|")


@pytest.mark.parametrize("beside", [True, False])
def test_continuous_integration_adds_goldens_and_images_that_lie_beside_the_checkout(
    run, tmp_path, beside
):
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    (checkout / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", checkout / ".ci/run")
    (checkout / "scripts/test.sh").write_text('echo "${GOLDENS:-none} ${CIFAR10:-none}"\n')
    folders = [tmp_path / "shared" / name for name in ("a/goldens", "b/goldens", "data")]
    for folder in folders if beside else []:
        folder.mkdir(parents=True)
    told = run(checkout / ".ci/run")
    first, second, data = folders
    assert told.stdout == (f"{first}:{second} {data}\n" if beside else "none none\n")

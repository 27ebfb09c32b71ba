"""The environment the scripts make: called ready only when all of it was installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A Python that makes environments and has no PyTorch; in them, pip fails at a word of $FAILS.
STAND_IN = r"""#!/bin/sh
case "$*" in
    *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
    *"pip --version"*) case "$0" in */.venv/*) exit 0 ;; *) exit 1 ;; esac ;;
    *install*"$FAILS") exit 1 ;;
    -) cat >/dev/null; exit "${LACKS:-1}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    copy = tmp_path / "checkout"
    for name in ("setup.py", "constraints/cpu.txt", "ebm_prior/_version.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return copy


def bash(checkout, command, **variables):
    return subprocess.run(
        ["bash", "-c", f". scripts/environment.sh && {command}"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "PYTHON": str(checkout.parent / "python"), **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("fails", ["torch", "[test]"])
def test_what_failed_to_install_is_told_and_not_called_ready(checkout, fails):
    told = bash(checkout, "own_python test && echo went on", FAILS=fails)
    assert told.returncode == 2
    assert "not installed; run this again" in told.stderr
    assert "went on" not in told.stdout
    assert not (checkout / ".venv/ready-test").exists()


def test_an_environment_that_is_ready_is_not_made_again(checkout):
    assert bash(checkout, "own_python test", FAILS="nothing").returncode == 0
    assert (checkout / ".venv/ready-test").exists()
    again = bash(checkout, "own_python demo && echo $python", FAILS="[demo]")
    assert again.stdout.strip() == str(checkout / ".venv/bin/python")
    assert again.stderr == ""


def test_a_python_with_pytorch_alone_is_not_taken_for_training(checkout):
    python = checkout.parent / "python"
    python.write_text("#!/bin/sh\ngrep -q safetensors && exit 1 || exit 0\n")
    told = bash(checkout, "given_python")
    assert told.returncode == 2
    assert "with the packages of setup.py in" in told.stderr
    python.write_text("#!/bin/sh\nexit 0\n")
    assert bash(checkout, "given_python && echo $python").stdout.strip() == str(python)

"""What holds of the tree as a whole: files, the help of every command, the commands of README."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from ebm_prior._version import __version__
from ebm_prior.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PACKAGES = ("nvae", "ebm_prior")
TEXT = {".py", ".sh", ".md", ".toml", ".txt", ".yaml", ".json", ".diff", ""}

# Runs `python -m MODULE ARGUMENTS` and tells on stderr whether that imported torch.
PROBE = """
import runpy, sys
module = sys.argv.pop(1)
status = 0
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as stop:
    status = stop.code or 0
print("torch imported:", "torch" in sys.modules, file=sys.stderr)
sys.exit(status)
"""


ENTRIES = [
    ("nvae.evaluate",),
    ("nvae.fid_stats",),
    ("nvae.train",),
    ("ebm_prior",),
    *(("ebm_prior", name) for name in COMMANDS),
]
WITH_HELP = [*ENTRIES, ("nvae.lmdb_io", "convert")]


@functools.cache
def help_of(*command: str) -> subprocess.CompletedProcess[str]:
    """`python -m <command> --help` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, *command, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "99"},
        capture_output=True,
        text=True,
    )


def started(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m <words>` in a folder."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def flags_of(*command: str) -> set[str]:
    """The flags that the help explains; its examples may name those of other commands."""
    lines = re.findall(r"^  -.*", help_of(*command).stdout, re.MULTILINE)
    return set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", "\n".join(lines)))


def own_files() -> list[Path]:
    """Every file of the repository that is text; goldens and what a run leaves behind are not."""
    folders = (*PACKAGES, "scripts", "tests", "patches", "constraints", ".ci")
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for name in folders:
        found += [path for path in (ROOT / name).rglob("*") if path.is_file()]
    apart = {"__pycache__", "golden"}
    return [p for p in found if p.suffix in TEXT and not apart & {q.name for q in p.parents}]


# --- commands


def test_every_module_of_a_command_has_what_the_parser_asks_for():
    folder = ROOT / "ebm_prior" / "commands"
    modules = {path.stem: path for path in folder.glob("*.py")}
    modules |= {path.parent.name: path for path in folder.glob("*/__init__.py")}
    del modules["__init__"], modules["shared"]
    assert set(modules) == set(COMMANDS)
    for name in COMMANDS:
        module = import_module(f"ebm_prior.commands.{name}")
        assert module.HELP
        assert callable(module.add_arguments)
        assert callable(module.run)


@pytest.mark.parametrize("command", WITH_HELP, ids=" ".join)
def test_help_answers_at_once_without_importing_torch(command):
    told = help_of(*command)
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("usage: ")
    assert told.stderr == "torch imported: False\n"


def test_the_help_of_the_prior_lists_each_command():
    told = help_of("ebm_prior").stdout
    assert [name for name in COMMANDS if not re.search(rf"^ +{name}\b", told, re.MULTILINE)] == []


@pytest.mark.parametrize("command", [c for c in ENTRIES if c != ("ebm_prior",)], ids=" ".join)
def test_an_unknown_flag_is_a_usage_error_not_a_traceback(command):
    told = started(*command, "--no_such_flag")
    assert told.returncode == 2
    assert "usage: " in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize("command", [c for c in ENTRIES if c != ("ebm_prior",)], ids=" ".join)
def test_a_dry_run_prints_the_settings_and_leaves_nothing_behind(command, tmp_path):
    inputs = {name: tmp_path / name for name in ("checkpoint", "prior", "authors")}
    for path in inputs.values():
        path.touch()
    values = {**inputs, "out": "new", "save": "new", "root": "new", "preset": "cifar10"}
    values["dataset"] = "digits"  # the one that needs no folder
    known = flags_of(*command)
    if command[-1] in ("train", "ablate", "bench") and command[0] == "ebm_prior":
        del values["prior"]  # there a kind, not a file; here only without --preset
    given = [f"--{name}={value}" for name, value in values.items() if f"--{name}" in known]
    told = started(*command, *given, "--dry_run", folder=tmp_path)
    assert told.returncode == 0, told.stderr
    assert isinstance(json.loads(told.stdout), dict)
    assert {path.name for path in tmp_path.iterdir()} == set(inputs)


def test_importing_the_packages_does_not_import_torch():
    code = "import sys, nvae, ebm_prior; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- README


def readme_blocks(*languages: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in languages]


def readme_commands() -> list[str]:
    """The lines of README's shell blocks, continued lines joined, comments left out."""
    lines = "\n".join(readme_blocks("bash", "sh", "shell", "console")).replace("\\\n", " ")
    kept = (line.strip().removeprefix("$ ") for line in lines.splitlines())
    return sorted({line for line in kept if line and not line.startswith("#")})


def words_of(line: str) -> list[str]:
    """A command's words without the variables set in front of it and without its comment."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_0-9]+=", words[0]):
        words.pop(0)
    return words


def program(words: list[str]) -> tuple[list[str], list[str]]:
    """What of ours a command line starts, as words for `python -m`, and its arguments."""
    if not words:
        return [], []
    if words[0] == "ebm-prior":
        words = ["python", "-m", "ebm_prior", *words[1:]]
    if words[0] == "bash":
        script = words[1]
        own = {"scripts/demo.sh": "demo", "scripts/sample.sh": "sample"}
        if script.startswith("scripts/train_ebm_"):
            own[script] = "train"
        return (["ebm_prior", own[script]], words[2:]) if script in own else ([], [])
    modules = [k + 1 for k, word in enumerate(words[:-1]) if word == "-m"]
    ours = [k for k in modules if words[k].split(".")[0] in PACKAGES]
    if words[0] not in ("python", "python3", "torchrun") or not ours:
        return [], []
    words = words[ours[0] :]
    if words[0] == "ebm_prior" and len(words) > 1 and not words[1].startswith("-"):
        return words[:2], words[2:]
    return words[:1], words[1:]


def test_readme_shows_commands():
    shown = [program(words_of(line))[0] for line in readme_commands()]
    assert ["nvae.evaluate"] in shown
    assert ["ebm_prior", "train"] in shown


@pytest.mark.parametrize("line", readme_commands())
def test_a_command_in_readme_exists_and_knows_its_flags(line):
    words = words_of(line)
    if words[:1] == ["bash"]:
        assert (ROOT / words[1]).is_file()
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command, arguments = program(words)
    if words[:2] == ["python", "-m"] and not command:
        assert words[2] in ("pip", "venv", "pytest")
    if not command:
        return
    assert help_of(*command).returncode == 0, help_of(*command).stderr
    given = {word.split("=")[0] for word in arguments if re.match(r"--?[A-Za-z]", word)}
    assert given - flags_of(*command) == set()


@pytest.mark.parametrize("block", readme_blocks("python", "py"), ids=lambda b: b.split("\n")[0])
def test_python_code_in_readme_parses(block):
    ast.parse(block)


# --- the tree


@pytest.mark.parametrize(
    "name",
    "README.md CHANGELOG.md LICENSE NOTICE Makefile pyproject.toml setup.py constraints/cpu.txt"
    " .gitignore .pre-commit-config.yaml .ci/run scripts/demo.sh scripts/test.sh"
    " scripts/train_ebm_celeba256.sh scripts/train_ebm_cifar10.sh scripts/train_ebm_church64.sh"
    " scripts/sample.sh tests/golden".split(),
)
def test_the_tree_has(name):
    assert (ROOT / name).exists()


def test_every_folder_of_modules_is_a_package_so_that_it_is_installed():
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_digits_backbone_ships_with_the_package_and_is_small():
    assets = list((ROOT / "ebm_prior" / "assets").glob("*.pt"))
    assert assets
    assert max(path.stat().st_size for path in assets) <= 3_000_000
    assert '"assets/*"' in (ROOT / "setup.py").read_text()


def test_the_version_is_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## \[(\d[^]]*)\]", changes, re.MULTILINE)
    assert latest is not None
    assert latest[1] == __version__
    assert "**Numbers**" in changes
    assert "### Numbers" in changes
    try:
        installed = version("nvae-ebm-prior")
    except PackageNotFoundError:
        return  # run from a checkout with somebody's own environment
    assert installed == __version__


def test_the_licence_is_apache_and_the_notice_speaks_of_other_peoples_weights():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in licence
    assert "the nvae-ebm-prior authors" in licence
    assert "NVIDIA" in (ROOT / "NOTICE").read_text()


def test_continuous_integration_runs_the_test_script_and_nothing_else():
    entry = ROOT / ".ci" / "run"
    assert os.access(entry, os.X_OK)
    started = [line for line in entry.read_text().splitlines() if line.startswith("bash ")]
    assert started == ["bash scripts/test.sh"]


def test_no_file_names_a_folder_of_one_persons_machine():
    own_path = re.compile(r"(?<![\w.<])/(home|Users|root|work|mnt|scratch)/")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in own_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if own_path.search(line)
    ]
    assert found == []


def test_no_file_needs_torchvision():
    needs = re.compile(r"^\s*(?:import|from) torchvision\b", re.MULTILINE)
    assert [p for p in own_files() if p.suffix == ".py" and needs.search(p.read_text())] == []

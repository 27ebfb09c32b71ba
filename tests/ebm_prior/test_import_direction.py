"""Who may import whom: `ebm_prior` uses `nvae` at its edges, `nvae` never imports `ebm_prior`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EDGES = ("commands/", "backbones/", "attach")
# Who knows that there is an NVAE or an HVAE: their adapters, what is put into an NVAE or trains an
# HVAE, and the demo and the bench, which are of certain NVAEs.
KNOW_THE_BACKBONE = (
    *("backbones/", "attach", "commands/train_hvae/", "commands/demo/", "commands/bench/"),
)
BACKBONES = (
    "ebm_prior.backbones.nvae",
    "ebm_prior.backbones.hvae",
    *(f"nvae.{name}" for name in ("arch.ModelConfig", "batchnorm", "checkpoint", "load", "model")),
)


def modules(package):
    folder = ROOT / package
    paths = sorted(folder.rglob("*.py"))
    return pytest.mark.parametrize("path", paths, ids=[str(p.relative_to(ROOT)) for p in paths])


def imports(path):
    """Every module and name that the file imports, late or by a literal `import_module`.

    What it takes of an imported module counts too: `from nvae import arch; arch.ModelConfig`.
    """
    found, bound = set(), {}
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                first = alias.name.split(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            for alias in node.names:
                found.add(f"{node.module}.{alias.name}")
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(node.args[0].value)
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in bound:
                found.add(".".join([bound[first], *rest]))
    return found


def under(names, *packages):
    return {name for name in names if name.startswith(tuple(f"{p}." for p in packages))} | (
        names & set(packages)
    )


@modules("ebm_prior")
def test_only_the_edges_of_the_prior_know_the_backbone(path):
    module = path.relative_to(ROOT / "ebm_prior").with_suffix("").as_posix()
    if not module.startswith(EDGES):
        assert not under(imports(path), "nvae")


@modules("ebm_prior")
def test_nothing_beyond_the_adapters_knows_which_backbone_it_runs_on(path):
    module = path.relative_to(ROOT / "ebm_prior").with_suffix("").as_posix()
    if not module.startswith(KNOW_THE_BACKBONE):
        assert not under(imports(path), *BACKBONES)


@modules("ebm_prior")
def test_what_lies_below_does_not_import_commands_or_the_trainer(path):
    module = path.relative_to(ROOT / "ebm_prior").with_suffix("").as_posix()
    if module.startswith("commands/") or module == "__main__":
        return
    assert not under(imports(path), "ebm_prior.commands", "ebm_prior.trainer")


@modules("nvae")
def test_the_backbone_knows_the_prior_only_by_the_hook_of_its_flag(path):
    found = under(imports(path), "ebm_prior")
    assert found <= ({"ebm_prior.attach"} if path.name == "evaluate.py" else set())


@pytest.mark.parametrize(
    "code",
    [
        "from nvae import arch\narch.ModelConfig()",
        "import nvae.arch\nnvae.arch.ModelConfig",
        "import nvae.arch as a\nx: a.ModelConfig",
        "def late():\n    from nvae.arch import ModelConfig",
    ],
)
def test_a_name_taken_of_an_imported_module_is_seen(tmp_path, code):
    (tmp_path / "module.py").write_text(code)
    assert under(imports(tmp_path / "module.py"), *BACKBONES) == {"nvae.arch.ModelConfig"}


def test_the_mathematics_runs_without_the_backbone():
    code = """
import sys
import ebm_prior.prior, ebm_prior.checkpoint, ebm_prior.trainer
from ebm_prior import joint, ncp, fitted, control, hierarchy, ood, transitions, diagnostics, hole
print([name for name in sys.modules if name.split(".")[0] == "nvae"])
"""
    assert python(code) == "[]"


def test_importing_either_package_does_not_import_torch():
    code = """
import sys
import nvae, nvae.arch, nvae.flags, nvae.runtime, ebm_prior, ebm_prior.presets
print("torch" in sys.modules, "ebm_prior.attach" in sys.modules)
"""
    assert python(code) == "False False"


def test_every_public_name_is_found():
    code = """
import ebm_prior
print(all(name in dir(ebm_prior) and getattr(ebm_prior, name) for name in ebm_prior.__all__))
print(callable(ebm_prior.attach), ebm_prior.attach.__module__, hasattr(ebm_prior, "nothing"))
"""
    assert python(code).splitlines() == ["True", "True ebm_prior.attach False"]


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()

"""Apex by its absence, by fakes of each way to have it wrong, and by one that works."""

from __future__ import annotations

import sys

import pytest
import torch

from ebm_prior.commands import main
from ebm_prior.training import apex, run_state
from tests.ebm_prior.test_trainer import resumed, same_run, trainer

# Adam in the form of apex's: the step counter is the group's, weight decay has two modes.
FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        self.decoupled = adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            one, two = (1 - beta ** group["step"] for beta in group["betas"])
            for p in group["params"]:
                moments = self.state[p]
                for name in ("exp_avg", "exp_avg_sq"):
                    moments.setdefault(name, torch.zeros_like(p))
                mean, square = moments.values()
                gradient = p.grad + (0 if self.decoupled else group["weight_decay"] * p)
                mean.lerp_(gradient, 1 - group["betas"][0])
                square.lerp_(gradient**2, 1 - group["betas"][1])
                move = mean / one / ((square / two).sqrt() + group["eps"])
                if self.decoupled:
                    move += group["weight_decay"] * p
                p.sub_(group["lr"] * move)
"""
WHOLE = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": FUSED_ADAM,
    "amp_C.py": "def multi_tensor_adam(): ...",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put files where Python finds them first; whatever they import is forgotten afterwards."""

    def forget():
        for name in list(sys.modules):
            if name.partition(".")[0] in ("apex", "amp_C"):
                monkeypatch.delitem(sys.modules, name)

    def write(files):
        for name, text in files.items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "site")

    forget()
    yield write
    for name in list(sys.modules):
        if name.partition(".")[0] in ("apex", "amp_C"):
            del sys.modules[name]


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)


def test_apex_that_is_absent_is_told_to_be(absent):
    assert apex.why_not().startswith("apex is not installed; build it")


@pytest.mark.parametrize(
    "files",
    [
        {"apex/__init__.py": "raise SystemExit('ran')", "apex/lib/__init__.py": ""},
        {"apex.py": "raise SystemExit('ran')"},
        {"apex/setup.py": "", "apex/apex/__init__.py": "", "apex/apex/optimizers/__init__.py": ""},
    ],
    ids=["another package", "another module", "a folder of sources"],
)
def test_what_is_not_nvidias_is_told_with_its_place_and_is_not_run(install, files, tmp_path):
    install(files)
    reason = apex.why_not()
    assert reason.startswith(str(tmp_path / "site" / "apex"))
    assert "is not NVIDIA's apex (`pip install apex` gets another package" in reason
    assert "apex" not in sys.modules


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"amp_C.py": None}, "import amp_C: ModuleNotFoundError: No module named 'amp_C'"),
        ({"amp_C.py": "raise ImportError('undefined\\nsymbol')"}, "ImportError: undefined symbol"),
        ({"amp_C.py": ""}, "amp_C has no multi_tensor_adam"),
        ({"apex/optimizers/__init__.py": ""}, "apex.optimizers has no FusedAdam"),
        ({"apex/__init__.py": "import torch._six_"}, "import apex.optimizers: ModuleNotFound"),
    ],
    ids=["no kernels", "kernels of another PyTorch", "few kernels", "few optimisers", "old"],
)
def test_apex_that_is_half_built_is_told_what_it_lacks(install, monkeypatch, files, reason):
    files = {name: text for name, text in (WHOLE | files).items() if text is not None}
    if "amp_C.py" not in files:
        monkeypatch.setitem(sys.modules, "amp_C", None)
        reason = reason.partition(": No")[0]
    install(files)
    assert apex.why_not().startswith("apex is half built: ")
    assert reason in apex.why_not()


def test_apex_that_is_whole_is_used_on_cuda_only(install):
    install(WHOLE)
    assert apex.why_not() is None
    assert apex.why_not(torch.device("cuda", 1)) is None
    assert "for CUDA, the run is on cpu" in apex.why_not(torch.device("cpu"))
    with pytest.raises(ValueError, match="run is on cpu; or use --optimizer adam, the same to"):
        apex.adam([torch.zeros(2)], lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)


def test_training_with_it_is_refused_before_any_work_with_the_reason(absent, tmp_path, capsys):
    junk = tmp_path / "checkpoint.pt"
    junk.touch()
    flags = ["--checkpoint", str(junk), "--preset", "digits", "--out", str(tmp_path / "run")]
    flags += ["--iterations", "1", "--device", "cpu", "--optimizer", "apex_adam"]
    assert main(["train", *flags]) == 2
    told = capsys.readouterr().err
    assert "--optimizer apex_adam: apex is not installed" in told
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# --- a run with the fake, on the CPU

SETTINGS = {"iterations": 6, "weight_decay": 0.1}


@pytest.fixture
def whole(install, monkeypatch):
    install(WHOLE)
    monkeypatch.setattr(apex, "why_not", lambda device: None)


def test_a_run_with_it_learns_what_one_with_adam_does(whole, tmp_path):
    energies = []
    for kind in ("adam", "apex_adam"):
        trainer(tmp_path / kind, optimizer=kind, **SETTINGS).run()
        energies.append(run_state.read(tmp_path / kind)["learned"]["energies"])
    torch.testing.assert_close(*energies, rtol=1e-4, atol=1e-5)


def test_a_run_with_it_goes_on_bit_for_bit(whole, tmp_path):
    settings = {**SETTINGS, "optimizer": "apex_adam"}
    trainer(tmp_path / "whole", **settings).run()
    trainer(tmp_path / "parts", **settings | {"iterations": 3}).run()
    resumed(tmp_path / "parts", **settings).run()
    same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_does_not_go_on_with_another_optimizer(whole, tmp_path):
    trainer(tmp_path / "run", **SETTINGS).run()
    with pytest.raises(ValueError, match=r"with optimizer 'adam' \(now 'apex_adam'\); go on"):
        resumed(tmp_path / "run", optimizer="apex_adam", **SETTINGS)

"""Reading and writing checkpoints: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nvae
from nvae import checkpoint
from nvae.arch import ModelConfig
from nvae.model import AutoEncoder
from tests.conftest import GOLDEN

ZIP = GOLDEN / "nvae" / "cifar10_vanilla_one_group" / "checkpoint.pt"
OLD = GOLDEN / "nvae" / "cifar10_res35_mbconv_old_checkpoint" / "checkpoint.pt"
PLAIN = GOLDEN / "nvae" / "cifar10_mbconv_sep11" / "checkpoint.pt"
DIGITS = ModelConfig(
    dataset="digits",
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_blocks=1,
    num_postprocess_blocks=1,
    num_mixture_dec=3,
    res_dist=True,
)


def content(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        checkpoint.read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], Any], path: Path = ZIP) -> Path:
    held = content(path)
    held = change(held) or held
    torch.save(held, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def test_load_gives_a_model_in_eval_mode() -> None:
    model = nvae.load(ZIP)
    assert isinstance(model, nvae.AutoEncoder)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_an_old_stream_without_aliases_and_late_arguments_is_read() -> None:
    assert not [key for key in content(OLD)["state_dict"] if key.endswith("weight_normalized")]
    read = checkpoint.read(OLD)
    assert read.args["num_mixture_dec"] == 10
    assert read.args["ada_groups"] is False
    model = checkpoint.build(read)
    aliases = [key for key in read.state_dict if key.endswith("weight_normalized")]
    assert aliases
    for key in aliases:
        first = model.get_parameter(key.removesuffix("_normalized"))
        assert model.get_parameter(key) is first


def test_a_written_file_has_upstreams_entries_in_order(tmp_path: Path) -> None:
    read = checkpoint.read(OLD)
    checkpoint.write(tmp_path / "new.pt", read)
    old, new = content(OLD), content(tmp_path / "new.pt")
    assert list(new) == list(old)
    assert new["arch_instance"] == old["arch_instance"]
    assert isinstance(new["args"], argparse.Namespace)
    assert vars(old["args"]).items() <= vars(new["args"]).items()
    for key, value in new["state_dict"].items():
        if key.endswith("weight_normalized"):
            first = new["state_dict"][key.removesuffix("_normalized")]
            assert value.data_ptr() == first.data_ptr(), "the file should hold the tensor once"
        else:
            assert torch.equal(value, old["state_dict"][key])


def test_a_model_of_our_own_data_set_survives_writing(tmp_path: Path) -> None:
    model = AutoEncoder(DIGITS)
    checkpoint.write(
        tmp_path / "c.pt", checkpoint.Checkpoint(model.state_dict(), DIGITS, args={}, epoch=3)
    )
    again = checkpoint.read(tmp_path / "c.pt")
    assert (again.config, again.epoch) == (DIGITS, 3)
    assert all(torch.equal(again.state_dict[k], v) for k, v in model.state_dict().items())
    assert list(again.state_dict) == list(model.state_dict())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    read = checkpoint.read(ZIP)
    checkpoint.write(path, read)
    before = path.read_bytes()
    read.scheduler = {"not picklable": lambda: None}
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.write(path, read)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_views_of_a_stacked_storage_become_tensors_of_their_own(tmp_path: Path) -> None:
    """The fused optimiser leaves parameters of equal shape as slices of one stack."""

    def stack(held: dict[str, Any]) -> None:
        state = held["state_dict"]
        keys = [k for k, v in state.items() if v.shape == state["stem.bias"].shape and v.ndim == 1]
        stacked = torch.stack([state[k] for k in keys])
        state.update(zip(keys, stacked, strict=True))
        held["optimizer"]["state"] = {0: {"step": 3, "exp_avg": stacked[1]}}

    path = changed(tmp_path, stack)
    plain, read = checkpoint.read(ZIP), checkpoint.read(path)
    for key, value in read.state_dict.items():
        assert torch.equal(value, plain.state_dict[key])
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    moment = read.optimizer["state"][0]["exp_avg"]
    assert moment.untyped_storage().nbytes() == moment.numel() * moment.element_size()


def test_tensors_that_share_memory_in_the_file_do_not_in_the_model(tmp_path: Path) -> None:
    def share(held: dict[str, Any]) -> None:
        state = held["state_dict"]
        first, second = [k for k in state if k.endswith("bn_act.bias")][:2]
        state[second] = state[first]

    state = checkpoint.read(changed(tmp_path, share)).state_dict
    pointers = [v.data_ptr() for k, v in state.items() if not k.endswith("weight_normalized")]
    assert len(set(pointers)) == len(pointers)


def test_names_with_the_prefix_of_ddp_are_read(tmp_path: Path) -> None:
    def wrap(held: dict[str, Any]) -> None:
        held["state_dict"] = {f"module.{k}": v for k, v in held["state_dict"].items()}

    read = checkpoint.read(changed(tmp_path, wrap))
    assert list(read.state_dict) == list(checkpoint.read(ZIP).state_dict)


def test_halved_weights_are_read_as_float32(tmp_path: Path) -> None:
    def halve(held: dict[str, Any]) -> None:
        held["state_dict"]["stem.bias"] = held["state_dict"]["stem.bias"].half()

    assert checkpoint.read(changed(tmp_path, halve)).state_dict["stem.bias"].dtype == torch.float32


def test_unknown_arguments_are_kept(tmp_path: Path) -> None:
    def add(held: dict[str, Any]) -> None:
        held["args"].colour_of_the_shed = "red"

    path = changed(tmp_path, add)
    assert checkpoint.read(path).args["colour_of_the_shed"] == "red"


@pytest.mark.parametrize("path", [ZIP, OLD], ids=["zip", "stream"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, path: Path, kept: float) -> None:
    whole = path.read_bytes()
    (tmp_path / "c.pt").write_bytes(whole[: int(kept * len(whole))])
    assert "not a readable checkpoint" in refusal(tmp_path / "c.pt")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    whole = bytearray(ZIP.read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "c.pt").write_bytes(whole)
    assert "not a readable checkpoint" in refusal(tmp_path / "c.pt")


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("checkpoint/data.pkl", bytes(10**7))
    assert "unpacks to 10,000,000 bytes" in refusal(bomb)


def test_a_file_that_runs_code_is_refused_and_does_not_run_it(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "args": Evil(trace)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(trace), protocol=2))
    for name in ("zip.pt", "raw.pt"):
        assert "not run" in refusal(tmp_path / name) or "was run" in refusal(tmp_path / name)
    assert not trace.exists()


def test_only_the_namespace_is_let_through(tmp_path: Path) -> None:
    torch.save({"args": Path("x"), "state_dict": {}}, tmp_path / "c.pt")
    assert "pathlib" in refusal(tmp_path / "c.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "c.pt")
    assert "it is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("other", [[1], {"a": 1}, torch.zeros(2), None], ids=repr)
def test_another_kind_of_file_is_refused(tmp_path: Path, other: object) -> None:
    torch.save(other, tmp_path / "c.pt")
    assert "not a checkpoint of NVAE" in refusal(tmp_path / "c.pt")


def _args(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda held: vars(held["args"]).update(values)


def _state(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda held: held["state_dict"].update(
        {k.replace("/", "."): v for k, v in values.items()}
    )


def _drop(held: dict[str, Any]) -> None:
    del held["state_dict"]["stem.weight"]


def _drop_argument(held: dict[str, Any]) -> None:
    del held["args"].num_nf


def _poison(held: dict[str, Any]) -> None:
    held["state_dict"]["stem.weight"][0, 0, 0, 0] = torch.nan


def _negative(held: dict[str, Any]) -> None:
    key = next(k for k in held["state_dict"] if k.endswith("running_var"))
    held["state_dict"][key][0] = -1


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "wrong type": (_args(num_nf="1"), "num_nf: got '1', expected a value of type int"),
    "int for bool": (_args(use_se=1), "use_se: got 1, expected a value of type bool"),
    "bool for int": (_args(num_nf=True), "num_nf: got True"),
    "absurd width": (_args(num_channels_enc=10**9), "num_channels_enc: got 1000000000"),
    "absurd depth": (_args(num_groups_per_scale=10**9), "num_groups_per_scale: got 1000000000"),
    "too many cells": (_args(num_groups_per_scale=900), "the model would have"),
    "negative": (_args(num_latent_scales=-1), "num_latent_scales: got -1"),
    "missing argument": (_drop_argument, "the arguments lack num_nf"),
    "undefined primitives": (_args(arch_instance="res_mbconv9"), "mconv_e6k9g0"),
    "unknown architecture": (_args(arch_instance="resnet"), "arch_instance: got 'resnet'"),
    "unknown data set": (_args(dataset="cifar11"), "dataset: got 'cifar11'"),
    "another model": (_args(num_latent_per_group=5), "belong to different models"),
    "missing tensor": (_drop, "1 missing (first: stem.weight); 0 unexpected"),
    "unexpected tensor": (_state(extra=torch.zeros(1)), "1 unexpected (first: extra)"),
    "not a tensor": (_state(extra=3), "a dict of name -> tensor"),
    "nan": (_poison, "stem.weight: some values are not finite"),
    "negative variance": (_negative, "variances are negative"),
    "integers": (
        lambda held: held["state_dict"].update({"stem.bias": torch.zeros(8, dtype=torch.int64)}),
        "stem.bias: got",
    ),
    "epoch": (lambda held: held.update(epoch="three"), "epoch: got str, expected int"),
    "args": (lambda held: held.update(args=3), "args: got int"),
    "empty weights": (lambda held: held.update(state_dict={}), "missing (first: prior_ftr0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_itself_is_refused(tmp_path: Path, name: str) -> None:
    change, words = REFUSED[name]
    assert words in refusal(changed(tmp_path, lambda held: change(held) and None))


def test_an_alias_that_differs_is_refused(tmp_path: Path) -> None:
    def split(held: dict[str, Any]) -> None:
        key = next(k for k in held["state_dict"] if k.endswith("weight_normalized"))
        held["state_dict"][key] = held["state_dict"][key] + 1

    path = changed(tmp_path, split, PLAIN)
    assert "they are two names of one tensor" in refusal(path)
    with pytest.raises(RuntimeError, match=r"weight_normalized differs"):
        checkpoint.load(PLAIN).load_state_dict(content(path)["state_dict"])


def test_loading_by_hand_keeps_or_restores_the_tie_of_the_aliases() -> None:
    state = checkpoint.read(PLAIN).state_dict
    for assign in (False, True):
        model = checkpoint.load(PLAIN)
        count = len(list(model.parameters()))
        model.load_state_dict(state, assign=assign)
        assert len(list(model.parameters())) == count
    short = {k: v for k, v in state.items() if not k.endswith("weight_normalized")}
    model.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"stem\.bias"):
        model.load_state_dict({k: v for k, v in state.items() if k != "stem.bias"})


def test_a_file_of_the_other_format_is_told_by_its_name(tmp_path) -> None:
    path = tmp_path / "hvae.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"a \.safetensors file, expected NVAE's checkpoint.pt"):
        checkpoint.read(path)

"""The authors' files: what is read off their keys, and what is refused."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch

from ebm_prior.authors import import_authors
from ebm_prior.latents import Layout
from tests.conftest import golden_files
from tests.ebm_prior.small_vaes import prior


class Latents:
    """A backbone of which only the layout is asked."""

    def __init__(self, *shapes):
        self.layout = Layout(shapes)


AUTHORS = golden_files("checkpoint_layout.pth")


def authors_file(path, networks):
    torch.save({f"netE{i}": net for i, net in enumerate(networks)}, path)
    return path


@pytest.mark.parametrize("path", AUTHORS, ids=lambda path: path.stem)
def test_golden_authors_file_is_imported(path):
    backbone = Latents((4, 8, 8), (4, 16, 16))
    imported = import_authors(path, backbone, {"num_steps": 5, "b2": 1e-4})
    config = imported.config
    assert (config.network, config.width, config.spectral_norm) == ("residual", 4, True)
    assert (config.num_steps, config.b2, config.max_T) == (5, 1e-4, 3)
    content = torch.load(path, weights_only=True)
    for i in range(2):
        state = imported.energies.layer(i).state_dict()
        assert list(state) == list(content[f"netE{i}"])
        assert all(torch.equal(state[k], v) for k, v in content[f"netE{i}"].items())


@pytest.mark.parametrize("network", ["residual", "conv"])
@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_kind_and_shapes_are_read_off_the_keys(tmp_path, network, spectral_norm, size):
    backbone = Latents((3, 8, 8), (3, size, size))
    original = prior(backbone, network=network, width=4, spectral_norm=spectral_norm)
    networks = [
        {f"module.{k}": v for k, v in original.energies.layer(i).state_dict().items()}
        for i in range(2)
    ]
    path = authors_file(tmp_path / "authors.pth", networks)
    config = import_authors(path, backbone).config
    assert (config.network, config.width) == (network, 4)
    assert config.spectral_norm == spectral_norm
    assert config.shapes == backbone.layout.shapes
    with pytest.raises(ValueError, match=f"is for latents 3x8x8, 3x{size}x{size}, the backbone"):
        import_authors(path, Latents((3, 4, 4), (3, size, size)))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def authors_broken():
    nets = [
        prior(Latents((3, 8, 8)), network="conv", width=4).energies.layer(0).state_dict()
        for _ in range(2)
    ]
    gap = {"netE0": nets[0], "netE2": nets[1]}
    short = {k: v for k, v in nets[0].items() if "linear1" not in k}
    return {
        "nothing": (b"", "not a whole PyTorch file"),
        "code": ({"netE0": Hostile()}, "files that run code"),
        "a list": ([1], "holds list, expected"),
        "a gap": (gap, "without a gap"),
        "no tensors": ({"netE0": {"a": 1}}, "not tensors"),
        "another net": ({"netE0": {"a": torch.ones(1)}}, "expected a convolution downsample"),
        "fewer keys": ({"netE0": short}, "missing"),
    }


def test_an_authors_file_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    nets = [prior(Latents((3, 8, 8)), network="conv", width=4).energies.layer(0).state_dict()]
    plain = authors_file(tmp_path / "plain.pth", nets)
    sound, bomb = tmp_path / "sound.pth", tmp_path / "bomb.pth"
    for path, more in ((sound, 0), (bomb, 10**8)):
        with (
            zipfile.ZipFile(plain) as old,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
            new.writestr("plain/data/99", bytes(more))
    assert import_authors(sound, Latents((3, 8, 8))).config.width == 4
    with pytest.raises(ValueError, match=r"unpacks to 100,\d+,\d+ bytes"):
        import_authors(bomb, Latents((3, 8, 8)))


@pytest.mark.parametrize(("content", "message"), authors_broken().values(), ids=authors_broken())
def test_a_broken_authors_file_is_refused_and_nothing_runs(
    tmp_path, monkeypatch, content, message
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "authors.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as refused:
        import_authors(path, Latents((3, 8, 8)))
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["authors.pth"]

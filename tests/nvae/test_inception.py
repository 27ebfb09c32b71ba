"""The feature networks: FID's Inception v3 read from a file, and the random one."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nvae import feature_networks, features, inception


def weights(num_features, generator):
    """Random weights with the keys of the usual file, BatchNorm apart."""
    with torch.device("meta"):
        network = inception.Inception(num_features)
    state = {}
    for name, unit in network.units().items():
        shape, width = unit.weight.shape, unit.out_channels
        state[f"{name}.conv.weight"] = torch.randn(shape, generator=generator) / shape[1:].numel()
        state[f"{name}.bn.weight"] = 0.5 + torch.rand(width, generator=generator)
        state[f"{name}.bn.bias"] = torch.randn(width, generator=generator)
        state[f"{name}.bn.running_mean"] = torch.randn(width, generator=generator)
        state[f"{name}.bn.running_var"] = 0.5 + torch.rand(width, generator=generator)
    return state


@pytest.fixture
def small(generator, tmp_path):
    """A file with what the 192 features need."""
    path = tmp_path / "weights.pth"
    torch.save(weights(192, generator), path)
    return path


def test_the_network_is_that_of_the_fid_literature():
    with torch.device("meta"):
        network = inception.Inception()
    units = {name: tuple(unit.weight.shape) for name, unit in network.units().items()}
    assert len(units) == 94
    # The number of trainable parameters that is told of Inception v3 without its classifier.
    assert sum(p.numel() for p in network.parameters()) == 21_768_352 + 1008 * 2048
    assert units["Mixed_6b.branch7x7dbl_2"] == (128, 128, 7, 1)
    assert units["Mixed_7c.branch3x3dbl_3a"] == (384, 384, 1, 3)
    assert units["Mixed_7b.branch_pool"] == (192, 1280, 1, 1)
    assert network.fc.shape == (1008, 2048)


def test_the_first_features_are_convolutions_with_batch_norm_written_out(small, generator):
    state = torch.load(small, weights_only=True)
    x = torch.rand(2, 3, 40, 30, generator=generator)

    def unit(name, x, **how):
        x = F.conv2d(x, state[f"{name}.conv.weight"], **how)
        moments = [state[f"{name}.bn.running_{m}"] for m in ("mean", "var")]
        gamma, beta = (state[f"{name}.bn.{m}"] for m in ("weight", "bias"))
        return F.relu(F.batch_norm(x, *moments, gamma, beta, eps=1e-3))

    h = F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) * 2 - 1
    h = unit("Conv2d_1a_3x3", h, stride=2)
    h = unit("Conv2d_2a_3x3", h)
    h = F.max_pool2d(unit("Conv2d_2b_3x3", h, padding=1), 3, 2)
    found = inception.load(small, 64)(x).pooled
    torch.testing.assert_close(found, h.mean((2, 3)), rtol=1e-4, atol=1e-5)
    h = F.max_pool2d(unit("Conv2d_4a_3x3", unit("Conv2d_3b_1x1", h)), 3, 2)
    found = inception.load(small, 192)(x).pooled
    torch.testing.assert_close(found, h.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_average_pools_leave_the_padding_out_and_the_last_block_takes_the_maximum():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(inception._pool("average")(ones), ones)
    pools = {
        name: branches["branch_pool"][0]
        for name, branches in inception.STAGES.items()
        if name.startswith("Mixed")
    }
    assert pools.pop("Mixed_7c") == "maximum"
    assert pools.pop("Mixed_6a") == pools.pop("Mixed_7a") == "halve"
    assert set(pools.values()) == {"average"}


def test_all_containers_hold_the_same_network(small, tmp_path, generator):
    state = torch.load(small, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    x = torch.rand(2, 3, 32, 32, generator=generator)
    first = inception.load(small, 64)
    second = inception.load(tmp_path / "weights.safetensors", 64)
    assert torch.equal(first(x).pooled, second(x).pooled)
    assert len(first.sha256) == 64
    assert first.sha256 != second.sha256
    folded = {}
    for name, unit in inception.load(small, 192).units().items():
        scale = (unit.weight.abs().amax((1, 2, 3)) / 32767).numpy()
        steps = (unit.weight.numpy() / scale[:, None, None, None]).round()
        folded |= {f"{name}.q": steps.astype(np.int16), f"{name}.scale": scale}
        folded[f"{name}.bias"] = unit.bias.numpy()
    np.savez(tmp_path / "weights.npz", missing=np.array(["fc.weight"]), **folded)
    third = inception.load(tmp_path / "weights.npz", 64)
    torch.testing.assert_close(third(x).pooled, first(x).pooled, rtol=1e-3, atol=1e-3)


def test_the_logits_have_no_bias_and_grey_is_three_equal_colours(generator):
    network = inception.Inception(64)
    network.fc = torch.nn.Parameter(torch.randn(1008, 64, generator=generator))
    x = torch.rand(2, 1, 32, 32, generator=generator)
    found = network(x)
    torch.testing.assert_close(found.logits, found.pooled @ network.fc.detach().T)
    assert torch.equal(network(x.expand(-1, 3, -1, -1)).pooled, found.pooled)


def test_values_outside_the_unit_range_are_clamped_and_chunks_change_nothing(small, generator):
    network = inception.load(small, 64)
    x = torch.rand(3, 3, 16, 16, generator=generator) * 1.4 - 0.2
    whole = network(x).pooled
    torch.testing.assert_close(whole, network(x.clamp(0, 1)).pooled)
    parts = torch.cat([network(x[i : i + 1]).pooled for i in range(3)])
    torch.testing.assert_close(parts, whole)


def test_a_partial_file_says_what_it_is_good_for(small):
    with pytest.raises(ValueError, match=r"lacks .* of the 768 .*good for --features 64, 192 \("):
        inception.load(small, 768)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.clear(), "expected the keys of pt_inception"),
        (lambda s: s.pop("Conv2d_1a_3x3.bn.bias"), r"lacks 1 layers .*first: Conv2d_1a_3x3\)"),
        (lambda s: s["Conv2d_1a_3x3.bn.bias"].fill_(torch.nan), "is not finite"),
        (
            lambda s: s.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 5, 5)}),
            "another network",
        ),
    ],
)
def test_files_that_do_not_fit_are_one_line(small, change, message):
    state = torch.load(small, weights_only=True)
    change(state)
    torch.save(state, small)
    with pytest.raises(ValueError, match=message):
        inception.load(small, 64)


def test_a_missing_or_damaged_file_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"no such file.*--features random"):
        inception.load(tmp_path / "none.pth")
    for name in ("bad.pth", "bad.safetensors", "bad.npz"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match="not a whole"):
            inception.load(tmp_path / name)


def test_without_weights_there_is_one_message_and_a_random_network(generator):
    with pytest.raises(ValueError, match=r"--inception pt_inception.* --features random"):
        feature_networks.network(None, "2048")
    network, again = (feature_networks.network(None, "random") for _ in range(2))
    x = torch.rand(3, 1, 8, 8, generator=generator)
    found = network(x)
    assert torch.equal(found.pooled, again(x).pooled)
    assert found.logits is None
    assert found.pooled.shape == (3, network.num_features)
    told = features.described(network)
    assert told["comparable"] is False
    assert told["features"] == network.label == f"random-{network.sha256[:12]}"


@pytest.mark.gpu
def test_a_gpu_computes_the_features_in_full_precision(small, generator):
    network, x = inception.load(small, 192), torch.rand(4, 3, 32, 32, generator=generator)
    expected = network(x).pooled
    torch.testing.assert_close(network.cuda()(x).pooled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.weights
def test_the_layers_of_the_real_network_see_what_they_were_normalised_for(generator):
    """Set INCEPTION to the file. BatchNorm has no learned scale, so deviations are near 1."""
    network = inception.load(os.environ["INCEPTION"], 768)
    seen = {}
    for name, unit in network.units().items():
        unit.register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out.std((0, 2, 3)).median().item()})
        )
    noise = torch.randn(4, 3, 40, 40, generator=generator)
    smooth = F.interpolate(noise, scale_factor=8, mode="bicubic") * 0.2 + 0.5
    network(smooth)
    late = [value for name, value in seen.items() if name.startswith("Mixed_6")]
    assert 0.3 < min(late)
    assert max(late) < 3

"""Every EBM golden at the contract's tolerances: numbers of the published reference, float32."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ebm_prior.config import PriorConfig
from ebm_prior.energy import ConvEnergy, EnergyNets, ResidualEnergy, time_embedding
from ebm_prior.frozen import fast
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import Schedule, forward_pair
from tests.conftest import golden_files
from tests.ebm_prior.toys import ExplicitHierarchy

VARIANTS = {"cifar10": ("residual", ResidualEnergy), "celeba256": ("conv", ConvEnergy)}


def each(pattern):
    """One test case per file, named after it."""
    return pytest.mark.parametrize("path", golden_files(pattern), ids=lambda path: path.stem)


def arrays(path):
    with np.load(path) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files if file[k].dtype.kind in "fi"}


def under(values, prefix):
    """The arrays below a prefix; further slashes become the dots of state dict keys."""
    return {
        k.removeprefix(prefix).replace("/", "."): v
        for k, v in values.items()
        if k.startswith(prefix)
    }


def assert_near(got, expected, of_maximum):
    """Largest difference against the array's own maximum, the contract's measure."""
    limit = of_maximum * expected.abs().max().item()
    assert (got - expected).abs().max().item() <= limit


@each("schedule.json")
def test_golden_schedule(path):
    for steps, golden in json.loads(path.read_text()).items():
        if isinstance(golden, str):
            assert steps == "1", "the reference raises there only"
            continue
        schedule = Schedule(int(steps))
        assert schedule.knots == golden["knots"]
        for ours, theirs in (
            (schedule.alpha, "a_s"),
            (schedule.sigma, "sigmas"),
            (schedule.alpha_bar, "a_s_cum"),
            (schedule.sigma_bar, "sigmas_cum"),
            (schedule.recovery, "is_recovery"),
        ):
            np.testing.assert_allclose(ours.numpy(), golden[theirs], rtol=1e-12)
        for key in (k for k in golden if k.startswith("langevin_step@")):
            b2 = float(key.removeprefix("langevin_step@"))
            np.testing.assert_allclose(schedule.step_size(b2).numpy(), golden[key], rtol=1e-6)


@each("time_embedding.npz")
def test_golden_time_embedding(path):
    golden = arrays(path)
    for size in (128, 7):
        assert_near(time_embedding(golden["t"], size), golden[f"emb{size}"], 1e-6)


@each("net_*.npz")
def test_golden_network(path):
    golden = arrays(path)
    _, data_set, channels_by_size, normalised = path.stem.split("_")
    channels, size = map(int, channels_by_size.split("x"))
    width = 8 if data_set == "cifar10" else 4
    net = VARIANTS[data_set][1]((channels, size, size), width, normalised == "sn")
    fresh = under(golden, "sd0/")
    assert list(net.state_dict()) == list(fresh), "keys and their order are the file format"
    net.load_state_dict(fresh)
    t = golden["t"]

    def outputs():
        x = golden["x"].clone().requires_grad_()
        y = net(x, t)
        return y, torch.autograd.grad(y.sum(), x, retain_graph=True)[0]

    net.eval()
    for got, name in zip(outputs(), ("y", "dydx"), strict=True):
        assert_near(got, golden[f"eval0/{name}"], 1e-3 if normalised == "sn" else 1e-4)
    net.train()
    for number, expected in enumerate(golden["train/y_seq"], start=1):
        assert_near(net(golden["x"], t), expected, 1e-4)
        for key, vector in under(golden, f"buf{number}/").items():
            assert_near(net.state_dict()[key], vector, 1e-5)
    net.eval()
    y, gradient = outputs()
    assert_near(y, golden["eval_after/y"], 1e-4)
    assert_near(gradient, golden["eval_after/dydx"], 1e-4)
    y.sum().backward()
    for key, expected in under(golden, "dparam/").items():
        assert_near(net.get_parameter(key).grad, expected, 1e-4)


@pytest.fixture
def hierarchy():
    return ExplicitHierarchy(under(arrays(golden_files("hierarchy.npz")[0]), "ref/"))


@each("hierarchy.npz")
def test_golden_hierarchy(path, hierarchy):
    golden = arrays(path)
    parts = [golden[f"T/u{i}"] for i in range(3)]
    u = hierarchy.layout.join(parts)
    z, warm = hierarchy.to_z(u), hierarchy.to_z(u, 0.7)
    back = hierarchy.layout.split(hierarchy.to_u(z))
    for i in range(3):
        assert_near(z[i], golden[f"T/z{i}"], 1e-5)
        assert_near(warm[i], golden[f"T/z{i}_temp0.7"], 1e-5)
        assert_near(back[i], golden[f"T/uinv{i}"], 1e-5)


class Case:
    """A golden of the chain or of the training step, with the prior it was made with."""

    def __init__(self, path, hierarchy):
        with np.load(path) as file:
            self.args = json.loads(str(file["args"]))
        self.golden = arrays(path)
        self.layout = hierarchy.layout
        self.prior = EBMPrior(
            hierarchy,
            PriorConfig(
                hierarchy.layout.shapes,
                network=VARIANTS[self.args["arch"]][0],
                width=self.args["ch"],
                max_T=self.args["T"],
                num_steps=self.args.get("K", 1),
                b2=self.args["step"],
            ),
        )
        self.reset()

    def reset(self):
        self.prior.energies.load_state_dict(under(self.golden, "sd0/"))

    def joined(self, name):
        """The array of every layer, on one u; `{}` in the name is the layer."""
        return self.layout.join([self.golden[name.format(i)] for i in range(3)])

    def assert_layers(self, u, name, of_maximum=1e-5):
        for i, part in enumerate(self.layout.split(u)):
            assert_near(part, self.golden[name.format(i)], of_maximum)


@pytest.mark.parametrize("on", [lambda prior: prior, fast], ids=["plain", "fast"])
@each("langevin_*.npz")
def test_golden_langevin_chain(path, on, hierarchy):
    case = Case(path, hierarchy)
    prior, golden, t = on(case.prior), case.golden, case.golden["t"]
    start = case.joined("u_t1_{}")

    u = start.clone().requires_grad_()
    f = prior.energies(hierarchy.to_z(u), t)
    assert_near(f.T.unsqueeze(2), golden["f_at_start"], 1e-4)
    (gradient,) = torch.autograd.grad(f.sum(), u)
    case.assert_layers(gradient, "dF_du_at_start_{}", 1e-4)

    for num_steps in (1, 5):
        noise = [case.joined(f"K{num_steps}/noise_s{k}_l{{}}") for k in range(num_steps)]
        for mode in ("eval", "train"):
            case.reset()
            prior.energies.train(mode == "train")
            u = prior.reverse(t, start, num_steps=num_steps, noise=noise)
            case.assert_layers(u, f"K{num_steps}/{mode}/u{{}}")
        state = prior.energies.state_dict()
        for key, vector in under(golden, f"K{num_steps}/train/buf/").items():
            assert_near(state[key], vector, 1e-5)

    case.reset()
    prior.energies.eval()
    noise = (
        case.layout.join([golden[f"chain/noise_{first + i}"] for i in range(3)])
        for first in range(0, 18, 3)
    )
    u = case.joined("chain/uT_{}")
    for t in reversed(range(case.args["T"])):
        u = prior.reverse(t, u, num_steps=2, noise=noise)
        case.assert_layers(u, f"chain/u_after_t{t}_{{}}")
    assert_near(hierarchy.decode(u, golden["chain/temp"].item()), golden["chain/x"], 1e-5)


@pytest.mark.parametrize("on", [lambda prior: prior, fast], ids=["plain", "fast"])
@each("train_step_*.npz")
def test_golden_training_step(path, on, hierarchy):
    case = Case(path, hierarchy)
    prior, golden, args, t = on(case.prior), case.golden, case.args, case.golden["t"]

    u = hierarchy.to_u([golden[f"z_post_{i}"] for i in range(3)])
    noises = case.joined("pair_noise_t_{}"), case.joined("pair_noise_t1_{}")
    positive, u_next = forward_pair(u, t, prior.schedule, *noises)
    case.assert_layers(positive, "u_pos_{}")
    case.assert_layers(u_next, "u_t1_{}")

    prior.energies.train()
    noise = [case.joined(f"ld_noise_s{k}_l{{}}") for k in range(args["K"])]
    negative = prior.reverse(t, u_next, noise=noise)
    case.assert_layers(negative, "u_neg_{}")
    loss, info = prior.contrast(positive, negative, t)
    ours = torch.stack([info.layer_loss, info.positive, info.negative], dim=1)
    torch.testing.assert_close(ours.double(), golden["loss_posf_negf"], rtol=1e-4, atol=0)

    optimizer = torch.optim.Adam(
        prior.energies.parameters(),
        lr=args["lr"],
        betas=tuple(args["betas"]),
        weight_decay=args["wd"],
    )
    loss.backward()
    gradients = under(golden, "grad/")
    for key, parameter in prior.energies.named_parameters():
        expected = gradients[key]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), key
    optimizer.step()
    layer_maximum = {
        layer: max(g.abs().max() for key, g in gradients.items() if key.startswith(layer))
        for layer in ("netE0", "netE1", "netE2")
    }
    state = prior.energies.state_dict()
    for key, expected in under(golden, "sd1/").items():
        off = (state[key] - expected).abs()
        if key in gradients:  # the first Adam step is a sign, which rounding decides near zero
            off = off[gradients[key].abs() >= 1e-6 * layer_maximum[key.split(".")[0]]]
        assert off.max() <= 2e-6, key


@each("checkpoint_layout.pth")
def test_golden_checkpoint_layout(path):
    file = torch.load(path, weights_only=True)
    sides = [16 if "res_blocks.1.linear.1.weight_u" in file[f"netE{i}"] else 8 for i in range(2)]
    nets = EnergyNets(ResidualEnergy((4, side, side), width=4) for side in sides)
    for i in range(2):
        net = nets.layer(i)
        assert list(net.state_dict()) == list(file[f"netE{i}"])
        net.load_state_dict(file[f"netE{i}"])
        # The optimiser's state is keyed by the order in which parameters are registered.
        state = file[f"opt{i}"]["state"]
        shapes = [tuple(state[n]["exp_avg"].shape) for n in sorted(state)]
        assert shapes == [tuple(p.shape) for p in net.parameters()]
    assert next(iter(nets.state_dict())) == "netE0.t_ebm_model1.0.weight_orig"

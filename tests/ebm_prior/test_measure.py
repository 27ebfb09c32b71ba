"""What the commands share to measure and to show: classifier, ruler, figures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_prior.commands.shared import figures, measure
from ebm_prior.commands.shared.classifier import SmallClassifier, accuracy, train_classifier
from ebm_prior.commands.shared.measure import Ruler, joined
from ebm_prior.commands.shared.subset import Subset
from nvae import data, metrics, runtime


class Digits:
    """As much of a command's job as a ruler asks for."""

    dataset = "digits"
    here = runtime.Runtime(torch.device("cpu"))

    def images(self, train, limit=None):
        half = data.load("digits", None, train=train)
        return torch.stack([half[i] for i in range(len(half))]), half.labels

    chosen = images


@pytest.fixture(scope="module")
def digits():
    return {train: Digits().images(train) for train in (True, False)}


@pytest.fixture(scope="module")
def ruler():
    torch.set_num_threads(1)
    return Ruler.of(Digits())


# --- classifier


def test_the_classifier_knows_more_than_95_percent_of_held_out_digits(ruler, digits):
    x, labels = digits[False]
    assert accuracy(ruler.classifier, x, labels) > 0.95
    assert ruler.protocol["classifier_accuracy_held_out"] > 0.95
    assert (ruler.classify(x).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 28, 28), (3, 32, 32), (3, 48, 32)])
def test_a_classifier_fits_images_of_any_size_and_number_of_classes(shape):
    network = SmallClassifier(shape, num_classes=7).eval()
    x = torch.rand(3, *shape)
    assert network.features(x).shape == (3, network.num_features)
    assert network(x).shape == (3, 7)


def test_training_a_classifier_costs_the_caller_no_random_number_and_repeats(digits):
    x, labels = (part[:100] for part in digits[True])
    before = torch.get_rng_state()
    one, two = (train_classifier(x, labels, seed=3, epochs=1) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


def test_a_larger_classifier_learns_colours_with_flips(generator):
    labels = torch.arange(3).repeat(60)
    x = 0.3 * torch.rand(180, 3, 16, 16, generator=generator)
    x[torch.arange(180), labels] += 0.5
    network = train_classifier(x, labels, seed=0, epochs=3, batch_size=20, flip=True)
    assert accuracy(network, x, labels) > 0.95


def test_labels_that_do_not_go_with_the_images_are_refused():
    for labels in (torch.zeros(3), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match="one label of at least 0 for each image"):
            train_classifier(torch.rand(2, 1, 8, 8), labels, seed=0)


# --- ruler


def test_the_distance_is_nothing_to_the_reference_and_rises_with_noise(ruler, digits, generator):
    x = torch.cat([digits[True][0], digits[False][0]])
    noise = torch.randn(x.shape, generator=generator)
    values = [ruler.distance((x + s * noise).clamp(0, 1)) for s in (0, 0.1, 0.3)]
    assert values[0] == pytest.approx(0, abs=1e-3)
    assert values == sorted(values)
    assert values[2] > 10
    both = [ruler.measure((x + s * noise).clamp(0, 1)) for s in (0, 0.3)]
    assert both[0]["confident"] > both[1]["confident"]
    assert both[0]["frechet_pixels"] < both[1]["frechet_pixels"]


def test_the_distance_is_the_metrics_own_in_the_classifiers_features(ruler, digits):
    x, y = digits[True][0], digits[False][0]
    reference = ruler.classifier.features(torch.cat([x, y]))
    expected = metrics.frechet_distance(reference, ruler.classifier.features(y))
    assert ruler.measure(y)[ruler.name] == pytest.approx(expected, rel=1e-6)
    assert ruler.distance(y) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(ruler.features(y), ruler.look(y).features)


def test_blocks_measure_as_the_whole(ruler, digits):
    x = digits[False][0]
    seen = joined(ruler.look(part) for part in x.split(70))
    for name, value in ruler.numbers(seen).items():
        assert value == pytest.approx(ruler.measure(x)[name], rel=1e-4), name


def test_random_features_are_never_called_fid(digits, tmp_path):
    x = digits[False][0][:60]
    ruler = Ruler.of(Digits(), *digits[True], features="random")
    assert ruler.name == "fid_random"
    assert "not FID" in ruler.title
    numbers = ruler.measure(x)
    assert {"fid_random", "kid_random", "kid_random_std"} == set(numbers)
    assert ruler.classify(x) is None

    path = metrics.path_of(tmp_path, "digits", ruler.network.label)
    metrics.write(path, ruler.statistics)
    again = Ruler.of(Digits(), features="random", fid_dir=str(tmp_path))
    assert again.distance(x) == pytest.approx(numbers["fid_random"], rel=1e-9)
    assert again.protocol["reference"] == str(path)


def test_a_reference_is_read_block_by_block_and_measures_as_in_memory(digits, monkeypatch):
    monkeypatch.setattr(measure, "BLOCK", 100)
    half, read = data.load("digits", None, train=True), []
    load = half.load_image
    half.load_image = lambda index: read.append(index) or load(index)
    chosen = torch.arange(0, 1400, 2)
    images = Subset(half, chosen)
    assert images.shape == (700, 1, 8, 8)
    assert len(read) == 1
    one = Ruler.of(Digits(), images, None, features="random")
    two = Ruler.of(Digits(), digits[True][0][chosen], None, features="random")
    assert torch.equal(one.statistics.mean, two.statistics.mean)
    assert read[1:] == chosen.tolist()


def test_what_is_missing_is_told(tmp_path):
    job = SimpleNamespace(
        dataset="celeba_64", here=Digits.here, chosen=lambda train: (torch.rand(4, 3, 8, 8), None)
    )
    for flags, message in (
        ({"features": "classifier"}, "celeba_64 has no labels to train a classifier"),
        ({}, "features 2048 need the weights of FID's Inception network"),
        ({"features": "random", "fid_dir": str(tmp_path)}, "there are no such statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            Ruler.of(job, **flags)


# --- figures


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_figures_are_written_and_show_what_they_are_given(tmp_path, generator):
    values = torch.randn(200, generator=generator)
    low, high = np.arange(5) - 1, np.arange(5) + 1
    figures.lines(
        tmp_path / "lines.png",
        range(5),
        {"a": torch.arange(5.0), "b": [2, 1, 2, 1, 2]},
        xlabel="k",
        ylabel="AUROC",
        title="a title",
        band={"a": (low, high)},
        hline={"chance": 0.5},
    )
    panels = {f"k = {k}": {"inside": values, "outside": values + k} for k in range(2)}
    figures.histograms(tmp_path / "histograms.png", panels, xlabel="score", title="scores")
    rows = {"one": 3.0, "two": (5.0, 4.0, 7.0), "three": -1.0}
    figures.bars(tmp_path / "bars.png", rows, ylabel="distance", title="rows")
    names = ["even", "odd"]
    figures.heatmap(tmp_path / "heat.png", [[5, 1], [0, 7]], names, names, title="confusion")
    beside = {"s": {"x": (2.0, 1.0, 3.0, "2 s")}, "MB": {"x": (5.0, 5.0, 5.0, "5")}}
    figures.bar_panels(tmp_path / "panels.png", beside, title="panels")
    for name in ("lines", "histograms", "bars", "heat", "panels"):
        found = pixels(tmp_path / f"{name}.png")
        assert min(found.shape[:2]) > 250, name
        assert len(np.unique(found.reshape(-1, 3), axis=0)) > 20, name
    blue = [int(figures.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (abs(pixels(tmp_path / "lines.png").astype(int) - blue).max(2) < 8).any()


def test_figures_refuse_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="b: 2 values at 3 positions"):
        figures.lines(
            tmp_path / "x.png", range(3), {"b": [1, 2]}, xlabel="x", ylabel="y", title="t"
        )
    with pytest.raises(ValueError, match=r"\(2, 2\) with 1 row and 2 column labels"):
        figures.heatmap(tmp_path / "x.png", np.eye(2), ["a"], ["a", "b"], title="t")
    with pytest.raises(ValueError, match="no panels"):
        figures.histograms(tmp_path / "x.png", {}, xlabel="x", title="t")
    assert not (tmp_path / "x.png").exists()

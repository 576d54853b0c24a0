"""The metrics: against closed forms, other libraries and brute force, and what they say to too few images."""

import evaluate
import numpy as np
import pytest
import torch
from scipy import linalg

from djepa_hf.metrics import METRICS, load_metric


@pytest.fixture(scope="module")
def metrics():
    return {name: load_metric(name) for name in METRICS}


def features(n, width=8, seed=0, mean=0.0, scale=1.0):
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(n, width)) @ np.random.default_rng(99).normal(size=(width, width)) / width**0.5
    return (scale * mixed + mean).astype(np.float32)


def frechet(metrics, predictions, reference):
    return metrics["frechet_distance"].compute(predictions=predictions, reference=reference)["frechet_distance"]


def test_frechet_distance_is_that_of_scipy(metrics):
    first, second = features(300), features(200, seed=1, mean=0.3, scale=1.4)
    a, b = first.astype(np.float64), second.astype(np.float64)
    root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet(metrics, first, second) == pytest.approx(expected, rel=1e-6)
    statistics = {"mu": b.mean(0), "sigma": np.cov(b.T)}
    assert frechet(metrics, first, statistics) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians(metrics):
    """Two points per axis have exactly the mean and covariance that one wants."""
    deviations, mean = np.array([1.0, 2.0, 0.5]), np.array([1.0, 0.0, -2.0])

    def with_deviations(values, centre):
        count = 2 * len(values)
        corners = np.concatenate([np.diag(values), -np.diag(values)]) * ((count - 1) / 2) ** 0.5
        return (corners + centre).astype(np.float32)

    ours = with_deviations(deviations, np.zeros(3))
    theirs = {"mu": mean, "sigma": np.diag([4.0, 4.0, 0.25])}
    expected = (mean**2).sum() + ((deviations - np.array([2.0, 2.0, 0.5])) ** 2).sum()
    assert frechet(metrics, ours, theirs) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_larger_with_fewer_images(metrics):
    real = features(4000, seed=1)
    distances = [frechet(metrics, features(n, seed=2), real) for n in (50, 200, 800)]
    assert distances[0] > 2 * distances[1] > 4 * distances[2] > 0


def test_identical_sets(metrics):
    same = features(100)
    assert frechet(metrics, same, same) == pytest.approx(0, abs=1e-6)
    found = metrics["precision_recall"].compute(predictions=same, reference=same[::-1].copy())
    assert found == {"precision": 1.0, "recall": 1.0}


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_precision_and_recall_are_those_of_brute_force(metrics, batch_size):
    fake, real = features(60, width=3, scale=0.7, mean=0.4), features(80, width=3, seed=1)

    def covered(points, centres):
        distances = np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(-1))
        radii = np.sort(distances, axis=1)[:, 3]  # the zeroth is the point itself
        inside = [any(np.linalg.norm(point - c) <= r for c, r in zip(centres, radii, strict=True)) for point in points]
        return sum(inside) / len(points)

    found = metrics["precision_recall"].compute(predictions=fake, reference=real, batch_size=batch_size)
    assert found == {"precision": covered(fake, real), "recall": covered(real, fake)}
    assert 0 < found["recall"] < found["precision"] < 1


def test_kernel_distance_is_not_biased_and_repeats(metrics):
    options = {"reference": features(400, seed=1), "subsets": 50, "subset_size": 100}
    same = metrics["kernel_distance"].compute(predictions=features(300, seed=2), **options)
    other = metrics["kernel_distance"].compute(predictions=features(300, seed=2, mean=0.5), **options)
    assert abs(same["kernel_distance"]) < same["kernel_distance_std"]
    assert other["kernel_distance"] > 5 * other["kernel_distance_std"]
    again = load_metric("kernel_distance", seed=0).compute(predictions=features(300, seed=2), **options)
    assert again == same
    assert load_metric("kernel_distance", seed=1).compute(predictions=features(300, seed=2), **options) != same


def test_inception_score_is_between_one_and_the_number_of_classes(metrics):
    labels = torch.arange(100) % 5
    sure = 200.0 * torch.nn.functional.one_hot(labels, 5)
    score = metrics["inception_score"].compute(predictions=sure.numpy(), splits=1)["inception_score"]
    assert score == pytest.approx(5, rel=1e-6)
    score = metrics["inception_score"].compute(predictions=np.zeros((100, 5), np.float32))["inception_score"]
    assert score == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "count", "options", "message"),
    [
        ("frechet_distance", 1, {"reference": 9}, "needs at least 2 images; `predictions` has 1"),
        ("frechet_distance", 9, {"reference": 1}, "needs at least 2 images; `reference` has 1"),
        ("kernel_distance", 9, {"reference": 20, "subset_size": 10}, "subsets of 10 images, but `predictions` has 9"),
        ("precision_recall", 9, {"reference": 3}, "need over 3 images; `reference` has 3"),
        ("inception_score", 9, {}, "of 10 splits needs at least 20 images; `predictions` has 9"),
    ],
)
def test_too_few_images(metrics, name, count, options, message):
    if "reference" in options:
        options = {**options, "reference": features(options["reference"])}
    with pytest.raises(ValueError, match=message):
        metrics[name].compute(predictions=features(count), **options)


@pytest.mark.parametrize("name", ["frechet_distance", "kernel_distance", "precision_recall"])
def test_features_of_other_networks(metrics, name):
    options = {"subset_size": 10} if name == "kernel_distance" else {}
    with pytest.raises(ValueError, match=r"`predictions` have 8 features, `reference` has 5"):
        metrics[name].compute(predictions=features(20), reference=features(20, width=5), **options)


def test_metrics_are_evaluation_modules(metrics):
    for name, metric in metrics.items():
        assert isinstance(metric, evaluate.Metric)
        assert metric.name == name
        assert "predictions" in metric.inputs_description
    whole = frechet(metrics, features(90), features(80, seed=1))
    for part in np.array_split(features(90), 4):
        metrics["frechet_distance"].add_batch(predictions=part)
    in_parts = metrics["frechet_distance"].compute(reference=features(80, seed=1))
    assert in_parts["frechet_distance"] == whole
    with pytest.raises(ValueError, match="There is no metric 'fid'; there are frechet_distance, "):
        load_metric("fid")

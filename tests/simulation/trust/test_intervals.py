"""Tests for prediction intervals: their coverage, and their files."""

import numpy as np
import pytest

from mlip_jax.checkpoint import CheckpointError
from mlip_jax.simulation.trust.intervals import EnsembleIntervals, Intervals, ValidationErrors


def draw(rng, num):
    """Return distances and errors, whose size grows with the distance."""
    distance = rng.uniform(0.2, 1.2, num)
    return distance, distance**2 * rng.laplace(0, 1, num)


def errors(rng, num, members=1, molecules=None):
    """Return validation errors of members, whose predictions have independent noise."""
    distance, noise = draw(rng, num)
    truth = rng.normal(0, 3, num)
    names = np.arange(num) if molecules is None else molecules
    return [
        ValidationErrors(
            names,
            distance,
            {"gap": truth},
            {"gap": truth + 0.5 * noise + 0.5 * np.abs(noise) * rng.normal(0, 1, num)},
        )
        for _ in range(members)
    ]


@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("num", [60, 300])
def test_the_coverage_is_the_requested_one(num, coverage):
    """Detects quantiles of the wrong rank, and difficulties that depend on the error itself."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(200):
        fitted = Intervals.fit(*(lambda d, e: (d, np.abs(e)))(*draw(rng, num)))
        distance, error = draw(rng, 200)
        covered.append(np.mean(np.abs(error) <= fitted.half_width(distance, coverage)))
    assert np.mean(covered) == pytest.approx(coverage, abs=0.012)
    width = fitted.half_width(np.array([0.3, 1.1]), coverage)
    assert num < 100 or width[1] > 1.5 * width[0]


def test_too_few_molecules_give_no_interval():
    fitted = Intervals.fit(np.ones(8), np.arange(8.0))
    assert np.isinf(fitted.half_width(np.ones(2), 0.9)).all()
    assert 4.0 < fitted.half_width(np.ones(1), 0.8)[0] < np.inf
    assert np.isinf(Intervals.fit(np.full(3, np.nan), np.ones(3)).half_width(np.ones(2))).all()


def test_an_ensemble_with_the_same_molecules_is_calibrated_as_a_whole():
    rng, covered = np.random.default_rng(1), []
    for _ in range(40):
        fitted = EnsembleIntervals.fit(errors(rng, 400, members=4), ["gap"])
        members = errors(rng, 400, members=4)  # new molecules
        predicted = np.array([m.predicted["gap"] for m in members])
        spread = predicted.std(0, ddof=1)
        width = fitted.half_width("gap", np.ones((4, 400)), spread, 0.9)
        covered.append(np.mean(np.abs(predicted.mean(0) - members[0].labels["gap"]) <= width))
    assert fitted.by_spread and np.mean(covered) == pytest.approx(0.9, abs=0.012)
    alone = EnsembleIntervals.fit(members[:1], ["gap"])
    assert width.mean() < alone.half_width("gap", members[0].distance[None], None, 0.9).mean()
    other = errors(rng, 400, molecules=np.full(400, 7))
    mixed = EnsembleIntervals.fit([*members[:1], *other], ["gap"])
    assert not mixed.by_spread and len(mixed.of_member) == 2


def test_files_round_trip(tmp_path):
    (saved,) = errors(np.random.default_rng(2), 50)
    saved.save(tmp_path / "intervals.npz")
    loaded = ValidationErrors.load(tmp_path / "intervals.npz")
    np.testing.assert_array_equal(loaded.predicted["gap"], saved.predicted["gap"])
    again = EnsembleIntervals.fit([loaded], ["gap"])
    assert again.half_width("gap", np.ones((1, 1)), None, 0.9) > 0
    (tmp_path / "intervals.npz").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="corrupted"):
        ValidationErrors.load(tmp_path / "intervals.npz")

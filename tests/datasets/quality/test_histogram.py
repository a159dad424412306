"""Tests for the histogram: no value is lost, and the order of values does not matter."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.datasets.quality.histogram import Histogram

values = st.lists(
    st.floats(-20, 20) | st.sampled_from([np.nan, np.inf, -np.inf, -5.0, 5.0, 0.0]), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(values, max_size=5))
def test_parts_and_merged_halves_equal_the_whole(parts):
    whole, streamed, halves = (Histogram.linear(-5, 5, 7) for _ in range(3))
    whole.add([v for part in parts for v in part])
    for part in parts:
        streamed.add(part)
        half = Histogram.linear(-5, 5, 7)
        half.add(part)
        halves.merge(half)
    everything = np.array([v for part in parts for v in part], float)
    for h in (whole, streamed, halves):
        assert h.known + h.missing == everything.size and h.missing == np.isnan(everything).sum()
        inside = everything[(everything >= -5) & (everything <= 5)]
        assert np.array_equal(h.counts, np.histogram(inside, 7, (-5, 5))[0])
        assert (h.below, h.above) == ((everything < -5).sum(), (everything > 5).sum())
        finite = everything[np.isfinite(everything)]
        if finite.size:
            assert (h.minimum, h.maximum) == (finite.min(), finite.max())
            assert h.mean == pytest.approx(finite.mean(), abs=1e-12)
        else:
            assert np.isnan([h.minimum, h.maximum, h.mean]).all()
    json.dumps(whole.to_json(), allow_nan=False)


def test_histogram_quantiles_are_accurate_to_a_bin():
    drawn = np.random.default_rng(0).normal(size=20_000)
    h = Histogram.linear(-6, 6, 240)
    h.add(drawn)
    for q in (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.99, 1.0):
        assert h.quantile(q) == pytest.approx(np.quantile(drawn, q), abs=0.05)
    assert np.isnan(Histogram.linear(0, 1, 2).quantile(0.5))
    with pytest.raises(ValueError, match="between 0 and 1"):
        h.quantile(1.5)


def test_quantiles_count_values_outside_the_edges():
    h = Histogram.linear(0, 10, 10)
    h.add([-100.0] * 30 + [5.5] * 40 + [200.0] * 30)
    assert -100 <= h.quantile(0.2) < 0 and 5 <= h.quantile(0.5) <= 6 and 10 < h.quantile(0.9) <= 200
    assert (h.quantile(0), h.quantile(1)) == (-100, 200)


def test_integer_bins():
    h = Histogram.integers(1, 5)
    h.add([1, 2, 2, 2, 5, 9])
    assert h.counts.tolist() == [1, 3, 0, 0, 1] and h.above == 1
    assert [h.quantile(q) for q in (0.1, 0.5, 0.8)] == [1, 2, 5]


def test_logarithmic_bins():
    h = Histogram.logarithmic(1e-3, 1e3, 6)
    h.add([[0.0, 2e-3], [0.5, 50]])
    assert h.counts.tolist() == [1, 0, 1, 0, 1, 0] and h.below == 1


def test_from_counts():
    h = Histogram.from_counts([0, 1, 2, 4], [0, 3, 1])
    assert (h.known, h.minimum, h.maximum, h.mean) == (4, 1, 4, (3 * 1.5 + 3) / 4)
    whole = Histogram.from_counts([1.5, 2.5, 3.5], [2, 2])
    assert (whole.minimum, whole.maximum, whole.mean) == (2, 3, 2.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Histogram([1.0]),
        lambda: Histogram([0, 1, 1]),
        lambda: Histogram([0, np.nan]),
        lambda: Histogram([[0, 1]]),
        lambda: Histogram.from_counts([0, 1], [1, 2]),
        lambda: Histogram.from_counts([0, 1], [-1]),
    ],
)
def test_invalid_bins_are_rejected(make):
    with pytest.raises(ValueError, match="received"):
        make()


def test_different_edges_cannot_be_merged():
    with pytest.raises(ValueError, match="7 from 0 to 6, and 3 from 0 to 6"):
        Histogram.linear(0, 6, 6).merge(Histogram.linear(0, 6, 2))

"""Tests for displaced inputs: they point back to the reference and are reproducible."""

import numpy as np
import pytest

from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.graphs.edge_counts import count_all
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import PaddingBudget, Sizes
from mlip_jax.structure import Structure
from mlip_jax.training.noise import DISPLACEMENT, AlternativeGeometries, CoordinateNoise, NoisedRows

CUTOFF = 3.0


def columns(count=4, seed=0, numbers=(6, 6, 8, 1, 1, 1)):
    rng = np.random.default_rng(seed)
    return Columns.from_structures(
        Structure(np.array(numbers, np.int32), rng.normal(0, 1.3, (len(numbers), 3)), record=s)
        for s in range(count)
    )


REFERENCE = columns()
# of samples 0 (two) and 2 (one)
FRAMES = AlternativeGeometries(columns(6, 1), np.array([0, 3, 4]), np.array([0, 2, 2, 3, 3]))


@pytest.mark.parametrize("frames", [None, FRAMES])
def test_displacements_point_to_the_reference(frames):
    displaced = CoordinateNoise(0.1, CUTOFF, 3, 0.5, frames)(REFERENCE, np.arange(4), 2)
    for s in range(4):
        atoms = slice(REFERENCE.offsets[s], REFERENCE.offsets[s + 1])
        reference, back = (
            REFERENCE.positions[atoms],
            displaced.positions[atoms] + displaced.atom_properties[DISPLACEMENT][atoms],
        )
        np.testing.assert_allclose(
            np.linalg.norm(back[:, None] - back, axis=-1),
            np.linalg.norm(reference[:, None] - reference, axis=-1),
            atol=1e-9,
        )
    assert displaced.numbers is REFERENCE.numbers


def test_inputs_of_a_model_of_bonds_are_turned_and_only_heavy_atoms_are_fitted():
    """Detects displacements that contain the turn of the input, or a fit to hydrogens."""
    displaced = CoordinateNoise(0.0, CUTOFF, 3, 1.0, FRAMES, heavy=True)(REFERENCE, np.arange(2), 2)
    moved = displaced.atom_properties[DISPLACEMENT]
    first, second = slice(0, 6), slice(6, 12)
    assert np.abs(moved[second]).max() < 1e-9  # without frames: only turned
    assert np.abs(displaced.positions[second] - REFERENCE.positions[second]).max() > 0.1
    np.testing.assert_allclose(moved[first][:3].mean(0), 0, atol=1e-9)
    assert np.abs(moved[first].mean(0)).max() > 1e-3


def test_noise_has_the_given_size_and_displacements_contain_no_rigid_motion():
    many = columns(400)
    displaced = CoordinateNoise(0.1, CUTOFF, 0)(many, np.arange(400), 0)
    assert (displaced.positions - many.positions).std() == pytest.approx(0.1, rel=0.03)
    moved = displaced.atom_properties[DISPLACEMENT].reshape(400, 6, 3)
    np.testing.assert_allclose(moved.mean(1), 0, atol=1e-9)
    # of 18 coordinates 6 are the place and turn of the molecule
    assert moved.std() == pytest.approx(0.1 * np.sqrt(12 / 18), rel=0.05)


def test_half_of_the_inputs_are_frames():
    drawn = [
        CoordinateNoise(0.0, CUTOFF, 0, 0.5, FRAMES)(REFERENCE, np.arange(4), epoch).positions
        for epoch in range(200)
    ]
    first = np.array([d[:6] for d in drawn])
    is_frame = ~(first == REFERENCE.positions[:6]).all((1, 2))
    assert 0.4 < is_frame.mean() < 0.6
    assert all(
        any((f == FRAMES.rows.positions[6 * k : 6 * k + 6]).all() for k in (0, 3))
        for f in first[is_frame]
    )
    assert all((d[6:12] == REFERENCE.positions[6:12]).all() for d in drawn)  # one without frames


def test_noise_depends_only_on_seed_epoch_and_sample():
    make = CoordinateNoise(0.1, CUTOFF, 7, 0.5, FRAMES)
    whole = make(REFERENCE, np.arange(4), 5)
    part = make(REFERENCE.take(np.array([3, 1])), np.array([3, 1]), 5)
    np.testing.assert_array_equal(
        part.positions, np.concatenate([whole.positions[18:], whole.positions[6:12]])
    )
    for other in (
        make(REFERENCE, np.arange(4), 6),
        CoordinateNoise(0.1, CUTOFF, 8)(REFERENCE, np.arange(4), 5),
    ):
        assert (other.positions != whole.positions).any()


def test_frames_with_other_atoms_are_an_error():
    wrong = AlternativeGeometries(columns(6, 1, (6, 8, 6, 1, 1, 1)), FRAMES.index, FRAMES.first)
    with pytest.raises(DatasetError, match="record [03]: the atoms of its frames"):
        for epoch in range(20):
            CoordinateNoise(0.0, CUTOFF, 0, 1.0, wrong)(REFERENCE, np.arange(1), epoch)


def test_displaced_structures_fit_into_their_batches():
    make, sizes = CoordinateNoise(0.3, CUTOFF, 0, 0.5, FRAMES), graph_sizes(REFERENCE, CUTOFF)
    bounds = make.bounds(sizes, count_all(FRAMES.rows, CUTOFF)[FRAMES.index])
    assert (bounds.n_edge >= sizes.n_edge).all() and (bounds.n_edge <= 30).all()
    assert bounds.n_edge[0] >= count_all(FRAMES.rows, CUTOFF)[[0, 3]].max()
    budget = PaddingBudget(25, int(bounds.n_edge.sum()), 5)
    for epoch in range(50):
        assert (
            count_all(make(REFERENCE, np.arange(4), epoch, budget), CUTOFF).sum() <= budget.n_edge
        )


def test_noise_adds_edges_in_small_cells():
    """Detects cells with more edges than pairs of atoms, whose batches had no space for noise."""
    sizes = Sizes(np.array([2, 2, 6]), np.array([100, 2, 4]), None)
    bounds = CoordinateNoise(0.1, CUTOFF, 0).bounds(sizes)
    assert bounds.n_edge.tolist() == [108, 2, 12]


def test_noise_that_never_fits_is_an_error():
    with pytest.raises(ValueError, match="do not fit into 2 edges"):
        CoordinateNoise(0.01, CUTOFF, 0)(REFERENCE, np.arange(4), 0, PaddingBudget(25, 2, 5))


def test_displaced_validation_rows_are_fixed():
    rows = NoisedRows(REFERENCE, CoordinateNoise(0.1, CUTOFF, 0))
    np.testing.assert_array_equal(
        rows.take(np.array([1, 2])).positions,
        rows.take(np.array([2, 1])).take(np.array([1, 0])).positions,
    )
    assert len(rows) == 4

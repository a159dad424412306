"""Tests for batched nudged elastic bands: each step equals that of ASE."""

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from ase.mep import NEB
from ase.optimize import BFGS, FIRE

from mlip_jax import MLIPCalculator, neb
from mlip_jax.simulation.device_memory import ProgramTooLarge
from mlip_jax.simulation.reactions import neb as neb_module
from mlip_jax.simulation.reactions.neb import NEBOptions, ReactionPath, find_paths
from mlip_jax.simulation.reactions.paths import interpolate_path
from tests.simulation.analytic import pairwise

POTENTIAL = pairwise(depth=0.2, length=2.4, cutoff=5.5)
STEPS = 6
MINIMIZERS = {"bfgs": BFGS, "fire": FIRE}


def cluster(periodic=False, fixed=(0,)):
    """Return a path: an atom rolls from one hollow of four atoms over an edge, by linear steps."""
    r = 2.4 * 2 ** (1 / 6)
    base = np.array([[0, 0, 0], [r, 0, 0], [0.5 * r, 0.87 * r, 0], [1.5 * r, 0.87 * r, 0]])
    ends = base[[0, 1, 2]].mean(0), base[[1, 3, 2]].mean(0)
    images = []
    for x in np.linspace(0, 1, 5):
        atom = (1 - x) * ends[0] + x * ends[1] + [0.05 * x, 0, 0.8 * r]
        atoms = Atoms("Ar5", [*base, atom], constraint=FixAtoms(fixed))
        if periodic:
            atoms.set_cell([2 * r, 1.8 * r, 12.0])
            atoms.pbc = (True, True, False)
            atoms.positions += [1.0, 0.3, 4.0]
        images.append(atoms)
    return images


def band_of_ase(path, optimizer, steps, climb):
    images = [image.copy() for image in path]
    calculator = MLIPCalculator(POTENTIAL, dtype="float64")
    for image in images:
        image.calc = calculator
    band = NEB(images, climb=climb, method="improvedtangent", allow_shared_calculator=True)
    run = MINIMIZERS[optimizer](band, logfile=None)
    run.run(fmax=1e-3, steps=steps)
    return images, np.linalg.norm(band.get_forces(), axis=1).max(), run.nsteps


@pytest.mark.parametrize(
    ("optimizer", "climb", "periodic"),
    [
        ("bfgs", True, False),
        pytest.param("fire", False, True, marks=pytest.mark.slow),
        pytest.param("fire", True, False, marks=pytest.mark.slow),
        pytest.param("bfgs", True, True, marks=pytest.mark.slow),
    ],
)
def test_bands_equal_those_of_ase(optimizer, climb, periodic):
    """Two paths of one program; the second one is the first one reversed and displaced."""
    forward = cluster(periodic)
    other = [image.copy() for image in forward[::-1]]
    rng = np.random.default_rng(0)
    for image in other[1:-1]:
        image.positions[1:] += rng.normal(0, 0.05, (4, 3))
    results = neb(
        [forward, other],
        POTENTIAL,
        optimizer=optimizer,
        climb=climb,
        fmax=1e-3,
        max_steps=STEPS,
        relax_ends=False,
    )
    for start, result in zip([forward, other], results, strict=True):
        images, fmax, steps = band_of_ase(start, optimizer, STEPS, climb)
        assert result.steps == steps
        for ours, theirs in zip(result.images, images, strict=True):
            np.testing.assert_allclose(ours.positions, theirs.positions, rtol=0, atol=1e-8)
            energy = theirs.get_potential_energy()
            assert ours.get_potential_energy() == pytest.approx(energy, abs=1e-8)
        assert result.fmax == pytest.approx(fmax, abs=1e-7)
        assert np.abs(images[2].positions - start[2].positions).max() > 0.03


@pytest.mark.slow
def test_barriers_of_relaxed_and_interpolated_paths():
    """From two ends: a symmetric barrier with a saddle point in the middle."""
    path = cluster(fixed=(0, 1, 2, 3))
    (result,) = neb([path[0], path[-1]], POTENTIAL, num_images=3, fmax=0.01)
    assert result.converged and len(result.images) == 5
    assert result.barrier == pytest.approx(result.reverse_barrier, abs=5e-3)
    assert result.barrier > 0.03 and abs(result.reaction_energy) < 5e-3
    saddle = result.images[int(np.argmax(result.energies))].copy()
    saddle.calc = MLIPCalculator(POTENTIAL, dtype="float64")
    assert np.linalg.norm(saddle.get_forces(), axis=1).max() < 0.02
    assert (np.diff(result.distances) > 0.1).all()


def test_coinciding_ends_are_reported():
    """Detects a barrier of zero between equal structures that is shown as a result."""
    path = cluster()
    assert "same structure" in ReactionPath([path[0], path[0].copy()], "converged").remark
    assert ReactionPath([path[0], path[-1]], "converged").remark == ""
    assert ReactionPath([], "failed", "other atoms").remark == ""


@pytest.mark.parametrize("given", [2, 3])
def test_images_have_no_momenta(given):
    """Detects momenta of the first image in all images, with which dynamics would continue."""
    ends = [
        Atoms("Ar2", [[0, 0, 0], [0, 0, z]], momenta=np.ones((2, 3))) for z in (3, 4, 5)[:given]
    ]
    images = interpolate_path(ends, 1, "linear")
    assert len(images) == 3 and not any(image.has("momenta") for image in images)
    assert all(end.has("momenta") for end in ends)


def test_invalid_paths_are_reported():
    path = cluster()
    swapped = path[-1][[1, 0, 2, 3, 4]]
    swapped.numbers[0] = 1
    (result,) = neb([path[0], swapped], POTENTIAL)
    assert result.status == "failed" and "other atoms" in result.reason and result.images == []
    ion = path[-1].copy()
    ion.info["charge"] = 1
    (result,) = neb([path[0], ion], POTENTIAL)
    assert result.status == "failed" and "another charge" in result.reason
    with pytest.raises(ValueError, match="at least two"):
        neb([[path[0]]], POTENTIAL)
    with pytest.raises(ValueError, match="interpolation must be"):
        neb([path], POTENTIAL, interpolation="spline")


def test_paths_are_split_for_the_memory_of_the_device(monkeypatch):
    """The program needs one byte per path, and there are three: batches of at most two."""
    given, sizes = {k: cluster() for k in range(7)}, []

    def optimize(batch, *args):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise ProgramTooLarge(len(batch), 3)
        return [ReactionPath(path, "converged") for path in batch]

    monkeypatch.setattr(neb_module, "_optimize", optimize)
    found = dict(find_paths(given, POTENTIAL, NEBOptions(relax_ends=False)))
    assert sizes == [7, 2, 2, 2, 1] and sorted(found) == list(range(7))
    for key, path in found.items():
        np.testing.assert_array_equal(path.images[2].positions, given[key][2].positions)

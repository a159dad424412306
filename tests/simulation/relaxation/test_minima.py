"""Tests for the search for minima: clusters with known minima, reactions, invalid options."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from mlip_jax.simulation.relaxation import minima
from mlip_jax.simulation.relaxation.minima import find_minima
from mlip_jax.simulation.relaxation.minima_result import boltzmann_populations
from mlip_jax.simulation.relaxation.relax import Relaxation
from tests.simulation.analytic import pairwise

DEPTH, LENGTH = 0.0104, 3.4
# LJ6: the two lowest minima of six Lennard-Jones atoms in units of the depth, an octahedron and a
# capped trigonal
# bipyramid (Hoare and Pal, Adv. Phys. 20, 161 (1971)).
LJ6 = (-12.7121, -12.3029)


def cluster(count, seed):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3), -1).reshape(-1, 3)[:count] * 3.9
    return Atoms("Ar" * count, grid + rng.normal(0, 0.2, (count, 3)))


@pytest.mark.slow
def test_minima_of_six_lennard_jones_atoms():
    potential = pairwise("lennard_jones", cutoff=200.0, depth=DEPTH, length=LENGTH)
    (result,) = find_minima(
        [[cluster(6, s) for s in range(4)]],
        potential,
        rounds=6,
        replicas=12,
        temperature=20.0,
        picoseconds=12.0,
        frames=8,
        timestep=10.0,
        fmax=1e-4,
        energy_tolerance=1e-4,
        rmsd_tolerance=0.2,
        window=0.1,
        dtype="float64",
        max_steps=2000,
    )
    energies = [(m.energy - 6 * -1234.5678) / DEPTH for m in result.minima]
    np.testing.assert_allclose(energies[:2], LJ6, atol=2e-2)  # higher ones may be symmetric saddles
    assert result.minima[0].times > 1 and result.relaxed[0] == 4
    assert sum(m.times for m in result.minima) + sum(
        n for reason, n in result.left_out.items() if reason != "dynamics broke"
    ) == sum(result.relaxed)


def test_molecules_in_one_batch():
    potential = pairwise("harmonic", length=1.4, elements=(8,))
    ring = Atoms("O3", [[0, 0, 0], [1.4, 0, 0], [0.7, 1.4 * 0.75**0.5, 0]])
    shaken = [ring.copy() for _ in range(3)]
    for k, atoms in enumerate(shaken):
        atoms.rattle(0.05, seed=k)
    one, other = find_minima(
        [shaken, [ring]],
        potential,
        rounds=1,
        replicas=2,
        temperature=100.0,
        picoseconds=0.02,
        frames=2,
    )
    assert (
        len(one.minima) == len(other.minima) == 1
        and one.minima[0].times > 3
        and one.relaxed == [3, 4]
    )
    assert one.minima[0].energy == pytest.approx(other.minima[0].energy, abs=1e-3)


def test_reaction_products_are_rejected():
    potential = pairwise("harmonic", length=2.0, stiffness=5.0)
    (result,) = find_minima([[Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])]], potential, rounds=2)
    assert result.minima == [] and result.left_out == {"other bonds": 1} and result.relaxed == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds must be an integer of at least 0"),
        ({"window": 0.0}, "window must be positive"),
        ({"frames": 0}, "frames"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        find_minima([[molecule("H2")]], pairwise(), **options)


def test_a_molecule_without_geometry_is_rejected():
    with pytest.raises(ValueError, match="needs at least one geometry"):
        find_minima([[]], pairwise())


def peroxide(angle):
    """Return H2O2 with a dihedral angle (degrees): 90 and 270 are mirror images."""
    atoms = molecule("H2O2")
    atoms.set_dihedral(2, 0, 1, 3, angle, indices=[3])
    return atoms


class NoRelaxer:
    """Relaxer whose force field has no forces."""

    def __init__(self, potential, **options):
        pass

    def stream(self, molecules):
        for key, atoms in molecules:
            yield key, Relaxation(atoms, "converged", energy=0.0)


def with_exchanged_hydrogens(name):
    """Return a molecule, and copies with the hydrogens of its last heavy atom exchanged."""
    atoms = molecule(name)
    last = int(np.flatnonzero(atoms.numbers > 1)[-1])
    bonded = [i for i in np.flatnonzero(atoms.numbers == 1) if atoms.get_distance(i, last) < 1.2]
    cyclic, swapped = atoms.copy(), atoms.copy()
    cyclic.positions[bonded] = atoms.positions[np.roll(bonded, 1)]
    swapped.positions[bonded[:2]] = atoms.positions[bonded[1::-1]]
    return [atoms, cyclic, swapped]


def test_mirror_images_and_orders_of_hydrogens(monkeypatch):
    """Detects a search that counts enantiomeric conformers twice.

    Also detects one that counts the minima of small molecules once per order of their hydrogens.
    """
    monkeypatch.setattr(minima, "Relaxer", NoRelaxer)
    potential = pairwise("none", elements=(1, 6, 7, 8))
    starts = [
        [peroxide(100.0), peroxide(260.0)],
        *map(with_exchanged_hydrogens, ("C2H6", "H3CNH2", "CH4", "H2O")),
    ]
    for merge, counts in ((False, [1, 1]), (True, [2])):
        result, *others = find_minima(starts, potential, rounds=0, merge_mirror_images=merge)
        assert [[m.times for m in other.minima] for other in others] == [[3]] * 4
        assert [m.times for m in result.minima] == counts
        assert [m.mirror_images for m in result.minima] == ([2] if merge else [1, 1])
        np.testing.assert_allclose(result.populations(300.0), np.full(len(counts), 1 / len(counts)))


def test_minima_end_with_a_tight_relaxation():
    """Detects a bond of H2 that counts as broken, because it is as long as the limit of a bond."""
    potential = pairwise("harmonic", length=0.79, stiffness=20.0, elements=(1, 8, 6))
    starts = [[Atoms("CO", [[0, 0, 0], [0, 0, 0.9]])], [Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])]]
    result, hydrogen = find_minima(starts, potential, rounds=0, fmax=5.0)
    assert len(hydrogen.minima) == 1 and not hydrogen.left_out
    forces = result.minima[0].atoms.get_forces()
    assert np.abs(forces).max() < 1e-3


def test_boltzmann_populations():
    # kT at 300 K is 25.852 meV; twice as many states with twice the population
    weights = boltzmann_populations([-5.0, -5.0 + 0.025852, -5.0], [1, 1, 2], 300.0)
    np.testing.assert_allclose(weights, np.array([1, np.exp(-1), 2]) / (3 + np.exp(-1)), rtol=1e-5)

"""Tests for dynamics on the device: agreement with ASE, neighbor lists, restarts and breakage."""

import pickle
import warnings

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.cluster import Icosahedron
from ase.md.verlet import VelocityVerlet

from mlip_jax import MLIPCalculator, MolecularDynamics
from mlip_jax.simulation import device_memory
from mlip_jax.simulation.dynamics import batch
from mlip_jax.simulation.dynamics.settings import Settings
from mlip_jax.simulation.dynamics.start import initialize_momenta
from tests.simulation.analytic import pairwise
from tests.simulation.calculators.test_long_range import potential as point_charges

QUIET = {"stop_on_bond_break": False, "max_temperature": 1e6}
# options of tests of the energy, which share a compiled program
SPARSE = {"temperature": 30.0, "frame_every": 0, "record_every": 10, "fix_com": True}


def cluster(seed=0, shake=0.1, temperature=0.0):
    atoms = Icosahedron("Ar", 2, latticeconstant=5.4)
    rng = np.random.default_rng(seed)
    atoms.positions += rng.normal(0, shake, (len(atoms), 3)) + 11.0
    if temperature:
        atoms.set_momenta(
            rng.normal(
                0, np.sqrt(atoms.get_masses()[:, None] * units.kB * temperature), (len(atoms), 3)
            )
        )
    return atoms


def crystal(repeat, seed=0, shake=0.1):
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True) * repeat
    atoms.positions += np.random.default_rng(seed).normal(0, shake, (len(atoms), 3))
    return atoms


def under_ase(calculator, atoms, steps, timestep, every=1):
    """Return positions, forces and energies of ASE's velocity Verlet with our calculator."""
    atoms, recorded = atoms.copy(), []
    atoms.calc = calculator
    with VelocityVerlet(atoms, timestep * units.fs) as run:
        run.attach(
            lambda: recorded.append(
                (atoms.positions.copy(), atoms.get_forces(), atoms.get_total_energy())
            ),
            interval=every,
        )
        run.run(steps)
    return [np.array(x) for x in zip(*recorded)]


def assert_agrees_with_ase(potential, dynamics, steps=50):
    trajectories = dynamics.run(steps)
    calculator = MLIPCalculator(potential, dtype="float64")
    for start, ours in zip(dynamics.molecules, trajectories):
        start = start.copy()
        positions, forces, energies = under_ase(
            calculator, start, steps, dynamics.settings.timestep
        )
        origin = ours.frames[0].positions - start.positions
        assert ours.steps == list(range(steps + 1)) and ours.broken is None
        np.testing.assert_allclose(
            np.array([f.positions for f in ours.frames]) - origin[0], positions, atol=1e-9
        )
        np.testing.assert_allclose([f.get_forces() for f in ours.frames], forces, atol=1e-9)
        np.testing.assert_allclose(ours.thermo.total, energies, rtol=0, atol=1e-8)
        np.testing.assert_allclose(
            [f.get_potential_energy() for f in ours.frames], ours.thermo.potential, atol=1e-9
        )


def every_step(atoms, potential, **options):
    quiet = {
        "ensemble": "nve",
        "record_every": 1,
        "frame_every": 1,
        "dtype": "float64",
        "fix_com": False,
        **QUIET,
    }
    return MolecularDynamics(atoms, potential, **quiet | options)


def test_open_molecules_agree_with_ase_at_each_step():
    potential = pairwise()
    # different sizes, hot enough for many lists
    starts = [
        cluster(0, temperature=900),
        Atoms("Ar2", [[0, 0, 0], [0, 0, 4.0]]),
        cluster(1, temperature=200),
    ]
    dynamics = every_step(starts, potential, timestep=4.0, skin=0.5)
    assert_agrees_with_ase(potential, dynamics)
    assert (
        dynamics.lists_built_on == "device"
        and dynamics.num_lists_built > 2
        and dynamics.num_compiles == 1
    )


def test_cells_agree_with_ase():
    potential = pairwise(cutoff=4.5)
    wide = crystal((2, 2, 2), 1)
    wide.set_cell(
        wide.cell.array @ np.array([[1, 0.1, 0], [0, 1, 0], [0, 0.05, 1]]), scale_atoms=True
    )
    dynamics = every_step(wide, potential, timestep=4.0, skin=0.3, temperature=150.0)
    assert_agrees_with_ase(potential, dynamics, 25)
    assert dynamics.lists_built_on == "device" and dynamics.num_lists_built > 2


def test_cells_smaller_than_the_cutoff_have_lists_from_the_host():
    """Also with steps longer than the skin allows, which used to be reported as broken molecules."""
    potential = pairwise(cutoff=6.0)
    slab = crystal((1, 2, 2), 3)
    slab.pbc = (True, True, False)
    dynamics = every_step(
        [crystal((1, 1, 1), 2), slab], potential, timestep=10.0, skin=0.03, temperature=150.0
    )
    assert_agrees_with_ase(potential, dynamics, 25)
    assert dynamics.lists_built_on == "host" and dynamics.num_lists_built > 3
    assert float(dynamics.snapshot()["skin"]) > 0.8  # with which a restored run continues


def test_energy_is_conserved_to_second_order():
    errors = []
    for timestep in (8.0, 4.0):
        dynamics = every_step(cluster(0), pairwise(), timestep=timestep, **SPARSE)
        total = dynamics.run(int(8000 / timestep))[0].thermo.total
        errors.append(np.std(total))
    assert 3.5 < errors[0] / errors[1] < 4.6, errors


def test_float32_loses_no_energy_to_rounding():
    """Holds also far from the origin; energies keep the digits of the small changes."""
    drifts = {}
    for dtype in ("float32", "float64"):
        dynamics = every_step(cluster(0), pairwise(), timestep=2.0, dtype=dtype, **SPARSE)
        thermo = dynamics.run(5000)[0].thermo
        drifts[dtype] = np.polyfit(thermo.time / 1000, thermo.total / 13, 1)[0]
        assert np.std(thermo.total) < 1e-3
    assert abs(drifts["float32"] - drifts["float64"]) < 1e-6, drifts  # eV/atom/ps


def test_batches_are_chosen_for_the_memory_of_the_device(monkeypatch, caplog):
    """Smaller batches take turns, with the same results, also if all molecules of one break."""
    molecules = [Atoms("Ar2", [[0, 0, 0], [0, 0, 3.5 + 0.02 * k]]) for k in range(16)]
    for atoms in molecules[:8]:
        atoms.positions[1, 2] -= 2.5
    options = {"timestep": 2.0, "dtype": "float64", "record_every": 2, "frame_every": 3}

    def prepare():
        return MolecularDynamics(molecules, pairwise(), **options, **QUIET)

    whole = prepare()
    expected = whole.run(8)
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: 1)
    with pytest.raises(device_memory.ProgramTooLarge) as error:
        whole.batches[0].check_memory()
    limit = int(0.6 * error.value.needed)
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: limit)
    small, resumed = prepare(), prepare()
    first = small.run(4)
    assert len(small.batches) > 1 and "may be used for 16 molecules; continuing" in caplog.text
    resumed.restore(small.snapshot())
    assert resumed.step == small.step == 4
    rest = resumed.run(4)
    assert resumed.broken == whole.broken and set(whole.broken) == set(range(8))
    for a, b, both in zip(first, rest, expected):
        assert a.steps + b.steps == both.steps
        potential = np.concatenate([a.thermo.potential, b.thermo.potential])
        np.testing.assert_allclose(potential, both.thermo.potential, rtol=1e-9)
        for frame, other in zip(a.frames + b.frames, both.frames):
            np.testing.assert_allclose(frame.positions, other.positions, atol=1e-9)
    with pytest.raises(ValueError, match="belongs to other molecules"):
        MolecularDynamics(molecules[:3], pairwise(), **options).restore(small.snapshot())


def test_records_of_a_short_dispatch_are_small(monkeypatch):
    """On a busy machine a dispatch makes few steps, so there are many dispatches."""
    monkeypatch.setattr(batch, "DISPATCH_SECONDS", 0.0)
    dynamics = MolecularDynamics(
        cluster(0), pairwise(), replicas=4, ensemble="nve", temperature=5.0, frame_every=2
    )
    segments = list(dynamics.stream(30))
    assert len(segments) > 10
    assert len(pickle.dumps([frames for _, frames in segments])) < 200_000


@pytest.mark.parametrize("kind", ["tiny", pytest.param("so3krates", marks=pytest.mark.slow)])
def test_forces_equal_those_of_a_new_list(make_potential, kind):
    potential = make_potential(kind, 1)
    # the larger molecule first, whose compiled calculator also holds the smaller one
    start = [molecule("C6H6"), molecule("CH3CH2OH")]
    dynamics = every_step(
        start, potential, timestep=1.0, temperature=600.0, skin=1.0, frame_every=8
    )
    calculator = MLIPCalculator(potential, "float64")
    trajectories = dynamics.run(80)
    assert 2 < dynamics.num_lists_built < 70
    for trajectory in trajectories:
        for atoms in trajectory.frames:
            scale = np.abs(atoms.get_forces()).max()
            fresh = calculator.get_forces(atoms)
            np.testing.assert_allclose(atoms.get_forces(), fresh, rtol=0, atol=1e-10 * scale)
            assert atoms.get_potential_energy() == pytest.approx(
                calculator.get_potential_energy(atoms), abs=1e-8
            )


def test_more_neighbors_than_the_capacity():
    """Clusters beyond each other's cutoff that collide."""
    a, b = cluster(0), cluster(1)
    b.positions += [22.0, 0, 0]
    both = a + b
    both.set_momenta(
        both.get_masses()[:, None]
        * np.where(np.arange(26) < 13, 0.05, -0.05)[:, None]
        * [1.0, 0, 0]
    )
    dynamics = every_step(both, pairwise(), timestep=8.0, frame_every=10)
    before = dynamics.batches[0].capacity.budget
    ours = dynamics.run(250)[0]
    calculator = MLIPCalculator(pairwise(), dtype="float64")
    positions, _, energies = under_ase(calculator, dynamics.molecules[0], 250, 8.0, every=10)
    assert dynamics.batches[0].capacity.budget.n_edge > before.n_edge and dynamics.num_compiles >= 2
    assert ours.steps == list(range(0, 251, 10)), "no step is lost or made twice"
    np.testing.assert_array_equal(ours.thermo.step, np.arange(251))
    origin = both.positions[0] - dynamics.molecules[0].positions[0]
    np.testing.assert_allclose(
        np.array([f.positions for f in ours.frames]) - origin, positions, atol=1e-6
    )
    np.testing.assert_allclose(ours.thermo.total[::10], energies, atol=1e-7)


@pytest.mark.parametrize(
    ("ensemble", "by"),
    [
        ("langevin", "device"),
        pytest.param("rescaling", "device", marks=pytest.mark.slow),
        pytest.param("rescaling", "host", marks=pytest.mark.slow),
    ],
)
def test_a_restart_is_bit_exact(ensemble, by):
    start = crystal((1, 1, 1)) if by == "host" else [cluster(0), cluster(1)]
    options = dict(
        ensemble=ensemble,
        timestep=4.0,
        temperature=300.0,
        skin=0.3,
        dtype="float32",
        frame_every=10,
        fix_com=True,
        seed=3,
        replicas=2,
    )
    whole = every_step(start, pairwise(cutoff=6.0), **options)
    expected = whole.run(100)
    first = every_step(start, pairwise(cutoff=6.0), **options)
    first.run(43)
    second = every_step(start, pairwise(cutoff=6.0), **options)
    second.restore({k: v.copy() for k, v in first.snapshot().items()})
    assert second.step == 43 and second.lists_built_on == by
    for ours, theirs in zip(second.run(57), expected):
        np.testing.assert_array_equal(ours.thermo.total, theirs.thermo.total[44:])
        assert ours.steps == [50, 60, 70, 80, 90, 100]
        np.testing.assert_array_equal(ours.frames[-1].positions, theirs.frames[-1].positions)
        np.testing.assert_array_equal(
            ours.frames[-1].get_momenta(), theirs.frames[-1].get_momenta()
        )
    for name, value in whole.snapshot().items():
        np.testing.assert_array_equal(second.snapshot()[name], value, err_msg=name)
    with pytest.raises(ValueError, match="belongs to other molecules: positions"):
        every_step(
            crystal((1, 1, 2)) if by == "host" else cluster(0), pairwise(cutoff=6.0)
        ).restore(first.snapshot())


def test_broken_molecules_are_marked_and_the_others_continue():
    """Dimers of hydrogen on springs; covalent radii are 0.31 Å."""
    potential = pairwise("harmonic", length=0.74, stiffness=5.0)

    def dimer(speed):
        atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])
        atoms.set_momenta(atoms.get_masses()[:, None] * [[0, 0, -speed], [0, 0, speed]])
        return atoms

    calm, torn, pressed, fast = dimer(0.01), dimer(1.0), dimer(-1.2), dimer(60.0)
    dynamics = every_step(
        [calm, torn, pressed, fast, calm],
        potential,
        stop_on_bond_break=True,
        bond_range=(0.6, 1.5),
        timestep=0.1,
        max_temperature=1e9,
    )
    runs = dynamics.run(200)
    assert sorted(dynamics.broken) == [1, 2, 3]
    assert "H0–H1 is longer than 1.5 times" in runs[1].broken.reason
    assert "H0–H1 is shorter than 0.6 times" in runs[2].broken.reason
    assert "in one step" in runs[3].broken.reason and runs[3].broken.step == 1
    for ours in runs[1:3]:
        step = ours.broken.step
        assert ours.steps[-1] == step < 200, "the last frame shows the break"
        ratio = ours.frames[-1].get_distance(0, 1) / 0.62
        assert ratio > 1.5 or ratio < 0.6
        assert (
            np.isfinite(ours.thermo.total[: step + 1]).all()
            and np.isnan(ours.thermo.total[step + 1 :]).all()
        )
    # as many molecules, which share the compiled program
    unbroken = every_step(
        [calm] * 5, potential, stop_on_bond_break=True, bond_range=(0.6, 1.5), timestep=0.1
    ).run(200)[0]
    for ours in (runs[0], runs[4]):
        assert ours.broken is None and len(ours.frames) == 201
        np.testing.assert_allclose(
            ours.frames[-1].positions, unbroken.frames[-1].positions, atol=1e-10
        )
    hot = MolecularDynamics(
        dimer(0.5), potential, ensemble="nve", max_temperature=100.0, stop_on_bond_break=False
    )
    assert "temperature exceeds 100 K" in hot.run(5)[0].broken.reason and hot.run(5)[0].frames == []


def test_invalid_molecules_and_settings_are_rejected(make_potential):
    potential = pairwise()
    good, lost = cluster(0), cluster(0)
    lost.positions[3] = np.nan
    for given, words in [
        ([], "no molecules"),
        ([good, lost], "molecule 1 .* atom 3"),
        (Atoms("He"), "was not trained on He"),
        ([good, crystal((1, 1, 1))], "separate runs"),
        (Atoms(), "the molecule has no atoms"),
    ]:
        with pytest.raises(ValueError, match=words):
            MolecularDynamics(given, potential)
    for options, words in [
        ({"ensemble": "nvt"}, "one of nve"),
        ({"timestep": 0}, "timestep must be more than 0"),
        ({"temperature": -1.0}, "at least 0"),
        ({"skin": 0.0}, "skin"),
        ({"dtype": "half"}, "dtype"),
        ({"record_every": 0}, "record_every"),
        ({"bond_range": (1.1, 2)}, "bond_range"),
        ({"replicas": 0}, "replicas"),
        ({"temperatures": [1.0, 2.0]}, "temperatures must be 1"),
        ({"ensemble": "npt"}, "periodic in all directions"),
    ]:
        with pytest.raises(ValueError, match=words):
            MolecularDynamics(good, potential, **options)


@pytest.mark.parametrize("cutoff", [pytest.param(np.inf, marks=pytest.mark.slow), 5.0])
def test_long_range_pairs_charge_and_spin(cutoff):
    """Point charges, whose cutoff is larger than that of the edges."""
    potential = point_charges(cutoff)
    starts = [molecule("CH3CH2OH"), molecule("H2O")]
    starts[0].info |= {"charge": 1.0, "num_unpaired_electrons": 1.0}
    dynamics = every_step(starts, potential, timestep=0.2, temperature=300.0, skin=0.04)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert_agrees_with_ase(potential, dynamics, 15)  # the charges collide soon
    assert dynamics.num_lists_built > 2


def test_given_momenta_are_kept_unless_new_ones_are_requested():
    """Detects a continued simulation that starts from random velocities."""
    given = np.array([[1.0, 0, 0], [0, 0.1, 0], [-1.0, -0.1, 0]])
    for draw in (False, True):
        water = Atoms("OHH", molecule("H2O").positions, momenta=given)
        initialize_momenta([water], Settings(draw_momenta=draw), np.array([300.0]))
        assert np.allclose(water.get_momenta(), given) != draw
        if draw:
            assert water.get_kinetic_energy() == pytest.approx(3 * units.kB * 300)

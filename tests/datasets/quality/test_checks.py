"""Tests for the data checks: correct data pass, and every kind of error is identified."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mlip_jax.datasets import readers
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.quality import checks
from mlip_jax.datasets.quality.check_report import lines, to_markdown
from mlip_jax.datasets.quality.checks import Findings, combine, count_duplicates, examine
from mlip_jax.datasets.quality.diagnosis import diagnose
from mlip_jax.datasets.quality.distribution import Distribution
from mlip_jax.datasets.quality.geometry import fingerprints
from mlip_jax.datasets.quality.pairs import (
    MAX_PAIRS,
    MAX_RMSD,
    bond_stiffness,
    close_pairs,
    neighbor_pairs,
)
from mlip_jax.datasets.quality.problems import EARLY
from mlip_jax.structure import Structure

HARTREE, BOHR, KCAL_PER_MOL = 27.211386245988, 0.529177210903, 0.0433641153087705
DATA = Path(__file__).parents[2] / "data"
SMALL = DATA / "gfn2_small.hdf5"
REAL = [
    SMALL,
    DATA / "readers/md17/rmd17_ethanol.npz",
    DATA / "readers/qm7x/qm7x_small.npz",
    DATA / "spice_1.1.4_small.hdf5",
]


def morse(positions, rest, depth=4.0, width=1.5):
    """Return energy and forces of Morse bonds between all atoms of a molecule."""
    difference = positions[:, None] - positions
    distance = np.sqrt((difference**2).sum(-1)) + np.eye(len(positions))
    decay = np.exp(-width * (distance - rest))
    off = 1 - np.eye(len(positions))
    energy = 0.5 * (off * depth * (1 - decay) ** 2).sum()
    slope = off * 2 * depth * width * (1 - decay) * decay
    return energy, -(slope[..., None] * difference / distance[..., None]).sum(1)


@functools.cache
def molecules(count=8, conformations=20, noise=0.05, seed=0):
    """Return CH4-like clusters, randomly rotated and shifted, with Morse energies and forces."""
    rng = np.random.default_rng(seed)
    structures = []
    for m in range(count):
        n = 5 + m % 4
        numbers = np.array([6] + [1] * (n - 1), np.int32)
        ball = np.concatenate([np.zeros((1, 3)), rng.normal(size=(n - 1, 3))])
        ball[1:] /= np.linalg.norm(ball[1:], axis=1)[:, None]
        for _ in range(200):  # atoms on the sphere keep apart
            d = ball[1:, None] - ball[None, 1:]
            ball[1:] += 0.05 * (d / ((d**2).sum(-1) + 1e-3)[..., None] ** 2).sum(1)
            ball[1:] /= np.linalg.norm(ball[1:], axis=1)[:, None]
        rest = np.sqrt(((ball[:, None] - ball) ** 2).sum(-1)) + 0.1
        for c in range(conformations):
            positions = ball + noise * rng.normal(size=ball.shape)
            energy, forces = morse(positions, rest)
            turn = Rotation.random(random_state=1000 * m + c).as_matrix()
            structures.append(
                Structure(
                    numbers,
                    positions @ turn + rng.normal(size=3),
                    energy=energy - 500.0 - 20 * n,
                    forces=forces @ turn,
                    molecule=f"m{m}",
                    conformer=c,
                    source=f"f.hdf5:m{m}",
                )
            )
    return Columns.from_structures(structures)


def whats(columns, **options):
    return {p.what: p for p in diagnose(examine(columns), **options)}


def pairs_of(columns, usable):
    return close_pairs(columns, *neighbor_pairs(columns, usable))


def with_(columns, **factors):
    """Return columns with "forces", "energy" or "positions" multiplied by a factor."""
    return dataclasses.replace(columns, **{k: getattr(columns, k) * f for k, f in factors.items()})


def test_correct_data_pass():
    columns = molecules()
    findings = examine(columns)
    assert diagnose(findings) == []
    ratio = findings.distributions["pair ratio"]
    assert ratio.count >= 60 and ratio.median == pytest.approx(1.0, abs=0.03)
    assert findings.counts | {"blocks": 1} == dict.fromkeys(checks.COUNTS, 0) | {
        "blocks": 1,
        "structures": len(columns),
        "atoms": len(columns.numbers),
    }
    assert findings.distributions["relative net force"].largest < 1e-10
    assert lines(findings, [])[-1] == "no problems found"


@functools.cache
def real(path):
    with readers.open_data(path) as reader:
        return Columns.from_structures(reader)


@pytest.mark.parametrize("path", REAL)
def test_synthetic_bonds_have_a_realistic_stiffness(path):
    """Frames of dynamics and displaced minima, with a semi-empirical method and two functionals."""
    findings = examine(real(path))
    assert findings.distributions["bond stiffness"].count >= 20
    assert 25 < findings.distributions["bond stiffness"].median < 45
    assert not [p for p in diagnose(findings) if p.severity == "error"]


def test_real_data_pass():
    columns = real(SMALL)
    findings = examine(columns)
    assert findings.distributions["pair ratio"].median == pytest.approx(1.0, abs=0.05)
    assert not [p for p in diagnose(findings) if p.severity == "error"]
    assert "gradients" in whats(with_(columns, forces=-1))
    assert "hartree/bohr" in whats(with_(columns, forces=BOHR / HARTREE))["units"].message


@pytest.mark.parametrize(
    ("factors", "what", "words"),
    [
        (
            {"forces": -1},
            "gradients",
            "these look like gradients (dE/dx), not forces: change their sign",
        ),
        ({"forces": BOHR}, "units", "forces in eV/bohr"),
        ({"forces": 1 / BOHR}, "units", "converted twice from eV/bohr"),
        ({"forces": 1 / HARTREE}, "units", "energies were in eV and forces in hartree/Å"),
        ({"forces": HARTREE}, "units", "converted twice from hartree/Å"),
        ({"energy": 1 / HARTREE}, "units", "energies were in hartree and forces in eV/Å"),
        ({"forces": 1 / KCAL_PER_MOL}, "units", "energies were in eV and forces in kcal/mol/Å"),
        ({"forces": KCAL_PER_MOL}, "units", "forces were converted twice from kcal/mol/Å"),
        ({"energy": HARTREE}, "units", "energies were converted twice from hartree"),
        (
            {"energy": 1 / HARTREE, "forces": BOHR / HARTREE, "positions": 1 / BOHR},
            "units",
            "as if energies were in hartree and forces in hartree/bohr (",
        ),
        ({"energy": 1 / KCAL_PER_MOL}, "units", "energies were in kcal/mol and forces in eV/Å"),
        ({"forces": BOHR / HARTREE}, "units", "energies were in eV and forces in hartree/bohr"),
        (
            {"forces": -BOHR / HARTREE},
            "units",
            "gradients (dE/dx), not forces: change their sign as well",
        ),
        ({"forces": HARTREE / BOHR}, "units", "converted twice from hartree/bohr"),
        ({"forces": 0.3}, "forces and energies", "no unit explains the factor"),
        ({"energy": 0.0}, "forces and energies", "no unit explains the factor"),
        ({"positions": 1 / BOHR}, "positions", "positions look like bohr"),
        ({"positions": BOHR}, "positions", "converted twice from bohr"),
        ({"positions": 0.1}, "positions", "positions look like nm"),
        ({"positions": 10.0}, "positions", "converted twice from nm"),
        ({"positions": 3.0}, "positions", "no known unit of length"),
        ({"positions": 1 / BOHR, "forces": -1}, "gradients", "these look like gradients"),
        ({"positions": 1 / BOHR, "forces": BOHR}, "units", "forces in eV/bohr"),
    ],
)
def test_wrong_units_and_signs_are_identified(factors, what, words):
    actual = whats(with_(molecules(), **factors))
    assert words in actual[what].message and actual[what].severity == "error"
    if list(factors) == ["positions"] and words != "no known unit of length":  # said once
        assert {w for w, p in actual.items() if p.severity == "error"} == {"positions"}


@pytest.mark.parametrize(
    ("factor", "size", "words"),
    [
        (1 / HARTREE, "27 times too small", "energies were in hartree and forces in hartree/Å"),
        (
            1 / KCAL_PER_MOL,
            "23 times too large",
            "energies were in kcal/mol and forces in kcal/mol/Å",
        ),
        (96.4853, "96 times too large", "energies were in kJ/mol and forces in kJ/mol/Å ("),
        (HARTREE, "27 times too large", "energies and forces were converted twice from hartree"),
        (
            KCAL_PER_MOL,
            "23 times too small",
            "energies and forces were converted twice from kcal/mol",
        ),
        (
            1 / 96.4853,
            "96 times too small",
            "energies and forces were converted twice from kJ/mol (",
        ),
        (1e4, "times too large", "no unit explains the factor"),
    ],
)
@pytest.mark.parametrize("path", REAL[:3])
def test_common_factor_of_energies_and_forces_is_identified(path, factor, size, words):
    """The ratio of both cannot reveal the factor, but the stiffness of bonds does."""
    actual = whats(with_(real(path), energy=factor, forces=factor))["units"]
    assert (
        actual.severity == "error"
        and words in actual.message
        and "energies and forces are both" in actual.message
    )
    within = float(actual.message.split(" about ")[1].split()[0]) / max(factor, 1 / factor)
    assert 0.6 < within < 1.6 and size.split(" ", 1)[1] in actual.message


def test_deviating_bond_stiffness_is_accepted():
    """Bonds differ between methods and temperatures. Only impossible values are errors."""
    for factor in (0.4, 2.5):
        assert not [
            p
            for p in whats(with_(real(SMALL), energy=factor, forces=factor)).values()
            if p.severity == "error"
        ]


def test_forces_without_energies_are_checked_by_bonds():
    columns = with_(real(SMALL), energy=np.nan)
    assert list(whats(columns)) == ["no energy"]
    assert whats(with_(columns, forces=-1))["gradients"].severity == "error"
    kcal = whats(with_(columns, forces=1 / KCAL_PER_MOL))["units"]
    assert kcal.severity == "error" and "as if they were in kcal/mol/Å" in kcal.message
    no_pairs = whats(with_(real(REAL[3]), energy=1 / HARTREE, forces=BOHR / HARTREE))
    assert (
        "they were in hartree/bohr" in no_pairs["units"].message
        and "energies" not in no_pairs["units"].message
    )
    both = whats(with_(real(SMALL), forces=-1, energy=-1))
    assert "change their sign, and that of the energies" in both["gradients"].message


@pytest.mark.parametrize("seed", range(3))
def test_stiffness_of_bonds_by_hand(seed):
    """Harmonic O-H bonds along the axes with length r and force k (r - 1), rotated at random."""
    rng, k, structures = np.random.default_rng(seed), 40.0, []
    for c in range(30):
        r = 1 + 0.05 * rng.normal(size=2)
        positions = np.array([[0, 0, 0], [r[0], 0, 0], [0, r[1], 0]])
        forces = np.array(
            [[k * (r[0] - 1), k * (r[1] - 1), 0], [-k * (r[0] - 1), 0, 0], [0, -k * (r[1] - 1), 0]]
        )
        turn = Rotation.random(random_state=100 * seed + c).as_matrix()
        structures.append(
            Structure(
                np.array([8, 1, 1]),
                positions @ turn,
                forces=forces @ turn,
                molecule="w",
                conformer=c,
            )
        )
    columns = Columns.from_structures(structures)
    actual = bond_stiffness(columns, *neighbor_pairs(columns, np.ones(30, bool)))
    assert len(actual) >= 20
    np.testing.assert_allclose(actual, k)
    metal = dataclasses.replace(
        columns, numbers=np.where(columns.numbers == 8, 46, columns.numbers)
    )
    assert len(bond_stiffness(metal, *neighbor_pairs(metal, np.ones(30, bool)))) == 0


def test_nearly_constant_bonds_are_ignored():
    """At minima of another method, lengths differ by 1 mÅ and forces depend on the surroundings."""
    rng = np.random.default_rng(0)
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    structures = []
    for _ in range(40):
        forces = np.zeros((3, 3))
        forces[1, 0] = rng.normal(0, 0.1)
        structures.append(
            Structure(
                np.array([8, 1, 1]),
                water * (1 + rng.uniform(-5e-4, 5e-4)),
                -1.0,
                forces,
                molecule="water",
            )
        )
    columns = Columns.from_structures(structures)
    assert not len(bond_stiffness(columns, *neighbor_pairs(columns, np.ones(40, bool))))


def test_without_bonds_of_hydrogen_a_stiffness_is_only_a_warning():
    columns = real(SMALL)
    metal = dataclasses.replace(
        columns, numbers=np.where(columns.numbers == 1, 3, columns.numbers + 20)
    )
    assert not [w for w in whats(metal) if w in ("units", "stiffness")]
    for factor in (1e-2, 1e2):
        actual = whats(with_(metal, energy=factor, forces=factor))
        assert actual["stiffness"].severity == "warning" and "units" not in actual


@pytest.mark.parametrize("number", ["forces", "energy"])
def test_labels_of_other_structures_are_detected(number):
    columns, rng = molecules(), np.random.default_rng(0)
    if number == "energy":
        changed = dataclasses.replace(columns, energy=rng.permutation(columns.energy))
    else:
        forces = columns.forces.copy()
        for n in np.unique(columns.n_atoms):
            rows = columns.offsets[:-1][columns.n_atoms == n][:, None] + np.arange(n)
            forces[rows] = columns.forces[rows[rng.permutation(len(rows))]]
        changed = dataclasses.replace(columns, forces=forces)
    problem = whats(changed)["forces and energies"]
    assert problem.severity == "error" and "do not fit the energy differences" in problem.message


def test_partly_wrong_forces_are_a_warning():
    columns = molecules()
    wrong = np.isin(columns.molecule, ["m1", "m5"])  # of eight
    forces = np.where(
        np.repeat(wrong, columns.n_atoms)[:, None], 0.3 * columns.forces, columns.forces
    )
    problem = whats(dataclasses.replace(columns, forces=forces))["forces and energies"]
    assert problem.severity == "warning" and "some forces" in problem.message


@pytest.mark.parametrize(
    ("wrong", "severity"), [(1, "warning"), (3, "error"), (8, "error"), (12, "error")]
)
def test_some_molecules_with_the_wrong_sign(wrong, severity):
    """Each wrong molecule accounts for about 6 % of the pairs."""
    columns = molecules(16, 12)
    names = [f"m{k}" for k in range(2, 2 + wrong)]
    rows = np.repeat(np.isin(columns.molecule, names), columns.n_atoms)[:, None]
    mixed = dataclasses.replace(columns, forces=np.where(rows, -columns.forces, columns.forces))
    findings = examine(mixed)
    (problem,) = diagnose(findings)
    assert (problem.what, problem.severity) == ("some gradients", severity)
    share = np.isin(mixed.molecule[pairs_of(mixed, np.ones(len(mixed), bool)).first], names).mean()
    assert f"({share:.0%})" in problem.message
    named = {
        text.split("#")[0]
        for text in problem.message.split("for instance in ")[1]
        .replace(", ", " and ")
        .split(" and ")
    }
    assert named <= {f"f.hdf5:{m}" for m in names}
    assert diagnose(combine([findings, examine(columns)]))[0].what == "some gradients"


def test_net_force():
    columns = molecules()
    shifted = dataclasses.replace(columns, forces=np.roll(columns.forces, 1, axis=0))
    assert whats(shifted)["net force"].severity == "error"
    rms = np.sqrt((columns.forces**2).mean())
    assert (
        whats(dataclasses.replace(columns, forces=columns.forces + 0.05 * rms))[
            "net force"
        ].severity
        == "warning"
    )


def test_too_few_pairs_are_a_warning():
    columns = molecules()
    first = columns.take(np.flatnonzero(columns.conformer == 0))
    assert "not checked" in whats(first)["few pairs"].message
    some = columns.take(np.flatnonzero(columns.molecule == "m0")[:9])
    assert 6 <= examine(some).distributions["pair ratio"].count < 20
    assert list(whats(some)) == ["few pairs"]
    assert list(whats(with_(some, forces=-1))) == ["gradients"]


def test_few_pairs_that_are_all_negative_indicate_gradients():
    """This also holds if the pairs do not agree on a factor."""
    columns = molecules().take(np.flatnonzero(molecules().molecule == "m0")[:9])
    other = dataclasses.replace(
        columns,
        energy=-np.sign(columns.energy - columns.energy.mean())
        * np.abs(columns.energy - columns.energy.mean()) ** 3,
    )
    ratio = examine(other).distributions["pair ratio"]
    assert (
        6 <= ratio.count < 20
        and ratio.largest < 0
        and ratio.share(2 * ratio.median, 0.5 * ratio.median) < 1
    )
    problem = diagnose(examine(other))[0]
    assert problem.severity == "error" and "look like gradients (dE/dx)" in problem.message


def labels_missing():
    columns = molecules()
    energy, forces = columns.energy.copy(), columns.forces.copy()
    energy[:10] = np.nan
    forces[columns.offsets[5] : columns.offsets[15]] = np.nan
    forces[columns.offsets[20], 1] = np.nan
    positions = columns.positions.copy()
    positions[columns.offsets[30]] = np.nan
    return dataclasses.replace(columns, energy=energy, forces=forces, positions=positions)


def test_missing_labels_are_counted():
    findings = examine(labels_missing())
    assert [
        findings.counts[k]
        for k in ("no energy", "no forces", "partly forces", "no labels", "positions not finite")
    ] == [10, 10, 1, 5, 1]
    actual = {p.what: p for p in diagnose(findings)}
    assert set(actual) == {"no energy", "no forces", "partly forces", "positions not finite"}
    assert "10 of 160 structures (6.25 %) have no energy" in actual["no energy"].message
    assert findings.distributions["pair ratio"].median == pytest.approx(1.0, abs=0.03)


def test_no_labels_at_all():
    columns = molecules()
    none = with_(columns, energy=np.nan, forces=np.nan)
    assert [(p.severity, p.what) for p in diagnose(examine(none))] == [("error", "no labels")]
    learnable = dataclasses.replace(
        none, properties={"gap": np.where(np.arange(len(none)) > 3, 1.0, np.nan)}
    )
    assert examine(learnable).counts["properties"] == len(none) - 4
    assert [(p.severity, p.what) for p in diagnose(examine(learnable))] == [
        ("warning", "no labels")
    ]
    of_atoms = dataclasses.replace(none, atom_properties={"charge": np.zeros(len(none.numbers))})
    assert examine(of_atoms).counts["properties"] == len(none)
    assert list(whats(with_(columns, forces=np.nan))) == ["no forces"]
    assert list(whats(with_(columns, energy=np.nan))) == ["no energy"]
    assert [p.what for p in diagnose(Findings())] == ["empty"]


def test_single_bad_structures_are_listed():
    columns = molecules()
    positions, forces, energy = (
        columns.positions.copy(),
        columns.forces.copy(),
        columns.energy.copy(),
    )
    positions[columns.offsets[7] + 2] = positions[columns.offsets[7] + 1] + [0.1, 0, 0]
    forces[columns.offsets[50]] = [0, -400.0, 0]
    energy[90] /= HARTREE
    actual = whats(dataclasses.replace(columns, positions=positions, forces=forces, energy=energy))
    assert set(actual) == {"atoms too close", "large forces", "energy outliers"}
    assert (
        "f.hdf5:m0#7 (0.1 Å)" in actual["atoms too close"].message
        and actual["atoms too close"].severity == "warning"
    )
    assert (
        "1 of 160" in actual["large forces"].message
        and "f.hdf5:m2#10 (400 eV/Å)" in actual["large forces"].message
    )
    assert (
        "1 of 160" in actual["energy outliers"].message
        and "f.hdf5:m4#10" in actual["energy outliers"].message
    )


def test_many_atoms_too_close_are_an_error():
    columns = molecules()
    positions = columns.positions.copy()
    for s in range(3):
        positions[columns.offsets[s] + 1] = positions[columns.offsets[s]] + [0.2, 0, 0]
    assert (
        whats(dataclasses.replace(columns, positions=positions))["atoms too close"].severity
        == "error"
    )


@pytest.mark.parametrize(("share", "severity"), [(0.04, "warning"), (0.07, "error")])
def test_many_large_forces_are_an_error(share, severity):
    columns, forces = molecules(), molecules().forces.copy()
    last = columns.offsets[1:][-round(160 * share) :]
    forces[last - 1, 0] += 150.0
    problem = whats(dataclasses.replace(columns, forces=forces))["large forces"]
    assert problem.severity == severity and "eV/Å" in problem.message


def test_early_problems_are_detected_in_the_first_part():
    columns = molecules()
    faults = [
        with_(columns, **f)
        for f in ({"forces": -1}, {"forces": BOHR}, {"positions": 0.1}, {"energy": 0.0})
    ]
    faults += [
        with_(columns, energy=1 / HARTREE, forces=1 / HARTREE),
        dataclasses.replace(columns, forces=np.roll(columns.forces, 1, axis=0)),
    ]
    for fault in faults:
        errors = [p.what for p in diagnose(examine(fault)) if p.severity == "error"]
        assert errors and set(errors) <= EARLY
    assert not EARLY & set(whats(with_(columns, energy=np.nan, forces=np.nan)))
    assert set(whats(with_(columns, energy=np.nan))) == {"no energy"} and "no energy" not in EARLY
    assert not EARLY & set(whats(with_(columns, forces=np.nan), duplicates=50))


def test_duplicates():
    columns = molecules()
    again = columns.take(np.concatenate([np.arange(160), [3, 3, 100]]))
    count, later = count_duplicates(fingerprints(again))
    assert count == 3 and later.tolist() == [160, 161, 162]
    assert count_duplicates(np.zeros(0, np.uint64))[0] == 0
    findings = examine(again)
    assert diagnose(findings, duplicates=3) == []
    assert [p.what for p in diagnose(findings, duplicates=20)] == ["duplicates"]
    copies = examine(
        columns.take(np.repeat(np.arange(160), 3))
    )  # copies must not take the place of close pairs
    assert copies.distributions["pair ratio"].count >= 60


def test_pairs_are_limited_and_within_a_molecule(monkeypatch):
    columns = molecules()
    pairs = pairs_of(columns, np.ones(160, bool))
    assert (
        0 < len(pairs.first) <= MAX_PAIRS
        and (pairs.rmsd <= MAX_RMSD).all()
        and (pairs.first != pairs.second).all()
    )
    np.testing.assert_array_equal(columns.molecule[pairs.first], columns.molecule[pairs.second])
    np.testing.assert_allclose(
        pairs.energy, columns.energy[pairs.second] - columns.energy[pairs.first]
    )
    assert len({*zip(pairs.first.tolist(), pairs.second.tolist())}) == len(pairs.first)
    monkeypatch.setattr("mlip_jax.datasets.quality.pairs.MAX_PAIRS", 25)
    nearest = pairs_of(columns, np.ones(160, bool))
    np.testing.assert_array_equal(nearest.rmsd, pairs.rmsd[:25])
    usable = np.random.default_rng(0).random(160) < 0.5
    some = pairs_of(columns, usable)
    assert usable[some.first].all() and usable[some.second].all()


def test_different_atom_orders_are_not_paired():
    """The same molecule with another order of atoms must not be compared atom by atom."""
    columns = molecules(1, 30)
    structures = [
        dataclasses.replace(
            s, numbers=s.numbers[::-1], positions=s.positions[::-1], forces=s.forces[::-1]
        )
        if k % 2
        else s
        for k, s in enumerate(columns)
    ]
    pairs = pairs_of(Columns.from_structures(structures), np.ones(30, bool))
    assert len(pairs.first) and (pairs.first % 2 == pairs.second % 2).all()


def test_pairs_of_crystals_are_not_rotated():
    """Atoms may be wrapped into other images of the cell. The forces still show their sign."""
    rng = np.random.default_rng(0)
    cell = np.array([[3.0, 0, 0], [0.5, 3.2, 0], [0, 0.3, 3.4]])
    sites, k = rng.random((6, 3)) @ cell, 5.0
    structures = []
    for c in range(40):
        shift = 0.1 * rng.normal(size=sites.shape)
        shift -= shift.mean(0)
        fractional = (sites + shift) @ np.linalg.inv(cell)
        structures.append(
            Structure(
                np.full(6, 14),
                (fractional % 1.0) @ cell,
                energy=0.5 * k * (shift**2).sum(),
                forces=-k * shift,
                cell=cell,
                pbc=np.ones(3, bool),
                molecule="Si",
                conformer=c,
            )
        )
    columns = Columns.from_structures(structures)
    pairs = pairs_of(columns, np.ones(40, bool))
    assert len(pairs.first) >= 20
    np.testing.assert_allclose(pairs.energy / pairs.work, 1.0, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 160), max_size=4), missing=st.booleans())
def test_combined_blocks_equal_the_whole(cuts, missing):
    """Quantities that compare the structures of a block are excluded."""
    columns = labels_missing() if missing else molecules()
    edges = [0, *sorted(cuts), 160]
    parts = [examine(columns.take(np.arange(a, b))) for a, b in zip(edges, edges[1:])]
    whole, together = examine(columns), combine(parts)
    within = {"pair ratio", "pair distance", "pair stiffness", "bond stiffness", "energy residual"}
    within |= {"stretch stiffness", "bond force"}  # relative to the median length in the block
    within |= {"energy ratio all-electron", "energy ratio GFN2-xTB"}  # one per composition
    counts = {"blocks", "energy outlier"}
    assert {k: n for k, n in whole.counts.items() if k not in counts} == {
        k: n for k, n in together.counts.items() if k not in counts
    }
    assert together.counts["blocks"] == len(parts)
    for name in set(checks.DISTRIBUTIONS) - within:
        a, b = whole.distributions[name], together.distributions[name]
        assert (a.count, a.bins) == (b.count, b.bins)
        np.testing.assert_allclose(
            [a.smallest, a.largest, a.total, a.squares],
            [b.smallest, b.largest, b.total, b.squares],
            rtol=1e-12,
        )
    for name in set(checks.WORST_OF) - within - {"relative net force"}:
        assert whole.worst[name] == together.worst[name]
    assert (
        combine(parts).to_json() == together.to_json()
        and combine([whole]).to_json() == whole.to_json()
    )


@pytest.mark.parametrize(
    "findings",
    [
        Findings(),
        *[
            examine(c)
            for c in (molecules(), labels_missing(), molecules().take(np.zeros(0, np.int64)))
        ],
    ],
)
def test_json_round_trip(findings):
    text = json.dumps(findings.to_json(), allow_nan=False)
    again = Findings.from_json(json.loads(text))
    assert again.to_json() == findings.to_json() and diagnose(again) == diagnose(findings)
    assert json.dumps(again.to_json()) == text and len(text) < 100_000
    older = json.loads(text)
    del older["distributions"]["bond stiffness"], older["worst"]["pair ratio"]
    assert (
        lines(Findings.from_json(older), []) and not Findings.from_json(older).worst["pair ratio"]
    )


def test_last_digits_do_not_depend_on_the_machine():
    """Sums in another order have other last digits."""
    values = np.sqrt(np.arange(1.0, 50_000.0))
    a, b = Distribution.from_values(values), Distribution.from_values(values[::-1])
    assert a.total != b.total and a.to_json() == b.to_json()
    one, two = (
        Findings(worst=Findings().worst | {"force component": [[value, "a#0"]]})
        for value in (1 / 3, 1 / 3 + 1e-14)
    )
    assert one != two and one.to_json() == two.to_json()


def test_findings_do_not_depend_on_the_number_of_threads():
    """There are enough values that BLAS would distribute them over threads."""
    code = f"""
import json, numpy as np
from mlip_jax.datasets import readers
from mlip_jax.datasets.quality import checks
from mlip_jax.datasets.columns import Columns
with readers.open_data({str(SMALL)!r}) as reader:
    columns = Columns.from_structures(reader)
columns = columns.take(np.tile(np.arange(len(columns)), 60))
columns.positions[:] += np.random.default_rng(0).normal(0, 0.03, columns.positions.shape)
columns.energy[:] += np.random.default_rng(1).normal(0, 0.3, len(columns))
print(json.dumps(checks.examine(columns).to_json()))
"""
    actual = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": n, "PYTHONPATH": str(DATA.parents[1])},
        ).stdout
        for n in ("1", "2")
    ]
    assert actual[0] == actual[1] and json.loads(actual[0])["counts"]["structures"] == 6120


def test_same_seed_same_findings():
    assert examine(molecules(), seed=3).to_json() == examine(molecules(), seed=3).to_json()


def test_report():
    findings = examine(with_(molecules(), forces=-1))
    problems = diagnose(findings)
    text, console = to_markdown(findings, problems), lines(findings, problems)
    assert "**error** (gradients): these look like gradients" in text and "160 structures" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1 and len(table) == 14
    assert (
        console[-1].startswith("error: these look like gradients")
        and "160 structures" in console[0]
    )


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50),
    q=st.floats(0, 1),
    cut=st.integers(0, 50),
)
def test_quantiles_are_accurate_to_a_bin(values, q, cut):
    x = np.array(values)
    actual = Distribution.from_values(x)
    assert actual.count == len(x) and (actual.smallest, actual.largest) == (x.min(), x.max())
    rank = int(np.clip(np.ceil(q * len(x)) - 1, 0, len(x) - 1))
    near = np.sort(x)[max(rank - 1, 0) : rank + 2]
    low, high = near - 0.016 * np.abs(near) - 1e-9, near + 0.016 * np.abs(near) + 1e-9
    assert low.min() <= actual.quantile(q) <= high.max()
    parts = Distribution.from_values(x[:cut])
    parts.add(Distribution.from_values(x[cut:]))
    assert parts.bins == actual.bins and parts.count == actual.count
    assert actual.share(-2e6, 2e6) == 1.0
    again = Distribution.from_json(actual.to_json())
    assert again.bins == actual.bins and again.to_json() == actual.to_json()


def test_distribution_ignores_non_finite_values():
    actual = Distribution.from_values(np.array([np.nan, np.inf, -np.inf, 3.0, 1e300, -1e-300]))
    assert actual.count == 3 and sum(actual.bins.values()) == 3
    json.dumps(actual.to_json(), allow_nan=False)
    assert actual.quantile(0.0) <= 0 and np.isnan(Distribution().median)


def test_forces_that_are_all_zero():
    """Some files store zeros instead of missing forces."""
    rng = np.random.default_rng(0)
    water = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    columns = Columns.from_structures(
        [
            Structure(
                np.array([8, 1, 1]),
                water + rng.normal(0, 0.03, (3, 3)),
                energy=-10.0,
                forces=np.zeros((3, 3)),
                molecule="water",
                conformer=c,
            )
            for c in range(60)
        ]
    )
    messages = [p.message for p in diagnose(examine(columns)) if p.severity == "error"]
    assert (
        len(messages) == 1
        and "whether they are all zero" in messages[0]
        and "inf" not in messages[0].replace("infin", "")
    )

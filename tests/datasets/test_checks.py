"""Sound data pass the checks; every kind of fault is found and named."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from mlip_jax.datasets import checks, readers
from mlip_jax.datasets.checks import Findings, combine, count_duplicates, examine
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.distribution import Distribution
from mlip_jax.datasets.geometry import fingerprints
from mlip_jax.datasets.pairs import MAX_PAIRS, MAX_RMSD, close_pairs
from mlip_jax.datasets.verdict import lines, to_markdown, verdict
from mlip_jax.structure import Structure

HARTREE, BOHR, KCAL_PER_MOL = 27.211386245988, 0.529177210903, 0.0433641153087705
SMALL = Path(__file__).parents[1] / "data" / "gfn2_small.hdf5"


def morse(positions, rest, depth=4.0, width=1.5):
    """Energy and forces of Morse bonds between all atoms of a molecule, by hand."""
    difference = positions[:, None] - positions
    distance = np.sqrt((difference ** 2).sum(-1)) + np.eye(len(positions))
    decay = np.exp(-width * (distance - rest))
    off = 1 - np.eye(len(positions))
    energy = 0.5 * (off * depth * (1 - decay) ** 2).sum()
    slope = off * 2 * depth * width * (1 - decay) * decay
    return energy, -(slope[..., None] * difference / distance[..., None]).sum(1)


@functools.cache
def molecules(count=8, conformations=20, noise=0.05, seed=0):
    """A CH4-like ball of atoms for each molecule, turned and shifted at will, with its Morse energies and forces."""
    rng = np.random.default_rng(seed)
    made = []
    for m in range(count):
        n = 5 + m % 4
        numbers = np.array([6] + [1] * (n - 1), np.int32)
        ball = np.concatenate([np.zeros((1, 3)), rng.normal(size=(n - 1, 3))])
        ball[1:] /= np.linalg.norm(ball[1:], axis=1)[:, None]
        for _ in range(200):  # atoms on the sphere keep apart
            d = ball[1:, None] - ball[None, 1:]
            ball[1:] += 0.05 * (d / ((d ** 2).sum(-1) + 1e-3)[..., None] ** 2).sum(1)
            ball[1:] /= np.linalg.norm(ball[1:], axis=1)[:, None]
        rest = np.sqrt(((ball[:, None] - ball) ** 2).sum(-1)) + 0.1
        for c in range(conformations):
            positions = ball + noise * rng.normal(size=ball.shape)
            energy, forces = morse(positions, rest)
            turn = Rotation.random(random_state=1000 * m + c).as_matrix()
            made.append(Structure(numbers, positions @ turn + rng.normal(size=3), energy=energy - 500.0 - 20 * n,
                                  forces=forces @ turn, molecule=f"m{m}", conformer=c, source=f"f.hdf5:m{m}"))
    return Columns.from_structures(made)


def whats(columns, **options):
    return {p.what: p for p in verdict(examine(columns), **options)}


def with_(columns, **factors):
    """Columns with "forces", "energy" or "positions" multiplied."""
    return dataclasses.replace(columns, **{k: getattr(columns, k) * f for k, f in factors.items()})


def test_sound_data_pass():
    columns = molecules()
    findings = examine(columns)
    assert verdict(findings) == []
    ratio = findings.distributions["pair ratio"]
    assert ratio.count >= 60 and ratio.median == pytest.approx(1.0, abs=0.03)
    assert findings.counts | {"blocks": 1} == dict.fromkeys(checks.COUNTS, 0) | {
        "blocks": 1, "structures": len(columns), "atoms": len(columns.numbers)}
    assert findings.distributions["relative net force"].largest < 1e-10
    assert lines(findings, [])[-1] == "no problems found"


def test_real_data_pass():
    with readers.open_data(SMALL) as reader:
        columns = Columns.from_structures(reader)
    findings = examine(columns)
    assert findings.distributions["pair ratio"].median == pytest.approx(1.0, abs=0.05)
    assert not [p for p in verdict(findings) if p.severity == "error"]
    assert "gradients" in whats(with_(columns, forces=-1))
    assert "hartree/bohr" in whats(with_(columns, forces=BOHR / HARTREE))["units"].message


@pytest.mark.parametrize(("factors", "what", "words"), [
    ({"forces": -1}, "gradients", "these look like gradients (dE/dx), not forces: change their sign"),
    ({"forces": BOHR}, "units", "forces in eV/bohr"),
    ({"forces": 1 / BOHR}, "units", "converted from eV/bohr once too often"),
    ({"forces": 1 / HARTREE}, "units", "energies were in eV and forces in hartree/Å"),
    ({"forces": HARTREE}, "units", "converted from hartree/Å once too often"),
    ({"energy": 1 / HARTREE}, "units", "energies were in hartree and forces in eV/Å"),
    ({"forces": 1 / KCAL_PER_MOL}, "units", "energies were in eV and forces in kcal/mol/Å"),
    ({"forces": KCAL_PER_MOL}, "units", "energies were in kcal/mol and forces in eV/Å"),
    ({"energy": 1 / KCAL_PER_MOL}, "units", "energies were in kcal/mol and forces in eV/Å"),
    ({"forces": BOHR / HARTREE}, "units", "energies were in eV and forces in hartree/bohr"),
    ({"forces": -BOHR / HARTREE}, "units", "gradients (dE/dx), not forces: change their sign too"),
    ({"forces": HARTREE / BOHR}, "units", "converted from hartree/bohr once too often"),
    ({"forces": 0.3}, "forces and energies", "no unit explains the factor"),
    ({"energy": 0.0}, "forces and energies", "no unit explains the factor"),
    ({"positions": 1 / BOHR}, "positions", "positions look like bohr"),
    ({"positions": BOHR}, "positions", "converted from bohr once too often"),
    ({"positions": 0.1}, "positions", "positions look like nm"),
    ({"positions": 10.0}, "positions", "converted from nm once too often"),
    ({"positions": 3.0}, "positions", "no known unit of length"),
    ({"positions": 1 / BOHR, "forces": -1}, "gradients", "these look like gradients"),
    ({"positions": 1 / BOHR, "forces": BOHR}, "units", "forces in eV/bohr")])
def test_wrong_units_and_signs_are_named(factors, what, words):
    found = whats(with_(molecules(), **factors))
    assert words in found[what].message and found[what].severity == "error"
    if list(factors) == ["positions"] and words != "no known unit of length":  # said once
        assert {w for w, p in found.items() if p.severity == "error"} == {"positions"}


@pytest.mark.parametrize("number", ["forces", "energy"])
def test_labels_of_other_structures_are_found(number):
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


def test_a_part_of_wrong_signs_is_a_warning():
    columns = molecules()
    some = np.random.default_rng(0).random(len(columns)) < 0.12
    forces = np.where(np.repeat(some, columns.n_atoms)[:, None], -columns.forces, columns.forces)
    problem = whats(dataclasses.replace(columns, forces=forces))["forces and energies"]
    assert problem.severity == "warning" and "a part of the forces" in problem.message


def test_net_force():
    columns = molecules()
    shifted = dataclasses.replace(columns, forces=np.roll(columns.forces, 1, axis=0))
    assert whats(shifted)["net force"].severity == "error"
    rms = np.sqrt((columns.forces ** 2).mean())
    assert whats(dataclasses.replace(columns, forces=columns.forces + 0.05 * rms))["net force"].severity == "warning"


def test_few_pairs_are_no_clean_bill():
    columns = molecules()
    first = columns.take(np.flatnonzero(columns.conformer == 0))
    assert "not checked" in whats(first)["few pairs"].message
    few = columns.take(np.flatnonzero(columns.molecule == "m0")[:9])
    assert 6 <= examine(few).distributions["pair ratio"].count < 20
    assert list(whats(few)) == ["few pairs"]
    assert list(whats(with_(few, forces=-1))) == ["gradients"]


def labels_missing():
    columns = molecules()
    energy, forces = columns.energy.copy(), columns.forces.copy()
    energy[:10] = np.nan
    forces[columns.offsets[5]:columns.offsets[15]] = np.nan
    forces[columns.offsets[20], 1] = np.nan
    positions = columns.positions.copy()
    positions[columns.offsets[30]] = np.nan
    return dataclasses.replace(columns, energy=energy, forces=forces, positions=positions)


def test_missing_labels_are_counted():
    findings = examine(labels_missing())
    assert [findings.counts[k] for k in ("no energy", "no forces", "partly forces", "no labels",
                                         "positions not finite")] == [10, 10, 1, 5, 1]
    found = {p.what: p for p in verdict(findings)}
    assert set(found) == {"no energy", "no forces", "partly forces", "positions not finite"}
    assert "10 of 160 structures (6.25 %) have no energy" in found["no energy"].message
    assert findings.distributions["pair ratio"].median == pytest.approx(1.0, abs=0.03)


def test_no_labels_at_all():
    columns = molecules()
    none = with_(columns, energy=np.nan, forces=np.nan)
    assert [(p.severity, p.what) for p in verdict(examine(none))] == [("error", "no labels")]
    assert list(whats(with_(columns, forces=np.nan))) == ["no forces"]
    assert list(whats(with_(columns, energy=np.nan))) == ["no energy"]
    assert [p.what for p in verdict(Findings())] == ["empty"]


def test_single_bad_structures_are_named():
    columns = molecules()
    positions, forces, energy = columns.positions.copy(), columns.forces.copy(), columns.energy.copy()
    positions[columns.offsets[7] + 2] = positions[columns.offsets[7] + 1] + [0.1, 0, 0]
    forces[columns.offsets[50]] = [0, -400.0, 0]
    energy[90] /= HARTREE
    found = whats(dataclasses.replace(columns, positions=positions, forces=forces, energy=energy))
    assert set(found) == {"atoms too close", "large forces", "energy outliers"}
    assert "f.hdf5:m0#7 (0.1 Å)" in found["atoms too close"].message and found["atoms too close"].severity == "warning"
    assert "1 of 160" in found["large forces"].message and "f.hdf5:m2#10 (400 eV/Å)" in found["large forces"].message
    assert "1 of 160" in found["energy outliers"].message and "f.hdf5:m4#10" in found["energy outliers"].message


def test_many_atoms_too_close_are_an_error():
    columns = molecules()
    positions = columns.positions.copy()
    for s in range(3):
        positions[columns.offsets[s] + 1] = positions[columns.offsets[s]] + [0.2, 0, 0]
    assert whats(dataclasses.replace(columns, positions=positions))["atoms too close"].severity == "error"


def test_duplicates():
    columns = molecules()
    again = columns.take(np.concatenate([np.arange(160), [3, 3, 100]]))
    count, later = count_duplicates(fingerprints(again))
    assert count == 3 and later.tolist() == [160, 161, 162]
    assert count_duplicates(np.zeros(0, np.uint64))[0] == 0
    findings = examine(again)
    assert verdict(findings, duplicates=3) == []
    assert [p.what for p in verdict(findings, duplicates=20)] == ["duplicates"]
    copies = examine(columns.take(np.repeat(np.arange(160), 3)))  # copies must not take the place of close pairs
    assert copies.distributions["pair ratio"].count >= 60


def test_pairs_are_bounded_and_of_one_molecule(monkeypatch):
    columns = molecules()
    pairs = close_pairs(columns, np.ones(160, bool))
    assert 0 < len(pairs.first) <= MAX_PAIRS and (pairs.rmsd <= MAX_RMSD).all() and (pairs.first != pairs.second).all()
    np.testing.assert_array_equal(columns.molecule[pairs.first], columns.molecule[pairs.second])
    np.testing.assert_allclose(pairs.energy, columns.energy[pairs.second] - columns.energy[pairs.first])
    assert len({*zip(pairs.first.tolist(), pairs.second.tolist())}) == len(pairs.first)
    monkeypatch.setattr("mlip_jax.datasets.pairs.MAX_PAIRS", 25)
    nearest = close_pairs(columns, np.ones(160, bool))
    np.testing.assert_array_equal(nearest.rmsd, pairs.rmsd[:25])
    usable = np.random.default_rng(0).random(160) < 0.5
    few = close_pairs(columns, usable)
    assert usable[few.first].all() and usable[few.second].all()


def test_another_order_of_atoms_is_no_pair():
    """The same molecule with its atoms in another order must not be compared atom by atom."""
    columns = molecules(1, 30)
    made = [dataclasses.replace(s, numbers=s.numbers[::-1], positions=s.positions[::-1], forces=s.forces[::-1])
            if k % 2 else s for k, s in enumerate(columns)]
    pairs = close_pairs(Columns.from_structures(made), np.ones(30, bool))
    assert len(pairs.first) and (pairs.first % 2 == pairs.second % 2).all()


def test_pairs_of_crystals_are_not_turned():
    """In a cell, atoms may be wrapped into other images; the forces of the cell's atoms still tell the sign."""
    rng = np.random.default_rng(0)
    cell = np.array([[3.0, 0, 0], [0.5, 3.2, 0], [0, 0.3, 3.4]])
    sites, k = rng.random((6, 3)) @ cell, 5.0
    made = []
    for c in range(40):
        shift = 0.1 * rng.normal(size=sites.shape)
        shift -= shift.mean(0)
        fractional = (sites + shift) @ np.linalg.inv(cell)
        made.append(Structure(np.full(6, 14), (fractional % 1.0) @ cell, energy=0.5 * k * (shift ** 2).sum(),
                              forces=-k * shift, cell=cell, pbc=np.ones(3, bool), molecule="Si", conformer=c))
    columns = Columns.from_structures(made)
    pairs = close_pairs(columns, np.ones(40, bool))
    assert len(pairs.first) >= 20
    np.testing.assert_allclose(pairs.energy / pairs.work, 1.0, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 160), max_size=4), damaged=st.booleans())
def test_blocks_together_are_the_whole(cuts, damaged):
    """Everything but what is sought within a block: pairs and the fit of element energies."""
    columns = labels_missing() if damaged else molecules()
    edges = [0, *sorted(cuts), 160]
    parts = [examine(columns.take(np.arange(a, b))) for a, b in zip(edges, edges[1:])]
    whole, together = examine(columns), combine(parts)
    within = {"pair ratio", "pair distance", "energy residual"}
    counts = {"blocks", "energy outlier"}
    assert {k: n for k, n in whole.counts.items() if k not in counts} == {
        k: n for k, n in together.counts.items() if k not in counts}
    assert together.counts["blocks"] == len(parts)
    for name in set(checks.DISTRIBUTIONS) - within:
        a, b = whole.distributions[name], together.distributions[name]
        assert (a.count, a.bins) == (b.count, b.bins)
        np.testing.assert_allclose([a.smallest, a.largest, a.total, a.squares],
                                   [b.smallest, b.largest, b.total, b.squares], rtol=1e-12)
    for name in set(checks.WORST_OF) - within - {"relative net force"}:
        assert whole.worst[name] == together.worst[name]
    assert combine(parts).to_json() == together.to_json() and combine([whole]).to_json() == whole.to_json()


@pytest.mark.parametrize("made", [Findings(), *[examine(c) for c in (molecules(), labels_missing(),
                                                                     molecules().take(np.zeros(0, np.int64)))]])
def test_json_round_trip(made):
    text = json.dumps(made.to_json(), allow_nan=False)
    again = Findings.from_json(json.loads(text))
    assert again.to_json() == made.to_json() and verdict(again) == verdict(made)
    assert len(text) < 100_000


def test_same_seed_same_findings():
    assert examine(molecules(), seed=3).to_json() == examine(molecules(), seed=3).to_json()


def test_report():
    findings = examine(with_(molecules(), forces=-1))
    problems = verdict(findings)
    text, console = to_markdown(findings, problems), lines(findings, problems)
    assert "**error** (gradients): these look like gradients" in text and "160 structures" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1 and len(table) == 9
    assert console[-1].startswith("error: these look like gradients") and "160 structures" in console[0]


@settings(max_examples=80, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), q=st.floats(0, 1),
       cut=st.integers(0, 50))
def test_quantiles_are_right_to_a_bin(values, q, cut):
    x = np.array(values)
    found = Distribution.of(x)
    assert found.count == len(x) and (found.smallest, found.largest) == (x.min(), x.max())
    rank = int(np.clip(np.ceil(q * len(x)) - 1, 0, len(x) - 1))
    near = np.sort(x)[max(rank - 1, 0):rank + 2]
    low, high = near - 0.016 * np.abs(near) - 1e-9, near + 0.016 * np.abs(near) + 1e-9
    assert low.min() <= found.quantile(q) <= high.max()
    parts = Distribution.of(x[:cut])
    parts.add(Distribution.of(x[cut:]))
    assert parts.bins == found.bins and parts.count == found.count
    assert found.share(-2e6, 2e6) == 1.0
    assert Distribution.from_json(found.to_json()) == found


def test_distribution_leaves_out_what_is_not_finite():
    found = Distribution.of(np.array([np.nan, np.inf, -np.inf, 3.0, 1e300, -1e-300]))
    assert found.count == 3 and sum(found.bins.values()) == 3
    json.dumps(found.to_json(), allow_nan=False)
    assert found.quantile(0.0) <= 0 and np.isnan(Distribution().median)

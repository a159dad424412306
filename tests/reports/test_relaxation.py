"""Tests for the report of relaxations: self-contained, correct counts, any molecules."""

import csv
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.data.colors import jmol_colors
from matplotlib.figure import Figure

from mlip_jax.reports.molecules import Picture, _views, bonds, draw, molecule_figure
from mlip_jax.reports.relaxation.figures import cell_figure, distribution_figure
from mlip_jax.reports.relaxation.report import write_relaxation_report
from mlip_jax.reports.relaxation.results import (
    STATUSES,
    choose,
    kind_of_reason,
    metrics,
    read_results,
)
from tests.reports.test_training import HOSTILE, parse

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
    r"ignore:Setting the shape on a NumPy array:DeprecationWarning:ase\.",
)  # the last one is also in pyproject.toml
COLUMNS = (
    "index",
    "name",
    "smiles",
    "status",
    "reason",
    "n_atoms",
    "charge",
    "geometry",
    "steps",
    "energy_start_ev",
    "energy_ev",
    "fmax_start_ev_per_ang",
    "fmax_ev_per_ang",
    "rmsd_ang",
    "outside_domain",
)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(index, status="converged", reason="", **changes):
    numbers = (
        {}
        if status == "failed"
        else {
            "n_atoms": 9,
            "charge": 0.0,
            "steps": 10 + index,
            "energy_start_ev": -10.0,
            "energy_ev": -11.0 - index,
            "fmax_start_ev_per_ang": 3.0,
            "fmax_ev_per_ang": 0.04,
            "rmsd_ang": 0.1 * index,
        }
    )
    return {
        "index": index,
        "name": f"mol{index}",
        "status": status,
        "reason": reason,
        **numbers,
        **changes,
    }


def example_results(tmp_path, hostile=""):
    rows = [row(i) for i in range(10)]
    rows += [
        row(10, "step limit", steps=500),
        row(11, "diverged", "atoms 3 and 7 came within 0.12 Å", rmsd_ang=""),
    ]
    rows += [
        row(
            12,
            "failed",
            f"a.smi line 12: RDKit cannot read the SMILES 'C1CC'{hostile}",
            name=hostile,
        ),
        row(13, "failed", f"a.smi line 999: RDKit cannot read the SMILES 'X(5)'{hostile}"),
        row(14, "failed", "this force field was not trained on Br; it knows H, C"),
    ]
    return read_results(write_csv(tmp_path / "results.csv", rows))


def pictures():
    return [
        Picture(
            "ethanol", molecule("CH3CH2OH"), molecule("CH3CH2OH"), "+1 eV in 3 steps\nRMSD 0.1 Å"
        ),
        Picture(HOSTILE, molecule("C6H6"), molecule("C6H6"), HOSTILE),
        Picture("atom", Atoms("He"), Atoms("He")),
        Picture("pair", molecule("H2"), molecule("H2")),
    ]


def test_numbers(tmp_path):
    result = metrics(example_results(tmp_path), 3.0)
    assert {s: result[s.replace(" ", "_")] for s in STATUSES} == {
        "converged": 10,
        "step limit": 1,
        "diverged": 1,
        "failed": 3,
    }
    assert (
        result["molecules"] == 15
        and result["converged_share"] == 10 / 15
        and result["molecules_per_second"] == 4.0
    )
    assert result["steps"]["max"] == 500 and result["steps"]["median"] == 15
    assert result["energy_gained_ev"]["min"] == 1.0 and result["energy_gained_ev"]["max"] == 11.0
    reasons = {(r["status"], r["reason"]): r["count"] for r in result["reasons"]}
    assert reasons == {
        ("failed", "RDKit cannot read the SMILES …"): 2,
        ("step limit", ""): 1,
        ("diverged", "atoms … and … came within … Å"): 1,
        ("failed", "this force field was not trained on Br; it knows H, C"): 1,
    }
    assert (
        result["reasons"][0]["example"]
        == "molecule 12: a.smi line 12: RDKit cannot read the SMILES 'C1CC'"
    )


def test_kinds_of_reasons():
    assert kind_of_reason("energy or forces are not finite") == "energy or forces are not finite"
    assert (
        kind_of_reason(
            "m.xyz structure 4: 1 of 2 atoms have NaN or infinite coordinates, "
            "the first of them atom 1"
        )
        == "… of … atoms have NaN or infinite coordinates, the first of them atom …"
    )
    assert kind_of_reason("my file.smi line 4: RDKit finds no geometry (ETKDGv3)") == (
        "RDKit finds no geometry (ETKDGv3)"
    )


def test_report(tmp_path):
    results = example_results(tmp_path, HOSTILE)
    path = write_relaxation_report(
        tmp_path,
        results,
        title=HOSTILE,
        seconds=12.0,
        files=["relaxed.xyz"],
        info={"Settings": {"fmax": 0.05, HOSTILE: HOSTILE}},
        pictures=pictures(),
    )
    parser, text = parse(path)
    assert parser.tags.count("img") == 2
    for words in (
        "66.67",
        "Not converged",
        "RDKit cannot read the SMILES",
        "relaxed.xyz",
        "molecules/s",
    ):
        assert words in text, words
    saved = json.loads(
        (tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert saved == json.loads(json.dumps(metrics(results, 12.0)))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0, "failed", "no atoms")],
        [row(0)],
        [row(0, steps=0, fmax_ev_per_ang=0.0, fmax_start_ev_per_ang=0.0)],
        [row(0, "diverged", "x", energy_ev="inf")],
        [row(i, energy_ev=-1e9) for i in range(2)],
    ],
)
def test_report_of_few_molecules(tmp_path, rows):
    results = read_results(write_csv(tmp_path / "results.csv", rows))
    path = write_relaxation_report(
        tmp_path, results, title="few", seconds=0.0, info={"a": {"b": "c"}}
    )
    content = path.read_text()
    assert ("<img" in content) == any(
        r["status"] != "failed" and r["status"] != "diverged" for r in rows
    )
    json.loads(
        (tmp_path / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )


def test_figure_counts_outliers(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row(i, energy_ev=-11 - rng.gamma(2), rmsd_ang=rng.gamma(2)) for i in range(1000)]
    rows += [row(1000 + i, energy_ev=-1e6) for i in range(2)]
    figure = distribution_figure(read_results(write_csv(tmp_path / "results.csv", rows)))
    gained = figure.axes[1]
    assert gained.get_xlim()[1] < 100 and "outside" in gained.get_title(loc="right")
    # all molecules except those annotated as outside
    counts = gained.patches[0].get_data().values.sum()
    assert counts == 1002 - int(gained.get_title(loc="right").split("·")[1].split()[0])


def test_chosen_molecules_are_ordered_by_rmsd(tmp_path):
    rows = [row(i, rmsd_ang=0.01 * (17 * i % 101), n_atoms=20) for i in range(100)]
    rows += [
        row(100, rmsd_ang=9, n_atoms=500),
        row(101, rmsd_ang=9, n_atoms=1),
        row(102, "diverged", "x", rmsd_ang=9),
    ]
    results = read_results(write_csv(tmp_path / "results.csv", rows))
    chosen = choose(results)
    values = results.rmsd[chosen]
    assert (
        len(chosen) == 6 and (np.diff(values) > 0).all() and values[0] == results.rmsd[:100].min()
    )
    assert values[-1] == results.rmsd[:100].max()
    groups = [i // 10 for i in choose(results, num_conformers=10)]
    assert len(set(groups)) == 6
    # only two molecules, so several conformers of each are shown
    assert len(choose(results, num_conformers=50)) == 6
    few = read_results(write_csv(tmp_path / "few.csv", rows[99:]))
    assert choose(few) == [int(few.index[0]), 100]
    assert choose(read_results(write_csv(tmp_path / "none.csv", []))) == []


def test_bonds_are_those_of_the_molecule():
    ethanol = molecule("CH3CH2OH")
    result = bonds(ethanol.numbers, ethanol.positions)
    kinds = sorted("".join(sorted(ethanol.symbols[list(pair)])) for pair in result)
    assert kinds == ["CC", "CH", "CH", "CH", "CH", "CH", "CO", "HO"]


def test_views_are_aligned_along_the_shortest_axis():
    benzene = molecule("C6H6")
    turned = benzene.copy()
    turned.rotate(50, (1, 2, 3))
    turned.positions += 7
    before, after = _views(turned.positions, benzene.positions)
    np.testing.assert_allclose(before, after, atol=1e-9)
    assert np.abs(after[:, 2]).max() < 1e-9
    np.testing.assert_allclose(
        Atoms("C6H6", after).get_all_distances(), benzene.get_all_distances(), atol=1e-9
    )
    chiral = np.random.default_rng(0).normal(size=(5, 3))
    view = _views(chiral, chiral)[1]
    # not the mirror image
    assert np.linalg.det(view[1:4] - view[0]) * np.linalg.det(chiral[1:4] - chiral[0]) > 0


def test_near_atoms_cover_distant_ones():
    figure = Figure()
    ax = figure.subplots()
    draw(ax, np.array([8, 1, 6]), np.array([[0, 0, 3.0], [0.1, 0, -3.0], [0, 0.1, 0.0]]), 5.0)
    (shapes,) = ax.collections
    colors = shapes.get_facecolors()[:, :3]
    order = [int(np.argmin(np.abs(colors - jmol_colors[z]).sum(1))) for z in (6, 8)]
    # hydrogen is drawn first, faded; oxygen last, in its own color
    assert order == [1, 2] and len(colors) == 3
    np.testing.assert_allclose(colors[2], jmol_colors[8])


@pytest.mark.parametrize("count", [1, 6])
def test_pictures_draw_every_atom_and_bond(count):
    figure = molecule_figure(pictures()[:1] * count)
    figure.canvas.draw()
    assert len(figure.axes) == 2 * count
    for ax in figure.axes:
        (shapes,) = ax.collections
        corners = [len(path.vertices) for path in shapes.get_paths()]
        assert sum(n > 10 for n in corners) == 9 and sum(n < 10 for n in corners) == 3 * 8


def test_molecules_outside_the_domain_are_listed(tmp_path):
    rows = [row(0, outside_domain=0), row(1, outside_domain=1, name="", smiles="[CH3:1][OH:2]")]
    results = read_results(write_csv(tmp_path / "results.csv", rows))
    assert results.outside_names == (("CO", 1, "converged"),)
    path = write_relaxation_report(tmp_path, results, title="", seconds=1.0, info={})
    content = path.read_text(encoding="utf-8")
    assert 'href="#outside-the-domain"' in content and "<td>CO</td><td>1</td>" in content


def test_cells_of_crystals(tmp_path):
    """Volumes and pressures are those of finished crystals; molecules have none."""
    columns = ("volume_start_ang3", "volume_ang3", "pressure_gpa")
    values = [(100.0, 110.0, 0.5), (100.0, 90.0, -0.5), ("", "", "")]
    path = tmp_path / "results.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, *columns))
        writer.writeheader()
        writer.writerows(row(i) | dict(zip(columns, v)) for i, v in enumerate(values))
    results = read_results(path)
    np.testing.assert_allclose(results.volume_change, [10, -10])
    content = metrics(results, 1.0)
    assert content["volume_change_percent"]["max"] == pytest.approx(10)
    assert content["pressure_gpa"]["min"] == -0.5
    assert len(cell_figure(results).axes) == 2
    molecules = read_results(write_csv(tmp_path / "molecules.csv", [row(0)]))
    assert "pressure_gpa" not in metrics(molecules, 1.0)

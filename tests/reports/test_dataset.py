"""Tests for the report of a data set: complete, valid for any data, and no markup from names."""

import io
import json
import re

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from mlip_jax.datasets.quality.histogram import Histogram
from mlip_jax.reports.dataset.figure import dataset_figure
from mlip_jax.reports.dataset.report import write_dataset_report
from mlip_jax.reports.dataset.summary import DatasetSummary, PropertySummary
from mlip_jax.reports.dataset.tables import markdown, print_summary

# Ignore warnings about objects of other tests, which the garbage collector may raise here.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
HOSTILE = "<script>x</script> [red]$a^|b\n# c `d` \\frac"


def full(**changes):
    rng = np.random.default_rng(0)
    histograms = {
        "n_atoms": Histogram.integers(1, 200),
        "conformers": Histogram.integers(1, 100),
        "energy_per_atom": Histogram.linear(-1, 1, 400),
        "total_energy_per_atom": Histogram.linear(-1000, 0, 500),
        "force": Histogram.logarithmic(1e-4, 1e3, 140),
        "shortest_distance": Histogram.linear(0, 3, 300),
    }
    histograms["n_atoms"].add(rng.integers(10, 50, 1000))
    histograms["conformers"].add(np.full(100, 10))
    histograms["energy_per_atom"].add(np.append(rng.normal(0, 0.05, 999), 40.0))
    histograms["energy_per_atom"].add([np.nan] * 7)
    histograms["total_energy_per_atom"].add(rng.normal(-400, 50, 1000))
    histograms["force"].add(rng.lognormal(size=20_000))
    histograms["shortest_distance"].add(rng.normal(1.0, 0.03, 1000))
    fields = {
        "title": "Toy",
        "level_of_theory": "PBE/def2-SVP",
        "files": ["toy.hdf5"],
        "elements": {"O": 250, "H": 749, "Br": 1},
        "num_structures": 1000,
        "num_molecules": 80,
        "charges": {1.0: 10, -1.0: 1, 0.0: 989},
        "labels": {"energy": 1.0, "forces": 0.99999},
        "properties": {
            "dipole": PropertySummary(-3.0, np.float64(2.5), 0.5, "e·Å", (3,)),
            "score": PropertySummary(float("nan"), float("nan"), 0.0),
        },
        "reference_energies": {"H": -13.5871234},
        "counts": {"left out: charge": 12},
        "notes": ["A note."],
        "problems": ["A problem."],
    }
    return DatasetSummary(**fields | histograms | changes)


def bare(**changes):
    return DatasetSummary(
        **{
            "title": "Bare",
            "level_of_theory": "unknown",
            "files": [],
            "elements": {},
            "num_structures": 0,
            "num_molecules": 0,
        }
        | changes
    )


def tables(text):
    """Return {first cell: [cells]} of the rows of all tables; check their lengths."""
    rows, width = {}, None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        width = width or len(cells)
        assert len(cells) == width, line
        rows.setdefault(cells[0], cells[1:])
    return rows


def test_files(tmp_path):
    path = write_dataset_report(tmp_path / "new" / "folder", full())
    assert path.name == "dataset.md"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "dataset.json",
        "dataset.md",
        "dataset.png",
    ]
    picture = imread(path.parent / "dataset.png")
    assert picture.shape[1] == 1380 and picture.std() > 0.1
    write_dataset_report(path.parent, full(title="Again"))
    assert path.read_text(encoding="utf-8").startswith("# Again\n")


def test_table_of_the_papers():
    text = markdown(full())
    assert "| data set | n_s | n_c | N | level of theory | elements |" in text
    assert tables(text)["Toy"] == ["80", "12.5", "1,000", "PBE/def2-SVP", "H, O, Br"]


def test_tables():
    rows = tables(markdown(full()))
    # never "100 %" if a label is missing
    assert rows["forces"] == ["\\> 99.9 %"] and rows["energy"] == ["100 %"]
    assert rows["H"] == ["749", "74.9 %", "-13.587123"] and rows["Br"] == ["1", "0.1 %", "–"]
    assert rows["−1"] == ["1", "0.1 %"] and rows["+1"] == ["10", "1 %"]
    assert rows["dipole"] == ["3", "e·Å", "50 %", "−3.00", "2.50"]
    assert rows["score"] == ["scalar", "unknown", "0 %", "–", "–"]
    assert rows["left out: charge"] == ["12"]
    values, missing, mean, low, *quantiles, high = rows["Energy minus reference (eV/atom)"]
    assert (values, missing, high) == ("1,000", "7", "40.00")
    assert abs(float(quantiles[3].replace("−", "-"))) < 0.01 and len(quantiles) == 7
    assert rows["Conformers per molecule"] == ["100", "0", "10.00", *["10"] * 9]


def test_json_contains_all_fields(tmp_path):
    write_dataset_report(tmp_path, full())
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} in dataset.json")}
    content = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"), **refuse)
    assert content["num_structures"] == 1000 and content["mean_conformers"] == 12.5
    assert content["energy_per_atom"]["above"] == 1 and content["energy_per_atom"]["missing"] == 7
    assert sum(content["force"]["counts"]) == 20_000 and len(content["force"]["edges"]) == 141
    assert content["properties"]["score"]["minimum"] is None and content["properties"]["dipole"][
        "shape"
    ] == [3]
    assert content["charges"] == {"1.0": 10, "-1.0": 1, "0.0": 989}


def test_figure_has_a_panel_per_distribution():
    titles = [ax.get_title(loc="left") for ax in dataset_figure(full()).axes]
    assert titles == [
        "Atoms per structure",
        "Conformers per molecule",
        "Energy minus reference",
        "Total energy",
        "Force on an atom",
        "Shortest distance",
        "Elements",
        "Total charge",
    ]
    axes = dict(zip(titles, dataset_figure(full()).axes))
    assert (
        axes["Force on an atom"].get_xscale() == "log"
        and axes["Total energy"].get_xscale() == "linear"
    )
    # the value at 40 eV/atom does not compress the others, and is annotated
    assert axes["Energy minus reference"].get_xlim()[1] < 0.5
    assert axes["Energy minus reference"].get_title(loc="right").endswith("outside")
    assert [
        ax.get_title(loc="left") for ax in dataset_figure(full(force=None, charges={0: 1000})).axes
    ] == [t for t in titles if t not in ("Force on an atom", "Total charge")]


@pytest.mark.parametrize(
    "summary",
    [
        bare(),
        bare(elements={"H": 0}, n_atoms=Histogram.integers(1, 5)),
        bare(elements={"H": 2}, num_structures=1, num_molecules=1, n_atoms=([1.5, 2.5], [1])),
        bare(energy_per_atom=([0, 1], [0]), force=([1e-3, 1e-2, 1], [0, 5]), charges={0: 0, 1: 0}),
        bare(
            elements={
                s: 10**n
                for n, s in enumerate("H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K".split())
            }
        ),
    ],
)
def test_any_data_set(tmp_path, summary):
    write_dataset_report(tmp_path, summary)
    tables((tmp_path / "dataset.md").read_text(encoding="utf-8"))
    print_summary(summary, Console(file=io.StringIO()))


def test_all_values_outside_the_bins(tmp_path):
    histogram = Histogram.linear(-1, 1, 10)
    histogram.add([7.0, np.inf, -np.inf])
    write_dataset_report(tmp_path, bare(energy_per_atom=histogram))
    assert tables((tmp_path / "dataset.md").read_text())["Energy minus reference (eV/atom)"][
        :2
    ] == ["3", "0"]


def test_names_from_data_are_escaped(tmp_path):
    summary = full(
        title=HOSTILE,
        level_of_theory=HOSTILE,
        files=[HOSTILE],
        notes=[HOSTILE],
        problems=[HOSTILE],
        labels={HOSTILE: 0.5},
        properties={HOSTILE: PropertySummary(0, 1, 1.0, HOSTILE)},
        counts={HOSTILE: 3},
    )
    text = write_dataset_report(tmp_path, summary).read_text(encoding="utf-8")
    tables(text)
    assert (
        not re.search(r"(?<!\\)<", text)
        and "\n# c" not in text
        and not re.search(r"(?<!\\)`", text)
    )
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=400))
    assert "[red]$a^|b" in stream.getvalue()


def test_output_fits_a_console_of_80_columns():
    stream = io.StringIO()
    print_summary(full(), Console(file=stream, width=80))
    shown = stream.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80
    assert all(
        text in shown
        for text in (
            "12.5",
            "PBE/def2-SVP",
            "Shortest distance (Å)",
            "Note: A note.",
            "Problem: A problem.",
        )
    )


def test_invalid_summaries_are_errors():
    with pytest.raises(ValueError, match="'Xx' is not the symbol"):
        bare(elements={"Xx": 1})
    with pytest.raises(ValueError, match="'forces' must be between 0 and 1, received 98.0"):
        bare(labels={"forces": 98.0})


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = write_dataset_report(tmp_path, full())
    old = path.read_text()
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        write_dataset_report(tmp_path, full(title="New"))
    assert path.read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dataset.json",
        "dataset.md",
        "dataset.png",
    ]

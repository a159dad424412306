"""Tests for the task `inspect_data`: the numbers agree with those computed by NumPy."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.io import write
from matplotlib import image

from mlip_jax import defaults
from mlip_jax.datasets import readers, source
from mlip_jax.datasets.quality.histogram import Histogram
from mlip_jax.reports.dataset.report import write_dataset_report
from mlip_jax.reports.dataset.tables import markdown
from mlip_jax.tasks import inspect_data

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "tests/data/gfn2_small.hdf5"
SAMPLES = REPOSITORY / "tests/datasets/readers/samples"


def command(workdir, **fields):
    return [
        sys.executable,
        "-m",
        "mlip_jax.main",
        f"--config={REPOSITORY}/configs/inspect_data.py",
        f"--workdir={workdir}",
        *(f"--config.data.{k}={v}" for k, v in fields.items()),
    ]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """Workdir and output of a run on the whole file."""
    folder = tmp_path_factory.mktemp("inspected")
    process = subprocess.run(
        command(folder / "run", path=DATA),
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(REPOSITORY), COLUMNS="120"),
        timeout=600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return folder / "run", process.stdout + process.stderr


@pytest.fixture(scope="module")
def structures():
    with readers.open_data(DATA) as opened:
        return list(opened)


def config_for(path, directory, **changes):
    config = defaults.inspect_defaults()
    config.data.path, config.data.directory = str(path), str(directory)
    config.data.update(changes)
    return config


def summary_of(path, directory, **changes):
    return inspect_data.summarize(
        source.load(config_for(path, directory, reject_invalid=False, **changes).data)
    )


def histogram(plain):
    """Return a histogram of dataset.json."""
    h = Histogram(plain["edges"], plain["counts"], plain["below"], plain["above"], plain["missing"])
    h.minimum, h.maximum, h.finite = plain["minimum"], plain["maximum"], int(h.counts.sum())
    return h


def check_distribution(plain, values):
    """Assert that a histogram describes these values; its quantiles are accurate to one bin."""
    values = np.asarray(values, float)
    h = histogram(plain)
    assert h.known == len(values) and h.missing == 0
    edges = h.edges
    np.testing.assert_allclose(
        [plain["minimum"], plain["maximum"], plain["mean"]],
        [values.min(), values.max(), values.mean()],
        rtol=1e-5,
    )
    # Rounding in the store may move a value over an edge.
    counts = np.histogram(values, edges)[0]
    assert np.abs(counts - h.counts).sum() <= 0.02 * len(values)
    for q in (0.05, 0.25, 0.5, 0.75, 0.95):
        low, high = np.quantile(values, q, method="lower"), np.quantile(values, q, method="higher")
        bins = np.clip(np.searchsorted(edges, [low, high], side="right") - 1, 0, len(edges) - 2)
        assert (
            edges[bins[0]] - np.diff(edges).max()
            <= h.quantile(q)
            <= edges[bins[1] + 1] + np.diff(edges).max()
        )


def cells(text, first):
    """Return the cells of the row of a Markdown table that begins with `first`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_has_the_columns_of_the_papers(inspected):
    workdir, output = inspected
    text = (workdir / "dataset.md").read_text()
    assert cells(text, "data set") == ["data set", "n_s", "n_c", "N", "level of theory", "elements"]
    assert cells(text, "gfn2\\_small.hdf5") == [
        "gfn2\\_small.hdf5",
        "17",
        "6.0",
        "102",
        "GFN2-xTB (tblite 0.8.0)",
        "H, C, N, O, S, Cl",
    ]
    assert cells(text, "energy") == ["energy", "100 %"] and cells(text, "forces") == [
        "forces",
        "100 %",
    ]
    assert "Problem" not in text and "![Distributions](dataset.png)" in text
    assert (
        "n_c" in output and "102" in output and "Traceback" not in output and "dataset.md" in output
    )


def test_numbers_equal_those_computed_with_numpy(inspected, structures):
    content = json.loads((inspected[0] / "dataset.json").read_text())
    sizes = [len(s) for s in structures]
    molecules, conformers = np.unique([s.molecule for s in structures], return_counts=True)
    assert (
        (content["num_structures"], content["num_molecules"])
        == (len(structures), len(molecules))
        == (102, 17)
    )
    assert content["mean_conformers"] == 6.0
    check_distribution(content["n_atoms"], sizes)
    assert [content["n_atoms"]["counts"][n - 6] for n in range(6, 12)] == np.bincount(sizes)[
        6:
    ].tolist()
    check_distribution(content["conformers"], conformers)
    check_distribution(
        content["force"], np.concatenate([np.linalg.norm(s.forces, axis=1) for s in structures])
    )
    check_distribution(content["total_energy_per_atom"], [s.energy / len(s) for s in structures])
    check_distribution(
        content["shortest_distance"],
        [
            np.linalg.norm(s.positions[:, None] - s.positions[None], axis=-1)[
                np.triu_indices(len(s), 1)
            ].min()
            for s in structures
        ],
    )
    numbers = np.concatenate([s.numbers for s in structures])
    assert content["elements"] == {
        chemical_symbols[z]: int(n) for z, n in zip(*np.unique(numbers, return_counts=True))
    }
    charges = {
        float(c): int(n)
        for c, n in zip(*np.unique([s.charge for s in structures], return_counts=True))
    }
    assert {float(c): n for c, n in content["charges"].items()} == charges and len(charges) == 3
    assert content["counts"]["read from the source"] == 102 and content["problems"] == []


def test_energies_minus_reference_energies(inspected, structures):
    content = json.loads((inspected[0] / "dataset.json").read_text())
    present = sorted({z for s in structures for z in s.numbers.tolist()})
    counts = np.array([[(s.numbers == z).sum() for z in present] for s in structures], float)
    energy = np.array([s.energy for s in structures])
    fitted, *_ = np.linalg.lstsq(counts, energy, rcond=None)
    check_distribution(content["energy_per_atom"], (energy - counts @ fitted) / counts.sum(1))
    for z, value in zip(present, fitted):
        np.testing.assert_allclose(
            content["reference_energies"][chemical_symbols[z]], value, rtol=1e-6
        )


def test_further_labels(inspected, structures):
    content = json.loads((inspected[0] / "dataset.json").read_text())["properties"]
    formation = [float(s.properties["formation_energy"]) for s in structures]
    assert set(content) == {"formation_energy"} and content["formation_energy"]["labelled"] == 1.0
    np.testing.assert_allclose(
        [content["formation_energy"]["minimum"], content["formation_energy"]["maximum"]],
        [min(formation), max(formation)],
    )


def test_the_figure_is_an_image(inspected):
    picture = image.imread(inspected[0] / "dataset.png")
    assert picture.ndim == 3 and min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.05


def test_filters_apply_and_are_counted(tmp_path, structures):
    summary = summary_of(DATA, tmp_path, charge=0.0, elements=("H", "C", "N", "O"))
    kept = [s for s in structures if s.charge == 0 and not {16, 17} & set(s.numbers.tolist())]
    assert (summary.num_structures, summary.num_molecules) == (
        len(kept),
        len({s.molecule for s in kept}),
    )
    assert set(summary.elements) == {"H", "C", "N", "O"} and summary.charges == {0.0: len(kept)}
    assert summary.counts["skipped here: charge"] == 12
    assert summary.counts["skipped here: elements"] == 102 - 12 - len(kept)
    assert summary.n_atoms.known == len(kept) and summary.force.known == sum(len(s) for s in kept)


def test_flipped_gradients_are_reported(tmp_path):
    path = tmp_path / "flipped.hdf5"
    shutil.copy(DATA, path)
    with h5py.File(path, "a") as file:
        for group in file.values():
            group["dft_total_gradient"][:] = -group["dft_total_gradient"][:]
    text = inspect_data.run(config_for(path, tmp_path / "data"), tmp_path / "run").read_text()
    assert "**Problem:** these look like gradients" in text and "change their sign" in text
    assert cells(text, "flipped.hdf5")[1:4] == ["17", "6.0", "102"]
    assert json.loads((tmp_path / "run/dataset.json").read_text())["problems"]
    assert (tmp_path / "run/dataset.png").stat().st_size > 10_000


def without(tmp_path, name, *fields):
    """Write the data set without some labels."""
    path = tmp_path / f"{name}.hdf5"
    shutil.copy(DATA, path)
    with h5py.File(path, "a") as file:
        for group in file.values():
            for field in fields:
                del group[field]
    return path


def check_report(folder, summary):
    """Assert that the report of a summary contains the titles of the known quantities."""
    text = write_dataset_report(folder, summary).read_text()
    assert text == markdown(summary) and (folder / "dataset.png").stat().st_size > 10_000
    assert (
        json.loads((folder / "dataset.json").read_text())["num_structures"]
        == summary.num_structures
    )
    return text


def test_data_without_energies(tmp_path):
    path = without(tmp_path, "forces", "dft_total_energy", "formation_energy")
    summary = summary_of(path, tmp_path / "data")
    assert summary.labels == {"energy": 0.0, "forces": 1.0} and summary.reference_energies == {}
    assert (
        summary.energy_per_atom is None
        and summary.total_energy_per_atom is None
        and summary.force.known > 0
    )
    text = check_report(tmp_path / "report", summary)
    assert "Force on an atom" in text and "Total energy" not in text
    assert "no structure has energy" in text


def test_data_without_forces(tmp_path):
    summary = summary_of(without(tmp_path, "energies", "dft_total_gradient"), tmp_path / "data")
    assert summary.labels == {"energy": 1.0, "forces": 0.0} and summary.force is None
    text = check_report(tmp_path / "report", summary)
    assert "Total energy" in text and "Force on an atom" not in text


def test_data_without_any_label(tmp_path):
    path = without(tmp_path, "bare", "dft_total_energy", "dft_total_gradient", "formation_energy")
    summary = summary_of(path, tmp_path / "data")
    assert summary.labels == {"energy": 0.0, "forces": 0.0} and summary.num_structures == 102
    assert "no structure has an energy or forces" in check_report(tmp_path / "report", summary)
    assert np.isnan(summary.properties["formation_energy"].minimum)
    assert summary.properties["formation_energy"].labelled == 0.0


def test_some_labels_are_missing(tmp_path):
    path = tmp_path / "some.hdf5"
    shutil.copy(DATA, path)
    with h5py.File(path, "a") as file:
        for group in file.values():
            group["dft_total_energy"][0] = np.nan
            group["dft_total_gradient"][1] = np.nan
    summary = summary_of(path, tmp_path / "data")
    np.testing.assert_allclose([summary.labels["energy"], summary.labels["forces"]], 5 / 6)
    assert summary.energy_per_atom.missing == 17 and summary.energy_per_atom.known == 85
    atoms = sum(summary.elements.values())
    assert 6 * summary.force.known == 5 * atoms and 6 * summary.force.missing == atoms


def sample(name, folder):
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder.mkdir()
    return module.make(folder)[0]


def test_conformers_of_geom(tmp_path):
    """GEOM has energies, many properties, no forces, and different numbers of conformers."""
    path = sample("geom", tmp_path / "geom")
    with readers.open_data(path) as opened:
        structures = list(opened)
    summary = summary_of(path, tmp_path / "data")
    _, conformers = np.unique([s.molecule for s in structures], return_counts=True)
    assert summary.num_molecules == len(conformers) == 3 and summary.num_structures == len(
        structures
    )
    assert (
        summary.conformers.maximum
        == conformers.max()
        > conformers.min()
        == summary.conformers.minimum
    )
    assert summary.labels["forces"] == 0.0 and summary.force is None
    assert set(summary.properties) == {name for s in structures for name in s.properties}
    for name, content in summary.properties.items():
        values = np.array([s.properties.get(name, np.nan) for s in structures], float)
        np.testing.assert_allclose(
            [content.minimum, content.maximum], [np.nanmin(values), np.nanmax(values)], err_msg=name
        )
        np.testing.assert_allclose(content.labelled, np.isfinite(values).mean(), err_msg=name)
    check_report(tmp_path / "report", summary)


def test_ase_frames_including_a_crystal(tmp_path):
    summary = summary_of(sample("ase", tmp_path / "ase"), tmp_path / "data")
    assert summary.num_structures == 4 and summary.labels == {"energy": 0.75, "forces": 1.0}
    assert summary.charges == {0.0: 3, 1.0: 1} and {"Na", "Cl"} < set(summary.elements)
    assert summary.total_energy_per_atom.known == 3 and summary.total_energy_per_atom.missing == 1
    check_report(tmp_path / "report", summary)


def test_the_stress_of_crystals_has_a_unit(tmp_path):
    """Its unit is that of the package; only other labels of a file have unknown units."""
    atoms = bulk("NaCl", "rocksalt", a=5.7)
    labels = {"energy": -1.0, "forces": np.zeros((2, 3)), "stress": np.full(6, 0.01)}
    atoms.calc = SinglePointCalculator(atoms, **labels)
    write(tmp_path / "a.xyz", [atoms])
    summary = summary_of(tmp_path / "a.xyz", tmp_path / "data")
    assert summary.properties["stress"].unit == "eV/Å³"

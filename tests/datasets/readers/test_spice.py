"""Tests for the SPICE reader: units, sign of forces, charges, and invalid files."""

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.datasets.charges import charge_from_smiles
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import spice

# Cut from SPICE 1.1.4 (CC0): two molecules, both charged, three conformations each.
GENUINE = Path(__file__).parents[2] / "data" / "spice_1.1.4_small.hdf5"
# CODATA 2018
HARTREE_IN_EV = 27.211386245988
BOHR_IN_ANGSTROM = 0.529177210903


def read(path, report=None):
    with spice.Reader(path) as source:
        yield from source.read(range(len(source)), report or ReadReport())


def write(
    path,
    *,
    numbers=(8, 1, 1),
    count=2,
    smiles="[O:1]([H:2])[H:3]",
    name="water",
    units=None,
    **changes,
):
    """Write one molecule in the layout of SPICE. `changes` are fields; None omits a field."""
    rng = np.random.default_rng(0)
    n = len(numbers)
    fields = {
        "atomic_numbers": np.array(numbers, np.int16),
        "conformations": rng.normal(size=(count, n, 3)),
        "dft_total_energy": rng.normal(size=count),
        "dft_total_gradient": rng.normal(size=(count, n, 3)),
        "formation_energy": rng.normal(size=count),
        "smiles": smiles and [smiles],
        "subset": ["made up"],
    } | changes
    units = spice.UNITS | (units or {})
    with h5py.File(path, "a") as file:
        group = file.create_group(name)
        for field, value in fields.items():
            if value is None:
                continue
            text = field in ("smiles", "subset")
            data = group.create_dataset(
                field, data=value, dtype=h5py.string_dtype() if text else None
            )
            if field in units:
                data.attrs["units"] = units[field]
    return path


def test_equals_an_independent_parser():
    report = ReadReport()
    structures = list(read(GENUINE, report))
    expected = []
    with h5py.File(GENUINE) as file:
        for name in file:
            for c in range(len(file[name]["conformations"])):
                expected.append((name, c, {k: v[()] for k, v in file[name].items()}))
    assert len(structures) == len(expected) == report.structures == 6
    assert report.records == 2 and not report.skipped
    for s, (name, c, raw) in zip(structures, expected):
        np.testing.assert_array_equal(s.numbers, raw["atomic_numbers"])
        np.testing.assert_allclose(
            s.positions, raw["conformations"][c].astype(float) * BOHR_IN_ANGSTROM, rtol=1e-6
        )
        assert s.energy == pytest.approx(raw["dft_total_energy"][c] * HARTREE_IN_EV, rel=1e-6)
        np.testing.assert_allclose(
            s.forces,
            -raw["dft_total_gradient"][c].astype(float) * HARTREE_IN_EV / BOHR_IN_ANGSTROM,
            rtol=1e-6,
        )
        assert s.properties["formation_energy"] == pytest.approx(
            raw["formation_energy"][c] * HARTREE_IN_EV, rel=1e-6
        )
        assert s.positions.dtype == s.forces.dtype == np.float64
        assert s.conformer == c and s.subset and name in s.source and GENUINE.name in s.source
    distances = np.linalg.norm(
        structures[0].positions[:, None] - structures[0].positions[None], axis=-1
    )
    assert 0.8 < distances[np.triu_indices(len(distances), 1)].min() < 1.3  # bond lengths in Å


def test_charges_of_spice_molecules():
    charges = {s.molecule: s.charge for s in read(GENUINE)}
    assert len(charges) == 2
    assert next(charge for molecule, charge in charges.items() if "[Na+]" in molecule) == 1.0
    assert all(charge != 0 for charge in charges.values())


def test_forces_point_downhill(tmp_path):
    """Forces are minus the stored gradient: a step along them lowers the energy by F·Δx."""
    tblite = pytest.importorskip("tblite.interface")
    numbers = np.array([8, 1, 1])
    start = np.array([[0.0, 0.0, 0.2], [0.0, 1.6, -0.9], [0.0, -1.4, -1.0]])  # bohr

    def label(positions):
        calculator = tblite.Calculator("GFN2-xTB", numbers, positions)
        calculator.set("verbosity", 0)
        calculator.set("accuracy", 0.01)
        result = calculator.singlepoint()
        return float(result.get("energy")), np.array(result.get("gradient"))

    _, gradient = label(start)
    positions = np.array([start, start - 0.05 * gradient])
    energy, gradients = zip(*(label(p) for p in positions))
    path = write(
        tmp_path / "gfn2.hdf5",
        conformations=positions,
        dft_total_energy=np.array(energy),
        dft_total_gradient=np.array(gradients),
    )
    before, after = read(path)
    step = after.positions - before.positions
    work = float((0.5 * (before.forces + after.forces) * step).sum())
    assert work > 0
    assert after.energy < before.energy
    assert before.energy - after.energy == pytest.approx(work, rel=1e-2)


def test_sign_is_minus_the_gradient(tmp_path):
    """A spring, for which energy and forces are known."""
    rest = np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    positions = np.array([rest * 1.1, rest * 1.2])
    stretch = positions[:, 1, 0] - 2.0
    gradient = np.zeros((2, 2, 3))
    gradient[:, 1, 0], gradient[:, 0, 0] = stretch, -stretch
    path = write(
        tmp_path / "spring.hdf5",
        numbers=(1, 1),
        smiles="[H:1][H:2]",
        conformations=positions,
        dft_total_energy=0.5 * stretch**2,
        dft_total_gradient=gradient,
        formation_energy=None,
    )
    first, second = read(path)
    work = (0.5 * (first.forces + second.forces) * (second.positions - first.positions)).sum()
    assert second.energy - first.energy == pytest.approx(-work, rel=1e-6)
    assert first.forces[1, 0] < 0  # a stretched spring pulls back


MAPPED_SMILES = [
    "[H:1][O:2][H:3]",
    "[N+:1]([H:2])([H:3])([H:4])[H:5]",
    "[O-:1][H:2]",
    "[Ca++]",
    "[Ca+2]",
    "[Ca+2:1]",
    "[Fe+3:4]",
    "[O--:2]",
    "[O-2:2]",
    "[Cl-:1].[Na+:2]",
    "[Cl-:1].[Cl-:2].[Mg+2:3]",
    "[H:3][N+:1]([H:4])([H:5])[C:2]([H:8])([H:9])[C:6](=[O:7])[O-:10]",
    "[C@@H:1]([F:2])([Cl:3])[Br:4]",
    "[C@H:1]([O-:5])([F:2])[Cl:3]",
    "[13CH3-:1]",
    "[2H+:1]",
    "[nH:1]1[cH:2][cH:3][cH:4][cH:5]1",
    "[c:1]1([H:7])[n+:2]([H:8])[c:3]([H:9])[c:4]([H:10])[c:5]([H:11])[c:6]1[H:12]",
    "C[N+](C)(C)C",
    "F[P-](F)(F)(F)(F)F",
    "[O-]S(=O)(=O)[O-]",
    "[H+]",
    "[N+:12](=[O:1])([O-:13])[C:2]",
    "[Al+3].[O-2]",
    "[OH2+:1]",
    "[NH4+]",
    "[C:1]#[O+:2]",
    "[H]C#C[H].[Na+]",
]


@pytest.mark.parametrize("smiles", MAPPED_SMILES)
def test_charge_equals_that_of_rdkit(smiles):
    chem = pytest.importorskip("rdkit.Chem")
    molecule = chem.MolFromSmiles(smiles, sanitize=False)
    assert charge_from_smiles(smiles) == chem.GetFormalCharge(molecule)


def test_records_without_positions_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.hdf5", name="a")
    write(
        path,
        name="b",
        conformations=None,
        dft_total_energy=None,
        dft_total_gradient=None,
        formation_energy=None,
    )
    write(path, name="c", count=0)
    write(path, name="d")
    report = ReadReport()
    sources = [s.source for s in read(path, report)]
    assert sources == ["a.hdf5:a"] * 2 + ["a.hdf5:d"] * 2
    assert report == ReadReport(
        records=4,
        structures=4,
        skipped={"no positions": 2},
        identities=[("no positions", "a.hdf5:b"), ("no positions", "a.hdf5:c")],
    )


def test_positions_that_are_not_finite_are_skipped_and_counted(tmp_path):
    positions = np.random.default_rng(0).normal(size=(3, 3, 3))
    positions[1, 0, 0] = np.nan
    path = write(
        tmp_path / "a.hdf5",
        conformations=positions,
        dft_total_energy=np.arange(3.0),
        dft_total_gradient=np.zeros((3, 3, 3)),
        formation_energy=None,
    )
    report = ReadReport()
    assert [s.conformer for s in read(path, report)] == [0, 2]
    assert report.skipped == {"positions not finite": 1} and report.structures == 2


def test_missing_labels_are_nan(tmp_path):
    energy = np.array([np.nan, 1.0])
    path = write(
        tmp_path / "a.hdf5", dft_total_energy=energy, dft_total_gradient=None, formation_energy=None
    )
    first, second = read(path)
    assert np.isnan(first.energy) and second.energy == pytest.approx(HARTREE_IN_EV)
    assert np.isnan(first.forces).all() and first.forces.shape == (3, 3)
    assert np.isnan(first.properties["formation_energy"])


def test_missing_texts_are_empty_and_molecules_stay_distinct(tmp_path):
    path = tmp_path / "a.hdf5"
    for name in "ab":
        write(path, name=name, smiles=None, subset=None)
    structures = list(read(path))
    assert {s.subset for s in structures} == {""}
    assert len({s.molecule for s in structures}) == 2


def test_missing_file_is_rejected(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.hdf5: no such file.*config\.data\.path"):
        list(read(tmp_path / "nowhere.hdf5"))


@pytest.mark.parametrize("keep", [0, 3, 100, 6000, 15_000])
def test_truncated_file_is_rejected(tmp_path, keep):
    path = tmp_path / "cut.hdf5"
    path.write_bytes(GENUINE.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"cut\.hdf5.*(truncated|corrupted)"):
        list(read(path))


def test_other_file_formats_are_rejected(tmp_path):
    path = tmp_path / "page.hdf5"
    path.write_text("<html>404 not found</html>" * 100)
    with pytest.raises(DatasetError, match="not an HDF5 file"):
        list(read(path))


def test_directory_is_rejected(tmp_path):
    with pytest.raises(DatasetError, match=str(tmp_path.name)):
        list(read(tmp_path))


def test_file_without_molecules_is_rejected(tmp_path):
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    with pytest.raises(DatasetError, match="no molecules"):
        list(read(tmp_path / "empty.hdf5"))


def test_other_layouts_are_rejected(tmp_path):
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        file["energies"] = np.zeros(3)
    with pytest.raises(
        DatasetError,
        match=r"flat\.hdf5:energies: expected a group for each molecule.*found an array",
    ):
        list(read(tmp_path / "flat.hdf5"))
    with h5py.File(tmp_path / "ani.hdf5", "w") as file:
        file["C2H6/species"] = np.zeros(8)
    with pytest.raises(DatasetError, match=r"ani\.hdf5:C2H6.*species"):
        list(read(tmp_path / "ani.hdf5"))


@pytest.mark.parametrize(
    ("field", "unit"),
    [
        ("conformations", "nanometers"),
        ("dft_total_gradient", "eV/angstrom"),
        ("dft_total_energy", "kcal/mol"),
    ],
)
def test_other_units_are_rejected(tmp_path, field, unit):
    path = write(tmp_path / "a.hdf5", units={field: unit})
    with pytest.raises(DatasetError, match=f"a.hdf5:water: {field} is in '{unit}', expected"):
        list(read(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("conformations", np.zeros((2, 4, 3))),
        ("dft_total_energy", np.zeros(3)),
        ("dft_total_gradient", np.zeros((2, 3, 2))),
    ],
)
def test_invalid_shapes_are_reported(tmp_path, field, value):
    path = write(tmp_path / "a.hdf5", **{field: value})
    with pytest.raises(DatasetError, match=f"a.hdf5:water: {field} .*shape.*expected"):
        list(read(path))


def test_corrupted_record_is_identified(tmp_path):
    """The file can be opened, but one of its data sets has a wrong checksum."""
    path = tmp_path / "a.hdf5"
    write(path, name="whole")
    write(path, name="z-broken", dft_total_energy=None)
    with h5py.File(path, "a") as file:
        data = file["z-broken"].create_dataset(
            "dft_total_energy", data=np.array([1.234, 5.678]), chunks=(2,), fletcher32=True
        )
        data.attrs["units"] = "hartree"
    stored, pattern = path.read_bytes(), np.array([1.234, 5.678]).tobytes()
    assert stored.count(pattern) == 1
    path.write_bytes(stored.replace(pattern, np.array([1.235, 5.678]).tobytes()))
    whole = []
    with pytest.raises(
        DatasetError, match=r"a\.hdf5:z-broken: the record cannot be read.*corrupted"
    ):
        for s in read(path):
            whole.append(s.source)
    assert whole == ["a.hdf5:whole"] * 2


def test_reading_is_lazy_and_leaves_the_file_closed(tmp_path):
    """A molecule is read when it is requested, not on opening the file or with the previous one."""
    path = tmp_path / "copy.hdf5"
    shutil.copy(GENUINE, path)
    with h5py.File(path, "r+") as file:
        first, second = list(file)[:2]
        count = len(file[first]["conformations"])
        del file[second]["atomic_numbers"]
    structures = read(path)
    for _ in range(count):
        assert next(structures).source.endswith(first)
    with pytest.raises(DatasetError, match=re.escape(second)):
        next(structures)
    structures = read(path)
    next(structures)
    structures.close()
    with h5py.File(path, "r+"):
        pass


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([8, 0, 1], "0 is not an atomic number; expected 1 to 118"),
        ([8, 306, 1], "306 is not an atomic number"),
        ([8, -1, 1], "-1 is not an atomic number"),
        ([8, 119, 1], "119 is not an atomic number"),
        ([[8], [1], [1]], r"atomic numbers have shape \(3, 1\)"),
        (8, r"atomic numbers have shape \(\)"),
    ],
)
def test_invalid_atomic_numbers_are_rejected(tmp_path, numbers, message):
    path = write(tmp_path / "a.hdf5", atomic_numbers=np.array(numbers, np.int16))
    with pytest.raises(DatasetError, match=f"a.hdf5:water: {message}"):
        list(read(path))


def test_all_elements_are_read(tmp_path):
    path = write(tmp_path / "a.hdf5", numbers=(1, 118), smiles="[H][Og]")
    assert [s.numbers.tolist() for s in read(path)] == [[1, 118]] * 2


@pytest.mark.parametrize("field", ["smiles", "subset"])
def test_invalid_texts_are_rejected(tmp_path, field):
    path = write(tmp_path / "a.hdf5", **{field: None})
    for count in (0, 2):
        with h5py.File(path, "a") as file:
            file["water"].pop(field, None)
            file["water"].create_dataset(field, (count,), h5py.string_dtype())
        with pytest.raises(
            DatasetError, match=rf"a.hdf5:water: {field} has shape \({count},\), expected one text"
        ):
            list(read(path))
    with h5py.File(path, "a") as file:
        del file["water"][field]
        file["water"][field] = np.array([b"\xff\xfe"])
    with pytest.raises(DatasetError, match=f"a.hdf5:water: {field} is not valid UTF-8"):
        list(read(path))


def test_impossible_sizes_are_rejected(tmp_path):
    path = write(tmp_path / "a.hdf5", conformations=None)
    with h5py.File(path, "a") as file:
        file["water"].create_dataset("conformations", (2**40, 3, 3), "f8", chunks=(1, 3, 3))
    with pytest.raises(DatasetError, match="a.hdf5:water/conformations: .* bytes of one array"):
        list(read(path))

"""Tests for the ANI reader: both layouts, levels, missing labels, sign of forces, invalid files."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import ani

GENUINE = Path(__file__).parents[2] / "data" / "readers" / "ani" / "ani1x_small.hdf5"
HARTREE = 27.211386245988
BOHR = 0.529177210903


def read(path, report=None, **options):
    with ani.Reader(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def ani1(path, mode="w", name="gdb11_s01/gdb11_s01-0", **changes):
    """Write a molecule in the layout of ANI-1. `changes` are fields; None omits a field."""
    rng = np.random.default_rng(0)
    fields = {
        "species": np.array([b"C", b"H", b"H", b"H", b"H"]),
        "coordinates": rng.normal(size=(3, 5, 3)),
        "energies": rng.normal(size=3) - 40.5,
        "smiles": np.array([c.encode() for c in "[H]C([H])([H])[H]"]),
        "coordinatesHE": rng.normal(size=(2, 5, 3)),
        "energiesHE": np.array([-39.5, -39.4]),
    } | changes
    with h5py.File(path, mode) as file:
        for field, value in fields.items():
            if value is not None:
                file[f"{name}/{field}"] = value
    return path


def ani1x(path, **changes):
    """Write a formula in the layout of ANI-1x."""
    fields = {
        "atomic_numbers": np.array([1, 1], np.uint8),
        "coordinates": np.zeros((2, 2, 3), np.float32),
        "wb97x_dz.energy": np.array([-1.1, -1.2]),
        "wb97x_dz.forces": np.zeros((2, 2, 3)),
    } | changes
    with h5py.File(path, "w") as file:
        for field, value in fields.items():
            if value is not None:
                file[f"H2/{field}"] = value
    return path


@pytest.mark.parametrize(
    ("level", "theory"), [("wb97x_dz", "ωB97X/6-31G(d)"), ("wb97x_tz", "ωB97X/def2-TZVPP")]
)
def test_equals_an_independent_parser(level, theory):
    report = ReadReport()
    structures = read(GENUINE, report, level=level)
    assert report.records == 3 and report.structures == len(structures) == 6 and not report.skipped
    with ani.Reader(GENUINE, level=level) as source:
        assert source.level_of_theory == theory
    with h5py.File(GENUINE) as file:
        expected = [
            (name, c, {k: v[()] for k, v in file[name].items()})
            for name in file
            for c in range(len(file[name]["coordinates"]))
        ]
    for s, (name, c, raw) in zip(structures, expected, strict=True):
        np.testing.assert_array_equal(s.numbers, raw["atomic_numbers"])
        np.testing.assert_array_equal(s.positions, raw["coordinates"][c].astype(float))
        assert s.energy == pytest.approx(raw[f"{level}.energy"][c] * HARTREE, rel=1e-7)
        np.testing.assert_allclose(
            s.forces, raw[f"{level}.forces"][c].astype(float) * HARTREE, rtol=1e-6
        )
        np.testing.assert_array_equal(
            s.properties["dipole"], raw[f"{level}.dipole"][c].astype(float)
        )
        assert (s.molecule, s.conformer, s.source) == (name, c, f"ani1x_small.hdf5:{name}")
        if level == "wb97x_tz":
            np.testing.assert_array_equal(
                s.atom_properties["mbis_charges"], raw["wb97x_tz.mbis_charges"][c]
            )


def test_forces_are_not_gradients():
    """Forces resemble those of another method, not their negative."""
    tblite = pytest.importorskip("tblite.interface")
    resemblance = []
    for s in read(GENUINE):
        calculator = tblite.Calculator("GFN2-xTB", s.numbers, s.positions / BOHR)
        calculator.set("verbosity", 0)
        forces = -np.array(calculator.singlepoint().get("gradient")) * HARTREE / BOHR
        resemblance.append((forces * s.forces).sum() / (forces**2).sum())
    assert 0.5 < np.median(resemblance) < 2.0  # a wrong unit would be at 0.5 / 0.529 or beyond


def test_sign_and_unit_of_forces(tmp_path):
    """Two atoms on a spring: dE = -F·dx to second order."""
    positions = np.zeros((2, 2, 3))
    positions[:, 1, 0] = 0.80, 0.81
    stretch = positions[:, 1, 0] - 0.74
    forces = np.zeros((2, 2, 3))
    forces[:, 1, 0], forces[:, 0, 0] = -stretch, stretch
    path = ani1x(
        tmp_path / "a.h5",
        coordinates=positions,
        **{"wb97x_dz.energy": 0.5 * stretch**2, "wb97x_dz.forces": forces},
    )
    a, b = read(path)
    work = (0.5 * (a.forces + b.forces) * (b.positions - a.positions)).sum()
    assert b.energy - a.energy == pytest.approx(-work, rel=1e-6) and b.energy > a.energy


def test_dipole_is_in_e_angstrom():
    """The MBIS charges give most of the dipole, which would be 5 times as large in debye."""
    ratios = []
    for s in read(GENUINE, level="wb97x_tz"):
        charges = s.atom_properties["mbis_charges"]
        of_charges = (charges - charges.mean()) @ s.positions
        ratios.append(np.linalg.norm(of_charges) / np.linalg.norm(s.properties["dipole"]))
    assert 0.7 < np.median(ratios) < 1.5


def test_charges_that_are_all_zero_become_nan():
    with h5py.File(GENUINE) as file:
        zero = [
            not row.any() for name in file for row in file[name]["wb97x_dz.hirshfeld_charges"][()]
        ]
    assert sum(zero) == 4
    for s, missing in zip(read(GENUINE), zero, strict=True):
        for name in ("hirshfeld_charges", "cm5_charges"):
            assert np.isnan(s.atom_properties[name]).all() == missing
            assert missing or s.atom_properties[name].sum() == pytest.approx(0, abs=1e-3)


def test_charges_of_one_element_can_be_zero(tmp_path):
    path = ani1x(tmp_path / "a.h5", **{"wb97x_dz.cm5_charges": np.zeros((2, 2))})
    first = read(path)[0]
    assert (first.atom_properties["cm5_charges"] == 0).all()
    assert np.isnan(first.atom_properties["hirshfeld_charges"]).all()
    assert np.isnan(first.properties["dipole"]).all()


def test_conformations_without_an_energy_are_skipped():
    report = ReadReport()
    actual = read(GENUINE, report, level="ccsd(t)_cbs")
    assert [(s.molecule, s.conformer) for s in actual] == [
        ("C1H4N4O4", 0),
        ("C1H4N4O4", 1),
        ("C1H6N2O5", 0),
        ("C2H10N4O3", 0),
    ]
    assert report.skipped == {"no ccsd(t)_cbs energy": 2} and report.structures == 4
    assert report.identities[0] == ("no ccsd(t)_cbs energy", "ani1x_small.hdf5:C1H6N2O5#1")
    assert all(s.forces is None and not s.properties for s in actual)
    kept = read(GENUINE, level="ccsd(t)_cbs", keep_unlabeled=True)
    assert [np.isnan(s.energy) for s in kept] == [False, False, False, True, True, False]


def test_option_names_of_earlier_versions_are_accepted():
    """A config with keep_unlabelled, the former name of keep_unlabeled, must not fail."""
    options = {"level": "ccsd(t)_cbs", "keep_unlabelled": True}
    with readers.open_data(GENUINE, "ani", **options) as source:
        assert len(list(source)) == 6


def test_missing_level_is_rejected():
    with pytest.raises(
        DatasetError, match=r"no energies of level 'b3lyp'; it has .*'ccsd\(t\)_cbs'.*'wb97x_dz'"
    ):
        ani.Reader(GENUINE, level="b3lyp")
    with ani.Reader(GENUINE, level="hf_dz") as source:
        assert source.level_of_theory == "hf_dz"


def test_ani1(tmp_path):
    path = ani1(tmp_path / "ani_gdb_s01.h5")
    ani1(
        path,
        "a",
        "gdb11_s01/gdb11_s01-1",
        species=np.array([b"O", b"H", b"H"]),
        smiles=None,
        coordinates=np.ones((1, 3, 3)),
        energies=np.array([-76.3]),
        coordinatesHE=None,
        energiesHE=None,
    )
    assert ani.Reader.matches(path)
    raw = h5py.File(path)["gdb11_s01/gdb11_s01-0"]
    actual = read(path)
    assert [(s.molecule, s.conformer, s.record) for s in actual] == [
        ("C", c, 0) for c in range(3)
    ] + [("gdb11_s01-1", 0, 1)]
    np.testing.assert_array_equal(actual[0].numbers, [6, 1, 1, 1, 1])
    np.testing.assert_allclose(
        [s.energy for s in actual[:3]], raw["energies"][()] * HARTREE, rtol=1e-7
    )
    np.testing.assert_array_equal(actual[2].positions, raw["coordinates"][2])
    assert actual[0].forces is None and actual[3].energy == pytest.approx(-76.3 * HARTREE)
    more = read(path, high_energy=True)
    assert [(s.conformer, s.subset) for s in more[:5]] == [
        (0, ""),
        (1, ""),
        (2, ""),
        (3, "high energy"),
        (4, "high energy"),
    ]
    assert more[3].energy == pytest.approx(-39.5 * HARTREE, rel=1e-7)
    with pytest.raises(DatasetError, match="no energies of level 'wb97x_tz'; it has 'wb97x_dz'"):
        ani.Reader(path, level="wb97x_tz")


def test_folder_of_files(tmp_path):
    for i in (1, 2):
        ani1(tmp_path / f"ani_gdb_s0{i}.h5", name=f"gdb11_s0{i}/gdb11_s0{i}-0")
    assert ani.Reader.matches(tmp_path)
    with ani.Reader(tmp_path) as source:
        assert len(source) == 2 and [f.name for f in source.files()] == [
            "ani_gdb_s01.h5",
            "ani_gdb_s02.h5",
        ]
        assert (
            next(source.read(range(1, 2), ReadReport())).source
            == "ani_gdb_s02.h5:gdb11_s02/gdb11_s02-0"
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty: contains no .h5"):
        ani.Reader(tmp_path / "empty")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("coordinates", np.zeros((2, 3, 3))),
        ("wb97x_dz.energy", np.zeros(3)),
        ("wb97x_dz.forces", np.zeros((2, 2, 2))),
    ],
)
def test_invalid_shapes_are_reported(tmp_path, field, value):
    with pytest.raises(DatasetError, match=f"a.h5:H2: {field} ha(s|ve) shape .*expected"):
        read(ani1x(tmp_path / "a.h5", **{field: value}))


def test_positions_that_are_not_finite_are_skipped_and_counted(tmp_path):
    positions = np.zeros((2, 2, 3))
    positions[0, 0, 0] = np.nan
    report = ReadReport()
    assert [s.conformer for s in read(ani1x(tmp_path / "a.h5", coordinates=positions), report)] == [
        1
    ]
    assert report.skipped == {"positions not finite": 1}


def test_other_layouts_are_rejected(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x/y"] = np.zeros(3)
    assert not ani.Reader.matches(tmp_path / "a.h5")
    with pytest.raises(DatasetError, match="a.h5: no group has 'coordinates'"):
        read(tmp_path / "a.h5")
    ani2x = ani1(tmp_path / "b.h5", species=np.ones((3, 5), int))
    assert not ani.Reader.matches(ani2x)
    with pytest.raises(
        DatasetError, match="b.h5:gdb11_s01/gdb11_s01-0: expected a list of 'atomic_numbers'"
    ):
        read(ani2x)
    with pytest.raises(DatasetError, match="Xx.*not the symbol of an element"):
        read(ani1(tmp_path / "c.h5", species=np.array([b"Xx", b"H", b"H", b"H", b"H"])))


@pytest.mark.parametrize("keep", [0, 100, 9000, 20_000])
def test_truncated_file_is_rejected(tmp_path, keep):
    path = tmp_path / "cut.h5"
    path.write_bytes(GENUINE.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"cut\.h5.*(truncated|corrupted)"):
        read(path)


def test_files_are_closed(tmp_path):
    path = shutil.copy(GENUINE, tmp_path)
    read(path)
    with pytest.raises(DatasetError, match="no energies"):
        ani.Reader(path, level="nothing")
    with h5py.File(path, "r+"):
        pass


def test_forces_of_some_groups_only(tmp_path):
    path = ani1x(tmp_path / "a.h5", **{"wb97x_dz.forces": None})
    with h5py.File(path, "a") as file:
        for field, value in {
            "atomic_numbers": np.array([8, 1], np.uint8),
            "coordinates": np.ones((1, 2, 3)),
            "wb97x_dz.energy": np.array([-75.0]),
            "wb97x_dz.forces": np.full((1, 2, 3), 0.5),
        }.items():
            file[f"OH/{field}"] = value
    actual = read(path)
    assert [s.molecule for s in actual] == ["H2", "H2", "OH"] and actual[0].forces is actual[
        1
    ].forces is None
    np.testing.assert_allclose(actual[2].forces, 0.5 * 27.211386245988, rtol=1e-8)


@pytest.mark.parametrize("number", [0, 119])
def test_invalid_atomic_numbers_are_rejected(tmp_path, number):
    path = ani1x(tmp_path / "a.h5", atomic_numbers=np.array([1, number], np.uint8))
    with pytest.raises(DatasetError, match=f"a.h5:H2: {number} is not an atomic number"):
        read(path)
    with pytest.raises(DatasetError, match="b.h5:gdb11_s01/gdb11_s01-0: 0 is not an atomic number"):
        read(ani1(tmp_path / "b.h5", species=np.array([b"C", b"X", b"H", b"H", b"H"])))


@pytest.mark.parametrize(
    "options",
    [{"level": 5}, {"keep_unlabeled": "no"}, {"keep_unlabeled": 1}, {"high_energy": None}],
)
def test_options_of_the_wrong_type_are_rejected(options):
    with pytest.raises(
        ConfigError, match=f"reader option {next(iter(options))} must be .*received"
    ):
        ani.Reader(GENUINE, **options)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, HARTREE),
        ({"forces_unit": "hartree/bohr"}, HARTREE / BOHR),
        ({"forces_are_gradients": True}, -HARTREE),
    ],
)
def test_forces_that_others_add_to_ani_1(tmp_path, options, factor):
    """Files with `forces` used to be read without them, and without a word."""
    raw = np.arange(45.0).reshape(3, 5, 3)
    path = ani1(tmp_path / "a.h5", forces=raw, forcesHE=2 * raw[:2])
    structures = read(path, high_energy=True, **options)
    np.testing.assert_allclose(structures[1].forces, raw[1] * factor, rtol=1e-7)
    np.testing.assert_allclose(structures[4].forces, 2 * raw[1] * factor, rtol=1e-7)


def test_other_names_of_forces(tmp_path):
    path = ani1(tmp_path / "a.h5", force=np.ones((3, 5, 3)), stress=np.ones((3, 6)))
    report = ReadReport()
    assert read(path, report)[0].forces is None and report.unread == {"force": 1, "stress": 1}
    assert read(path, forces_key="force")[0].forces[0, 0] == pytest.approx(HARTREE)
    with pytest.raises(DatasetError, match="no group has 'forcs'.*forces_key"):
        read(path, forces_key="forcs")


def test_a_level_may_be_missing_in_the_first_group(tmp_path):
    """The first group used to decide for the file."""
    path = ani1x(tmp_path / "a.h5", **{"wb97x_dz.energy": None, "wb97x_tz.energy": np.zeros(2)})
    with h5py.File(path, "a") as file:
        file.copy("H2", "H2b")
        file["H2b/wb97x_dz.energy"] = np.array([-1.1, -1.2])
    assert len(read(path)) == 2


def test_invalid_bytes_of_a_record_name_it(tmp_path):
    path = ani1(tmp_path / "a.h5", energies=np.array([b"x", b"y", b"z"]))
    with pytest.raises(DatasetError, match="a.h5:gdb11_s01/gdb11_s01-0: the record cannot be read"):
        read(path)


def test_charges_of_ions_are_those_of_their_smiles(tmp_path):
    """Ions in the layout of ANI-1 used to be neutral."""
    smiles = np.array([c.encode() for c in "[H][C-]([H])[H]"])
    path = ani1(
        tmp_path / "a.h5",
        species=np.array([b"C", b"H", b"H", b"H"]),
        coordinates=np.random.default_rng(0).normal(size=(3, 4, 3)),
        smiles=smiles,
    )
    assert [s.charge for s in read(path)] == [-1, -1, -1]

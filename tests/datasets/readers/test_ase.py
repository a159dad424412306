"""Tests for the general reader: keys and units of extended XYZ, databases and formats of ASE."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.io import write
from ase.io.trajectory import Trajectory

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.formats import ase_frames
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import ase as ase_reader
from mlip_jax.datasets.store.conversion import ConversionSpec, convert
from mlip_jax.datasets.store.store import Store

HARTREE, BOHR, KCAL_PER_MOL = 27.211386245988, 0.529177210903, 0.0433641153087705


def read(path, records=None, report=None, **options):
    with ase_reader.Reader(path, **options) as source:
        return list(
            source.read(range(len(source)) if records is None else records, report or ReadReport())
        )


@pytest.fixture
def frames(sample, tmp_path):
    """Return a copy of the sample that tests can change."""
    path = tmp_path / "frames.xyz"
    path.write_bytes(sample("ase")[0].read_bytes())
    return path


def change(path, old, new, count=-1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))
    return path


def images():
    """Five molecules, one of them periodic, with calculator results and other labels."""
    rng = np.random.default_rng(0)
    for i in range(5):
        n = i + 2
        positions = np.stack([1.1 * np.arange(n), np.zeros(n), 0.1 * rng.normal(size=n)], 1)
        atoms = Atoms(rng.integers(1, 10, n), positions, cell=np.diag([9.0, 8.0, 7.0]), pbc=i == 3)
        atoms.info["dft_energy"] = float(rng.normal())
        atoms.arrays["dft_forces"] = rng.normal(size=(n, 3))
        atoms.calc = SinglePointCalculator(
            atoms,
            energy=float(rng.normal()),
            forces=rng.normal(size=(n, 3)),
            dipole=rng.normal(size=3),
        )
        yield atoms


def store(kind, folder):
    path = folder / f"a.{kind}"
    if kind == "traj":
        with Trajectory(path, "w") as trajectory:
            for atoms in images():
                trajectory.write(atoms)
    elif kind == "db":
        with connect(path) as database:
            for atoms in images():
                database.write(
                    atoms,
                    data={
                        "dft_energy": atoms.info["dft_energy"],
                        "dft_forces": atoms.arrays["dft_forces"],
                    },
                )
    else:
        write(path, list(images()), format={"xyz": "extxyz", "json": "json"}.get(kind))
    return path


def test_equals_an_independent_parser(frames):
    """The text of the file is parsed by hand."""
    lines = frames.read_text().splitlines()
    report, at = ReadReport(), 0
    structures = read(frames, report=report)
    for record, s in enumerate(structures):
        n, comment = int(lines[at]), lines[at + 1]
        cells = [line.split() for line in lines[at + 2 : at + 2 + n]]
        at += n + 2
        np.testing.assert_array_equal(s.positions, [[float(x) for x in c[1:4]] for c in cells])
        np.testing.assert_array_equal(s.forces, [[float(x) for x in c[4:7]] for c in cells])
        assert s.source == f"frames.xyz:{record}" and s.record == record and s.conformer == 0
        np.testing.assert_equal(
            s.energy,
            float(comment.split("energy=")[1].split()[0]) if "energy=" in comment else np.nan,
        )
    assert at == len(lines) and len(structures) == report.structures == report.records == 4
    assert [s.numbers.tolist() for s in structures[2:]] == [[7, 1, 1, 1], [11, 17]]
    assert [s.charge for s in structures] == [0, 0, 1, 0]
    assert [s.smiles for s in structures] == ["O", "O", "[NH4+]", ""]
    assert [s.molecule for s in structures] == ["O", "O", "[NH4+]", "ClNa"]
    assert [s.subset for s in structures] == ["", "", "", "salt"]
    assert structures[0].cell is None and structures[0].pbc is None
    np.testing.assert_array_equal(structures[3].cell, 4.2 * np.eye(3))
    assert structures[3].pbc.tolist() == [True] * 3


@pytest.mark.parametrize(
    ("energy_unit", "length_unit", "forces_unit", "energy", "length", "force"),
    [
        ("eV", "Ang", "", 1, 1, 1),
        ("hartree", "bohr", "", HARTREE, BOHR, HARTREE / BOHR),
        ("Ha", "Ang", "hartree/bohr", HARTREE, 1, HARTREE / BOHR),
        ("kcal/mol", "Ang", "", KCAL_PER_MOL, 1, KCAL_PER_MOL),
        ("kJ/mol", "nm", "kcal/mol/Ang", KCAL_PER_MOL / 4.184, 10, KCAL_PER_MOL),
        ("meV", "angstrom", "eV/nm", 1e-3, 1, 0.1),
        ("Rydberg", "Bohr", "Ry/bohr", HARTREE / 2, BOHR, HARTREE / 2 / BOHR),
    ],
)
def test_units(frames, energy_unit, length_unit, forces_unit, energy, length, force):
    options = {"energy_unit": energy_unit, "length_unit": length_unit, "forces_unit": forces_unit}
    for a, b in zip(read(frames, **options), read(frames), strict=True):
        assert a.energy == pytest.approx(b.energy * energy, rel=1e-6, nan_ok=True)
        np.testing.assert_allclose(a.positions, b.positions * length, rtol=1e-6)
        np.testing.assert_allclose(a.forces, b.forces * force, rtol=1e-6)
        if b.cell is not None:
            np.testing.assert_allclose(a.cell, b.cell * length, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"energy_unit": "kcal"},
        {"length_unit": "m"},
        {"forces_unit": "hartree"},
        {"forces_unit": "__import__('os')/bohr"},
        {"format": "extxy"},
    ],
)
def test_unknown_units_and_formats_are_rejected(frames, options):
    with pytest.raises(ConfigError, match="(kcal|'m'|''|__import__|extxy)"):
        ase_reader.Reader(frames, **options)


def test_gradients(tmp_path):
    """A spring: with the stated sign, ΔE is minus force times displacement."""
    k, lines = 3.0, []
    for x in (1.1, 1.2):
        gradient = k * (x - 1.0)
        lines += [
            "2",
            f"Properties=species:S:1:pos:R:3:grad:R:3 energy={0.5 * gradient**2 / k}",
            f"H 0 0 0 {-gradient} 0 0",
            f"H {x} 0 0 {gradient} 0 0",
        ]
    path = tmp_path / "spring.xyz"
    path.write_text("\n".join(lines))
    first, second = read(path, forces_key="grad", forces_are_gradients=True)
    work = (0.5 * (first.forces + second.forces) * (second.positions - first.positions)).sum()
    assert second.energy - first.energy == pytest.approx(-work, rel=1e-9)
    assert second.forces[1, 0] == pytest.approx(-0.6)  # a stretched spring pulls back
    assert read(path, forces_key="grad")[1].forces[1, 0] == pytest.approx(0.6)


@pytest.mark.parametrize("kind", ["xyz", "db", "traj", "json"])
def test_kinds_of_files(kind, tmp_path):
    """Each kind of file has the same structures, calculator results and other labels."""
    path = store(kind, tmp_path)
    for s, atoms in zip(read(path), images(), strict=True):
        np.testing.assert_array_equal(s.numbers, atoms.numbers)
        np.testing.assert_allclose(s.positions, atoms.positions, atol=1e-7)
        assert s.energy == pytest.approx(atoms.calc.results["energy"], rel=1e-6)
        np.testing.assert_allclose(s.forces, atoms.calc.results["forces"], atol=1e-7)
        assert (s.cell is not None) == atoms.pbc.any()
        assert s.positions.dtype == s.forces.dtype == np.float64
    with ase_reader.Reader(path) as source:
        assert source.sequential == (kind == "json")
        (one,) = source.read(range(3, 4), ReadReport())
        two = [s.record for s in source.read(range(1, 3), ReadReport())]
    assert one.source == f"a.{kind}:3" and one.pbc.all() and two == [1, 2]
    dipoles = [s.properties["dipole"] for s in read(path, property_keys=("dipole",))]
    np.testing.assert_allclose(dipoles, [a.calc.results["dipole"] for a in images()], atol=1e-7)


@pytest.mark.parametrize("kind", ["xyz", "db"])
def test_other_keys(kind, tmp_path):
    path = store(kind, tmp_path)
    for s, atoms in zip(
        read(path, energy_key="dft_energy", forces_key="dft_forces"), images(), strict=True
    ):
        assert s.energy == pytest.approx(atoms.info["dft_energy"])
        np.testing.assert_allclose(s.forces, atoms.arrays["dft_forces"], atol=1e-7)


def test_sequential_reading_continues(tmp_path, monkeypatch):
    path = store("json", tmp_path)
    opened = []
    with ase_reader.Reader(path) as source:
        original = ase_frames.read_frames
        monkeypatch.setattr(
            ase_frames, "read_frames", lambda *args: opened.append(1) or original(*args)
        )
        parts = [
            s.record
            for r in (range(0, 2), range(2, 3), range(4, 5))
            for s in source.read(r, ReadReport())
        ]
        assert (
            parts == [0, 1, 2, 4] and len(opened) == 1
        )  # once, as the labels were looked up at the start before
        assert [s.record for s in source.read(range(1), ReadReport())] == [0] and len(opened) == 2


def test_missing_key_is_reported(frames):
    change(frames, " energy=", " dft_energy=")
    with pytest.raises(
        DatasetError, match="'energy' is in none of the 4 frames; found .*dft_energy.*_key"
    ):
        ase_reader.Reader(frames)
    assert read(frames, energy_key="dft_energy")[0].energy == -2078.25
    assert np.isnan(read(frames, energy_key="")[0].energy)
    for option in (
        "forces_key",
        "charge_key",
        "molecule_key",
        "smiles_key",
        "property_keys",
        "atom_property_keys",
    ):
        with pytest.raises(DatasetError, match=f"'nowhere' is in none.*{option}"):
            ase_reader.Reader(frames, **{"energy_key": ""} | {option: "nowhere"})


def test_forces_under_another_name_are_reported(frames):
    change(frames, "forces:R:3", "DFT_Forces:R:3")
    with pytest.raises(
        DatasetError, match=r"'forces' is missing, but DFT_Forces.*forces_key=DFT_F"
    ):
        ase_reader.Reader(frames)
    np.testing.assert_array_equal(read(frames, forces_key="DFT_Forces")[0].forces[0], [0, 0, -0.4])
    assert read(frames, forces_key="")[0].forces is None


def test_file_without_forces(frames):
    change(frames, "forces:R:3", "v:R:3")
    report = ReadReport()
    structures = read(frames, report=report)
    assert np.isnan(structures[0].forces).all() and structures[0].forces.shape == (3, 3)
    assert structures[0].energy == -2078.25 and report.unread["v"] == 4


def test_further_labels(frames):
    structures = read(frames, property_keys=("mu",), atom_property_keys=("q",))
    assert [s.properties["mu"] for s in structures[:3]] == [0.38, 0.40, 0.10]
    assert np.isnan(structures[3].properties["mu"]) and isinstance(
        structures[0].properties["mu"], float
    )
    np.testing.assert_array_equal(structures[0].atom_properties["q"], [-0.8, 0.4, 0.4])
    assert read(frames, property_keys="mu")[0].properties == {"mu": 0.38}


def test_molecules(frames):
    assert [s.molecule for s in read(frames, molecule_key="charge")] == ["0", "0", "1", "0"]
    assert [s.molecule for s in read(frames, smiles_key="")] == ["H2O", "H2O", "H3N", "ClNa"]
    with pytest.raises(
        DatasetError, match="frames.xyz:3: has no 'smiles' to identify its molecule"
    ):
        read(frames, molecule_key="smiles")


def test_level_of_theory_is_an_option(frames):
    with (
        ase_reader.Reader(frames) as a,
        ase_reader.Reader(frames, level_of_theory="PBE/def2-SVP") as b,
    ):
        assert (a.level_of_theory, b.level_of_theory) == ("unknown", "PBE/def2-SVP")


def test_conflicting_labels_are_rejected(tmp_path):
    atoms = next(images())
    with connect(tmp_path / "a.db") as database:
        database.write(atoms, data={"forces": atoms.calc.results["forces"]})
        database.write(atoms, data={"forces": atoms.calc.results["forces"] + 1})
    with pytest.raises(DatasetError, match=r"a\.db:1: 'forces' occurs twice with different values"):
        read(tmp_path / "a.db")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("energy=-2078.50", "energy=low", "'energy' is not numeric"),
        (
            "pos:R:3:forces:R:3:q:R:1 energy=-2078.50",
            "pos:R:3:forces:R:2:q:R:2 energy=-2078.50",
            "",
        ),
        ("O 0.000 0.000 0.129", "O 0.000 zero 0.129", "cannot be read"),
        ("O 0.000 0.000 0.129", "X 0.000 0.000 0.129", "0 is not an atomic number.*dummy atoms"),
        ("O 0.000 0.000 0.129 0.00", "O 0.000 0.000 0.129", "cannot be read"),
    ],
)
def test_corrupted_frames_are_identified(frames, old, new, message):
    change(frames, old, new)
    with pytest.raises(DatasetError, match=f"frames.xyz:1: .*{message}"):
        read(frames)


def test_positions_that_are_not_finite_and_frames_without_atoms(frames):
    change(frames, "O 0.000 0.000 0.129", "O 0.000 nan 0.129")
    report = ReadReport()
    assert [s.record for s in read(frames, report=report)] == [0, 2, 3]
    assert report.records == 4 and report.identities == [("positions not finite", "frames.xyz:1")]


@pytest.mark.parametrize("lines", [1, 2, 4, 7, 12, 18])
def test_truncated_xyz(frames, lines):
    frames.write_text("".join(frames.read_text().splitlines(keepends=True)[:lines]))
    with pytest.raises(DatasetError, match=r"frames\.xyz: frame \d.*states \d atoms.*truncated"):
        read(frames)


def test_shifted_xyz(frames):
    change(frames, "3\n", "2\n", 1)
    with pytest.raises(
        DatasetError, match=r"line 5: expected the number of atoms of frame 1, found b'H 0"
    ):
        read(frames)


def test_empty_lines_at_the_end(frames):
    frames.write_text(frames.read_text() + "\n  \n")
    assert len(read(frames)) == 4


@pytest.mark.parametrize("keep", [0, 30, 200, -40])
def test_truncated_trajectory(tmp_path, keep):
    path = store("traj", tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"a\.traj"):
        read(path)


def test_truncated_database(tmp_path):
    path = store("db", tmp_path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DatasetError, match=r"a\.db: is truncated"):
        read(path)


def test_pickles_are_not_read(frames, tmp_path):
    with pytest.raises(DatasetError, match="pickles"):
        ase_reader.Reader(frames, format="bundletrajectory")
    with pytest.raises(DatasetError, match="expected a file, found a folder"):
        ase_reader.Reader(tmp_path)


def test_formats_by_name(tmp_path):
    """Plain XYZ with an arbitrary comment, and a format that must be specified."""
    path = tmp_path / "plain.txt"
    path.write_text('2\nhydrogen = 5 apples, "quoted\nH 0 0 0\nH 0 0 0.74\n')
    (s,) = read(path, format="xyz", energy_key="")
    assert s.positions[1].tolist() == [0, 0, 0.74] and s.molecule == "H2" and np.isnan(s.energy)
    cell = tmp_path / "cell"
    write(cell, Atoms("NaCl", [[0, 0, 0], [2.4, 0, 0]], cell=[5, 5, 5], pbc=True), format="vasp")
    (s,) = read(cell, format="vasp", energy_key="")
    assert s.pbc.all() and sorted(s.numbers.tolist()) == [11, 17]
    with pytest.raises(
        DatasetError, match='ASE does not recognize the format.*reader_options="format=NAME"'
    ):
        ase_reader.Reader(cell)
    with pytest.raises(DatasetError, match="cannot be read as 'cif'"):
        ase_reader.Reader(cell, format="cif")


@pytest.mark.parametrize(
    "content",
    [
        b"a,b\n1,2\n",
        b"3\n1,2,3\n",
        b"12\n13\n14\n",
        b"3\n\nO 0 0 0\nH 0 0 1\n",
        b"<html></html>",
        b"2\n\nH a b c\nH d e f\n",
        b"0\n\n",
        b"-1\n\n",
        b"PK\x03\x04" * 20,
        b"\x89HDF\r\n\x1a\n" * 20,
    ],
)
def test_other_files_are_not_detected(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    assert not ase_reader.Reader.matches(path) and not ase_reader.Reader.matches(tmp_path)


@pytest.mark.parametrize("kind", ["xyz", "db", "traj"])
def test_files_are_detected_by_content(kind, tmp_path):
    path = store(kind, tmp_path).rename(tmp_path / "noending")
    assert readers.detect(path) == "ase"
    assert len(read(path)) == 5


def test_specific_readers_take_precedence(sample):
    path, _ = sample("nabladft")
    assert ase_reader.Reader.matches(path) and readers.detect(path) == "nabladft"


def charged(charges, **info):
    atoms = Atoms("OH2", [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]], charges=charges)
    atoms.info |= {"energy": -2078.0} | info
    return atoms


@pytest.mark.parametrize("kind", ["xyz", "traj", "db"])
def test_total_charges(tmp_path, kind):
    """Partial charges are not a total charge. Integer ones are, if nothing better is known."""
    path = tmp_path / f"a.{kind}"
    partial = [-0.8, 0.4, 0.1]
    images = [
        charged([-0.8, 0.4, 0.4 - 1e-5]),
        charged([-1, 0, 0.0]),
        charged(partial),
        charged(partial, charge=-1),
        charged(partial, smiles="[OH3+]"),
        charged([0, 0, 1.0], charge=2, smiles="O"),
    ]
    if kind == "db":
        with connect(path) as database:
            for atoms in images:
                database.write(
                    atoms,
                    key_value_pairs={"total": atoms.info["energy"]}
                    | ({"smiles": atoms.info["smiles"]} if "smiles" in atoms.info else {}),
                    data={k: v for k, v in atoms.info.items() if k == "charge"},
                )
        options = {"energy_key": "total"}
    else:
        write(path, images, format={"xyz": "extxyz"}.get(kind))
        options = {}
    report = ReadReport()
    assert [s.charge for s in read(path, report=report, **options)] == [0, -1, 0, -1, 1, 2]
    (note,) = report.remarks
    assert f"a.{kind}: the initial charges of the atoms do not add up to an integer" in note
    assert 'reader_options="charge_key=NAME"' in note


def test_integer_charges_need_no_note(tmp_path, frames):
    write(
        tmp_path / "a.xyz",
        [charged([-1, 0, 0.0]), charged([0.1, 0.1, 0.1], charge=0)],
        format="extxyz",
    )
    for path in (tmp_path / "a.xyz", frames):
        report = ReadReport()
        read(path, report=report)
        assert not report.remarks


def test_invalid_element_is_rejected(frames):
    change(
        frames,
        "Properties=species:S:1:pos:R:3:forces:R:3:q:R:1 energy=-2078.50",
        "Properties=Z:I:1:pos:R:3:forces:R:3:q:R:1 energy=-2078.50",
    )
    change(frames, "O 0.000 0.000 0.129", "200 0.000 0.000 0.129")
    change(frames, "H 0.000 0.783", "1 0.000 0.783")
    change(frames, "H 0.000 -0.783", "1 0.000 -0.783")
    with pytest.raises(DatasetError, match="frames.xyz:1: 200 is not an atomic number"):
        read(frames)


@pytest.mark.parametrize(
    "options",
    [
        {"energy_key": 5},
        {"charge_key": None},
        {"property_keys": 3},
        {"atom_property_keys": ("q", 1)},
        {"energy_unit": 1},
        {"length_unit": None},
        {"forces_unit": 2},
        {"forces_are_gradients": "no"},
        {"format": 1},
        {"level_of_theory": 2},
    ],
)
def test_options_of_the_wrong_type_are_rejected(frames, options):
    with pytest.raises(
        ConfigError, match=f"reader option {next(iter(options))} must be .*received"
    ):
        ase_reader.Reader(frames, **options)


def test_messages_show_options_as_on_the_command_line(frames):
    with pytest.raises(
        DatasetError,
        match='--config.data.reader_options="energy_key=NAME", or none, '
        "--config.data.reader_options=\"energy_key=''\"",
    ):
        ase_reader.Reader(frames, energy_key="nowhere")


def test_isolated_atoms_may_precede_the_labels(tmp_path):
    """The first ten frames used to decide whether the file has the requested forces."""
    atom = "1\nProperties=species:S:1:pos:R:3 REF_energy=-13.6 pbc='F F F'\nH 0 0 0\n"
    pair = (
        "2\nProperties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=-31 mu=0.5 pbc='F F F'\n"
        "H 0 0 0 0 0 1\nH 0 0 0.7 0 0 -1\n"
    )
    path = tmp_path / "a.xyz"
    path.write_text((12 * atom + pair).replace("'", '"'))
    options = {"energy_key": "REF_energy", "forces_key": "REF_forces", "property_keys": "mu"}
    structures = read(path, **options)
    assert structures[12].forces[0, 2] == 1 and structures[12].properties["mu"] == 0.5
    assert np.isnan(structures[0].forces).all()
    with pytest.raises(DatasetError, match="a.xyz:12: 'forces' is missing, but REF_forces"):
        read(path, energy_key="REF_energy")


@pytest.mark.parametrize(
    "comment, energy",
    [
        ("        -5.25", -5.25),  # CREST
        ("  -5.25 !CONF2", -5.25),
        (" energy: -5.25 gnorm: 0.0003 xtb: 6.7.1 (edcfbbe)", -5.25),
        ("Coordinates from ORCA-job water E -5.25", -5.25),
        ("frame 3, 1.5 ps", None),
        ("2.5", None),  # a time, for instance
    ],
)
def test_energies_without_a_name_in_the_comment_line(tmp_path, comment, energy):
    path = tmp_path / "crest_conformers.xyz"
    path.write_text(2 * f"2\n{comment}\nH 0 0 0\nH 0 0 0.74\n")
    if energy is None:
        with pytest.raises(DatasetError, match="'energy' is in none"):
            ase_reader.Reader(path)
        return
    report = ReadReport()
    assert [s.energy for s in read(path, report=report)] == pytest.approx([energy * HARTREE] * 2)
    assert "comment line" in next(iter(report.remarks)) and not report.unread
    assert read(path, energy_unit="eV")[0].energy == energy


def test_compressed_files_and_byte_order_marks(frames, tmp_path):
    import gzip

    for path, content in (
        (tmp_path / "a.xyz.gz", gzip.compress(frames.read_bytes())),
        (tmp_path / "b.xyz", b"\xef\xbb\xbf" + frames.read_bytes()),
    ):
        path.write_bytes(content)
        assert readers.detect(path) == "ase"
        assert [s.energy for s in read(path)][:3] == [s.energy for s in read(frames)][:3]
        assert read(path, records=range(2, 3))[0].charge == 1
    (tmp_path / "c.xyz.gz").write_bytes(gzip.compress(frames.read_bytes())[:-20])
    with pytest.raises(DatasetError, match="truncated"):
        ase_reader.Reader(tmp_path / "c.xyz.gz")


def test_symbols_of_isotopes_atomic_numbers_and_numbered_atoms(tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(
        "4\nProperties=pos:R:3:species:S:1 energy=1\n0 0 0 6\n1 0 0 D\n0 1 0 C0\n0 0 1 T\n"
        "2\nenergy=2\n8 0 0 0\nH1 0 0 1\n"
    )
    report = ReadReport()
    first, second = read(path, report=report)
    assert first.numbers.tolist() == [6, 1, 6, 1] and second.numbers.tolist() == [8, 1]
    assert report.unread == {"masses": 1}


def test_invalid_cells_are_skipped(tmp_path):
    lattices = {
        "4 0 0 0 4 0 4 4 0": "parallel or coplanar lattice vectors",
        "4 0 0 0 nan 0 0 0 4": "cell not finite",
        "4 0 0 0 4 0 0 0 4": None,
    }
    path = tmp_path / "a.xyz"
    path.write_text(
        "".join(
            f'1\nLattice="{lattice}" energy=1 pbc="T T T" Properties=species:S:1:pos:R:3\nH 0 0 0\n'
            for lattice in lattices
        )
    )
    report = ReadReport()
    assert len(read(path, report=report)) == 1
    assert list(report.skipped) == [reason for reason in lattices.values() if reason]


def test_placeholder_cells_of_pdb_files_are_removed(tmp_path):
    path = tmp_path / "a.pdb"
    path.write_text(
        "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
        "HETATM    1  H   LIG A   1       0.000   0.000   0.000  1.00  0.00           H\n"
        "HETATM    2  H   LIG A   1       0.000   0.000   0.740  1.00  0.00           H\nEND\n"
    )
    (structure,) = read(path, energy_key="")
    assert structure.cell is None and len(structure) == 2


def test_charges_under_other_names(tmp_path):
    path = tmp_path / "a.xyz"
    rows = "N 0 0 0\nH 0 0 1.0\n"
    path.write_text(f"2\nenergy=1 total_charge=1\n{rows}2\nenergy=1 Charge=-1\n{rows}")
    report = ReadReport()
    assert [s.charge for s in read(path, report=report)] == [1, -1] and not report.unread
    path.write_text(f"2\nenergy=1 charge=T\n{rows}")
    with pytest.raises(DatasetError, match="a.xyz:0: 'charge' is .*True.*, expected a number"):
        read(path)


def test_spins_are_read_and_stored(tmp_path):
    """A multiplicity used to be ignored. Half of a store may have no spin."""
    path = tmp_path / "a.xyz"
    rows = "C 0 0 0\nH 1.1 0 0\nH 0 1.1 0\nH 0 0 1.1\n"
    path.write_text(f"4\nenergy=-1 multiplicity=2\n{rows}4\nenergy=-1 charge=1\n{rows}")
    assert [s.spin for s in read(path)] == [1, 0]
    assert [s.spin for s in read(path, spin_key="")] == [0, 0]
    spec = ConversionSpec(str(path), atoms_per_shard=4)
    store = Store(convert(spec, tmp_path / "store", num_processes=1, progress=False))
    for labels_only in (False, True):
        assert store.take(np.array([1, 0]), labels_only=labels_only).spin.tolist() == [0, 1]
        assert store.take(np.array([1]), labels_only=labels_only).spin.tolist() == [0]
    path.write_text(f"4\nenergy=-1 multiplicity=1\n{rows}")
    with pytest.raises(DatasetError, match="a.xyz:0: 'multiplicity' is 1, .* 9 electrons"):
        read(path)

"""Tests for the GEOM reader: units, the three kinds of files, and invalid files."""

import builtins
import gzip
import importlib.util
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import msgpack
import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import readers
from mlip_jax.datasets.formats import geom_files
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import geom

Chem = pytest.importorskip("rdkit.Chem")
pytest.importorskip("rdkit.Chem.AllChem")

HARTREE = 27.211386245988
KCAL_PER_MOL = 0.0433641153087705


def _sample_module():
    spec = importlib.util.spec_from_file_location(
        "geom_sample", Path(__file__).parent / "samples" / "geom.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE = _sample_module()
NEEDED = {("numpy.core.multiarray", "scalar"), ("numpy", "dtype"), ("rdkit.Chem.rdchem", "Mol")}


class Independent(pickle.Unpickler):
    def find_class(self, module, name):
        assert (module, name) in NEEDED
        return super().find_class(module, name)


def read(path, report=None, **options):
    with geom.Reader(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def crude(count=3, charge=0, shift=0.0, **changes):
    """Return a water molecule in the layout of the crude files."""
    return {
        "totalconfs": 5,
        "uniqueconfs": count,
        "temperature": 298.15,
        "lowestenergy": -5.07,
        "ensembleenergy": 0.2,
        "ensembleentropy": 1.5,
        "ensemblefreeenergy": -0.4,
        "charge": charge,
        "datasets": ["plpro"],
        "conformers": [
            {
                "xyz": [
                    [8.0, 0.0, 0.0, shift + c],
                    [1.0, 0.96, 0.0, 0.1 + c],
                    [1.0, -0.24, 0.93, c],
                ],
                "geom_id": c,
                "set": 1,
                "degeneracy": 2,
                "totalenergy": -5.07 + 0.001 * c,
                "relativeenergy": 0.001 * c * HARTREE / KCAL_PER_MOL,
                "boltzmannweight": 0.5,
                "conformerweights": [0.25, 0.25],
            }
            for c in range(count)
        ],
    } | changes


def write_msgpack(path, *chunks):
    path.write_bytes(b"".join(msgpack.packb(chunk) for chunk in chunks))
    return path


def write_pickle(path, **changes):
    path.write_bytes(pickle.dumps(SAMPLE.small_molecule() | changes, 3))
    return path


def test_equals_an_independent_parser(sample):
    report = ReadReport()
    actual = read(sample("geom")[0], report)
    expected = []
    for record, path in enumerate(sorted(SAMPLE.DATA.glob("*.pickle"))):
        with open(path, "rb") as file:
            molecule = Independent(file).load()
        expected += [(record, c, molecule, raw) for c, raw in enumerate(molecule["conformers"])]
    assert len(expected) == 24 + 54 and len(actual) == len(expected) + 4
    assert (report.records, report.structures, report.skipped) == (3, 82, {})
    for s, (record, c, molecule, raw) in zip(actual, expected):
        assert (s.record, s.conformer, s.subset, s.charge) == (
            record,
            c,
            "drugs",
            molecule["charge"],
        )
        assert s.molecule == s.smiles == molecule["smiles"]
        assert s.energy == pytest.approx(raw["totalenergy"] * HARTREE, rel=1e-6)
        assert s.forces is None
        assert s.properties["energy_relative"] == pytest.approx(
            raw["relativeenergy"] * KCAL_PER_MOL, rel=1e-6
        )
        assert s.properties["boltzmann_weight"] == pytest.approx(float(raw["boltzmannweight"]))
        assert s.properties["degeneracy"] == raw["degeneracy"]
        assert s.numbers.tolist() == [a.GetAtomicNum() for a in raw["rd_mol"].GetAtoms()]
        np.testing.assert_allclose(
            s.positions, raw["rd_mol"].GetConformer().GetPositions(), atol=1e-6
        )
        # The lengths of the bonds to hydrogen are those of Å.
        hydrogen = next(a for a in raw["rd_mol"].GetAtoms() if a.GetAtomicNum() == 1)
        bonded = hydrogen.GetNeighbors()[0].GetIdx()
        assert 0.9 < np.linalg.norm(s.positions[hydrogen.GetIdx()] - s.positions[bonded]) < 1.2


def test_relative_energies_match_the_total_energies(sample):
    actual = read(sample("geom")[0])
    for record in range(3):
        energies = np.array([s.energy for s in actual if s.record == record])
        relative = np.array([s.properties["energy_relative"] for s in actual if s.record == record])
        assert np.ptp(energies) > 0.05
        np.testing.assert_allclose(energies - energies.min(), relative, atol=1e-5)


def test_properties_of_the_ensemble(sample):
    actual = read(sample("geom")[0])
    assert len({tuple(s.properties) for s in actual}) == 1
    small = actual[-1].properties
    assert small["ensemble_energy"] == pytest.approx(0.5 * KCAL_PER_MOL, rel=1e-6)
    assert small["ensemble_free_energy"] == pytest.approx(-0.6 * KCAL_PER_MOL, rel=1e-6)
    assert small["ensemble_entropy"] == pytest.approx(
        2e-3 * KCAL_PER_MOL, rel=1e-6
    )  # cal/(mol K) -> eV/K
    assert np.isnan(actual[0].properties["ensemble_energy"])


def test_subsets(sample):
    path, _ = sample("geom")
    assert {s.subset for s in read(path)} == {"drugs", "qm9"}
    actual = read(path, subset="qm9")
    assert [(s.subset, s.record, s.conformer) for s in actual] == [("qm9", 0, c) for c in range(4)]
    with pytest.raises(DatasetError, match=r"no subset 'qm7'; found \['drugs', 'qm9'\]"):
        geom.Reader(path, subset="qm7")
    with geom.Reader(path, subset="qm9") as source:
        assert sorted(f.name for f in source.files()) == ["OCCO.pickle", "summary_qm9.json"]


def test_lowest_conformers_of_an_unsorted_list(sample):
    path, _ = sample("geom")
    assert [s.conformer for s in read(path, subset="qm9", max_conformers=2)] == [1, 3]
    assert [s.conformer for s in read(path, subset="qm9", max_conformers=1)] == [1]
    assert len(read(path, subset="qm9", max_conformers=9)) == 4
    with pytest.raises(ConfigError, match="max_conformers"):
        geom.Reader(path, max_conformers=0)


def test_conformers_without_energy_come_last(tmp_path):
    molecule = crude()
    del molecule["conformers"][0]["totalenergy"]
    actual = read(write_msgpack(tmp_path / "a.msgpack", {"O": molecule}))
    assert np.isnan(actual[0].energy) and np.isfinite(actual[1].energy)
    assert [s.conformer for s in read(tmp_path / "a.msgpack", max_conformers=2)] == [1, 2]


def test_folder_without_summary_and_single_pickle(sample, tmp_path):
    path, _ = sample("geom")
    whole = read(path)
    (tmp_path / "drugs").mkdir()
    for p in (path / "drugs").iterdir():
        (tmp_path / "drugs" / p.name).write_bytes(p.read_bytes())
    assert readers.detect(tmp_path) == readers.detect(tmp_path / "drugs") == "geom"
    for folder in (tmp_path, tmp_path / "drugs"):
        actual = read(folder)
        assert len(actual) == 78
        assert [(s.energy, s.molecule, s.subset) for s in actual] == [
            (s.energy, s.molecule, s.subset) for s in whole[:78]
        ]
    one = next((path / "drugs").glob("PJ*"))
    assert readers.detect(one) == "geom"
    actual = read(one)
    assert (
        len(actual) == 24 and {s.charge for s in actual} == {1.0} and actual[0].source == one.name
    )


def test_level_of_theory(sample):
    for options, level in (({}, "GFN2-xTB (CREST)"), ({"level_of_theory": "MMFF94"}, "MMFF94")):
        with geom.Reader(sample("geom")[0], **options) as source:
            assert source.level_of_theory == level and not source.sequential


def test_missing_charge_is_inferred(tmp_path):
    write_pickle(tmp_path / "a.pickle", charge=None)
    assert {s.charge for s in read(tmp_path / "a.pickle")} == {0.0}
    raw = SAMPLE.small_molecule()
    ion = Chem.AddHs(Chem.MolFromSmiles("[NH4+]"))
    from rdkit.Chem import AllChem

    AllChem.EmbedMolecule(ion, randomSeed=1)
    (tmp_path / "b.pickle").write_bytes(
        pickle.dumps(
            {"conformers": [raw["conformers"][0] | {"rd_mol": ion}], "smiles": "[NH4+]"}, 3
        )
    )
    assert [s.charge for s in read(tmp_path / "b.pickle")] == [1.0]
    path = write_msgpack(
        tmp_path / "c.msgpack", {"[OH-]": crude(charge=None), "O": crude(charge=None)}
    )
    assert {s.molecule: s.charge for s in read(path)} == {"[OH-]": -1.0, "O": 0.0}


def test_summary_and_pickles_that_differ(tmp_path):
    (tmp_path / "drugs").mkdir()
    write_pickle(tmp_path / "drugs" / "a.pickle")
    (tmp_path / "summary_drugs.json").write_text(
        json.dumps(
            {
                "OCCO": {"pickle_path": "drugs/a.pickle"},
                "CC": {"pickle_path": "drugs/gone.pickle"},
                "C": {"charge": 0},
            }
        )
    )
    report = ReadReport()
    assert len(read(tmp_path, report)) == 4 and report.records == 3
    assert report.skipped == {"pickle is missing": 1, "no pickle in the summary": 1}
    assert ("pickle is missing", f"{tmp_path.name}:drugs/gone.pickle") in report.identities


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"C": 5}',
        '{"C": {"pickle_path": "../../etc/passwd"}}',
        '{"C": {"pickle_path": "/etc/passwd"}}',
        '{"C": {"pickle_path": 5}}',
    ],
)
def test_invalid_summaries_are_rejected(tmp_path, text):
    (tmp_path / "summary_drugs.json").write_text(text)
    with pytest.raises(DatasetError, match=r"summary_drugs\.json"):
        geom.Reader(tmp_path)


# --- MessagePack ---


def test_crude_msgpack(tmp_path):
    chunks = {"O": crude(), "[OH3+]": crude(2, charge=1)}, {"OO": crude(1)}
    path = write_msgpack(tmp_path / "drugs_crude.msgpack", *chunks)
    assert readers.detect(path) == "geom"
    report = ReadReport()
    actual = read(path, report)
    assert (report.records, report.structures, report.skipped) == (3, 6, {})
    raw = [(s, m, c) for chunk in chunks for s, m in chunk.items() for c in m["conformers"]]
    for s, (smiles, molecule, conformer) in zip(actual, raw, strict=True):
        table = np.array(conformer["xyz"])
        assert s.numbers.tolist() == [8, 1, 1] and s.numbers.dtype.kind == "i"
        np.testing.assert_array_equal(s.positions, table[:, 1:])
        assert s.energy == pytest.approx(conformer["totalenergy"] * HARTREE, rel=1e-6)
        assert s.properties["energy_relative"] == pytest.approx(
            conformer["relativeenergy"] * KCAL_PER_MOL, rel=1e-6
        )
        assert (s.molecule, s.smiles, s.charge, s.subset) == (
            smiles,
            smiles,
            molecule["charge"],
            "drugs",
        )
        assert s.source == f"drugs_crude.msgpack:{smiles}" and s.forces is None
    assert [s.record for s in actual] == [0, 0, 0, 1, 1, 2]
    assert {s.subset for s in read(path, subset="mine")} == {"mine"}


def archive(path, content, name="qm9_crude.msgpack"):
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return path


def test_msgpack_in_a_tar(tmp_path):
    plain = write_msgpack(tmp_path / "qm9_crude.msgpack", {"O": crude()}, {"OO": crude(1)})
    packed = archive(tmp_path / "qm9_crude.msgpack.tar.gz", plain.read_bytes())
    assert readers.detect(packed) == "geom"
    a, b = read(plain), read(packed)
    assert [(s.energy, s.molecule, s.subset, s.record) for s in a] == [
        (s.energy, s.molecule, s.subset, s.record) for s in b
    ] and len(a) == 4
    assert a[0].subset == "qm9"


@pytest.mark.parametrize("packed", [False, True])
def test_stream_is_read_once_over_all_ranges(tmp_path, packed, monkeypatch):
    path = write_msgpack(
        tmp_path / "a.msgpack",
        *(
            {f"{'C' * (3 * k + i + 1)}": crude(shift=k + i / 10) for i in range(3)}
            for k in range(3)
        ),
    )
    if packed:
        path = archive(tmp_path / "a.msgpack.tar.gz", path.read_bytes())
    whole = [(s.record, s.molecule, s.positions.tolist()) for s in read(path)]
    opened = []
    original = builtins.open

    def counted(file, *args, **kwargs):
        opened.extend([file] if file in (path, str(path)) else [])
        return original(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", counted)
    for parts in (
        [range(0, 2), range(2, 2), range(2, 7), range(7, 9)],
        [range(0, 1), range(4, 5), range(8, 9)],
    ):
        with geom.Reader(path) as source:
            assert source.sequential
            opened.clear()
            actual = [
                (s.record, s.molecule, s.positions.tolist())
                for p in parts
                for s in source.read(p, ReadReport())
            ]
            assert len(opened) == 1
        assert actual == [w for w in whole if any(w[0] in p for p in parts)]
    with geom.Reader(path) as source:  # backward: reopens the file
        for p in (range(5, 9), range(0, 3), range(2, 4)):
            assert [
                (s.record, s.molecule, s.positions.tolist()) for s in source.read(p, ReadReport())
            ] == [w for w in whole if w[0] in p]
        assert len(source) == 9


def test_stream_restarts_after_an_early_exit(tmp_path):
    path = write_msgpack(tmp_path / "a.msgpack", {"O": crude(), "OO": crude(), "OOO": crude()})
    with geom.Reader(path) as source:
        first = source.read(range(0, 3), ReadReport())
        next(first)
        first.close()
        assert [s.record for s in source.read(range(0, 3), ReadReport())] == [0] * 3 + [1] * 3 + [
            2
        ] * 3


def test_truncated_streams_are_rejected(tmp_path):
    path = write_msgpack(
        tmp_path / "whole.msgpack", {"O": crude(1)}, {"OO": crude(1), "OOO": crude(1)}
    )
    content = path.read_bytes()
    first = len(msgpack.packb({"O": crude(1)}))
    for keep in [
        200,
        first - 1,
        first + 1,
        first + 2,
        first + 3,
        len(content) - 300,
        len(content) - 1,
    ]:
        cut = tmp_path / "cut.msgpack"
        cut.write_bytes(content[:keep])
        with pytest.raises(DatasetError, match=r"cut\.msgpack"):
            read(cut)
        with pytest.raises(DatasetError, match=r"cut\.msgpack: truncated after molecule"):
            len(geom.Reader(cut))
    packed = archive(tmp_path / "cut.msgpack.tar.gz", content * 50).read_bytes()
    (tmp_path / "cut.msgpack.tar.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DatasetError, match=r"cut\.msgpack\.tar\.gz"):
        read(tmp_path / "cut.msgpack.tar.gz")


def _conformer(**changes):
    return crude(conformers=[crude(1)["conformers"][0] | changes])


@pytest.mark.parametrize(
    ("molecule", "message"),
    [
        ([1, 2], "found list"),
        ("conformers", "found str"),
        (5, "found int"),
        ({"conformers": {}}, "found.*conformers"),
        (crude(conformers=[1]), "#0: a conformer is int"),
        (_conformer(xyz=[[8, 0, 0]]), r"#0: xyz has the row \[8, 0, 0\]"),
        (_conformer(xyz=[]), "#0: xyz has 0 rows"),
        (_conformer(xyz=[["O", 0, 0, 0]]), "#0: .*not four numbers"),
        (_conformer(xyz=[[8.5, 0, 0, 0]]), "#0: 8.5 is not an atomic"),
        (_conformer(xyz=[[0, 0, 0, 0]]), "#0: 0 is not an atomic"),
        (_conformer(xyz=[[119, 0, 0, 0]]), "#0: 119 is not an atomic"),
        (_conformer(xyz=5), "#0: xyz has int"),
        (_conformer(xyz=[[8, 0, 0, 0]] * 10_001), "#0: xyz has 10001 rows"),
        (_conformer(xyz=[[8, 0, 0, 0], [1, 0]]), r"the row \[1, 0\]"),
        (_conformer(rd_mol=b"x", xyz=None), "#0: xyz"),
        (_conformer(totalenergy="low"), "#0: totalenergy is 'low'"),
        (_conformer(boltzmannweight=[1]), r"boltzmannweight is \[1\]"),
        (crude(charge="one"), "charge is 'one'"),
        (crude(ensembleenergy={}), "ensembleenergy is {}"),
    ],
)
def test_molecules_of_another_layout_are_identified(tmp_path, molecule, message):
    path = write_msgpack(tmp_path / "a.msgpack", {"O": crude(1), "conformers": molecule})
    actual = []
    with (
        geom.Reader(path) as source,
        pytest.raises(DatasetError, match=rf"a\.msgpack:conformers.*{message}"),
    ):
        for s in source:
            actual.append(s)
    assert [s.molecule for s in actual] == ["O"]


def test_corrupted_streams_are_identified(tmp_path):
    good = msgpack.packb({"O": crude(1)})
    for bad in (
        b"\xc1" * 20,
        msgpack.packb([1, 2, 3]),
        msgpack.packb({5: crude(1)}),
        b"\x81\xa1C\xdd\xff\xff\xff\xff",
        b"\x81\xa1C\xc1",
        b"\x81\xa1C" + b"\x91" * 5000,
        b"\x81\xa2\xff\xfe\x01",
    ):
        path = tmp_path / "bad.msgpack"
        path.write_bytes(good + bad)
        with pytest.raises(DatasetError, match=r"bad\.msgpack"):
            read(path)


def test_molecules_without_conformers_and_positions(tmp_path):
    path = write_msgpack(
        tmp_path / "a.msgpack",
        {"O": crude(0), "OO": _conformer(xyz=[[8, 0, 0, float("nan")]]), "OOO": crude(1)},
    )
    report = ReadReport()
    assert [s.molecule for s in read(path, report)] == ["OOO"]
    assert report.skipped == {"no conformers": 1, "positions not finite": 1}


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_pickle_is_rejected_and_not_executed(tmp_path):
    mark = tmp_path / "executed"
    conformer = SAMPLE.small_molecule()["conformers"][0]
    for name, changes in (
        ("a", {"charge": Command(f"touch {mark}")}),
        ("b", {"conformers": [conformer | {"rd_mol": Command(f"touch {mark}")}]}),
    ):
        path = write_pickle(tmp_path / f"{name}.pickle", **changes)
        assert geom.Reader.matches(path)
        for where in (path, tmp_path):
            with pytest.raises(
                DatasetError,
                match=rf"{name}\.pickle: the pickle requests '\w+\.system'.*not executed",
            ):
                read(where)
        assert not mark.exists()
        pickle.loads(path.read_bytes())
        assert mark.exists()
        mark.unlink()
        path.unlink()


def molecule_pickle(binary=b"Vx\ntR."):
    """Return a pickle, as text opcodes, whose rd_mol is created from the opcodes of `binary`."""
    return (
        b"\x80\x02}(X\x0a\0\0\0conformers](}(X\x0b\0\0\0totalenergyG"
        + b"\xc0"
        + bytes(7)
        + b"X\x06\0\0\0rd_molcrdkit.Chem.rdchem\nMol\n"
        + binary
        + b"ueu."
    )


@pytest.mark.parametrize(
    ("binary", "message"),
    [
        (b"(X\x02\0\0\0CCtR", "RDKit molecule of str"),
        (b"(K\x05tR", "RDKit molecule of int"),
        (b")R", "missing"),
        (b"(]tR", "RDKit molecule of list"),
        (b"", "#0: expected a conformer with 'rd_mol'"),
        (b"(C\x05aaaaatR", "#0: RDKit cannot read the molecule"),
        (b"(C\0tR", "#0: RDKit cannot read|#0: an RDKit"),
        (b"}X\x05\0\0\0atomsK\x01sb(C\0tR", "changes a function"),
        (b"(C\0t\x81", "corrupted or malicious"),
    ],
)
def test_attributes_of_rdkit_molecules_are_ignored(tmp_path, binary, message):
    before = geom_files.RDKitMolecule.atoms
    path = tmp_path / "bad.pickle"
    path.write_bytes(molecule_pickle(binary))
    with pytest.raises(DatasetError, match=rf"bad\.pickle.*({message})"):
        read(path)
    assert geom_files.RDKitMolecule.atoms is before


def test_rdkit_molecules_are_created_from_bytes_only(tmp_path):
    """The same frame with RDKit's own bytes is readable, so only the content was rejected."""
    molecule = SAMPLE.small_molecule()["conformers"][0]["rd_mol"].ToBinary()
    path = tmp_path / "good.pickle"
    path.write_bytes(
        molecule_pickle(b"(B" + len(molecule).to_bytes(4, "little") + molecule + b"tR")
    )
    actual = read(path)
    assert len(actual) == 1 and len(actual[0]) == 10 and actual[0].molecule == "good.pickle"
    flat = Chem.MolFromSmiles("CC").ToBinary()
    path.write_bytes(molecule_pickle(b"(B" + len(flat).to_bytes(4, "little") + flat + b"tR"))
    with pytest.raises(DatasetError, match=r"good\.pickle#0: .*2 atoms and 0 conformers"):
        read(path)


def test_corrupted_rdkit_bytes_are_rejected(tmp_path):
    molecule = SAMPLE.small_molecule()["conformers"][0]["rd_mol"].ToBinary()
    for keep in (0, 4, 10, 20, 60, len(molecule) // 2, len(molecule) - 20):
        path = tmp_path / "bad.pickle"
        path.write_bytes(
            molecule_pickle(b"(B" + keep.to_bytes(4, "little") + molecule[:keep] + b"tR")
        )
        with pytest.raises(DatasetError, match=r"bad\.pickle#0"):
            read(path)


def test_truncated_and_other_pickles_are_rejected(tmp_path):
    content = write_pickle(tmp_path / "a.pickle").read_bytes()
    for keep in (len(content) - 1, len(content) // 2, 400):
        (tmp_path / "a.pickle").write_bytes(content[:keep])
        with pytest.raises(DatasetError, match=r"a\.pickle: the pickle is truncated"):
            read(tmp_path / "a.pickle")
        with pytest.raises(DatasetError, match=r"a\.pickle: the pickle is truncated"):
            read(tmp_path)
    (tmp_path / "a.pickle").write_bytes(pickle.dumps({"weights": [1, 2]}))
    assert not geom.Reader.matches(tmp_path / "a.pickle") and not geom.Reader.matches(tmp_path)
    with pytest.raises(
        DatasetError, match=r"a\.pickle: expected a dict with a list 'conformers'.*weights"
    ):
        read(tmp_path)
    with pytest.raises(DatasetError, match=r"a\.pickle: not GEOM data"):
        read(tmp_path / "a.pickle")


def test_other_folders_are_rejected(tmp_path):
    assert not geom.Reader.matches(tmp_path)
    with pytest.raises(DatasetError, match="expected GEOM's rdkit_folder"):
        geom.Reader(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"text" * 1000))
    archive(tmp_path / "b.tar.gz", b"text", name="notes.txt")
    for name in ("a.tar.gz", "b.tar.gz"):
        assert not geom.Reader.matches(tmp_path / name)
        with pytest.raises(DatasetError, match="not GEOM data"):
            geom.Reader(tmp_path / name)
    assert not geom.Reader.matches(write_msgpack(tmp_path / "c.msgpack", {"O": {"bonds": []}}))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("charge", "charge is \\[\\[\\["),
        ("smiles", "smiles is \\[\\[\\["),
        ("totalenergy", "totalenergy is \\[\\[\\["),
        ("xyz", "xyz has the row"),
        ("cell of xyz", "which is not four numbers"),
        ("conformers", "a conformer is list"),
    ],
)
def test_endless_lists_are_rejected(tmp_path, where, message):
    """60 lists, each four times in the next one. Walking through them would take centuries."""
    endless = []
    for _ in range(60):
        endless = [endless] * 4
    conformer = {"xyz": [[8.0, 0.0, 0.0, 0.0]], "totalenergy": -76.0}
    changes = {
        "charge": {"charge": endless},
        "smiles": {"smiles": endless},
        "conformers": {"conformers": endless},
        "totalenergy": {"conformers": [conformer | {"totalenergy": endless}]},
        "xyz": {"conformers": [conformer | {"xyz": endless}]},
        "cell of xyz": {"conformers": [conformer | {"xyz": [[8.0, endless, 0.0, 0.0]]}]},
    }[where]
    path = tmp_path / "a.pickle"
    path.write_bytes(
        pickle.dumps({"smiles": "O", "charge": 0, "conformers": [conformer]} | changes, 3)
    )
    assert readers.detect(path) == "geom" and path.stat().st_size < 3000
    with pytest.raises(DatasetError, match=f"a.pickle.*: .*{message}") as error:
        read(path)
    assert len(str(error.value)) < 1000


def test_numpy_tables_are_accepted(tmp_path):
    table = np.array([[8.0, 0.0, 0.0, 0.1], [1.0, 0.9, 0.0, 0.1]])
    for value in (table, table.tolist(), [tuple(row) for row in table], list(map(list, table))):
        path = tmp_path / "a.pickle"
        path.write_bytes(
            pickle.dumps({"smiles": "O", "conformers": [{"xyz": value, "totalenergy": -76.0}]}, 3)
        )
        (actual,) = read(path)
        assert (
            actual.numbers.tolist() == [8, 1] and actual.positions.tolist() == table[:, 1:].tolist()
        )
    path.write_bytes(
        pickle.dumps({"smiles": "O", "conformers": [{"xyz": table[0], "totalenergy": -76.0}]}, 3)
    )
    with pytest.raises(DatasetError, match="#0: xyz has the row"):
        read(path)


def test_invalid_elements_in_a_pickle_are_rejected(tmp_path):
    molecule = Chem.RWMol(Chem.AddHs(Chem.MolFromSmiles("O")))
    Chem.AllChem.EmbedMolecule(molecule, randomSeed=1)
    molecule.GetAtomWithIdx(0).SetAtomicNum(0)
    with pytest.raises(DatasetError, match="a.pickle#0: 0 is not an atomic number"):
        read(
            write_pickle(
                tmp_path / "a.pickle",
                conformers=[{"totalenergy": -76.0, "rd_mol": molecule.GetMol()}],
            )
        )


def test_oversized_molecule_of_a_stream_is_rejected(tmp_path, monkeypatch):
    """One byte of MessagePack can be a list, which takes 56 bytes in memory."""
    monkeypatch.setattr(geom_files, "MAX_MOLECULE", 2**16)
    path = write_msgpack(
        tmp_path / "a.msgpack",
        {"O": crude(), "OO": crude(conformers=[[[]] * 2**20] * 3), "N": crude()},
    )
    with geom.Reader(path) as source:
        assert len(source) == 3
        assert len(list(source.read(range(1), ReadReport()))) == 3
        with pytest.raises(DatasetError, match=r"molecule 1 \(after OO\).*more than 65536 bytes"):
            list(source.read(range(1, 2), ReadReport()))


def headers(kind, size, content=b"", name="x"):
    """Return a tar header that announces a header of `size` bytes, and that header."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def bombs():
    """Archives whose first valid member follows far too many header bytes."""
    comment = b"60000 comment=" + b"x" * (60_000 - 15) + b"\n"
    sparse = bytearray(headers(b"S", 0, name="qm9_crude.msgpack"))
    sparse[482] = 1  # its map continues in the next block
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + 8 * 32 + sum(sparse[156:512]))
    more = bytes(504) + b"\1" + bytes(7)
    return {
        "pax": headers(b"x", len(comment), comment),
        "global pax": headers(b"g", len(comment), comment),
        "long name": headers(b"L", 60_000, b"x" * 59_999 + b"\0"),
        "chain": headers(b"x", 11, b"11 a=bcdef\n") * 2000,
        "zeros": headers(b"x", 2**31),
        "map of a sparse file": bytes(sparse) + more * 200 + bytes(512),
    }


@pytest.mark.parametrize("name", bombs())
def test_archives_with_endless_headers_are_rejected(tmp_path, name):
    packed = msgpack.packb({"O": crude()})
    member = tarfile.TarInfo("qm9_crude.msgpack")
    member.size = len(packed)
    content = (
        bombs()[name]
        + (bytes(2**26) if name == "zeros" else b"")
        + member.tobuf()
        + packed
        + bytes(2048)
    )
    path = tmp_path / "a.msgpack.tar.gz"
    path.write_bytes(gzip.compress(content, 1))
    del content
    tracemalloc.start()
    try:
        assert geom.Reader.matches(path) is False
        with pytest.raises(DatasetError, match=r"a\.msgpack\.tar\.gz"):
            geom.Reader(path)
        with pytest.raises(DatasetError, match=r"a\.msgpack\.tar\.gz"):
            list(geom_files.MessagePackStream(path, "tar", "").read(range(1)))
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_archives_with_long_names(tmp_path):
    """Headers of ordinary length are accepted."""
    packed = msgpack.packb({"O": crude()})
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=format) as file:
            member = tarfile.TarInfo("folder/" * 400 + "qm9_crude.msgpack")
            member.size = len(packed)
            file.addfile(member, io.BytesIO(packed))
        assert geom.Reader.matches(tmp_path / "a.tar.gz") and len(read(tmp_path / "a.tar.gz")) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"max_conformers": "3"},
        {"max_conformers": 2.5},
        {"max_conformers": True},
        {"subset": 5},
        {"level_of_theory": 5},
    ],
)
def test_options_of_the_wrong_type_are_rejected(sample, options):
    with pytest.raises(
        ConfigError, match=f"reader option {next(iter(options))} must be .*received"
    ):
        geom.Reader(sample("geom")[0], **options)

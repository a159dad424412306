"""Tests for the PubChemQCR reader: units, sign of forces, stages, thinning, and invalid files."""

import copy
import csv
import importlib.util
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets.identity import molecule_identity
from mlip_jax.datasets.reader import DatasetError, ReadReport
from mlip_jax.datasets.readers import pubchemqcr

lmdb = pytest.importorskip("lmdb")

HARTREE = 27.211386245988
BOHR = 0.529177210903
NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9, "P": 15, "S": 16, "CL": 17}


def _sample_module():
    spec = importlib.util.spec_from_file_location(
        "pubchemqcr_sample", Path(__file__).parent / "samples" / "pubchemqcr.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAMPLE = _sample_module()
WATER = {
    "coordinates": [
        {"atom": s, "x": x, "y": y, "z": 0.0}
        for s, x, y in (("O", 0.0, 0.0), ("H", 0.96, 0.0), ("H", -0.24, 0.93))
    ],
    "energy": -76.0,
    "gradient": [{"atom": s, "dx": 0.01, "dy": 0.0, "dz": -0.02} for s in "OHH"],
}


def steps(count):
    """Return a stage whose snapshots have the energies 0, 1, ... hartree."""
    return [WATER | {"energy": float(i)} for i in range(count)]


def write(folder, stages, key=b"000000007", **options):
    return SAMPLE.write(folder / "data.lmdb", {key: stages}, **options)


def read(path, report=None, **options):
    with pubchemqcr.Reader(path, **options) as source:
        return list(source.read(range(len(source)), report or ReadReport()))


def test_equals_an_independent_parser(sample):
    path, _ = sample("pubchemqcr")
    report = ReadReport()
    actual = read(path, report)
    with open(path.parent / "summary.csv") as file:
        summary = {row["cid"]: row for row in csv.DictReader(file)}
    expected = [
        (k, c, s, len(stages["DFT_1st"]))
        for k, stages in SAMPLE.records().items()
        for c, s in enumerate(stages["DFT_1st"] or [])
    ]
    assert len(actual) == len(expected) == report.structures == 17
    for s, (key, c, raw, count) in zip(actual, expected):
        assert [a.upper() for a in (x["atom"] for x in raw["coordinates"])] == [
            {v: k for k, v in NUMBERS.items()}[n] for n in s.numbers
        ]
        np.testing.assert_allclose(
            s.positions, [[a["x"], a["y"], a["z"]] for a in raw["coordinates"]], rtol=1e-12
        )
        assert s.energy == pytest.approx(raw["energy"] * HARTREE, rel=1e-6)
        gradient = np.array([[a["dx"], a["dy"], a["dz"]] for a in raw["gradient"]])
        np.testing.assert_allclose(s.forces, -gradient * HARTREE / BOHR, rtol=1e-6)
        cid = str(int(key))
        smiles = summary[cid]["smiles"]
        assert (s.molecule, s.smiles, s.conformer) == (molecule_identity(smiles), smiles, c)
        assert (
            s.subset == "DFT_1st"
            and s.source == f"trajectories.lmdb:{key.decode()}"
            and s.charge == 0
        )
        assert list(s.properties) == ["homo", "lumo", "gap", "dipole_moment"]
        if c == count - 1:  # the properties are those of the final geometry
            for name, column, unit in (
                ("homo", "homo_ev", 1),
                ("lumo", "lumo_ev", 1),
                ("gap", "gap_ev", 1),
                ("dipole_moment", "dipole_e_bohr", BOHR),
            ):
                assert s.properties[name] == pytest.approx(
                    float(summary[cid][column]) * unit, rel=1e-6
                )
        else:
            assert np.isnan(list(s.properties.values())).all()


def test_forces_point_downhill(sample):
    """Adjacent snapshots of a relaxation: ΔE is -F·Δx. Gradients read as forces would give -1."""
    path, _ = sample("pubchemqcr")
    actual = read(path)
    ratios = []
    for a, b in zip(actual, actual[1:]):
        if a.record == b.record:
            work = -(0.5 * (a.forces + b.forces) * (b.positions - a.positions)).sum()
            if abs(work) > 1e-3:
                ratios.append((b.energy - a.energy) / work)
    assert len(ratios) >= 6
    assert np.median(ratios) == pytest.approx(1, abs=0.05)


def test_symbols_in_capitals_with_and_without_nuclear_charges(sample):
    path, _ = sample("pubchemqcr")
    by_molecule = {s.molecule: s.numbers.tolist() for s in read(path, summary="")}
    raw = SAMPLE.records()
    assert "CL" in {a["atom"] for a in raw[b"000002534"]["DFT_1st"][0]["coordinates"]}
    assert 17 in by_molecule["2534"] and 17 in by_molecule["1813"]


def test_missing_stages_are_skipped_and_counted(sample):
    path, _ = sample("pubchemqcr")
    report = ReadReport()
    actual = read(path, report)
    assert report.records == 4 and {s.record for s in actual} == {0, 1, 2}
    assert report.skipped == {"no snapshots of DFT_1st": 1}
    assert report.identities == [("no snapshots of DFT_1st", "trajectories.lmdb:000003589")]
    report = ReadReport()
    actual = read(path, report, stages=["pm3", "hf", "DFT_1st"])
    assert report.skipped == {"no snapshots of hf": 4, "no snapshots of DFT_1st": 1}
    assert {s.subset for s in actual} == {"pm3", "DFT_1st"}


def test_conformers_are_numbered_across_stages(tmp_path):
    path = write(tmp_path, {"pm3": steps(3), "hf": None, "DFT_1st": steps(4), "DFT_2nd": steps(2)})
    actual = read(path, stages=("pm3", "hf", "DFT_1st", "DFT_2nd"))
    assert [s.conformer for s in actual] == list(range(9))
    assert [s.subset for s in actual] == ["pm3"] * 3 + ["DFT_1st"] * 4 + ["DFT_2nd"] * 2
    actual = read(path, stages=("pm3", "DFT_1st"), max_snapshots=1)
    assert [(s.subset, s.conformer) for s in actual] == [("pm3", 2), ("DFT_1st", 6)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(11))),
        ({"stride": 3}, [0, 3, 6, 9, 10]),
        ({"stride": 5}, [0, 5, 10]),
        ({"stride": 100}, [0, 10]),
        ({"max_snapshots": 1}, [10]),
        ({"max_snapshots": 2}, [0, 10]),
        ({"max_snapshots": 3}, [0, 5, 10]),
        ({"max_snapshots": 11}, list(range(11))),
        ({"max_snapshots": 99}, list(range(11))),
        ({"stride": 2, "max_snapshots": 3}, [0, 4, 10]),
    ],
)
def test_thinning_keeps_first_and_last_snapshots(tmp_path, options, expected):
    actual = read(write(tmp_path, {"DFT_1st": steps(11)}), **options)
    assert [s.conformer for s in actual] == expected
    np.testing.assert_allclose([s.energy for s in actual], np.array(expected) * HARTREE, rtol=1e-6)


def test_thinned_trajectories_keep_the_final_properties(sample):
    path, _ = sample("pubchemqcr")
    assert all(np.isfinite(s.properties["gap"]) for s in read(path, max_snapshots=1))
    assert all(np.isnan(s.properties["gap"]) for s in read(path, stages=("pm3",)))


def test_single_snapshot(tmp_path):
    assert len(read(write(tmp_path, {"DFT_1st": steps(1)}), max_snapshots=5, stride=4)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"stages": ("DFT_3rd",)},
        {"stages": ()},
        {"stages": ("pm3", "pm3")},
        {"stride": 0},
        {"max_snapshots": 0},
        {"stages": 3},
        {"stages": ("pm3", 1)},
        {"stride": "abc"},
        {"stride": 2.5},
        {"stride": True},
        {"stride": None},
        {"max_snapshots": "5"},
        {"max_snapshots": 1.0},
        {"summary": 5},
        {"level_of_theory": 6},
    ],
)
def test_invalid_option_values_are_rejected(sample, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        pubchemqcr.Reader(sample("pubchemqcr")[0], **options)


def test_level_of_theory(sample):
    path, _ = sample("pubchemqcr")
    for options, level in (
        ({}, "B3LYP/6-31G*"),
        ({"stages": "pm3"}, "PM3"),
        ({"stages": ("hf", "DFT_2nd")}, "HF, B3LYP/6-31G*"),
        ({"level_of_theory": "GFN2-xTB"}, "GFN2-xTB"),
    ):
        with pubchemqcr.Reader(path, **options) as source:
            assert source.level_of_theory == level


def test_summary_is_optional(sample, tmp_path):
    path, _ = sample("pubchemqcr")
    with pubchemqcr.Reader(path) as source:
        assert source.files() == [path, path.parent / "summary.csv"]
    alone = tmp_path / "alone.lmdb"
    shutil.copy(path, alone)
    for actual in (read(alone), read(path, summary="")):
        assert {s.smiles for s in actual} == {""} and all(s.properties == {} for s in actual)
        assert {s.molecule for s in actual} == {"1721", "1813", "2534"}
    table = tmp_path / "table.csv"
    table.write_text("smiles,cid,gap_ev\nC(#N)[O-],1721,\nPS,1813,2.5\n")
    actual = read(alone, summary=str(table), max_snapshots=1)
    assert [s.charge for s in actual] == [-1.0, 0.0, 0.0] and actual[2].smiles == ""
    np.testing.assert_equal(
        [s.properties for s in actual], [{"gap": np.nan}, {"gap": 2.5}, {"gap": np.nan}]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "column cid"),
        ("", "column cid"),
        ("cid,gap_ev\n7,1.0\n8,wide\n", "line 3.*wide"),
        ("cid,smiles\nx7,C\n", "line 2"),
    ],
)
def test_invalid_summaries_are_rejected(sample, tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DatasetError, match=f"table.csv.*{message}"):
        pubchemqcr.Reader(sample("pubchemqcr")[0], summary=str(tmp_path / "table.csv"))
    with pytest.raises(DatasetError, match="nowhere.csv: no such file"):
        pubchemqcr.Reader(sample("pubchemqcr")[0], summary=str(tmp_path / "nowhere.csv"))


def test_missing_labels_are_nan(tmp_path):
    bare = {"coordinates": WATER["coordinates"]}
    actual = read(
        write(tmp_path, {"DFT_1st": [bare, WATER | {"energy": None, "gradient": []}, WATER]})
    )
    for s in actual[:2]:
        assert np.isnan(s.energy) and np.isnan(s.forces).all() and s.forces.shape == (3, 3)
    assert np.isfinite(actual[2].forces).all()


def test_positions_that_are_not_finite_are_skipped_and_counted(tmp_path):
    broken = copy.deepcopy(WATER)
    broken["coordinates"][1]["y"] = float("nan")
    report = ReadReport()
    actual = read(write(tmp_path, {"DFT_1st": [WATER, broken, WATER]}), report)
    assert [s.conformer for s in actual] == [0, 2] and report.skipped == {"positions not finite": 1}
    assert report.identities == [("positions not finite", "data.lmdb:000000007/DFT_1st#1")]


def _changed(change):
    snapshot = copy.deepcopy(WATER)
    change(snapshot)
    return [WATER, snapshot]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"DFT_1st": _changed(lambda s: s["gradient"].reverse())},
            "#1: the atoms of coordinates and of gradient differ",
        ),
        (
            {"DFT_1st": _changed(lambda s: s["gradient"].pop())},
            "#1: the atoms of coordinates and of gradient differ",
        ),
        (
            {"DFT_1st": _changed(lambda s: s["coordinates"][0].update(atom="Qq"))},
            "#1: 'Qq' is not the symbol",
        ),
        (
            {"DFT_1st": _changed(lambda s: s["coordinates"][0].update(atom="X"))},
            "#1: .*without a nucleus",
        ),
        ({"DFT_1st": _changed(lambda s: s["coordinates"][0].pop("z"))}, "#1: not a snapshot.*'z'"),
        (
            {"DFT_1st": _changed(lambda s: s["coordinates"][0].update(x="far"))},
            "#1: not a snapshot.*far",
        ),
        (
            {"DFT_1st": _changed(lambda s: s.pop("coordinates"))},
            "#1: not a snapshot.*'coordinates'",
        ),
        ({"DFT_1st": _changed(lambda s: s.update(coordinates=[]))}, "#1: a snapshot has 0 atoms"),
        ({"DFT_1st": _changed(lambda s: s.update(energy="low"))}, "#1: not a snapshot.*low"),
        ({"DFT_1st": [WATER, 5]}, "#1: not a snapshot"),
        ({"DFT_1st": "text"}, "stage DFT_1st is str"),
        ({"dft": []}, r"expected a dict with pm3.*found \['dft'\]"),
        ([1, 2], "found list"),
    ],
)
def test_records_of_another_layout_are_identified(tmp_path, stages, message):
    with pytest.raises(DatasetError, match=rf"data\.lmdb:000000007.*{message}"):
        read(write(tmp_path, stages))


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_record_is_rejected_and_not_executed(tmp_path):
    mark = tmp_path / "executed"
    bad = {"pm3": [], "DFT_1st": [WATER | {"energy": Command(f"touch {mark}")}]}
    path = SAMPLE.write(
        tmp_path / "data.lmdb", {b"000000001": {"DFT_1st": [WATER]}, b"000000002": bad}
    )
    actual = []
    with (
        pubchemqcr.Reader(path) as source,
        pytest.raises(
            DatasetError,
            match=r"data\.lmdb:000000002: the pickle requests '\w+\.system'.*not executed",
        ),
    ):
        for s in source:
            actual.append(s)
    assert len(actual) == 1 and not mark.exists()
    pickle.loads(pickle.dumps(bad))
    assert mark.exists()


def test_numpy_scalars_are_rejected(tmp_path):
    with pytest.raises(DatasetError, match=r"requests 'numpy.*scalar'"):
        read(write(tmp_path, {"DFT_1st": [WATER | {"energy": np.float64(1.0)}]}))


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        (lambda data: data, "not gzip"),
        (lambda data: zlib.compress(data), "not gzip"),
        (lambda data: SAMPLE.gzip.compress(data)[:-20], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: SAMPLE.gzip.compress(data[:-20]), "pickle is truncated"),
    ],
)
def test_corrupted_records_are_identified(tmp_path, compress, message):
    path = write(tmp_path, {"DFT_1st": [WATER]}, compress=compress)
    with pytest.raises(DatasetError, match=rf"data\.lmdb:000000007.*{message}"):
        read(path)


def test_decompression_bomb_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(pubchemqcr, "_MAX_RECORD", 2**16)
    path = write(tmp_path, {"DFT_1st": [WATER], "hf": "x" * 2**20})
    assert path.stat().st_size < 2**17
    with pytest.raises(DatasetError, match="more than 65536 bytes when decompressed"):
        read(path)


def test_record_of_zeros_is_not_decompressed_completely(tmp_path):
    """160 MiB of zeros take less than 1 MB in the file. zlib needs twice the limit temporarily."""
    data = b"\x80\x04\x8d" + (160 * 2**20).to_bytes(8, "little") + bytes(160 * 2**20) + b"."
    path = write(tmp_path, data, dump=lambda d: d, compress=lambda d: SAMPLE.gzip.compress(d, 1))
    del data
    tracemalloc.start()
    try:
        with pytest.raises(
            DatasetError, match="000000007: .*more than 67108864 bytes when decompressed"
        ):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 140 * 2**20
    finally:
        tracemalloc.stop()


def test_invalid_key_is_rejected(tmp_path):
    path = write(tmp_path, {"DFT_1st": [WATER]}, key=b"metadata")
    assert not pubchemqcr.Reader.matches(path)
    with pytest.raises(DatasetError, match=r"data\.lmdb:metadata: the key is not a number"):
        read(path)
    path = SAMPLE.write(tmp_path / "long.lmdb", {b"0" * 30: {"DFT_1st": [WATER]}})
    with pytest.raises(DatasetError, match="no record has this key"):
        read(path)


READ_ALL = """
import sys
from pathlib import Path
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.readers import pubchemqcr
for path in map(Path, sys.argv[1:]):
    assert pubchemqcr.Reader.matches(path)
    try:
        print("read", len(list(pubchemqcr.Reader(path))))
    except DatasetError as error:
        print(error)
"""


def test_truncated_files_do_not_kill_the_process(sample, tmp_path):
    """The library lmdb reads a memory map: access beyond the end of the file is a bus error."""
    whole = sample("pubchemqcr")[0].read_bytes()
    paths = [
        tmp_path / f"{keep}.lmdb"
        for keep in (44, 4096, 5000, 8192, 12_288, len(whole) - 4096, len(whole) - 1)
    ]
    for path in paths:
        path.write_bytes(whole[: int(path.stem)])
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL, *map(str, paths), str(sample("pubchemqcr")[0])],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stderr
    *cut, complete = result.stdout.splitlines()
    assert complete == "read 17" and len(cut) == len(paths)
    for path, line in zip(paths, cut):
        assert re.search(
            rf"{path.name}: truncated: {path.stem} bytes, but its header states \d+", line
        )


@pytest.mark.parametrize("keep", [0, 10, 43])
def test_truncated_headers_are_rejected(sample, tmp_path, keep):
    path = tmp_path / "cut.lmdb"
    path.write_bytes(sample("pubchemqcr")[0].read_bytes()[:keep])
    with pytest.raises(DatasetError, match=r"cut\.lmdb: not an LMDB file"):
        pubchemqcr.Reader(path)


def test_folders_and_other_versions_are_rejected(sample, tmp_path):
    with pytest.raises(DatasetError, match="not an LMDB file; found a folder"):
        pubchemqcr.Reader(tmp_path)
    assert not pubchemqcr.Reader.matches(tmp_path)
    data = bytearray(sample("pubchemqcr")[0].read_bytes())
    for page in (0, 4096):
        data[page + 20 : page + 24] = struct.pack("=I", 999)
    (tmp_path / "new.lmdb").write_bytes(data)
    with pytest.raises(
        DatasetError, match=r"new\.lmdb: cannot open it as LMDB.*(999|VERSION_MISMATCH)"
    ):
        pubchemqcr.Reader(tmp_path / "new.lmdb")


def test_file_without_records_is_rejected(tmp_path):
    with pytest.raises(DatasetError, match="no trajectories"):
        pubchemqcr.Reader(SAMPLE.write(tmp_path / "empty.lmdb", {}))


def test_other_lmdb_files_are_not_detected(tmp_path):
    assert not pubchemqcr.Reader.matches(
        SAMPLE.write(tmp_path / "a.lmdb", {b"1": {}}, compress=lambda data: data)
    )
    assert not pubchemqcr.Reader.matches(SAMPLE.write(tmp_path / "b.lmdb", {b"length": {}}))


def test_nothing_is_written(sample, tmp_path):
    path = tmp_path / "read_only.lmdb"
    shutil.copy(sample("pubchemqcr")[0], path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o444)
    read(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert [p.name for p in tmp_path.iterdir()] == ["read_only.lmdb"]


def test_two_readers_of_one_file(sample):
    path, _ = sample("pubchemqcr")
    first, second = pubchemqcr.Reader(path), pubchemqcr.Reader(path)
    assert pubchemqcr.Reader.matches(path)
    first.close()
    first.close()
    assert len(list(second)) == 17
    with pytest.raises(DatasetError, match="closed"):
        list(first)
    second.close()


def test_assumed_level_of_theory_is_noted(sample):
    path, _ = sample("pubchemqcr")
    with pubchemqcr.Reader(path) as source:
        (note,) = source.notes
        assert "does not state its level of theory; B3LYP/6-31G* is assumed, as published" in note
        assert '--config.data.reader_options="level_of_theory=...' in note
    with pubchemqcr.Reader(path, level_of_theory="B3LYP/6-31G*") as source:
        assert source.notes == []


def test_error_of_a_truncated_file_can_be_pickled(sample, tmp_path):
    """Errors of workers are pickled. One that cannot be unpickled would hide the cause."""
    cut = tmp_path / "cut.lmdb"
    cut.write_bytes(sample("pubchemqcr")[0].read_bytes()[:12_288])
    with pytest.raises(DatasetError) as error:
        pubchemqcr.Reader(cut)
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and "cut.lmdb: truncated: 12288 bytes" in str(again)
    assert isinstance(again, DatasetError)


def test_endless_lists_as_numbers_are_rejected(tmp_path):
    """60 lists, each twice in the next one. Walking through them would take centuries."""
    endless = []
    for _ in range(60):
        endless = [endless, endless]
    atom = WATER["coordinates"][0] | {"x": endless}
    for field, value in (
        ("coordinates", [atom] * 3),
        ("energy", endless),
        ("coordinates", endless),
        ("gradient", [WATER["gradient"][0] | {"dx": endless}] * 3),
        ("energy", 10**400),
    ):
        with pytest.raises(DatasetError, match=r"data\.lmdb:000000007/DFT_1st#0") as error:
            read(write(tmp_path, {"DFT_1st": [WATER | {field: value}]}))
        assert len(str(error.value)) < 1000

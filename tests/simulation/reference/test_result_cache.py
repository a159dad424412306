"""Tests for the result cache: results survive whatever happens to the end of the file."""

import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax.simulation.reference.result_cache import ResultCache, key_of

RESULTS = {
    f"key{n}": {
        "energy": -100.0 - n / 3,
        "positions": [[n / 7, float("nan")]],
        "error": "Fehler é\n" * (n % 2),
        "steps": n,
    }
    for n in range(5)
}


def filled(path):
    with ResultCache(path) as cache:
        for key, result in RESULTS.items():
            cache.add(key, result)
    return path


def same(a, b):
    return repr(a) == repr(b)  # NaN is not itself


def test_results_round_trip(tmp_path):
    path = filled(tmp_path / "deep" / "cache.jsonl")
    with ResultCache(path) as cache:
        assert len(cache) == 5 and "other" not in cache
        assert all(same(cache[key], result) for key, result in RESULTS.items())
        cache.add("key0", {"energy": 1.0})  # the later result counts
        assert cache["key0"] == {"energy": 1.0}
    with ResultCache(path) as cache:
        assert cache["key0"] == {"energy": 1.0} and len(cache) == 5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_file_keeps_complete_results(tmp_path_factory, data):
    path = filled(tmp_path_factory.mktemp("cut") / "cache.jsonl")
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    with ResultCache(path) as cache:
        assert len(cache) == whole
        assert all(same(cache[key], RESULTS[key]) for key in list(RESULTS)[:whole])
        for key in list(RESULTS)[whole:]:
            cache.add(key, RESULTS[key])
    with ResultCache(path) as cache:
        assert all(same(cache[key], RESULTS[key]) for key in RESULTS)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_corrupted_byte_costs_only_its_line(tmp_path_factory, data):
    path = filled(tmp_path_factory.mktemp("bit") / "cache.jsonl")
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with ResultCache(path) as cache:
        assert len(cache) >= 3  # two lines are left where one ended
        assert all(same(cache[key], RESULTS[key]) for key in RESULTS if key in cache)


def test_a_killed_writer_loses_only_its_line(tmp_path):
    path = tmp_path / "cache.jsonl"
    program = (
        "import sys\nfrom mlip_jax.simulation.reference.result_cache import ResultCache\n"
        "cache = ResultCache(sys.argv[1])\nfor n in range(10**9):\n"
        "    cache.add(str(n), {'n': n, 'long': 'x' * 5000})\n    print(n, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[3])),
    )
    for _ in range(20):
        reported = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    reported = int(rest[-1]) if rest else reported
    with ResultCache(path) as cache:
        assert len(cache) in (reported + 1, reported + 2)
        assert all(cache[str(n)]["n"] == n for n in range(reported + 1))


def test_concurrent_writers_do_not_mix_lines(tmp_path):
    with ResultCache(tmp_path / "c") as a, ResultCache(tmp_path / "c") as b:
        a.add("a", {"x": 1})
        b.add("b", {"x": 2})
        a.add("c", {"x": 3})
        assert a["a"] == {"x": 1} and a["c"] == {"x": 3} and b["b"] == {"x": 2}
    with ResultCache(tmp_path / "c") as cache:
        assert [cache[k]["x"] for k in "abc"] == [1, 2, 3]


@pytest.mark.parametrize("text", [b"7", b'{"a": 1}', b'["key", 1]', b"[[], {}]", b"[" * 5000])
def test_lines_of_another_form_are_skipped(tmp_path, text):
    """A cache of other people, with a valid checksum; the TypeError named no file."""
    path = tmp_path / "cache.jsonl"
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    with ResultCache(path) as cache:
        assert len(cache) == 0


def test_corruption_is_reported(tmp_path, caplog):
    path = filled(tmp_path / "cache.jsonl")
    path.write_bytes(path.read_bytes()[:-4])
    ResultCache(path).close()
    assert "recomputing 1 of 5 results" in caplog.text


def test_keys_contain_everything_a_result_depends_on():
    water, method = molecule("H2O"), {"method": "a", "fmax": 0.05}
    key = key_of(method, water)

    def changed(**info):
        atoms = water.copy()
        atoms.info.update(info)
        return key_of(method, atoms)

    moved = water.copy()
    moved.positions[0, 0] = np.nextafter(moved.positions[0, 0], 9)
    other = water.copy()
    other.numbers[0] = 16
    different = {
        key,
        key_of(method | {"fmax": 0.01}, water),
        key_of(method, moved),
        key_of(method, other),
        changed(charge=1),
        changed(num_unpaired_electrons=2),
    }
    assert len(different) == 6 and changed(total_charge=1) == changed(charge=1)
    assert changed(multiplicity=3) == changed(num_unpaired_electrons=2)
    assert changed(charge=0.0) == key == changed(name="anything")
    zero = water.copy()
    zero.positions[np.abs(zero.positions) == 0] = -0.0
    assert key_of(method, zero) == key


def test_an_unknown_key_is_an_error(tmp_path):
    with ResultCache(tmp_path / "c") as cache, pytest.raises(KeyError):
        cache["nothing"]

"""Tests for LMDB files: same content as with the library lmdb, and errors for corrupted pages."""

import numpy as np
import pytest

from mlip_jax.datasets.formats.lmdb_file import LmdbFile
from mlip_jax.datasets.reader import DatasetError

lmdb = pytest.importorskip("lmdb")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a file with a tree of several levels, and its content."""
    path, rng = tmp_path_factory.mktemp("lmdb") / "a.lmdb", np.random.default_rng(0)
    content = {
        b"%09d" % key: rng.bytes(int(rng.choice([0, 5, 300, 5000])))
        for key in rng.choice(10**6, 3000, replace=False).tolist()
    }
    with lmdb.open(str(path), subdir=False, lock=False, map_size=2**26) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in content.items():
                transaction.put(key, value)
        with environment.begin(write=True) as transaction:  # free pages, and the other head
            for key in list(content)[::7]:
                transaction.delete(key)
                del content[key]
    return path, content


def test_content_equals_that_of_lmdb(written):
    path, content = written
    file = LmdbFile(path)
    assert file.depth > 1 and file.length == len(content)
    assert file.keys().tolist() == sorted(content)
    assert file.first() == min(content.items())
    assert all(file.get(key, "a") == value for key, value in content.items())
    for key in (b"", b"0", b"9" * 9, b"\xff"):
        with pytest.raises(DatasetError, match="no record has this key"):
            file.get(key, "a")


def test_damaged_pages_are_errors(written, tmp_path):
    """Detects crashes and endless loops, which such pointers cause in the library lmdb."""
    path, content = written
    data, rng, errors = path.read_bytes(), np.random.default_rng(1), 0
    pages = [0, 1, LmdbFile(path).root]
    for _ in range(8):
        damaged = bytearray(data)
        for place in rng.integers(0, 4096, 200):
            page = int(rng.choice(pages))
            damaged[page * 4096 + int(place)] = int(rng.integers(256))
        (tmp_path / "b.lmdb").write_bytes(damaged)
        try:
            file = LmdbFile(tmp_path / "b.lmdb")
            file.keys()
            for key in list(content)[:20]:
                file.get(key, "a")
        except DatasetError:
            errors += 1
    assert errors > 2


def test_a_circle_of_pages_ends(written, tmp_path):
    path, _ = written
    root = LmdbFile(path).root
    damaged = bytearray(path.read_bytes())
    page = root * 4096
    first = int.from_bytes(damaged[page + 16 : page + 18], "little")
    damaged[page + first : page + first + 6] = root.to_bytes(6, "little")
    (tmp_path / "b.lmdb").write_bytes(damaged)
    file = LmdbFile(tmp_path / "b.lmdb")
    with pytest.raises(DatasetError, match="circle"):
        file.keys()
    with pytest.raises(DatasetError, match="no leaves"):
        file.get(b"", "a")

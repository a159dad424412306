"""Tests for hashes of molecules, which are equal on every machine."""

import numpy as np
import pytest

from mlip_jax.datasets.identity import splitmix64, stable_ids


def test_stable_ids_of_strings_are_blake2b():
    # from `printf CCO | b2sum -l 64`, read as little-endian
    assert int(stable_ids(np.array(["CCO"]))[0]) == int.from_bytes(
        bytes.fromhex("6d200b6f6c9553c3"), "little"
    )
    names = np.array(["CCO", "C", "CCO", ""])
    ids = stable_ids(names)
    assert ids.dtype == np.uint64 and ids[0] == ids[2] and len(set(ids.tolist())) == 3
    for same in (names.astype(object), names.astype("U40"), names.astype("S")):
        assert np.array_equal(stable_ids(same), ids)


def test_stable_ids_of_numbers():
    numbers = np.array([0, 5, 2**31 - 1])
    assert np.array_equal(
        stable_ids(numbers.astype(np.int32)), stable_ids(numbers.astype(np.uint64))
    )
    assert len(set(stable_ids(np.array([-1, 0, 1, 2**63 - 1, -(2**63)])).tolist())) == 5
    with pytest.raises(ValueError, match="strings or integers; received float64"):
        stable_ids(np.array([0.5]))
    with pytest.raises(ValueError, match="received object"):
        stable_ids(np.array(["a", 1], object))


def test_splitmix64_is_the_published_generator():
    """The first outputs of the reference implementation with seed 1234567."""
    state = (1234567 + 0x9E3779B97F4A7C15 * np.arange(3, dtype=object)) % 2**64
    assert splitmix64(state.astype(np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]

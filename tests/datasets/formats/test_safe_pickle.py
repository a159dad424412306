"""Tests for the restricted unpickler: it loads data files and never executes malicious ones."""

import builtins
import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from mlip_jax.datasets.formats import pickle_opcodes, safe_pickle
from mlip_jax.datasets.formats.safe_pickle import NUMPY
from mlip_jax.datasets.reader import DatasetError

RECONSTRUCT = np.zeros(0).__reduce__()[0]  # by which pickles create arrays

VALUES = {
    "text": "CL",
    "float": 1.5,
    "int": -7,
    "big": 2**80,
    "none": None,
    "list": [1, [2.0, ()]],
    "bytes": b"\xff\0",
    "flags": [True, False],
    "tuple": (1, 2, 3, 4),
    "none at all": {},
    "long": "x" * 300,
}


def loads(data, allowed=NUMPY):
    return safe_pickle.loads(data, allowed=allowed, source="file.pickle:7")


class Calls:
    """Object that is pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """Name of a file that the malicious pickles would create."""
    monkeypatch.chdir(tmp_path)
    yield "executed"
    assert not os.path.exists("executed")


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values(protocol):
    values = VALUES | ({"set": {1, 2}, "frozen": frozenset("ab")} if protocol >= 4 else {})
    allowed = NUMPY if protocol < 3 else {}  # bytes need _codecs.encode there
    assert loads(pickle.dumps(values, protocol), allowed) == values
    assert (
        safe_pickle.load(io.BytesIO(pickle.dumps(values, protocol)), allowed=allowed, source="x")
        == values
    )


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_scalars(protocol):
    values = [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.zeros((0, 3), np.float32),
        np.array(3.0),
        np.array([True, False]),
        np.array([1 + 2j]),
        np.float64(3.5),
        np.int16(-2),
        np.bool_(True),
        np.float32(0.1),
    ]
    data = pickle.dumps(values, protocol)
    for a, b in zip(loads(data), pickle.loads(data), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), b)
    shared = loads(pickle.dumps([values[0], values[0]], protocol))
    assert shared[0] is shared[1]


def test_names_of_both_numpy_generations():
    new = pickle.dumps(np.float64(2.5), 2)
    old = new.replace(b"numpy._core", b"numpy.core")
    if old == new:
        new = old.replace(b"numpy.core", b"numpy._core")
    assert old != new and loads(old) == loads(new) == 2.5


def malicious(mark):
    command = f"touch {mark}"
    python = f"open({mark!r}, 'w').close()"
    text = f"c{os.system.__module__}\nsystem\n(S'{command}'\ntR.".encode()

    def stack_global(module, name, argument=command):
        return (
            b"\x80\x04"
            + b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name))
            + b"\x93\x8c"
            + bytes([len(argument)])
            + argument.encode()
            + b"\x85R."
        )

    return {
        "os.system": (pickle.dumps(Calls(os.system, command)), f"{os.system.__module__}.system"),
        "eval": (pickle.dumps(Calls(builtins.eval, python)), "builtins.eval"),
        "exec, protocol 2": (pickle.dumps(Calls(builtins.exec, python), 2), "__builtin__.exec"),
        "getattr": (pickle.dumps(Calls(getattr, "a", "upper")), "builtins.getattr"),
        "nested": (
            pickle.dumps({"conformers": [[1, {"rd_mol": [Calls(os.system, command)]}]]}),
            "system",
        ),
        "in a tuple of an array": (
            pickle.dumps((np.ones(3), Calls(subprocess.getoutput, command))),
            "subprocess.getoutput",
        ),
        "text pickle": (text, "system"),
        "INST": (f"(S'{command}'\nios\nsystem\n.".encode(), "os.system"),
        "OBJ": (f"(cos\nsystem\nS'{command}'\no.".encode(), "os.system"),
        "dotted name": (stack_global("os", "path.os.system"), "os.path.os.system"),
        "dotted name of an allowed module": (
            stack_global("numpy", "ctypeslib.os.system"),
            "numpy.ctypeslib.os.system",
        ),
        "attribute of an allowed name": (
            stack_global("numpy", "dtype.__class__"),
            "numpy.dtype.__class__",
        ),
        "attribute of an allowed function": (
            stack_global("numpy.core.multiarray", "scalar.__self__"),
            "numpy.core.multiarray.scalar.__self__",
        ),
        "load of another pickle": (pickle.dumps(Calls(pickle.loads, text)), "_pickle.loads"),
        "import": (pickle.dumps(Calls(__import__, "antigravity")), "__import__"),
    }


NAMES = list(malicious("x"))


@pytest.mark.parametrize("name", NAMES)
def test_malicious_pickles_are_rejected_and_not_executed(name, mark):
    data, requested = malicious(mark)[name]
    with pytest.raises(
        DatasetError, match=r"file\.pickle:7: the pickle requests '.*was not executed"
    ) as error:
        loads(data)
    assert f"{requested}'" in str(error.value)


def test_malicious_samples_work_with_the_plain_unpickler(mark, tmp_path):
    """The plain unpickler executes the samples, so the tests above are meaningful."""
    executed = 0
    for name in ("os.system", "eval", "nested", "text pickle", "INST", "OBJ", "dotted name"):
        pickle.loads(malicious(mark)[name][0])
        executed += (tmp_path / mark).exists()
        (tmp_path / mark).unlink()
    assert executed == 7


def test_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DatasetError, match=r"requests 'evil_module\.thing'"):
        loads(b"cevil_module\nthing\n.")
    assert "evil_module" not in sys.modules


def test_allowed_names_refer_to_the_callers_functions():
    """A pickle can call the function, which may differ from the original one, but not change it."""
    calls = []
    allowed = {("os", "system"): lambda text: calls.append(text) or "done"}
    assert loads(b"cos\nsystem\n(S'ls'\ntR.", allowed) == "done" and calls == ["ls"]

    class Mutable:
        value = 1

    for state in (b"}S'value'\nI2\ns", b"(N}S'value'\nI2\nst"):  # attributes of the class itself
        with pytest.raises(DatasetError, match=r"file\.pickle:7.*changes a function"):
            loads(b"cm\nMutable\n" + state + b"b.", {("m", "Mutable"): Mutable})
    assert Mutable.value == 1
    with pytest.raises(DatasetError, match="corrupted or malicious"):
        loads(b"cm\nMutable\n)\x81.", {("m", "Mutable"): Mutable})


def test_extensions_and_persistent_ids_are_rejected(mark):
    """An extension code that was used before returns its object without looking up a name."""
    copyreg.add_extension("posix", "system", 240)
    try:
        pickle.loads(b"\x80\x02\x82\xf0.")
        data = b"\x80\x02\x82\xf0(X" + struct.pack("<I", 14) + b"touch executed" + b"tR."
        with pytest.raises(DatasetError, match="extension type .*EXT1.*not executed"):
            loads(data)
        pickle.loads(data)
        os.remove(mark)
    finally:
        copyreg.remove_extension("posix", "system", 240)
    for data in (b"Pname\n.", b"\x80\x02K\x01Q.", b"\x80\x02\x83\x01\x00.", b"\x80\x05\x97."):
        with pytest.raises(DatasetError, match="no data file needs.*not executed"):
            loads(data)


def state_of_dtype(kind, state):
    """Return a pickle of an array of one 8-byte value of type `kind` with the given state."""

    class Type:
        def __reduce__(self):
            return np.dtype, (kind, False, True), state

    class Array:
        def __reduce__(self):
            return (RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), Type(), False, b"AAAAAAAA"))

    return pickle.dumps(Array(), 3)


def test_array_types_with_pointers_are_rejected():
    assert loads(state_of_dtype("f8", (3, "<", None, None, None, -1, -1, 0))).shape == (1,)
    for kind, state in [
        ("O8", (3, "|", None, None, None, -1, -1, 63)),
        ("O8", (3, "|", None, None, None, -1, -1, 0)),
        ("f8", (3, "<", None, None, None, -1, -1, 63)),
        ("V8", (3, "|", None, None, None, 8, 1, 0)),
        ("f8", (3, "<", (np.dtype("i4"), (2,)), None, None, 8, 4, 0)),
        ("f8", 3),
        ("f8", ()),
    ]:
        with pytest.raises(DatasetError, match="array type"):
            loads(state_of_dtype(kind, state))
    for value in (
        np.array([{}, None], object),
        np.zeros(2, "f4,i4"),
        np.array(["a"]),
        np.datetime64("2020"),
    ):
        with pytest.raises(DatasetError, match=r"file\.pickle:7"):
            loads(pickle.dumps(value, 3))


def test_arrays_of_the_wrong_size_are_rejected():
    data = pickle.dumps(np.arange(3, dtype=np.int64), 3)
    assert data.count(b"K\x03\x85") == 1
    with pytest.raises(DatasetError, match=r"shape \(4,\) of int64 from 24 bytes"):
        loads(data.replace(b"K\x03\x85", b"K\x04\x85"))
    with pytest.raises(DatasetError, match="corrupted or malicious"):
        loads(b"cnumpy\nndarray\n(I4\nI4\nltR.")


BOMBS = {
    "memo": b"\x80\x02N" + b"r\xff\xff\xff\xff" + b".....",
    "memo of a text pickle": b"Np99999999999\n.",
    "memo of 2**24": b"\x80\x02N" + b"r" + struct.pack("<I", 2**24) + b".....",
    "tuples": b"\x80\x02}" + b")" + b"\x85" * 2_000_000 + b"Ns.",
    "bytes beyond the end": b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"abc.",
    "text beyond the end": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"N.",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "digits": b"L" + b"9" * 100_000 + b"L\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_bombs_are_rejected(name):
    """Small files can request gigabytes or a deep stack; some crash the plain unpickler."""
    with pytest.raises(DatasetError, match=r"file\.pickle:7: "):
        loads(BOMBS[name])


def test_deep_nesting_does_not_crash():
    try:
        value = loads(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    except DatasetError:
        return
    assert isinstance(value, list)


def test_errors_of_any_kind_become_dataset_errors():
    def fails(error):
        def function():
            raise error

        return {("a", "b"): function}

    for error in (
        MemoryError("no room"),
        RecursionError("too deep"),
        OverflowError("x"),
        KeyError("y"),
    ):
        with pytest.raises(DatasetError, match=f"{type(error).__name__}.*corrupted or malicious"):
            loads(b"ca\nb\n)R.", fails(error))


def test_every_truncation_is_rejected():
    for protocol in (0, 2, 4):
        data = pickle.dumps(
            {"a": [1, 2.5, "text", b"bytes", np.arange(3.0), 300, 70_000]}, protocol
        )
        loads(data)
        for keep in range(len(data)):
            with pytest.raises(DatasetError, match=r"file\.pickle:7: "):
                loads(data[:keep])


def test_corrupted_bytes_give_a_value_or_a_dataset_error():
    data = bytearray(pickle.dumps({"a": [1, 2.5, "text", b"bytes", np.arange(3.0)]}, 4))
    refused = 0
    for position in range(len(data)):
        for value in (0, 255, data[position] ^ 1, ord("."), ord("R"), ord("b")):
            corrupted = bytes(data[:position]) + bytes([value]) + bytes(data[position + 1 :])
            try:
                loads(corrupted)
            except DatasetError:
                refused += 1
    assert refused > len(data)


def test_trailing_bytes_and_other_files_are_rejected():
    with pytest.raises(DatasetError, match="5 bytes follow the end"):
        loads(pickle.dumps(1) + b"extra")
    for data in (b"", b"<html>404</html>", bytes(range(256)), b"\x80\x04"):
        with pytest.raises(
            DatasetError, match=r"file\.pickle:7: (the pickle is truncated|not a pickle)"
        ):
            loads(data)


def hand(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


TWINS = 22  # tuples in one another, each twice: 2**22 cells
ENDLESS = {
    "DUP": hand(b"}K\x01", b"2\x86" * TWINS, b"Ns"),
    "MEMOIZE": hand(
        b"}K\x01\x94", b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(TWINS)), b"Ns"
    ),
    "BINPUT": hand(b"}K\x01q\x07", b"h\x07\x86q\x07" * TWINS, b"Ns"),
    "PUT": hand(b"}K\x01p7\n", b"g7\n\x86p7\n" * TWINS, b"Ns"),
    "after a mark": hand(b"}K\x01q\x07", b"(h\x07h\x07tq\x07" * TWINS, b"Ns"),
    "three": hand(b"}K\x01q\x07", b"h\x07h\x07\x87q\x07" * (TWINS * 2 // 3), b"Ns"),
    "BUILD of nothing": hand(b"}K\x01", b"Nb2\x86" * TWINS, b"Ns"),
    "POP of a mark": hand(b"}K\x01", b"(02\x86" * TWINS, b"Ns"),
    "APPENDS of nothing": hand(b"}K\x01", b"(e2\x86" * TWINS, b"Ns"),
    "deep": hand(b"})", b"\x85" * 2000, b"Ns"),
    "mentioned often": hand(b"](K\x01K\x02K\x03\x87q\x07", b"h\x07" * 50_000, b"e"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_tuples_are_rejected(name):
    """Tuples as keys are hashed cell by cell, which would not end for 45 nested tuples."""
    with pytest.raises(
        DatasetError,
        match=r"file\.pickle:7: the pickle creates tuples of tuples with more than 100000",
    ):
        loads(ENDLESS[name])


@pytest.mark.parametrize("protocol", range(6))
def test_cells_of_tuples_are_counted(protocol):
    def cells(value):
        return 1 + sum(map(cells, value)) if isinstance(value, tuple) else 1

    flat = [(1, 2.5), ("a",), (), (1, 2, 3), (1, 2, 3, 4, 5), [(0, (1, (2, 3)))]]
    data = pickle.dumps(flat, protocol)
    inner, middle, outer = (2, 3), (1, (2, 3)), (0, (1, (2, 3)))
    expected = sum(
        cells(t) for t in ((1, 2.5), ("a",), (1, 2, 3), (1, 2, 3, 4, 5), inner, middle, outer)
    )
    assert pickle_opcodes.count_cells(data, "x") == expected and loads(data) == flat
    shared = [inner, inner, (inner, inner)]
    assert (
        pickle_opcodes.count_cells(pickle.dumps(shared, protocol), "x") == 4 * 3 + 7
        and loads(pickle.dumps(shared, protocol)) == shared
    )


def test_too_many_values_are_rejected():
    """Each opcode creates an object, although the file is small when compressed."""
    for code, count, what in (
        (b"]", 4_100_000, "values"),
        (b"K\x01", 4_100_000, "values"),
        (b"\x8f", 11_000, "sets"),
        (b"(\x91", 11_000, "sets"),
        (b"\x8a\x01\x05", 11_000, "long integers"),
        (b"L5L\n", 11_000, "long integers"),
    ):
        with pytest.raises(
            DatasetError,
            match=f"file.pickle:7: the pickle creates more than [0-9]+ {what}, which no d",
        ):
            loads(hand(code * count))
    for data in (hand(b"I" + b"9" * 30 + b"\n"), hand(b"I" + b"9" * 5000 + b"\n")):
        with pytest.raises(DatasetError, match="integer of more than 20 digits"):
            loads(data)


@pytest.mark.parametrize("protocol", range(6))
def test_realistic_numbers_of_values_are_accepted(protocol):
    """Several times the longest trajectories and ensembles, and long runs without text opcodes."""
    values = [{"atom": "C", "x": 0.5 * i, "y": [i], "flag": None} for i in range(50_000)]
    assert loads(pickle.dumps(values, protocol)) == values
    numbers = list(range(70_000)) + [2**31, -(2**31), 2**63, -(2**63)]
    assert loads(pickle.dumps(numbers, protocol)) == numbers
    scalars = [np.float64(i) for i in range(5_000)]
    assert loads(pickle.dumps(scalars, protocol)) == scalars


def test_repeated_copies_of_bytes_are_rejected():
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000
    once = b"\x80\x02](c_codecs\nencode\nq\x00" + text + b"X\x06\0\0\0latin1\x86q\x01R"
    assert loads(once + b"e.") == [b"a" * 100_000]
    with pytest.raises(DatasetError, match="copies of the same bytes over and over"):
        loads(once + b"h\x00h\x01R" * 100 + b"e.")

    state = (1, (10_000,), np.dtype("f8"), False, bytes(80_000))

    class Array:
        def __reduce__(self):
            return RECONSTRUCT, (np.ndarray, (0,), b"b"), state

    assert loads(pickle.dumps(Array(), 3)).shape == (10_000,)
    with pytest.raises(DatasetError, match="copies of the same bytes over and over"):
        loads(pickle.dumps([Array() for _ in range(10)], 3))


def test_arrays_cannot_be_changed():
    """The key of an item could be an endless nested list, which NumPy would walk through."""

    class Array:
        def __init__(self, items):
            self.items = items

        def __reduce__(self):
            return (
                RECONSTRUCT,
                (np.ndarray, (0,), b"b"),
                (1, (2,), np.dtype("f8"), False, bytes(16)),
                None,
                iter(self.items),
            )

    assert loads(pickle.dumps(Array([]), 3)).tolist() == [0, 0]
    with pytest.raises(DatasetError, match="changes an array|corrupted or malicious"):
        loads(pickle.dumps(Array([(0, 1.0)]), 3))
    shared = pickle.dumps([np.arange(4.0)], 5)
    assert b"_frombuffer" in shared and not loads(shared)[0].flags.writeable


def test_messages_stay_short():
    """A value in a message may be an endless nested list or a text of megabytes."""
    endless = []
    for _ in range(16):
        endless = [endless] * 2
    for data in (
        state_of_dtype("f8", endless),
        b"c" + b"x" * 10_000 + b"\nthing\n.",
        pickle.dumps(Calls(np.dtype, endless), 3),
    ):
        with pytest.raises(DatasetError) as error:
            loads(data)
        assert len(str(error.value)) < 1000

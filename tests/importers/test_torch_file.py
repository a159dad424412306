"""Tests for the reader of PyTorch files: supported and rejected content, and that no code runs."""

import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlip_jax.importers.formats import state_files, torch_file
from mlip_jax.importers.formats.torch_records import Record, plain, state_dict
from mlip_jax.importers.formats.weights import WeightsError
from tests.importers.torch_files import Call, Global, Tensor, module, write, write_old

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("write_file", [write, write_old])
def test_tensors_of_all_kinds(tmp_path, write_file):
    """Tied, transposed, expanded and offset tensors, and all types of numbers."""
    bfloat16 = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype("<u2")
    value = {
        "a": Tensor(ARRAY, 0),
        "tied": Tensor(ARRAY, 0),
        "transposed": Tensor(ARRAY, 0, size=(3, 2), stride=(1, 3)),
        "row": Tensor(ARRAY, 0, size=(3,), stride=(1,), offset=3),
        "expanded": Tensor(ARRAY, 0, size=(4, 3), stride=(0, 1)),
        "empty": Tensor(ARRAY[:0], 1),
        "scalar": Tensor(np.float64(2.5), 2),
        "half": Tensor(np.array([0.5], np.float16), 3),
        "bfloat16": Tensor(bfloat16, 4),
        "integer": Tensor(np.array([7]), 5),
        "logical": Tensor(np.array([True, False]), 6),
        "parameter": Call("torch._utils", "_rebuild_parameter", Tensor(ARRAY, 0), True, {}),
        "device": Call("torch", "device", "cuda", 0),
    }
    read = torch_file.read(write_file(tmp_path / "weights.pt", value))
    assert read.pop("device") == "cuda:0"
    expected = {
        "a": ARRAY,
        "tied": ARRAY,
        "transposed": ARRAY.T,
        "row": ARRAY[1],
        "expanded": np.tile(ARRAY[0], (4, 1)),
        "empty": ARRAY[:0],
        "scalar": np.float64(2.5),
        "half": np.array([0.5], np.float16),
        "bfloat16": np.array([1.5, -2.0], np.float32),
        "integer": np.array([7]),
        "logical": np.array([True, False]),
        "parameter": ARRAY,
    }
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name, strict=True)
    assert np.shares_memory(read["a"], read["tied"])
    assert state_files.read(tmp_path / "weights.pt").keys() == expected.keys()
    assert torch_file.is_torch_file(tmp_path / "weights.pt")


def test_modules_become_records(tmp_path):
    """Classes are not imported: this file names one that does not exist."""
    child = module("absent.Linear", {"weight": Tensor(ARRAY, 0), "bias": None})
    model = module(
        "absent.Model",
        {"scale": Tensor(np.float32(3.0), 1)},
        {"first": child, "second": child},
        act=Global("absent", "silu"),
        irreps=Call("absent", "Irreps", ((4, (0, 1)),)),
    )
    content = torch_file.read(write(tmp_path / "X.model", model))
    assert isinstance(content, Record) and content.kind == "absent.Model"
    assert plain(content.get("act")) == "absent.silu"
    assert plain(content.get("irreps")) == [[4, [0, 1]]]
    assert state_dict(content).keys() == {"scale", "first.weight", "second.weight"}
    np.testing.assert_array_equal(state_files.read(tmp_path / "X.model")["second.weight"], ARRAY)


def test_parts_of_storages_in_old_files(tmp_path):
    """Catches a part that is read from the start of its storage."""
    tensor = Tensor(ARRAY, 0, size=(2,), stride=(1,), part=("1", 3, 3))
    read = torch_file.read(write_old(tmp_path / "old.pt", {"a": tensor}))
    np.testing.assert_array_equal(read["a"], [3.0, 4.0])
    tensor.part = ("1", 4, 3)
    with pytest.raises(WeightsError, match="beyond 6 numbers"):
        torch_file.read(write_old(tmp_path / "old.pt", {"a": tensor}))


def _cyclic():
    child = module("absent.Loop")
    child.state["_modules"]["again"] = child
    return child


REFUSED = {
    "sparse": (Call("torch._utils", "_rebuild_sparse_tensor", 1), "a sparse tensor"),
    "quantized": (Call("torch._utils", "_rebuild_qtensor", 1), "a quantized tensor"),
    "float8": (Tensor(ARRAY, 0, kind="Float8_e4m3fnStorage"), "Float8_e4m3fnStorage"),
    "beyond": (Tensor(ARRAY, 0, size=(7,), stride=(1,)), "beyond its 6 numbers"),
    "negative": (Tensor(ARRAY, 0, size=(2,), stride=(-1,)), "a tensor of shape"),
    "huge": (Tensor(ARRAY, 0, size=(2**39,), stride=(0,)), "more numbers than in the file"),
    "many dimensions": (Tensor(ARRAY, 0, size=(1,) * 40, stride=(1,) * 40), "a tensor of shape"),
    "system": (Call("os", "system", "touch executed"), "'os.system'.*not executed"),
    "eval": (Call("builtins", "eval", "1"), "'builtins.eval'.*not executed"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("write_file", [write, write_old])
def test_rejected_content(tmp_path, monkeypatch, name, write_file):
    monkeypatch.chdir(tmp_path)
    value, message = REFUSED[name]
    write_file(Path("file.pt"), {"a": value})
    with pytest.raises(WeightsError, match=message):
        torch_file.read("file.pt")
    assert not Path("executed").exists()


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_nothing_is_executed(tmp_path, monkeypatch):
    """Names that are not rejected are inert: their calls and states only create records."""
    monkeypatch.chdir(tmp_path)
    for function, args in (
        (Path.touch, (Path("executed"),)),
        (np.save, ("executed", 1)),
        (zipfile.ZipFile, ("executed", "w")),
    ):
        write(Path("file.pt"), None, pickle.dumps(Malicious(function, *args), 2))
        assert isinstance(torch_file.read("file.pt"), Record)
    assert not list(Path().glob("executed*"))


def test_other_files_are_rejected(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(FileNotFoundError):
        torch_file.read(path)
    for content in (b"", b"no archive", b"PK\x03\x04", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        assert not torch_file.is_torch_file(path)
        with pytest.raises(WeightsError, match="cannot be read as a file of torch.save"):
            torch_file.read(path)
    write(path, {"a": Tensor(ARRAY, 0)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        torch_file.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
        archive.writestr("archive/constants.pkl", b"")
    with pytest.raises(WeightsError, match="a TorchScript archive"):
        torch_file.read(path)
    whole = write_old(path, {"a": Tensor(ARRAY, 0)}).read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(WeightsError, match="truncated"):
        torch_file.read(path)
    write(path, _cyclic())
    with pytest.raises(WeightsError, match="contain each other"):
        state_files.read(path)
    write(path, {"names": [1, 2]})
    with pytest.raises(WeightsError, match="no state dict in this file"):
        state_files.read(path)


VALUES = {
    "module": module("absent.Model", {"w": Tensor(ARRAY, 0)}, act=Global("torch", "silu")),
    "dict": {"a": Tensor(ARRAY, 0), "b": [1, (2.0, "x")], "c": {"d": None}},
}
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6)


def read_altered(folder, value, is_old, edits, cut):
    """Read a file with altered bytes; only the reader's own errors may leave it."""
    path = (write_old if is_old else write)(folder / "file.pt", value)
    content = bytearray(path.read_bytes())
    if not is_old:  # alter the pickle, whose checksum the archive would notice
        with zipfile.ZipFile(path) as archive:
            content = bytearray(archive.read("archive/data.pkl"))
    for place, byte in edits:
        content[int(place * (len(content) - 1))] = byte
    content = bytes(content[: int(cut * len(content))])
    path.write_bytes(content) if is_old else write(path, value, content or b".")
    tracemalloc.start()
    try:
        state_files.find(torch_file.read(path))
    except WeightsError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100e6


@example("dict", True, [(0.5, 92)], 1.0)  # an invalid escape sequence
@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(VALUES)), st.booleans(), EDITS, st.floats(0.9, 1))
def test_altered_files_raise_only_weights_errors(tmp_path_factory, name, is_old, edits, cut):
    read_altered(tmp_path_factory.mktemp("altered"), VALUES[name], is_old, edits, cut)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(st.sampled_from(sorted(VALUES)), st.booleans(), EDITS, st.floats(0, 1))
def test_many_altered_files(tmp_path_factory, name, is_old, edits, cut):
    folder = tmp_path_factory.getbasetemp() / "altered"
    folder.mkdir(exist_ok=True)
    read_altered(folder, VALUES[name], is_old, edits, cut)


def test_modules_that_occur_many_times_are_rejected(tmp_path):
    """Two children that are the same module, 14 levels deep: 20 kB gave 8 million weights."""
    weights = {f"p{k}": Tensor(ARRAY, 0) for k in range(200)}
    inner = module("a.M", weights)
    for _ in range(14):
        inner = module("a.M", children={"a": inner, "b": inner})
    path = write(tmp_path / "weights.pt", inner)
    with pytest.raises(WeightsError, match="more weights than in any model"):
        state_files.read(path)


def test_long_names_of_nested_modules_are_rejected(tmp_path):
    """Each weight of a module has the names of all modules around it."""
    inner = module("a.M", {"p": Tensor(ARRAY, 0)})
    for _ in range(60):
        inner = module("a.M", children={"m" * 190: inner})
    with pytest.raises(WeightsError, match="malicious"):
        state_files.read(write(tmp_path / "weights.pt", inner))


def test_a_member_beyond_the_end_of_the_archive(tmp_path):
    """zipfile raises EOFError for a header at the end of the file, which is not followed by data."""
    path = write(tmp_path / "weights.pt", {"a": 1})
    data = bytearray(path.read_bytes())
    header = data[: 30 + len("archive/data.pkl")]
    entry, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    data[entry + 42 : entry + 46] = struct.pack("<I", len(data))
    data[end + 20 : end + 22] = struct.pack("<H", len(header))  # length of the comment
    path.write_bytes(data + header)
    with pytest.raises(WeightsError, match="EOFError"):
        torch_file.read(path)

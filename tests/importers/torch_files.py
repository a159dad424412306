"""Writer of files in the formats of torch.save, without torch."""

import io
import pickle
import struct
import zipfile
from pickle import _Pickler as PythonPickler  # its methods can be replaced

import numpy as np

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
KINDS = {
    "<f4": "FloatStorage",
    "<f8": "DoubleStorage",
    "<f2": "HalfStorage",
    "<u2": "BFloat16Storage",
    "<i8": "LongStorage",
    "|b1": "BoolStorage",
}


class Global:
    """Stands for a class or function with the name `module`.`name` in a pickle."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as a call of a `Global`, followed by a state, if any."""

    def __init__(self, module, name, *args, state=None):
        self.function, self.args, self.state = Global(module, name), args, state


class Tensor:
    """Pickles as a tensor of torch; tensors with one `key` share their storage."""

    def __init__(self, array, key, size=None, stride=None, offset=0, kind=None, part=None):
        self.array, self.key, self.offset = np.asarray(array), str(key), offset
        self.size = self.array.shape if size is None else size
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        self.stride = strides if stride is None else stride
        self.kind = kind or KINDS[self.array.dtype.str]
        self.part = part


class _Storage:
    def __init__(self, tensor):
        self.tensor = tensor


class _Pickler(PythonPickler):
    """Writes the pickle of a file; `storages` collects the tensors by key."""

    is_old = False

    def __init__(self, buffer):
        super().__init__(buffer, 2)
        self.storages = {}

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save_reduce(obj.function, obj.args, obj.state, obj=obj)
        elif isinstance(obj, Tensor):
            arguments = (_Storage(obj), obj.offset, obj.size, obj.stride, False, {})
            self.save_reduce(Global("torch._utils", "_rebuild_tensor_v2"), arguments, obj=obj)
        else:
            super().save(obj, save_persistent_id)

    def save_reduce(self, func, args, state=None, *_, obj=None, **__):
        self.save(func)
        self.save(args)
        self.write(pickle.REDUCE)
        if state is not None:
            self.save(state)
            self.write(pickle.BUILD)

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        tensor = obj.tensor
        self.storages.setdefault(tensor.key, tensor.array)
        pid = ("storage", Global("torch", tensor.kind), tensor.key, "cpu", tensor.array.size)
        return (*pid, tensor.part) if self.is_old else pid


class _OldPickler(_Pickler):
    is_old = True


def write(path, value, data=b"", compression=zipfile.ZIP_STORED):
    """Write `value` as an archive; `data` replaces the pickle."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data or buffer.getvalue())
        for key, array in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
    return path


def write_old(path, value):
    """Write `value` as torch before 1.6 did: pickles, then the numbers."""
    buffer = io.BytesIO()
    for header in (MAGIC, VERSION, {"protocol_version": VERSION, "little_endian": True}):
        pickle.dump(header, buffer, 2)
    pickler = _OldPickler(buffer)
    pickler.dump(value)
    pickle.dump(sorted(pickler.storages), buffer, 2)
    for key in sorted(pickler.storages):
        array = np.ascontiguousarray(pickler.storages[key])
        buffer.write(struct.pack("<q", array.size) + array.tobytes())
    path.write_bytes(buffer.getvalue())
    return path


def module(kind, parameters=(), children=(), **attributes):
    """Return a pickled module of class `kind` with parameters and submodules by name."""
    package, _, name = kind.rpartition(".")
    state = {
        "training": False,
        "_parameters": dict(parameters),
        "_buffers": {},
        "_modules": dict(children),
        "_non_persistent_buffers_set": Call("__builtin__", "set", []),
    }
    return Call(package, name, state=state | attributes)

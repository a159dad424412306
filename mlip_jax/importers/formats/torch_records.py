"""Records of objects whose classes are not imported, and weights of modules among them.

A pickle names classes and functions of other programs. Each of these names becomes a subclass of
`Record`, which keeps its arguments and its state and does nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from mlip_jax.datasets.reader import DatasetError
from mlip_jax.importers.formats.weights import WeightsError

_MAX_NAMES = 10_000  # number of classes; MACE has about 60
_MAX_MODULES = 100_000
_MAX_ARRAYS = 100_000
_MAX_VALUES = 1_000_000  # attributes and arrays of all modules, each counted as often as it occurs
_MAX_DEPTH = 100
_MAX_NAME = 200  # characters of the name of a module
_MAX_PREFIX = 2000  # characters of the names of all modules around a module
# Names that malicious pickles call and weights do not need. All other names are inert as well; files
# with these names are rejected to warn the user.
_MODULES_OF_PROGRAMS = frozenset(
    "asyncio code codeop commands ctypes ftplib http importlib marshal multiprocessing nt os pdb "
    "pickle pip platform popen2 posix profile pty runpy shutil signal smtplib socket subprocess sys "
    "telnetlib tempfile timeit trace urllib webbrowser".split()
)
_BUILTINS = ("__builtin__", "builtins")
_FUNCTIONS_OF_PROGRAMS = frozenset(
    "__import__ breakpoint compile delattr eval exec execfile globals input open setattr vars".split()
)


class Record:
    """Object of a class that was not imported.

    Attributes:
      kind: Full name of the class or function, such as "mace.modules.models.MACE".
      arguments: Arguments of the call that creates the object.
      keywords: Keyword arguments of that call.
      state: State that the object sets, or None.
      values: Items that are appended, as of a list.
      entries: Items that are set by key, as of a dict.
    """

    kind = ""
    __slots__ = ("arguments", "entries", "keywords", "state", "values")

    def __new__(cls, *arguments, **keywords):
        """Keep the arguments."""
        record = object.__new__(cls)
        record.arguments, record.keywords, record.state = arguments, keywords, None
        record.values, record.entries = [], {}
        return record

    def __init__(self, *_, **__):
        """Accept all arguments; `__new__` keeps them."""

    def __call__(self, *arguments, **keywords):
        """Return a record of the call of this object, such as a bound method."""
        return Record(self, *arguments, **keywords)

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.entries[key] = value

    def append(self, value):
        """Keep an item of a list."""
        self.values.append(value)

    def extend(self, values):
        """Keep items of a list."""
        if not isinstance(values, list | tuple):
            raise pickle.UnpicklingError("items that are not a list")
        self.values.extend(values)

    def add(self, value):
        """Keep an item of a set."""
        self.values.append(value)

    @property
    def name(self) -> str:
        """Name of the class without its module."""
        return self.kind.rpartition(".")[2]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the object; for a module also a parameter, buffer or submodule."""
        attributes = attributes_of(self)
        for values in (attributes, *(attributes.get(group) for group in _GROUPS)):
            values = entries_of(values)
            if name in values:
                return values[name]
        return default


_GROUPS = ("_parameters", "_buffers", "_modules")


def record_classes(source: str) -> Callable[[str, str], type[Record]]:
    """Return a function that creates the class of records for each name of a pickle.

    The function raises DatasetError for names of functions that start programs or read files, and
    if there are more names than in any model.
    """
    known: dict[tuple[str, str], type[Record]] = {}

    def of_name(module: str, name: str) -> type[Record]:
        starts_programs = module.partition(".")[0] in _MODULES_OF_PROGRAMS or (
            module in _BUILTINS and name in _FUNCTIONS_OF_PROGRAMS
        )
        if starts_programs:
            raise DatasetError(
                f"{source}: the pickle requests '{f'{module}.{name}'[:200]}', which no weights need. "
                "This file may be malicious; it was not executed. Get it from its original source."
            )
        if len(known) >= _MAX_NAMES:
            raise DatasetError(f"{source}: more than {_MAX_NAMES} classes; the file is malicious")
        if (module, name) not in known:
            content = {"__slots__": (), "kind": f"{module}.{name}"[:300]}
            known[module, name] = type("Record", (Record,), content)
        return known[module, name]

    return of_name


def kind_of(value: Any) -> str:
    """Return the full name of a record or of a class, "" for other values."""
    is_class = isinstance(value, type) and issubclass(value, Record)
    return value.kind if is_class or isinstance(value, Record) else ""


def entries_of(value: Any) -> dict:
    """Return the entries of a dict, or of a record of a class derived from dict."""
    if isinstance(value, Record):
        value = value.entries
    return value if isinstance(value, dict) else {}


def attributes_of(record: Record) -> dict:
    """Return the attributes of an object by name.

    The state may be a pair of attributes and slots. A module of torch.fx passes its attributes as
    the first argument.
    """
    state = record.state
    if isinstance(state, tuple):
        state = {k: v for part in state if isinstance(part, dict) for k, v in part.items()}
    if not isinstance(state, dict) and record.arguments:
        state = record.arguments[0]
    return state if isinstance(state, dict) else {}


def is_module(value: Any) -> bool:
    """Return whether a value is a record of a torch.nn.Module."""
    return isinstance(value, Record) and "_parameters" in attributes_of(value)


def modules_of(root: Record) -> Iterator[tuple[str, Record]]:
    """Yield the modules in a module with the prefix of their names, from the top.

    Raises:
      WeightsError: Modules contain themselves, or there are more than in any model.
    """
    waiting, count = [("", root, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        count += 1
        if count > _MAX_MODULES or depth > _MAX_DEPTH or len(prefix) > _MAX_PREFIX:
            raise WeightsError("the modules contain each other: the file is corrupted or malicious")
        yield prefix, module
        children = entries_of(attributes_of(module).get("_modules"))
        waiting += [
            (f"{prefix}{_check_name(name)}.", child, depth + 1)
            for name, child in reversed(children.items())
            if isinstance(child, Record)
        ]


def _check_name(name: Any) -> str:
    """Return the name of a module or array. Raise WeightsError unless it is a short text."""
    if not isinstance(name, str) or len(name) > _MAX_NAME:
        raise WeightsError("the name of a module is not a short text: the file is malicious")
    return name


def state_dict(root: Record) -> dict[str, np.ndarray]:
    """Return the parameters and persistent buffers of a module by the names of its state dict."""
    arrays, count = {}, 0
    for prefix, module in modules_of(root):
        attributes = attributes_of(module)
        left_out = frozenset(_items(attributes.get("_non_persistent_buffers_set")))
        groups = [entries_of(attributes.get(group)) for group in _GROUPS[:2]]
        # A module can occur many times, as a part of others.
        count += len(attributes) + len(left_out) + sum(map(len, groups))
        if count > _MAX_VALUES or len(arrays) > _MAX_ARRAYS:
            raise WeightsError("more weights than in any model: the file is malicious")
        for entries in groups:
            for name, value in entries.items():
                if isinstance(value, np.ndarray) and name not in left_out:
                    arrays[prefix + _check_name(name)] = value
    return arrays


def _items(value: Any) -> list[str]:
    """Return the texts in a set, which old pickles create from a list."""
    if isinstance(value, Record):
        value = value.arguments[0] if value.arguments else value.values
    items = value if isinstance(value, set | frozenset | list | tuple) else ()
    return [item for item in items if isinstance(item, str)]


def plain(value: Any) -> Any:
    """Return settings without records, as far as they have a plain form.

    Classes and functions become their names, lists and dicts of other programs their items, other
    objects their attributes. Nested deeper than any settings, values become None.
    """
    return _plain(value, _MAX_DEPTH // 4, [_MAX_MODULES])


def _plain(value, depth, left):
    left[0] -= 1
    if left[0] < 0:
        raise WeightsError("the settings contain more values than any model's: malicious file")
    if depth == 0:
        return None
    if isinstance(value, Mapping):
        return {k: _plain(v, depth - 1, left) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, depth - 1, left) for v in value]
    if isinstance(value, type):
        return kind_of(value) or value.__name__
    if not isinstance(value, Record):
        return value
    if value.entries:
        return {k: _plain(v, depth - 1, left) for k, v in value.entries.items()}
    if value.values:
        return [_plain(v, depth - 1, left) for v in value.values]
    if (attributes := attributes_of(value)) and value.state is not None:
        return _of_settings(attributes, depth, left)
    if len(value.arguments) == 1:  # enumerations and containers
        return _plain(value.arguments[0], depth - 1, left)
    return kind_of(value)


def _of_settings(attributes, depth, left):
    """Return attributes; OmegaConf's nodes keep their content in `_content` or `_val`."""
    for name in ("_content", "_val"):
        if name in attributes:
            return _plain(attributes[name], depth - 1, left)
    return {k: _plain(v, depth - 1, left) for k, v in attributes.items()}

"""Operations on configs: completion by defaults, checks, identity, differences and JSON."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from mlip_jax import configs
from mlip_jax.defaults import TASKS
from mlip_jax.defaults.errors import ConfigError, unknown_name
from mlip_jax.defaults.training import LENGTH, TERMS

__all__ = [
    "TERMS",
    "ConfigError",
    "complete",
    "differences",
    "find_file",
    "identity",
    "import_file",
    "load_file",
    "part_with",
    "rename_fields",
    "replaced_fields",
    "to_dict",
    "unknown_name",
    "warn_renamed",
    "with_current_names",
]

log = logging.getLogger(__name__)

# Dotted names of free parts, whose fields are checked by the classes that they are options of.
FREE_FIELDS = frozenset(
    name for task in TASKS.values() for name, field in task.fields() if field.is_free
)


# Shipped configs: mlip_jax/configs in an installed package, configs/ in a checkout.
_SHIPPED = Path(configs.__path__[0])


def shipped_names() -> list[str]:
    """Return the names of the configs shipped with the package, in alphabetical order."""
    return sorted(path.stem for path in _SHIPPED.glob("*.py") if path.stem != "__init__")


def find_file(path: str) -> str:
    """Find a config file: an existing file, or otherwise a shipped config.

    In any folder, "spice" refers to the shipped config of that name, and so does "configs/spice.py",
    unless that file exists.

    Args:
      path: "FILE" or "NAME", each with ":ARGUMENT" if the config takes an argument.

    Returns:
      The path of the file, with the argument. A path that is neither is returned unchanged.

    Raises:
      ConfigError: There is no shipped config of that name. The message lists the nearest name and
        all names.
    """
    file, colon, argument = path.partition(":")
    given = Path(file)
    if given.is_file() and given.suffix == ".py":
        return path
    if given.name == file and given.suffix != ".py":  # a file "spice" is no config
        if file not in shipped_names():
            hint = (
                f" For your own file, use --config={file}.py."
                if Path(f"{file}.py").is_file()
                else ""
            )
            raise ConfigError(unknown_name("shipped config", file, shipped_names()) + hint)
        return f"{_SHIPPED / file}.py{colon}{argument}"
    shipped = _SHIPPED / given.name
    return (
        f"{shipped}{colon}{argument}"
        if given.parent == Path("configs") and shipped.is_file()
        else path
    )


def load_file(path: str) -> ml_collections.ConfigDict:
    """Return the config of a file, or of a shipped config: "spice:painn", see `find_file`.

    Raises:
      ConfigError: There is no such config, or it does not accept the argument.
      FileNotFoundError: The file does not exist.
    """
    file, colon, argument = find_file(path).partition(":")
    module, given = import_file(file), (argument,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*given)
    except TypeError as error:
        raise ConfigError(f"{path}: get_config: {error}") from error
    return module.get_config(*given)


def import_file(file: str) -> ModuleType:
    """Import a config file as a module.

    Raises:
      FileNotFoundError: The file does not exist.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such config file")
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complete(
    config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
    """Return `defaults` with the values of `config`, and check every value.

    Raises:
      ConfigError: A field of `config` is unknown (the message suggests the nearest name), has a
        value of another type, or has a value outside its choices or bounds (the message lists all
        such fields).
    """
    merged = defaults.copy_and_resolve_references()
    merged.unlock()
    _merge(merged, rename_fields(config), "")
    task = TASKS.get(merged.get("task"))
    if task is not None and (problems := list(task.problems(to_dict(merged)))):
        raise ConfigError("; ".join(problems))
    return merged


def _merge(target, given, path):
    """Copy the values of `given` to `target`, whose fields have the prefix `path`."""
    for key in given:
        name = f"{path}{key}"
        if key not in target:
            raise ConfigError(unknown_name("config field", name, [f"{path}{k}" for k in target]))
        try:
            value = given.get_ref(key).get() if hasattr(given, "get_ref") else given[key]
        except ValueError as error:  # None for a field that is not declared as optional
            raise ConfigError(f"config field {name!r} must have a value, received None") from error
        if name in FREE_FIELDS:
            target[key] = value
        elif isinstance(target[key], ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ConfigError(
                    f"config field {name!r} contains further fields, received {value!r}"
                )
            _merge(target[key], value, f"{name}.")
        else:
            try:
                target[key] = value
            except TypeError as error:
                raise ConfigError(f"config field {name!r}: {error}") from error


# {former dotted name: dotted name} of the renamed fields of all tasks.
RENAMED = {old: new for task in TASKS.values() for old, new in task.renamed().items()}


def rename_fields(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config with the current names of its fields, and log each former name.

    A config without former names is returned itself, otherwise a copy.

    Raises:
      ConfigError: A field is set by both of its names.
    """
    task = TASKS.get(config.get("task"))
    names = {} if task is None else task.renamed()
    former = [old for old in names if part_with(config, old) is not None]
    if not former:
        return config
    config, defaults = copy.deepcopy(config), task.build()
    config.unlock()
    for old in former:
        new = names[old]
        target, name = part_with(config, old), new.rpartition(".")[2]
        value = target[old.rpartition(".")[2]]
        default = part_with(defaults, new)[name]
        if name in target and target[name] != default and target[name] != value:
            raise ConfigError(
                f"config fields {old!r} and {new!r} are the same field, received {value!r} and "
                f"{target[name]!r}; set only {new!r}"
            )
        warn_renamed(old, new)
        with config.ignore_type():  # `complete` checks the type
            target[name] = value
        del target[old.rpartition(".")[2]]
    return config


def part_with(config: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict | None:
    """Return the part of a config that has the field with this dotted name, or None."""
    *parents, last = name.split(".")
    for parent in parents:
        config = config.get(parent) if isinstance(config, ml_collections.ConfigDict) else None
    return config if isinstance(config, ml_collections.ConfigDict) and last in config else None


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Log that a config field has another name now. Further calls of a process log nothing."""
    log.warning("config field %s is deprecated: use %s", old, new)


def replaced_fields(config: ml_collections.ConfigDict, given: Mapping[str, Any]) -> list[str]:
    """Return the fields of a config that a command has to unset, because it sets alternatives.

    train.num_epochs replaces train.num_steps, so a command that sets only the steps unsets the
    epochs of the config.

    Args:
      config: Config whose fields the command sets.
      given: Values that the command sets, by dotted name.

    Raises:
      ConfigError: The command sets both.
    """
    steps, epochs = LENGTH
    if given.get(steps) is None:
        return []
    if given.get(epochs) is not None:
        raise ConfigError(
            f"{steps} and {epochs} both set the length of training, received {given[steps]} and "
            f"{given[epochs]}; set one of them"
        )
    return [] if part_with(config, epochs) is None else [epochs]


def with_current_names(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plain config that an older version wrote, with the current names of its fields."""
    name = plain.get("task")
    task = TASKS.get(name) if isinstance(name, str) else None
    return dict(plain) if task is None else task.with_current_names(plain)


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Convert a config to plain nested dictionaries and lists, ready for JSON."""

    def plain(value):
        if isinstance(value, ml_collections.ConfigDict | Mapping):
            return {k: plain(value[k]) for k in sorted(value)}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config)


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return the plain config without the fields that do not change results.

    A workdir belongs to one identity.
    """
    plain = to_dict(config)
    task = TASKS.get(plain.get("task"))
    return plain if task is None else task.identity(plain)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Return a line `field: old -> new` for each difference between two plain configs."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{path}{key}.")
        elif a != b and not (a != a and b != b):  # NaN, the "any" of a filter, equals itself here
            lines.append(f"{path}{key}: {a!r} -> {b!r}")
    return lines

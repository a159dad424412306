"""Configs: the known fields with their defaults, checks with helpful errors, differences, and JSON."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

from mlip_jax import configs


class ConfigError(ValueError):
    """A config holds something that it must not."""


# Energy terms that can be added to a model are the files of mlip_jax/terms. The folder is listed and not imported,
# which would take seconds.
TERMS = tuple(sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).with_name("terms"))])
                     if not m.ispkg))
# Models and energy terms check their own options.
FREE_FIELDS = ("model.options", "property.heads", *(f"potential.{term}_options" for term in TERMS))


# mlip_jax/configs of an installed package, configs/ of a checkout.
_SHIPPED = Path(configs.__path__[0])


def shipped_names() -> list[str]:
    """Return the names of the configs that are part of the package, in alphabetical order."""
    return sorted(path.stem for path in _SHIPPED.glob("*.py") if path.stem != "__init__")


def find_file(path: str) -> str:
    """Find a config file: an existing file, or else a shipped config.

    In any folder, "spice" and "configs/spice.py" are the shipped config of that name, unless the current folder has a
    file with the given path.

    Args:
      path: "FILE" or "NAME", each with ":ARGUMENT" if the config takes an argument.

    Returns:
      The path of the file, with the argument. A path that is neither is returned as it is.

    Raises:
      ConfigError: There is no shipped config of that name; the message has the nearest one and all there are.
    """
    file, colon, argument = path.partition(":")
    given = Path(file)
    if given.is_file():
        return path
    if given.name == file and given.suffix != ".py":
        if file not in shipped_names():
            hint = f" Your own file is --config={file}.py." if Path(f"{file}.py").is_file() else ""
            raise ConfigError(unknown_name("shipped config", file, shipped_names()) + hint)
        return f"{_SHIPPED / file}.py{colon}{argument}"
    shipped = _SHIPPED / given.name
    return f"{shipped}{colon}{argument}" if given.parent == Path("configs") and shipped.is_file() else path


def complete(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`defaults` with the values of `config`.

    Raises:
      ConfigError: `config` has a field that does not exist (the nearest name is given) or of another type.
    """
    merged = defaults.copy_and_resolve_references()
    merged.unlock()
    _merge(merged, config, "")
    return merged


def _merge(target, given, path):
    for key in given:
        where = f"{path}{key}"
        if key not in target:
            raise ConfigError(unknown_name("config field", where, [f"{path}{k}" for k in target]))
        value = given.get_ref(key).get() if hasattr(given, "get_ref") else given[key]
        if where in FREE_FIELDS:
            target[key] = value
        elif isinstance(target[key], ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise ConfigError(f"config field {where!r} holds further fields; received {value!r}")
            _merge(target[key], value, f"{where}.")
        else:
            try:
                target[key] = value
            except TypeError as error:
                raise ConfigError(f"config field {where!r}: {error}") from error


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Plain nested dictionaries and lists, ready for JSON."""

    def plain(value):
        if isinstance(value, ml_collections.ConfigDict | Mapping):
            return {k: plain(value[k]) for k in sorted(value)}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(config)


# Fields that came later, and their defaults: folders of runs that were begun before do not have them. Those of no part
# have an empty one.
_LATER = (("optimizer", "rates", ""), ("data", "held_out", ""), ("data", "selection", "random"),
          ("data", "selection_force_field", ""), ("data", "fewer_conformers", "exclude"),
          ("report", "max_domain", 1_000), ("", "trajectory_format", "extxyz"))


def identity(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The plain config without what changes no result, so that a folder stays that of a run when it changes."""
    plain = to_dict(config)
    if plain.get("task") in ("relax", "predict"):
        for name in ("num_processes", "batch_atoms", "batch_size", "limit"):
            plain.pop(name, None)
    if plain.get("task") == "generate_conformers":
        plain.pop("num_processes", None)
    if plain.get("task") == "md":
        for name in ("num_steps", "restart_seconds"):
            plain.pop(name, None)
    if plain.get("task") == "stability":
        plain.pop("restart_seconds", None)
        if not plain.get("compare_picoseconds"):
            for name in ("compare_picoseconds", "compare_temperature", "trajectory_format", "oracle"):
                plain.pop(name, None)
    for path in ("data.refuse", "data.verify", "store.num_processes", "train.on_nonfinite", "train.resident",
                 "train.steps_per_dispatch", "train.profile_steps", "oracle.num_processes", "oracle.cache",
                 "relax.batch_atoms", "diversity.num_processes", "data.test_geometries"):
        part, name = path.split(".")
        plain.get(part, {}).pop(name, None)
    if not any(plain.get("potential", {}).get(term) for term in TERMS):
        plain.pop("potential", None)
    for part, name, default in _LATER:
        holder = plain.get(part) if part else plain
        if isinstance(holder, dict) and holder.get(name) == default:
            holder.pop(name)
    if plain.get("task") in ("train", "diversity") and not plain.get("init", {}).get("workdir"):
        plain.pop("init", None)
    if not plain.get("dens", {"weight": 1})["weight"]:
        plain.pop("dens")
    return plain


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Lines `field: old -> new` for all that differs between two plain configs."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{path}{key}.")
        elif a != b and not (a != a and b != b):  # NaN, which says "any" of a filter, is the same as NaN
            lines.append(f"{path}{key}: {a!r} -> {b!r}")
    return lines


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that does not exist: the nearest one, and all there are."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(known)}."

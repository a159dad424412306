"""Sweeps: the variants of a config, run one after another, each as a process of its own, and collected in a table.

A config file has, beside get_config(), a function sweep() that returns a list of variants: dictionaries of config
fields with the values that replace those of get_config(), and of the command line.

    def sweep():
        return product({"model.name": ["so3krates", "painn"], "seed": [0, 1, 2]})

A variant may have a "name", of its folder; else it is made of its values. With "config" it is a variant of another
config file, "FILE" or "FILE:ARGUMENT", of which the values are changed. "{sweep}/NAME" in a value is the folder of the
variant NAME, which is run before.

With a function report(folder) the config file makes a report of its own of what is done, at the end of a sweep.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")
_LONGEST = 80  # characters of a name
SWEEP = "{sweep}"
_FOLDER = re.compile(r"\{sweep\}/([A-Za-z0-9._+=-]+)")  # a comma ends it: several folders may stand in a value


class Variant(NamedTuple):
    """A variant of a config.

    Attributes:
      name: Of its folder; unique within a sweep.
      overrides: {dotted name of a config field: value}.
      config: With the overrides.
      config_file: That it is a variant of, where it is not that of the sweep.
    """

    name: str
    overrides: dict[str, Any]
    config: ml_collections.ConfigDict
    config_file: str = ""

    @property
    def needs(self) -> list[str]:
        """Names of the variants whose folders are in its values."""
        return sorted(set(_FOLDER.findall(to_text(self.overrides))))


def product(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The grid over values of config fields; the last one changes fastest.

    >>> product({"seed": [0, 1], "train.batch_size": [8]})
    [{'seed': 0, 'train.batch_size': 8}, {'seed': 1, 'train.batch_size': 8}]

    Raises:
      ConfigError: The values of a field are not a sequence, or there are none.
    """
    for path, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f"product: values of {path!r} must be a list with at least one; received {values!r}")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def load(config_file: str, config: ml_collections.ConfigDict) -> list[Variant]:
    """The variants that sweep() of a config file gives, all of them checked.

    Args:
      config_file: "FILE" or "FILE:ARGUMENT", as given to --config. The argument goes to sweep() too if it takes one.
      config: What the overrides are applied to.

    Raises:
      ConfigError: There is no sweep(), it returns something else, two variants are the same, or a variant has a field
        that does not exist, a value of another type, or a model or option that does not exist.
    """
    path, _, argument = config_file.partition(":")
    given = _call(path, "sweep", argument)
    if not isinstance(given, Sequence) or not given or not all(isinstance(v, Mapping) for v in given):
        raise ConfigError(f"{config_file}: sweep() must return a list of dictionaries, such as [{{'seed': 0}}, "
                          f"{{'seed': 1}}]; received {given!r}")
    found, names = [], [v.get("name") for v in given]
    for number, variant in enumerate(given):
        try:
            overrides = plain({k: v for k, v in variant.items() if k not in ("name", "config")})
            other = variant.get("config", "")
            base = _call(other.partition(":")[0], "get_config", other.partition(":")[2]) if other else config
            found.append((overrides, _checked(override(base, overrides)), other))
        except ValueError as error:
            raise ConfigError(f"{config_file}: variant {number} of the sweep, {dict(variant)!r}: {error}") from error
    variants = [Variant(name, *v) for name, v in zip(_names(config_file, names, [v[:2] for v in found]), found)]
    for v in variants:
        unknown = [name for name in v.needs if name not in {w.name for w in variants}]
        if unknown:
            raise ConfigError(f"{config_file}: {v.name} needs the folder of "
                              + configs.unknown_name("variant", unknown[0], [w.name for w in variants]))
    needs = {v.name: v.needs for v in variants}
    for name in needs:
        if name in _all_needs(name, needs):
            raise ConfigError(f"{config_file}: {name} needs its own folder, itself or through others")
    return variants


def _all_needs(name: str, needs: Mapping[str, Sequence[str]]) -> set[str]:
    """What a variant needs, and what that needs."""
    found, left = set(), list(needs[name])
    while left:
        if (here := left.pop()) not in found:
            found.add(here)
            left += needs[here]
    return found


def reporter(config_file: str) -> Callable[[Path], Any] | None:
    """The function report(folder) of a config file, if it has one."""
    return getattr(_module(config_file.partition(":")[0]), "report", None)


def _module(path: str):
    path = configs.find_file(path)
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None or not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(path: str, name: str, argument: str) -> Any:
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {name}(): add one that returns a list of variants, such as "
                          "[{'seed': 0}, {'seed': 1}], or run it without --sweep")
    return function(*[argument] if argument and inspect.signature(function).parameters else [])


def _checked(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config that can be trained by, with a model that exists, so that a slip shows before the first variant runs."""
    if config.get("task") == "property":
        configs.complete(config, defaults.property_defaults())
    of_task = {"train": defaults.train_defaults, "diversity": defaults.diversity_defaults}.get(config.get("task"))
    if of_task is not None:
        from mlip_jax.potential import create_model
        from mlip_jax.training.options import check
        if config.model.name:  # else the one of init.workdir, which may not be there yet
            create_model(config.model, config.get("potential"))
        check(configs.complete(config, of_task()))
    return config


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """A copy of `config` with other values of some fields.

    Args:
      overrides: {dotted name: value}. A dictionary as value changes the fields that it names; of options of a model or
        of an energy term it replaces all.

    Raises:
      ConfigError: There is no such field (the nearest name is given), or the value is of another type.
    """
    changed = copy.deepcopy(config)  # keeps references between fields, and which may be unset
    changed.unlock()
    overrides = dict(_flat(overrides))
    for path in sorted(overrides, key=lambda p: p.count(".")):  # what holds further fields before these
        *parents, name = path.split(".")
        target = changed
        for depth, parent in enumerate(parents, 1):
            target = target[parent] if parent in target else _added(target, parent)
            if not isinstance(target, ml_collections.ConfigDict):
                where = ".".join(parents[:depth])
                raise ConfigError(f"config field {where!r} holds no further fields; received {path!r}")
        value = overrides[path]
        with changed.ignore_type():  # types are checked below, where the message has the name of the field
            target[name] = ml_collections.ConfigDict(value) if isinstance(value, Mapping) else value
    configs.complete(changed, config)
    return changed


def _flat(overrides: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in overrides.items():
        where = f"{path}{key}"
        if isinstance(value, Mapping) and where not in configs._FREE:
            yield from _flat(value, f"{where}.")
        else:
            yield where, value


def _added(target: ml_collections.ConfigDict, name: str) -> ml_collections.ConfigDict:
    target[name] = ml_collections.ConfigDict()
    return target[name]


def plain(overrides: Any) -> Any:
    """The same of plain dictionaries, lists, tuples, strings, numbers, booleans and None.

    Raises:
      ConfigError: There is something else in it.
    """
    if isinstance(overrides, np.generic):
        return overrides.item()
    if isinstance(overrides, ml_collections.ConfigDict | Mapping):
        return {str(k): plain(v) for k, v in overrides.items()}
    if isinstance(overrides, list | tuple):
        return type(overrides)(map(plain, overrides))
    if overrides is None or isinstance(overrides, bool | int | float | str):
        return overrides
    raise ConfigError(f"a config field cannot be overridden with {overrides!r} of type {type(overrides).__name__}; "
                      "expected a number, string, boolean, None, or a list, tuple or dictionary of them")


def to_text(overrides: Mapping[str, Any]) -> str:
    """Overrides as the ASCII text that `parse` takes: a Python dictionary."""
    return ascii(plain(overrides))


def parse(text: str) -> dict[str, Any]:
    """Overrides from the text of a Python dictionary of literals; inf and nan are numbers.

    >>> parse("{'model.options.degrees': (1, 2), 'potential.long_range_cutoff': inf}")
    {'model.options.degrees': (1, 2), 'potential.long_range_cutoff': inf}

    Raises:
      ConfigError: It is something else.
    """
    try:
        overrides = ast.literal_eval(_Numbers().visit(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"overrides are no dictionary: {text!r} ({error}); expected one such as "
                          "\"{'model.options.degrees': (1, 2), 'seed': 1}\"") from error
    if not isinstance(overrides, dict) or not all(isinstance(k, str) for k in overrides):
        raise ConfigError(f"overrides must be a dictionary of config fields; received {text!r}")
    return overrides


class _Numbers(ast.NodeTransformer):
    """inf and nan, which are names to Python."""

    def visit_Name(self, node):
        return ast.Constant({"inf": math.inf, "nan": math.nan}[node.id]) if node.id in ("inf", "nan") else node


def _names(config_file, given, found) -> list[str]:
    """A name for each variant: the given one, or one made of the overrides."""
    paths = dict.fromkeys(path for overrides, _ in found for path in overrides)
    short = _short_paths(paths)
    names = [name or _made(overrides, short) for name, (overrides, _) in zip(given, found)]
    places: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        places.setdefault(str(name).lower(), []).append(number)  # some file systems do not tell A from a
    for name, same in places.items():
        if len(same) > 1 and any(given[i] for i in same):
            raise ConfigError(f"{config_file}: variants {same} of the sweep have the same name {name!r}")
        if len({to_text(dict(sorted(found[i][0].items()))) for i in same}) < len(same):
            raise ConfigError(f"{config_file}: variants {same} of the sweep are the same, {found[same[0]][0]!r}; give "
                              'each a "name" if that is meant')
        if len(same) > 1:
            for i in same:
                names[i] = _with_digest(names[i], found[i][0])
    for name in names:
        if not isinstance(name, str) or not _SAFE.fullmatch(name) or len(name) > _LONGEST or name.startswith("sweep"):
            raise ConfigError(
                f"{config_file}: {name!r} cannot be the name of a variant, which is that of its folder: letters, "
                f"digits and . _ + = , - (the first a letter or digit), at most {_LONGEST}, not beginning with 'sweep'")
    return names


def _short_paths(paths) -> dict[str, str]:
    """The last part of each path; the one before it in place of "name"; all of it where that is not unique."""
    short = {}
    for path in paths:
        parts = path.split(".")
        short[path] = parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]
    return {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}


def _made(overrides: Mapping[str, Any], short: Mapping[str, str]) -> str:
    name = ",".join(f"{short[path]}={_text(value)}" for path, value in overrides.items())
    name = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", name) or "base"
    return name if len(name) <= _LONGEST else _with_digest(name, overrides)


def _with_digest(name: str, overrides: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(to_text(overrides).encode()).hexdigest()[:8]
    return f"{name[:_LONGEST - 9]}-{digest}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{k}-{_text(v)}" for k, v in value.items())
    return "-".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def differing(variants: Sequence[Variant], config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """For each variant the overrides that are not the same in all; `config` has the value where there is none.

    Dictionaries are left out where the other values tell what they are: options that go with the name of a model.
    """
    paths = dict.fromkeys(path for v in variants for path in v.overrides)
    columns = {path: [v.overrides.get(path, _value(config, path)) for v in variants] for path in paths}
    columns = {path: column for path, column in columns.items() if len(set(map(repr, column))) > 1}
    bare = {path: column for path, column in columns.items() if not any(isinstance(v, Mapping) for v in column)}
    others = list(map(repr, zip(*bare.values()))) if bare else [""] * len(variants)
    shown = {path: column for path, column in columns.items()
             if path in bare or len(set(zip(others, map(repr, column)))) > len(set(others))}
    return [{path: column[i] for path, column in shown.items()} for i in range(len(variants))]


def _value(config: ml_collections.ConfigDict, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(config, ml_collections.ConfigDict) or part not in config:
            return None
        config = config[part]
    return plain(config)

"""Short form of the command line: `mlip-jax relax --force_field runs/spice molecules.smi`.

The first argument names a config. `--FIELD VALUE` sets a field of that config, and an argument
without a flag is the input of its task. `expand` rewrites this to the long form, which the rest of
the program uses: `--config=relax --config.force_field=runs/spice --config.input=molecules.smi`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import ml_collections
from absl import flags

from mlip_jax.config import ConfigError, find_file, part_with, unknown_name
from mlip_jax.defaults import TASKS
from mlip_jax.sweeps.variants import call_config_file

HELP = frozenset({"--help", "-help", "-h", "-?"})

# Fields that an argument without a flag sets; the first one that the config has.
_INPUTS = ("input", "smiles", "data.path")


def expand(args: Sequence[str]) -> list[str]:
    """Return a command line in the long form. One that begins with a flag is returned unchanged.

    Args:
      args: Command line, beginning with the program. The flags of the command must be defined.

    Raises:
      ConfigError: The config, or one of the fields, does not exist.
    """
    if len(args) < 2 or args[1].startswith("-"):
        return list(args)
    name, rest = args[1], list(args[2:])
    if HELP & set(rest):
        return [args[0], f"--config={name}", "--help"]
    config = _load(name)
    names = dict(_fields(config))
    long = [args[0], f"--config={name}"]
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            long.append(f"--config.{_input_field(name, names, argument, long)}={argument}")
        elif _is_flag(argument):
            long += [argument, *_value_of_flag(argument, rest)]
        else:
            long.append(_set_field(name, config, names, argument, rest))
    return long


def _is_flag(argument: str) -> bool:
    """Return whether an argument is a flag of the command, such as --workdir."""
    flag = argument.lstrip("-").partition("=")[0]
    return flag in flags.FLAGS or flag.startswith("no") and flag.removeprefix("no") in flags.FLAGS


def _value_of_flag(argument: str, rest: list[str]) -> list[str]:
    """Remove the value of a flag from the start of the other arguments and return it."""
    flag = argument.lstrip("-")
    return [rest.pop(0)] if rest and flag in flags.FLAGS and not flags.FLAGS[flag].boolean else []


def _set_field(
    name: str,
    config: ml_collections.ConfigDict,
    names: Mapping[str, type],
    argument: str,
    rest: list[str],
) -> str:
    """Return the long form of --FIELD=VALUE, or of --FIELD whose value begins `rest`."""
    flag, equals, value = argument.lstrip("-").partition("=")
    field = flag.removeprefix("config.")
    if not equals and field.startswith("no") and names.get(field.removeprefix("no")) is bool:
        return f"--noconfig.{field.removeprefix('no')}"
    if part_with(config, field) is None and not _is_former(config, field):
        raise ConfigError(unknown_name(f"{name} field", field, names))
    if not equals and names.get(field) is bool:
        return f"--config.{field}"
    if not equals and not rest:
        raise ConfigError(f"--{flag} requires a value")
    return f"--config.{field}={value if equals else rest.pop(0)}"


def _load(name: str) -> ml_collections.ConfigDict:
    """Return the config of "NAME" or "NAME:ARGUMENT"."""
    file, _, argument = find_file(name).partition(":")
    return call_config_file(file, "get_config", argument)


def _fields(config: ml_collections.ConfigDict, path: str = "") -> Iterator[tuple[str, type]]:
    """Yield (dotted name, type) of the fields of a config."""
    for key in config:
        if isinstance(config.get(key), ml_collections.ConfigDict):
            yield from _fields(config[key], f"{path}{key}.")
        else:
            yield f"{path}{key}", config.get_type(key)


def _input_field(name: str, names: Mapping[str, type], argument: str, long: Sequence[str]) -> str:
    """Return the field that an argument without a flag sets, or raise ConfigError."""
    field = next((f for f in _INPUTS if f in names), None)
    if field is None:
        raise ConfigError(f"{argument!r}: the config {name!r} has no input file")
    if any(a.startswith(f"--config.{field}=") for a in long):
        raise ConfigError(
            f"{argument!r}: the input is given twice. Join several files of one format with "
            f'commas: --{field}="a,b"'
            if field == "data.path"
            else f"{argument!r}: the input is given twice"
        )
    return field


def _is_former(config: ml_collections.ConfigDict, field: str) -> bool:
    """Return whether a field had this name in older versions."""
    task = TASKS.get(config.get("task"))
    return task is not None and field in task.renamed()

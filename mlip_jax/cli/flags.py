"""Flags of the command: definitions, parsing with helpful errors, and --help."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from mlip_jax import config as configs
from mlip_jax.cli.subcommands import HELP, expand
from mlip_jax.config import ConfigError, find_file, shipped_names, unknown_name
from mlip_jax.defaults import TASKS
from mlip_jax.defaults.training import LENGTH
from mlip_jax.workdir import unused_workdir

_SWEEP_FLAGS = ("sweep_index", "sweep_list", "sweep_collect")


def define(args: Sequence[str]) -> list[str]:
    """Define the flags. After `parse`, their values are attributes of `absl.flags.FLAGS`.

    Args:
      args: Command line, beginning with the program.

    Returns:
      The command line in its long form; see `subcommands.expand`.
    """
    define_common_flags()
    try:
        args = expand(args)
    except (TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, which defines get_config(), or name of a shipped config: spice. An argument "
        "of get_config() follows a colon: spice:painn.",
        sys_argv=without_unset(with_current_fields(args))[0],
    )
    flags.mark_flag_as_required("config")
    return args


def define_common_flags() -> None:
    """Define the flags except --config."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the run, for checkpoints, metrics and report. If unset, the first of runs/NAME of "
        "the config, runs/NAME-2, ... that has no results of another run.",
    )
    flags.DEFINE_string(
        "scheduler",
        None,
        "Address of a scheduler of dask, as in tcp://head:8786, whose workers compute labels, "
        "embeddings and the reference method in place of processes of this machine.",
    )
    flags.DEFINE_bool(
        "sweep",
        False,
        "Run the variants that sweep() of the config file returns, one after another, each in "
        "WORKDIR/NAME, and write their results to WORKDIR/sweep.md and sweep.csv. Rerun the same "
        "command to run the incomplete variants. Several processes share the variants.",
    )
    flags.DEFINE_string(
        "sweep_index",
        None,
        'With --sweep: run only the variant with this number (from 0), for job arrays; "slurm" '
        "reads the number from SLURM_ARRAY_TASK_ID.",
    )
    flags.DEFINE_bool(
        "sweep_list",
        False,
        "With --sweep: print number, name and fields of each variant; run nothing.",
    )
    flags.DEFINE_bool("sweep_collect", False, "With --sweep: rewrite the table; run nothing.")
    flags.DEFINE_multi_string(
        "overrides",
        None,
        "Values of config fields as a Python dictionary, applied after --config.FIELD: "
        "\"{'model.options.degrees': (1, 2), 'seed': 1}\". A sweep passes them to its variants.",
    )
    flags.DEFINE_integer(
        "profile", None, "Profile this many training steps and write the trace to WORKDIR/trace."
    )
    flags.DEFINE_bool("show_workdir", False, "Print the workdir of the run; run nothing.")
    flags.DEFINE_bool("debug", False, "Show the full traceback of an error.")


def parse(args: Sequence[str], about: str) -> list[str]:
    """Parse a command line like absl. An error such as an unknown field exits with a message.

    Args:
      args: Command line, beginning with the program.
      about: Text that --help prints above the flags.

    Returns:
      The program and the arguments that are not flags.
    """
    try:
        show_help(args[1:], about)
        if not any(a.lstrip("-").partition("=")[0] == "config" for a in args[1:]):
            raise ConfigError(
                "no config is given. Give its name first, as in `mlip-jax spice`. Known: "
                f"{', '.join(shipped_names())}."
            )
        long, unset = without_unset(with_current_fields(with_config_path(args)))
        remaining = flags.FLAGS(long)
        given = flags.FLAGS["config"].override_values
        drop_former_fields(flags.FLAGS.config, given)
        unset += configs.replaced_fields(flags.FLAGS.config, given)
        for name in unset:
            part = configs.part_with(flags.FLAGS.config, name)
            if part is None:
                raise ConfigError(f"the config has no field {name!r}")
            part[name.rpartition(".")[2]] = None
        return remaining
    except ModuleNotFoundError as error:
        if error.name != "configs":
            raise
        sys.exit(
            "error: the config imports from `configs`, but the shipped configs are in "
            "`mlip_jax.configs`. Write `from mlip_jax.configs import NAME`."
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        if any(a.lstrip("-").startswith("config.data.reader_options.") for a in args):
            sys.exit(
                "error: the options of a reader are one field. Write "
                '--config.data.reader_options="NAME=VALUE; NAME=VALUE".'
            )
        sys.exit(f"error: {error_text(error, args)}")
    except flags.Error as error:
        sys.exit(f"error: {error}\nRun with --help for the flags.")


def error_text(error: Exception, args: Sequence[str]) -> str:
    """Return the text of an error. If a flag names an unknown field, state the whole field."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # the text of a KeyError is the repr of its argument, with ml_collections even twice
    text = text.strip("'\"").replace("\\n", "\n").replace("\\'", "'")
    missing, _, hint = text.partition("\n")
    missing = missing.strip("'\"")
    for argument in args:
        flag = argument.lstrip("-").partition("=")[0]
        if missing in flag.removeprefix("no").split(".")[1:]:
            field = flag.partition(".")[2]
            hint = f" {hint.rstrip('.')}." if hint else ""
            if not hint and field.startswith("model."):
                hint = " The options of a model are model.options.NAME."
            if not hint and "_options." in field:
                hint = (
                    f" Set the options of energy terms with --overrides=\"{{'{field}': VALUE}}\"."
                )
            return f"unknown field {field!r} of the config.{hint} --help lists all fields."
    return text


def check(arguments: Sequence[str]) -> None:
    """Check that all arguments are flags, and that the flags are consistent.

    Args:
      arguments: Arguments that are not flags.

    Raises:
      ConfigError: There are such arguments, or a flag for sweeps is given without --sweep.
    """
    if arguments:
        raise ConfigError(f"unknown arguments: {' '.join(arguments)}")
    given = [f"--{name}" for name in _SWEEP_FLAGS if flags.FLAGS[name].value]
    # a sweep passes its flags to its variants, together with --nosweep
    if given and not flags.FLAGS["sweep"].present:
        raise ConfigError(f"{', '.join(given)} requires --sweep")


def workdir(config: ml_collections.ConfigDict) -> str:
    """Return the workdir: --workdir if it is given, else a folder named after the config.

    This is the first of runs/NAME[-ARGUMENT], runs/NAME[-ARGUMENT]-2, ... without results of another
    run, so the same command always has the same workdir, and another one does not need a name.
    """
    if flags.FLAGS.workdir is not None:
        return flags.FLAGS.workdir
    base = default_workdir()
    task = TASKS.get(config.get("task"))
    if flags.FLAGS.sweep or task is None:
        return base
    identity = configs.identity(configs.complete(config, task.build()))
    return str(unused_workdir(base, identity, LENGTH))


def default_workdir(config_file: str | None = None) -> str:
    """Return the first choice of a workdir if none is given: "runs/spice-painn" for "spice.py:painn".

    Args:
      config_file: Config file with its argument. By default that of --config.
    """
    config_file = config_file or config_flags.get_config_filename(flags.FLAGS["config"])
    file, _, argument = config_file.partition(":")
    variant = re.sub(r"[^\w.=+-]+", "-", argument)  # a list of workdirs has commas
    return str(Path("runs", "-".join(filter(None, [Path(file).stem, variant]))))


def apply_overrides(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config with the values of --overrides applied."""
    from mlip_jax.sweeps.overrides import override, parse

    for text in flags.FLAGS.overrides or ():
        config = override(config, parse(text))
    return config


def set_profile(config: ml_collections.ConfigDict) -> None:
    """Set train.profile_steps to the value of --profile, if that flag is given.

    Raises:
      ConfigError: The task of the config is not "train".
    """
    if flags.FLAGS.profile is None:
        return
    if config.get("task") != "train":
        raise ConfigError(f"--profile requires the task 'train', received {config.get('task')!r}")
    config.train.profile_steps = flags.FLAGS.profile


def is_own_config(args: Sequence[str]) -> bool:
    """Return whether a command line names a config file instead of a shipped config."""
    given = [a for a in args[1:2] if not a.startswith("-")]
    given += [value for name, value in zip(args, args[1:]) if name in ("--config", "-config")]
    given += [a.partition("=")[2] for a in args if a.startswith(("--config=", "-config="))]
    files = (Path(value.partition(":")[0]) for value in given)
    return any(file.suffix == ".py" and file.is_file() for file in files)


def with_config_path(args: Sequence[str]) -> list[str]:
    """Return the arguments with the value of --config replaced by the path of the config file.

    Raises:
      ConfigError: The config does not exist.
    """
    replaced = list(args)
    for i, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            if equals:
                replaced[i] = f"{name}={_find_existing(value)}"
            elif i + 1 < len(args):
                replaced[i + 1] = _find_existing(args[i + 1])
    return replaced


def with_current_fields(args: Sequence[str]) -> list[str]:
    """Return the arguments with former names of config fields replaced, and log each of them."""
    replaced = []
    for argument in args:
        match = re.match(r"(--?(?:no)?config\.)([\w.]+)(?==|$)", argument)
        old = match and match[2]
        if old in configs.RENAMED:
            configs.warn_renamed(old, configs.RENAMED[old])
            argument = match[1] + configs.RENAMED[old] + argument[match.end() :]
        replaced.append(argument)
    return replaced


def without_unset(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without --config.FIELD=None, and the names of these fields.

    Only fields that may be unset are removed. The flags of most types do not accept None.
    """
    optional = {name for task in TASKS.values() for name, field in task.fields() if field.unset}
    kept, unset = [], []
    for argument in args:
        name = argument.lstrip("-").removeprefix("config.").removesuffix("=None")
        is_unset = argument == f"--config.{name}=None" and name in optional
        (unset if is_unset else kept).append(name if is_unset else argument)
    return kept, unset


def drop_former_fields(config: ml_collections.ConfigDict | None, given: Iterable[str]) -> None:
    """Remove fields that the config file sets by a former name and a flag sets by the new name.

    Flags take precedence over the file.

    Args:
      config: Config to change.
      given: Dotted names of the fields that flags set.
    """
    for old, new in configs.RENAMED.items():
        part = None if config is None or new not in given else configs.part_with(config, old)
        if part is not None:
            with part.unlocked():
                del part[old.rpartition(".")[2]]


def _find_existing(config_file: str) -> str:
    """Return the path of a config file, with its argument, or raise ConfigError."""
    path = find_file(config_file)
    file = Path(path.partition(":")[0])
    if not file.is_file():
        if file.stem in shipped_names():
            raise ConfigError(f"{file}: no such config file. Give the name alone: {file.stem}")
        unknown = unknown_name("shipped config", file.stem, shipped_names())
        raise ConfigError(f"{file}: no such config file; {unknown}")
    return path


def show_help(args: Sequence[str], about: str) -> None:
    """Print the help and exit, if --help is among the arguments.

    With --config this is the help of that config, otherwise that of the command.
    """
    if not HELP & set(args):
        return
    given = [value for name, value in zip(args, args[1:]) if name in ("--config", "-config")]
    given += [a.partition("=")[2] for a in args if a.startswith(("--config=", "-config="))]
    if given:
        from mlip_jax.cli.help import help_text

        print(help_text(given[0]))
        print("\nFlags of every config: --help without --config.")
    else:
        # the first line is the name of this module
        flag_texts = flags.FLAGS.module_help(__name__).strip().partition("\n")[2]
        configs = textwrap.fill(
            ", ".join(shipped_names()), 80, initial_indent="  ", subsequent_indent="  "
        )
        print(f"{about.strip()}\n\nShipped configs:\n{configs}\n\nFlags:\n{flag_texts}")
    sys.exit(0)

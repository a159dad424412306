"""Commands of the documentation: extraction, and parsing as the program does, in this process."""

from __future__ import annotations

import importlib.util
import re
import shlex
import warnings
from pathlib import Path
from typing import NamedTuple

from absl import flags as absl_flags

from mlip_jax import config as configs
from mlip_jax.cli import flags
from mlip_jax.defaults import TASKS

_spec = importlib.util.spec_from_file_location(
    "docs_markdown", Path(__file__).with_name("markdown.py")
)
markdown = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(markdown)

PROGRAM = re.compile(r"(?:python -m mlip_jax\.main|(?<![\w/.-])mlip-jax)(?= )")
_OPERATORS = frozenset({"#", ";", "&&", "||", "|", "&", ">"})
_CODE = re.compile(r"`([^`\n]+)`")


class Command(NamedTuple):
    """Command of a page.

    Attributes:
      page: Name of the page.
      arguments: Arguments of the program.
    """

    page: str
    arguments: tuple[str, ...]

    @property
    def config(self) -> str:
        """Name of the config, with its argument: "spice:painn"."""
        flag = next((a for a in self.arguments if a.startswith("--config=")), None)
        name = self.arguments[0] if flag is None else flag.partition("=")[2]
        file, colon, argument = name.partition(":")
        return f"{Path(file).stem}{colon}{argument}"


def commands(page: str, text: str) -> list[Command]:
    """Return the complete commands of a page: those in blocks, and those in spans of code.

    A span that begins with --config is a command without the name of the program. Commands with
    shell variables and those without a config are skipped.
    """
    blocks = [b.text for b in markdown.blocks(text) if b.language in ("sh", "bash", "")]
    lines = [line for b in blocks for line in b.replace("\\\n", " ").split("\n")]
    found = [line[match.end() :] for line in lines for match in PROGRAM.finditer(line)]
    for span in _CODE.findall(markdown.without_blocks(text)):
        match = PROGRAM.search(span)
        if match or span.startswith("--config="):
            found.append(span[match.end() :] if match else span)
    return [
        Command(page, arguments)
        for command in found
        if (arguments := _split(command)) and "$" not in command and _has_config(arguments)
    ]


def _has_config(arguments: tuple[str, ...]) -> bool:
    """Return whether the first argument, or a flag, is a config."""
    return not arguments[0].startswith("-") or any(a.startswith("--config=") for a in arguments)


def _split(command: str) -> tuple[str, ...]:
    """Return the arguments of a command up to an operator of the shell or a comment."""
    arguments = []
    for word in shlex.split(command):
        if word in _OPERATORS:
            break
        arguments.append(word)
    return tuple(arguments)


def parse(arguments: tuple[str, ...]) -> dict:
    """Return the complete config of a command line, as plain dictionaries.

    Raises:
      SystemExit, ConfigError, absl.flags.Error: The command line is invalid.
    """
    _undefine()
    try:
        args = flags.define(["mlip-jax", *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of ml_collections
            flags.check(flags.parse(args, "")[1:])
        config = flags.apply_overrides(absl_flags.FLAGS.config)
        return configs.to_dict(configs.complete(config, TASKS[config.task].build()))
    finally:
        _undefine()


def _undefine() -> None:
    """Remove the flags of the program, which are global and differ between configs."""
    known = absl_flags.FLAGS
    for name in list(known):
        if name in _OWN or name.startswith("config."):
            delattr(known, name)
    known.unparse_flags()


_OWN = frozenset(
    {"config", "workdir", "sweep", "sweep_index", "sweep_list", "sweep_collect"}
    | {"overrides", "profile", "show_workdir", "debug", "scheduler"}
)

"""Text of `--config=FILE --help`: purpose of a config, and its fields with values and meanings."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Iterator

import ml_collections

from mlip_jax.config import find_file, import_file
from mlip_jax.defaults import TASKS
from mlip_jax.defaults.errors import ConfigError
from mlip_jax.defaults.field import Part

_NAMES = 46  # width of a field and its value (columns); the meaning is to the right


def help_text(path: str, width: int | None = None) -> str:
    """Return the docstring of a config file, and its fields with values and meanings.

    Args:
      path: "FILE" or "FILE:ARGUMENT".
      width: Width of the text (columns). By default, that of the terminal.

    Raises:
      FileNotFoundError: The file does not exist.
      ConfigError: Its get_config does not accept that argument.
    """
    width = max(width or shutil.get_terminal_size((120, 40)).columns, 80)
    file, colon, argument = find_file(path).partition(":")
    module = import_file(file)
    parts = [inspect.cleandoc(module.__doc__ or f"{file} has no docstring.")]
    given = (argument,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*given)
    except TypeError as error:
        if not colon:  # get_config requires an argument, so its fields are unknown
            return "\n\n".join(
                [*parts, f"Show the fields with the argument: --config={path}:ARGUMENT --help"]
            )
        raise ConfigError(f"{path}: get_config: {error}") from error
    config = module.get_config(*given)
    parts.append("Fields, set with --config.FIELD=VALUE:")
    parts.append("\n".join(_lines(config, width)))
    options = _model_options(config, width)
    return "\n\n".join([*parts, *options])


def fields(config: ml_collections.ConfigDict, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value) of all fields. An empty part such as model.options is a field."""
    for name in config:
        value = (
            config.get_ref(name).get()
            if not isinstance(config[name], ml_collections.ConfigDict)
            else config[name]
        )
        if isinstance(value, ml_collections.ConfigDict) and len(value):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _lines(config: ml_collections.ConfigDict, width: int) -> list[str]:
    """Return the lines of the help for all fields, part by part."""
    declared = TASKS.get(config.get("task"), Part(""))
    meanings = {name: field.explain() for name, field in declared.fields()}
    lines, part = [], ""
    values = _in_order(dict(fields(config)), declared)
    # fields outside of parts come first
    for name, value in sorted(values.items(), key=lambda field: "." in field[0]):
        if name == "task":
            continue
        if "." in name and name.partition(".")[0] != part:
            part = name.partition(".")[0]
            about = declared.members[part].description if part in declared.members else ""
            lines += [""] * bool(lines)
            lines += textwrap.wrap(
                f"{part}: {about}", width, initial_indent="  ", subsequent_indent="  "
            )
        lines += _line(name, value, meanings.get(name, ""), width)
    return lines


def _in_order(given: dict[str, object], declared: Part) -> dict[str, object]:
    """Return the values of all fields in the order of their declaration.

    A field that is not given has its default. Given fields that are not declared are last.
    """
    ordered = {}
    for name, field in declared.fields():
        # fields of a free part, which are not declared one by one
        options = {key: value for key, value in given.items() if key.startswith(f"{name}.")}
        ordered |= options or {name: given.get(name, field.default)}
    return ordered | given


def _line(name: str, value: object, meaning: str, width: int) -> list[str]:
    """Return the lines of the help for one field, with its meaning wrapped to the right."""
    shown = (
        "unset"
        if value is None
        else repr(dict(value) if isinstance(value, ml_collections.ConfigDict) else value)
    )
    left = f"  {name} = {shown}"
    meaning_lines = textwrap.wrap(meaning, width - _NAMES, break_on_hyphens=False)
    if not meaning_lines:
        return [left]
    first = left if len(left) >= _NAMES else left.ljust(_NAMES) + meaning_lines.pop(0)
    return [first] + [" " * _NAMES + line for line in meaning_lines]


def _model_options(config: ml_collections.ConfigDict, width: int) -> list[str]:
    """Return the options of the config's model with their defaults, and the model's docstring."""
    name = config.get("model", {}).get("name") if "model" in config else None
    if not name:
        return []
    from mlip_jax import models

    model = models.find(name)
    options = [f for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    shown = ", ".join(f"{f.name} = {f.default!r}" for f in options)
    return [
        f"Options of the model {name!r}, as --config.model.options.NAME=VALUE, and their defaults:",
        textwrap.fill(shown, width, initial_indent="  ", subsequent_indent="  "),
        textwrap.indent(inspect.getdoc(model) or "", "  "),
    ]

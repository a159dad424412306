"""Declarations of config fields.

Defaults, checks, help, documentation and the identity of a run are derived from them.

A part of a config is a `Part` of named fields and further parts. Its `build` returns the ConfigDict
of the defaults:

    >>> loss = Part(
    ...     "Training loss.",
    ...     beta=Field(0.99, "Weight of the forces.", bounds=Bounds("[0, 1]")),
    ...     penalty=Field("mse", "Penalty of an error.", choices=("mse", "mae")),
    ... )
    >>> loss.build().beta
    0.99
    >>> values = {"beta": 2.0, "penalty": "nae"}
    >>> list(loss.problems(values, "loss."))  # doctest: +NORMALIZE_WHITESPACE
    ['loss.beta must be from 0 to 1, received 2.0',
     "unknown loss.penalty 'nae'. Did you mean 'mae'? Known: mae, mse."]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from mlip_jax.defaults.bounds import Bounds
from mlip_jax.defaults.errors import unknown_name

_NONE = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """Declaration of a config field.

    Attributes:
      default: Default value. A dictionary declares a free part, in which any field may be set.
      description: Noun phrase that is clear without context and ends with a period.
      unit: Unit of the value, such as "eV/Å".
      choices: Allowed values, of the elements if the value is a list. A mapping also gives the
        meaning of each.
      free_mark: Text that marks a value outside of `choices` as valid: ":" in
        "package.module:Class".
      bounds: Interval of valid values, of the elements if the value is a list.
      changes_results: Whether a run with another value is another run, with its own workdir.
      only_with: Dotted names of fields. If all of them are unset, zero or empty, this field has no
        effect.
      legacy_value: Value in effect in runs that are older than the field. This value is not part of
        the identity of a run.
      former_name: Name of the field in older versions, within the same part. Old configs and
        workdirs still have it.
      type: Type of a field that may be unset on the command line; see `optional`.
      unset: Meaning of an unset field, if None is valid.
      unset_field: Name of a field of the same part, whose value an unset field has in the identity
        of a run. That field is not in the identity: it has no effect otherwise.
    """

    default: Any
    description: str
    _: dataclasses.KW_ONLY
    unit: str = ""
    choices: Sequence[str] | Mapping[str, str] = ()
    free_mark: str = ""
    bounds: Bounds | None = None
    changes_results: bool = True
    only_with: tuple[str, ...] = ()
    legacy_value: Any = _NONE
    former_name: str = ""
    type: type | None = None
    unset: str = ""
    unset_field: str = ""

    @property
    def is_free(self) -> bool:
        """Return whether this is a free part, in which any field may be set."""
        return isinstance(self.default, Mapping)

    def build(self) -> Any:
        """Return the default for a ConfigDict, or a placeholder with the type of an unset field."""
        if self.is_free:
            return ml_collections.ConfigDict(dict(self.default))
        if self.type is None:
            return self.default
        reference = placeholder(self.type)
        reference.set(self.default)
        return reference

    def problem(self, name: str, value: Any) -> str | None:
        """Return a message if `value` is invalid for the field with this dotted name, or None."""
        if self.is_free or value is None and self.unset:
            return None
        values = value if isinstance(value, list | tuple) else [value]
        if self.choices:
            unknown = [
                v
                for v in values
                if v not in self.choices and not (self.free_mark and self.free_mark in v)
            ]
            others = (
                f" A value with {self.free_mark!r} is accepted as well, see --help."
                if self.free_mark
                else ""
            )
            return unknown_name(name, unknown[0], self.choices) + others if unknown else None
        if self.bounds is not None and not all(v in self.bounds for v in values):
            unit = f" ({self.unit})" if self.unit else ""
            or_unset = " or unset" if self.unset else ""
            return f"{name} must be {self.bounds}{or_unset}{unit}, received {value!r}"
        return None

    def explain(self) -> str:
        """Return the text for the help: unit and bounds, description, choices, meaning of unset."""
        domain = ", ".join(str(x) for x in (self.unit, self.bounds) if x)
        parts = [f"({domain}) {self.description}" if domain else self.description]
        if self.choices:
            meanings = (
                self.choices if isinstance(self.choices, Mapping) else dict.fromkeys(self.choices)
            )
            listed = [
                f'"{name}"' + (f" ({meaning})" if meaning else "")
                for name, meaning in meanings.items()
            ]
            parts.append(
                f"{'Any' if isinstance(self.default, tuple) else 'One'} of {', '.join(listed)}."
            )
        if self.unset:
            parts.append(f"Unset: {self.unset}.")
        return " ".join(parts)


def optional(type: type, description: str, *, unset: str, default: Any = None, **options) -> Field:
    """Return a field of this type that may be unset. By default it is unset."""
    return Field(default, description, type=type, unset=unset, **options)


class Part:
    """Part of a config, or a whole config.

    Attributes:
      description: Noun phrase that ends with a period.
      members: Fields and parts by name, beginning with those of the argument `parts`.
      only_with: Dotted names of fields. If all of them are unset, zero or empty, this part has no
        effect.
    """

    def __init__(
        self,
        description: str,
        /,
        *parts: Part,
        only_with: Sequence[str] = (),
        **members: Field | Part,
    ):
        self.description, self.only_with = description, tuple(only_with)
        self.members = {
            name: member for part in parts for name, member in part.members.items()
        } | members

    def replace(self, **changes: Any) -> Part:
        """Return a copy with other defaults. A Field or Part as value replaces a whole member."""
        members = dict(self.members)
        for name, value in changes.items():
            is_member = isinstance(value, Field | Part)
            members[name] = (
                value if is_member else dataclasses.replace(self.members[name], default=value)
            )
        return Part(self.description, only_with=self.only_with, **members)

    def build(self) -> ml_collections.ConfigDict:
        """Return a config with the default of every field."""
        config = ml_collections.ConfigDict()
        for name, member in self.members.items():
            config[name] = member.build()
        return config

    def fields(self, prefix: str = "") -> Iterator[tuple[str, Field]]:
        """Yield (dotted name, field) of all fields, in the order of their declaration."""
        for name, member in self.members.items():
            if isinstance(member, Part):
                yield from member.fields(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", member

    def renamed(self, prefix: str = "") -> dict[str, str]:
        """Return {former dotted name: dotted name} of the renamed fields."""
        return {
            name.rpartition(".")[0] + "." * ("." in name) + field.former_name: name
            for name, field in self.fields(prefix)
            if field.former_name
        }

    def with_current_names(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """Return a plain config, or the values of this part, with former names replaced."""
        names = {
            member.former_name: name
            for name, member in self.members.items()
            if isinstance(member, Field) and member.former_name
        }
        current = {names.get(name, name): value for name, value in plain.items()}
        return {
            name: self.members[name].with_current_names(value)
            if isinstance(self.members.get(name), Part) and isinstance(value, Mapping)
            else value
            for name, value in current.items()
        }

    def problems(self, plain: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        """Yield a message for each invalid value of a plain config.

        Args:
          plain: Values of this part.
          prefix: Prefix of the dotted names of its fields.
        """
        for name, member in self.members.items():
            if name not in plain:
                continue
            if isinstance(member, Part):
                yield from member.problems(plain[name], f"{prefix}{name}.")
            elif (problem := member.problem(f"{prefix}{name}", plain[name])) is not None:
                yield problem

    def identity(
        self, plain: Mapping[str, Any], whole: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a plain config without the fields that do not change the results of a run.

        Args:
          plain: Values of this part. Unknown fields are kept.
          whole: Whole config, which `only_with` refers to. By default, `plain` itself.
        """
        whole = plain if whole is None else whole
        stand_ins = {m.unset_field for m in self.members.values() if isinstance(m, Field)}
        kept = {}
        for name, value in plain.items():
            if name in stand_ins:
                continue
            member = self.members.get(name)
            if (
                member is not None
                and member.only_with
                and not any(_value(whole, n) for n in member.only_with)
            ):
                continue
            if isinstance(member, Field) and value is None and member.unset_field:
                value = plain.get(member.unset_field)
            if isinstance(member, Field) and not (
                member.changes_results and value != member.legacy_value
            ):
                continue
            kept[name] = member.identity(value, whole) if isinstance(member, Part) else value
        return kept


def task(name: str, description: str, /, *parts: Part, **members: Field | Part) -> Part:
    """Return the config of a task: a part whose first field is "task"."""
    return Part(description, Part("", task=Field(name, "Name of the task.")), *parts, **members)


def _value(plain: Mapping[str, Any], name: str) -> Any:
    """Return the value of the field with this dotted name, or None if it does not exist."""
    for key in name.split("."):
        plain = plain.get(key) if isinstance(plain, Mapping) else None
    return plain

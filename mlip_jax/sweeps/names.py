"""Names of the variants of a sweep, which are also the names of their folders."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlip_jax.config import ConfigError
from mlip_jax.sweeps.overrides import to_text

MAX_LENGTH = 80  # characters of a name
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")


def variant_names(
    config_file: str, given: Sequence[str | None], overrides: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return a unique name per variant: the given name, or a name built from its overrides.

    Args:
      config_file: Config file of the sweep, for error messages.
      given: Name from sweep() per variant, or None.
      overrides: {dotted name: value} per variant.

    Raises:
      ConfigError: Two variants have the same name or the same overrides, or a name is not valid for
        a folder.
    """
    short = _short_paths(dict.fromkeys(path for each in overrides for path in each))
    names = [name or _name_of_values(each, short) for name, each in zip(given, overrides)]
    indices_by_name: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        # some file systems ignore case
        indices_by_name.setdefault(str(name).lower(), []).append(index)
    for name, same in indices_by_name.items():
        if len(same) > 1 and any(given[i] for i in same):
            raise ConfigError(
                f"{config_file}: variants {same} of the sweep have the same name {name!r}. Choose "
                "different names."
            )
        if len({to_text(dict(sorted(overrides[i].items()))) for i in same}) < len(same):
            raise ConfigError(
                f"{config_file}: variants {same} of the sweep are identical, "
                f'{overrides[same[0]]!r}. If that is intended, add a "name" to each.'
            )
        if len(same) > 1:
            for i in same:
                names[i] = _with_digest(names[i], overrides[i])
    for name in names:
        if (
            not isinstance(name, str)
            or not SAFE.fullmatch(name)
            or len(name) > MAX_LENGTH
            or name.startswith("sweep")
        ):
            raise ConfigError(
                f"{config_file}: invalid name {name!r} of a variant, which is also the name of its "
                f"folder: expected at most {MAX_LENGTH} letters, digits and . _ + = , - (the first "
                "a letter or digit), not beginning with 'sweep'"
            )
    return names


def _short_paths(paths: Iterable[str]) -> dict[str, str]:
    """Map each dotted path to its last part, or to the whole path if that part is not unique.

    If the last part is "name", the part before it is used: "model.name" becomes "model".
    """
    short = {}
    for path in paths:
        parts = path.split(".")
        short[path] = parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]
    return {
        path: name if list(short.values()).count(name) == 1 else path
        for path, name in short.items()
    }


def _name_of_values(overrides: Mapping[str, Any], short: Mapping[str, str]) -> str:
    name = ",".join(f"{short[path]}={_value_text(value)}" for path, value in overrides.items())
    name = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", name) or "base"
    return name if len(name) <= MAX_LENGTH else _with_digest(name, overrides)


def _with_digest(name: str, overrides: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(to_text(overrides).encode()).hexdigest()[:8]
    return f"{name[: MAX_LENGTH - 9]}-{digest}"


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "-".join(f"{k}-{_value_text(v)}" for k, v in value.items())
    return "-".join(map(_value_text, value)) if isinstance(value, list | tuple) else str(value)

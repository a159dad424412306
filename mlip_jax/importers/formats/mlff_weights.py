"""Weights of mlff v1.0 by name, and the record of those that have been used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlip_jax.datasets.formats import safe_pickle
from mlip_jax.importers.formats.weights import WeightsError
from mlip_jax.models.layers.heads import MAX_ATOMIC_NUMBER

_MAX_DEPTH = 12  # maximum depth of nested dicts


_MAX_ENTRIES = 100_000  # maximum number of entries of all dicts; SO3LR has about 300


class MlffWeights:
    """Weights by their names in mlff; it records which of them have been used.

    Args:
      tree: Nested dicts or flat names with "/", with or without "params" at the top; leaves are
        arrays.

    Raises:
      WeightsError: A leaf is not an array of floating-point numbers, or there are far more leaves
        than in any model.
    """

    def __init__(self, tree: Mapping[str, Any]):
        self._arrays = {name.removeprefix("params/"): value for name, value in _flatten(tree)}
        self._used: set[str] = set()

    def __call__(self, name: str) -> np.ndarray:
        """Return the array `name`.

        Raises:
          WeightsError: There is no such array.
        """
        if name not in self._arrays:
            raise WeightsError(
                f"the weights do not contain {name!r}: the hyperparameters belong to other "
                "weights, or the weights are not from mlff v1.0. Present are "
                f"{', '.join(sorted(self._arrays)[:8])}, ..."
            )
        self._used.add(name)
        return self._arrays[name]

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """Return the kernel of a dense layer, and its bias if there is one."""
        kernel = {"kernel": self(f"{name}/kernel")}
        return kernel | ({"bias": self(f"{name}/bias")} if f"{name}/bias" in self._arrays else {})

    def elements(self, name: str, *rest: int | None) -> np.ndarray:
        """Return a table by atomic number, padded with zeros to 119 rows.

        Args:
          name: Name of the table, which has at most 119 rows.
          *rest: Expected shape of a row; None accepts any width.
        """
        table, rows = self(name), MAX_ATOMIC_NUMBER + 1
        fits = table.ndim == 1 + len(rest) and all(
            want in (None, has) for want, has in zip(rest, table.shape[1:])
        )
        if not fits or len(table) > rows:
            shape = ", ".join("any" if n is None else str(n) for n in rest)
            raise WeightsError(
                f"weight {name} has shape {table.shape}, expected a table by atomic number, "
                f"(at most {rows}, {shape})"
            )
        return np.concatenate([table, np.zeros((rows - len(table), *table.shape[1:]), table.dtype)])

    def number(self, name: str) -> np.ndarray:
        """Return a weight that is a single number, shape (1,)."""
        value = self(name)
        if value.shape != (1,):
            raise WeightsError(f"weight {name} has shape {value.shape}, expected one number, (1,)")
        return value

    def ending(self, end: str) -> str:
        """Return the prefix, including "/", of the only name that ends with `end`."""
        names = [name for name in self._arrays if name.endswith(f"/{end}")]
        if len(names) != 1:
            raise WeightsError(
                f"expected exactly one weight whose name ends with {end!r}, received "
                f"{len(names)}: {names}"
            )
        return names[0].removesuffix(end)

    def check_all_used(self) -> None:
        """Raise WeightsError if a weight was not used.

        Otherwise the model would silently differ from the trained one.
        """
        unused = sorted(set(self._arrays) - self._used)
        if unused:
            raise WeightsError(
                f"{len(unused)} weights are not part of the model described by the "
                f"hyperparameters: {', '.join(unused[:8])}"
            )


def _flatten(tree):
    """Yield (name, array) of all leaves.

    The same dict can appear in several others, and in itself, so every visit is counted.
    """
    stack, visits = [("", 0, tree)], 0
    while stack:
        prefix, depth, entries = stack.pop()
        visits += len(entries)
        if visits > _MAX_ENTRIES:
            raise WeightsError(
                f"the file contains more than {_MAX_ENTRIES} weights, more than any model of "
                "this kind: it is corrupted or malicious"
            )
        for name, value in entries.items():
            where = f"{prefix}{safe_pickle.short_repr(name) if not isinstance(name, str) else name[:200]}"
            if isinstance(value, Mapping) and depth < _MAX_DEPTH:
                stack.append((f"{where}/", depth + 1, value))
            elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
                yield where, np.asarray(value)
            else:
                raise WeightsError(
                    f"weight {where} must be an array of floating numbers, received "
                    f"{type(value).__name__}"
                )

"""Molecules with properties to learn: which structures of a data set have them, and their values in training units.

Models are trained on remainders: a property less its mean, or less what the elements alone tell of it, over its
spread. What makes physical values of them travels with the predictor as a `Target`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlip_jax.config import unknown_name
from mlip_jax.datasets.columns import Columns, Rows
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.statistics import NUM_ELEMENTS, ElementFit, sum_reference

# Of what readers give, by the name that they give it; others are shown without a unit.
UNITS = {"gap": "eV", "homo": "eV", "lumo": "eV", "dipole": "e·Å", "dipole_moment": "e·Å", "zpve": "eV"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A property, and how its values are made of what a model puts out: value = output * scale + shift (+ elements).

    Attributes:
      name: As the reader has it. kind: Of readouts.KINDS: "scalar", "vector" or "atom". pooling: Of a scalar.
      weight: Of its loss.
      scale, shift: In the unit of the property. elements: (119,): of a scalar that is a sum, what each atom of an
        element adds; of an "atom", the mean of that element; else zero.
    """

    name: str
    kind: str
    pooling: str = "mean"
    weight: float = 1.0
    scale: float = 1.0
    shift: float = 0.0
    elements: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(NUM_ELEMENTS))

    @property
    def unit(self) -> str:
        """For people; "" where it is not known."""
        return UNITS.get(self.name, "")

    def offset(self, columns: Columns) -> np.ndarray | float:
        """What the elements tell: (S,), (A,), or a number."""
        if self.kind == "atom":
            return self.elements[columns.numbers]
        return self.shift + (sum_reference(self.elements, columns) if self.elements.any() else 0.0)

    def to_training(self, values: np.ndarray, columns: Columns) -> np.ndarray:
        """Values of structures (S,), (S, 3) or of their atoms (A,) as a model is to put them out."""
        return (values - self.offset(columns)) / self.scale

    def to_physical(self, outputs: np.ndarray, columns: Columns) -> np.ndarray:
        """The reverse."""
        return np.asarray(outputs, np.float64) * self.scale + self.offset(columns)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"elements": self.elements.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Target:
        """What `to_json` gave."""
        return cls(**{**values, "elements": np.array(values["elements"], np.float64)})


@dataclasses.dataclass(frozen=True)
class Samples:
    """Geometries with the properties of their molecules: Rows, of which row s is sample s.

    Attributes:
      rows: Where the geometries are. index: Their numbers there, (S,) int64.
      properties: Values in training units by name, (S, ...); NaN where unknown.
      atom_properties: Targets of atoms, which are read with the geometries.
    """

    rows: Rows
    index: np.ndarray
    properties: Mapping[str, np.ndarray]
    atom_properties: tuple[Target, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """The samples `indices`; with their targets alone if `labels_only`."""
        columns = self.rows.take(self.index[indices], labels_only=labels_only and not self.atom_properties)
        atoms = {t.name: t.to_training(columns.atom_properties[t.name], columns) for t in self.atom_properties}
        return dataclasses.replace(columns, atom_properties=atoms, properties={
            name: values[indices] for name, values in self.properties.items()})


def labelled(store: Any, indices: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Of the structures `indices` of a store those of which a property is known, and its values.

    Args:
      names: Of properties; those of atoms are known where all of a structure's are.

    Returns:
      Their numbers in the store, (S,) int64, and {name: (S, ...)} of the properties of whole structures.

    Raises:
      DatasetError: The data have no such property, or no structure has a value.
    """
    found, kept = {name: [] for name in names}, []
    for here, columns in store.chunks(indices):
        known = np.zeros(len(columns), bool)
        for name in names:
            known |= _known(columns, name)
        kept.append(here[known])
        rows = np.flatnonzero(known)
        for name in names:
            if name in columns.properties:
                found[name].append(columns.properties[name][rows])
    kept = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    if not len(kept):
        raise DatasetError(f"{store.path}: none of the {len(indices)} structures has a known {' or '.join(names)}")
    return kept, {name: np.concatenate(parts) for name, parts in found.items() if parts}


def _known(columns: Columns, name: str) -> np.ndarray:
    if name in columns.properties:
        return _finite(columns.properties[name])
    if name in columns.atom_properties:
        finite = _finite(columns.atom_properties[name])
        return np.logical_and.reduceat(finite, columns.offsets[:-1]) if len(columns) else np.zeros(0, bool)
    raise DatasetError(unknown_name("property of these data", name, [*columns.properties, *columns.atom_properties]))


def _finite(values: np.ndarray) -> np.ndarray:
    """Whether all of each row is, (S,)."""
    return np.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def fit_targets(rows: Rows, index: np.ndarray, values: Mapping[str, np.ndarray], names: Sequence[str],
                options: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """The targets of a training part, with their shifts and scales.

    Args:
      rows, index: Of the training structures. values: Of whole structures, (S, ...) by name, theirs.
      options: {name: {"pooling": ..., "weight": ...}} where they differ from the mean and 1.

    Raises:
      DatasetError: A property has a shape that no readout gives, or is the same everywhere.
    """
    columns = rows.take(index)
    targets = []
    for name in names:
        target = Target(name, _kind(name, values, columns), **options.get(name, {}))
        targets.append(_fitted(target, columns, values.get(name)))
    return targets


def _kind(name: str, values, columns: Columns) -> str:
    if name in values:
        shape, kind = values[name].shape[1:], {(): "scalar", (3,): "vector"}
    else:
        shape, kind = columns.atom_properties[name].shape[1:], {(): "atom"}
    if shape not in kind:
        raise DatasetError(f"property {name!r} has the shape {shape} for each structure or atom; what can be learned "
                           "is a number or a vector of a structure, or a number of an atom")
    return kind[shape]


def _fitted(target: Target, columns: Columns, values: np.ndarray | None) -> Target:
    values = columns.atom_properties[target.name] if values is None else values
    if target.kind == "atom":
        known = np.isfinite(values)
        counts = np.bincount(columns.numbers[known], minlength=NUM_ELEMENTS)
        sums = np.bincount(columns.numbers[known], values[known], minlength=NUM_ELEMENTS)
        target = dataclasses.replace(target, elements=sums / np.maximum(counts, 1))
    elif target.kind == "scalar" and target.pooling == "sum":
        fit = ElementFit()
        fit.add(columns, values)
        target = dataclasses.replace(target, elements=fit.solve())
    elif target.kind == "scalar":
        target = dataclasses.replace(target, shift=float(np.nanmean(values)))
    rest = target.to_training(values, columns)
    scale = float(np.sqrt(np.nanmean(rest ** 2)))
    if not scale > 1e-12 * np.nanmax(np.abs(values)):  # what rounding leaves of values that all are the same
        raise DatasetError(f"property {target.name!r} has no spread in the training part: there is nothing to learn")
    return dataclasses.replace(target, scale=scale)

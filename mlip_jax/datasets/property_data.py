"""Training data for molecular properties: labeled structures and normalized targets.

Models are trained on normalized values: the property minus its mean, or minus a sum of per-element
contributions, divided by its root mean square. A `Target` converts between normalized and physical
values and is saved with the predictor.
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

# Units by property name, as readers name the properties. Other properties are shown without unit.
UNITS = {
    "gap": "eV",
    "homo": "eV",
    "lumo": "eV",
    "dipole": "e·Å",
    "dipole_moment": "e·Å",
    "zpve": "eV",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A property and its normalization: value = output * scale + shift + element contributions.

    Attributes:
      name: Name of the property, as the reader names it.
      kind: "scalar", "vector" or "atom", a key of readouts.KINDS.
      pooling: Pooling over the atoms for a scalar: "mean", "sum" or "attention".
      weight: Weight of the loss of this property.
      scale: Scale (unit of the property).
      shift: Shift (unit of the property).
      elements: Contributions of the elements (unit of the property), (119,). For a scalar with sum
        pooling: contribution of each atom of an element. For kind "atom": mean of the element.
        Otherwise zero.
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
        """Unit of the property for display, "" if unknown."""
        return UNITS.get(self.name, "")

    def offset(self, columns: Columns) -> np.ndarray | float:
        """Return the shift plus element contributions: (S,), (A,), or one number for all."""
        if self.kind == "atom":
            return self.elements[columns.numbers]
        return self.shift + (sum_reference(self.elements, columns) if self.elements.any() else 0.0)

    def to_training(self, values: np.ndarray, columns: Columns) -> np.ndarray:
        """Normalize values of structures, (S,) or (S, 3), or of their atoms, (A,)."""
        return (values - self.offset(columns)) / self.scale

    def to_physical(self, outputs: np.ndarray, columns: Columns) -> np.ndarray:
        """Convert model outputs to physical values, the inverse of `to_training`."""
        return np.asarray(outputs, np.float64) * self.scale + self.offset(columns)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-compatible dictionary."""
        return dataclasses.asdict(self) | {"elements": self.elements.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Target:
        """Create a target from the result of `to_json`."""
        return cls(**{**values, "elements": np.array(values["elements"], np.float64)})


@dataclasses.dataclass(frozen=True)
class Samples:
    """Geometries with the normalized properties of their molecules; implements `Rows`.

    Attributes:
      rows: Source of the geometries.
      index: Index of each sample in `rows`, (S,) int64.
      properties: Normalized properties of structures by name, (S, ...); NaN if unknown.
      atom_properties: Targets per atom, whose values are read together with the geometries.
      smiles: SMILES of the samples, (S,); None takes those of `rows`.
    """

    rows: Rows
    index: np.ndarray
    properties: Mapping[str, np.ndarray]
    atom_properties: tuple[Target, ...] = ()
    smiles: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, indices: np.ndarray, *, labels_only: bool = False) -> Columns:
        """Return the samples `indices` with targets. Texts are optional if `labels_only`."""
        columns = self.rows.take(
            self.index[indices], labels_only=labels_only and not self.atom_properties
        )
        atoms = {
            t.name: t.to_training(columns.atom_properties[t.name], columns)
            for t in self.atom_properties
        }
        if self.smiles is not None:
            columns = dataclasses.replace(columns, smiles=self.smiles[indices])
        return dataclasses.replace(
            columns,
            atom_properties=atoms,
            properties={name: values[indices] for name, values in self.properties.items()},
        )


def select_labeled(
    store: Any, indices: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Select the structures with a known value of at least one property.

    Args:
      store: Store with the structures.
      indices: Indices of the candidate structures.
      names: Names of the properties. A property of atoms counts as known if it is known for all
        atoms of the structure.

    Returns:
      Indices of the selected structures in the store, (S,) int64, and their values {name: (S, ...)}
      for properties of structures.

    Raises:
      DatasetError: The data lack a property, or no structure has a value.
    """
    values_of, selected = {name: [] for name in names}, []
    for block, columns in store.chunks(indices):
        known = np.zeros(len(columns), bool)
        for name in names:
            known |= _is_known(columns, name)
        selected.append(block[known])
        rows = np.flatnonzero(known)
        for name in names:
            if name in columns.properties:
                values_of[name].append(columns.properties[name][rows])
    selected = np.concatenate(selected) if selected else np.zeros(0, np.int64)
    if not len(selected):
        raise DatasetError(
            f"{store.path}: none of the {len(indices)} structures has a known {' or '.join(names)}"
        )
    return selected, {name: np.concatenate(parts) for name, parts in values_of.items() if parts}


def _is_known(columns: Columns, name: str) -> np.ndarray:
    """Return whether each structure has a known value of a property, (S,) bool."""
    if name in columns.properties:
        return _finite(columns.properties[name])
    if name in columns.atom_properties:
        finite = _finite(columns.atom_properties[name])
        # (A,) -> (S,): known for all atoms of a structure
        return (
            np.logical_and.reduceat(finite, columns.offsets[:-1])
            if len(columns)
            else np.zeros(0, bool)
        )
    raise DatasetError(
        unknown_name(
            "property of these data", name, [*columns.properties, *columns.atom_properties]
        )
    )


def _finite(values: np.ndarray) -> np.ndarray:
    """Return whether all values of each row are finite, (S,)."""
    return np.isfinite(values).all(axis=tuple(range(1, values.ndim)))


def fit_targets(
    rows: Rows,
    index: np.ndarray,
    values: Mapping[str, np.ndarray],
    names: Sequence[str],
    options: Mapping[str, Mapping[str, Any]],
) -> list[Target]:
    """Fit shifts and scales of the targets on the training split.

    Args:
      rows: Source of the geometries.
      index: Indices of the training structures in `rows`.
      values: Properties of the training structures by name, (S, ...).
      names: Names of the properties to learn.
      options: {name: {"pooling": ..., "weight": ...}} for non-default values. The defaults are
        "mean" and 1.

    Raises:
      DatasetError: A property has a shape that no readout supports, or is constant.
    """
    columns = rows.take(index)
    targets = []
    for name in names:
        target = Target(name, _kind(name, values, columns), **options.get(name, {}))
        targets.append(_normalize(target, columns, values.get(name)))
    return targets


def _kind(name: str, values, columns: Columns) -> str:
    """Return the kind of a property, a key of readouts.KINDS, from its shape."""
    if name in values:
        shape, kind = values[name].shape[1:], {(): "scalar", (3,): "vector"}
    else:
        shape, kind = columns.atom_properties[name].shape[1:], {(): "atom"}
    if shape not in kind:
        raise DatasetError(
            f"property {name!r} has the shape {shape} per structure or atom; supported are scalars "
            "and vectors per structure, and scalars per atom"
        )
    return kind[shape]


def _normalize(target: Target, columns: Columns, values: np.ndarray | None) -> Target:
    """Return the target with shift, scale and element contributions fitted to the values."""
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
    # The scale is the root mean square of the values minus shift and element contributions.
    rest = target.to_training(values, columns)
    scale = float(np.sqrt(np.nanmean(rest**2)))
    if not scale > 1e-12 * np.nanmax(np.abs(values)):  # a smaller spread is rounding error
        raise DatasetError(
            f"property {target.name!r} is constant in the training split: there is nothing to learn"
        )
    return dataclasses.replace(target, scale=scale)

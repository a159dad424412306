"""Structures that a user passes to a Python function: written to a file that a task reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ml_collections
from ase import Atoms

from mlip_jax.datasets import atoms_list, source
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.files import make_subfolder

# Options of the reader that name properties of structures, and of atoms.
_PROPERTY_KEYS = ("property_keys", "atom_property_keys")
_PROPERTY = "property"  # the task that trains predictors of properties
_TRAJECTORY = "structures.traj"


def set_structures(
    config: ml_collections.ConfigDict, structures: Sequence[Atoms] | str | Path, folder: Path
) -> None:
    """Set the data of a config: a path, or Atoms, which are written to a file next to the run.

    Args:
      config: Config of a task that reads labeled structures, changed in place.
      structures: Structures with their labels, or the path of a data set.
      folder: Workdir of the run.

    Raises:
      DatasetError: The structures have no labels, or lack a property that is to be predicted.
      ValueError: An item is not Atoms.
    """
    if isinstance(structures, str | Path):
        config.data.path = str(structures)
        return
    atoms, keys = atoms_list.as_list(structures), {}
    options = source.reader_options(config.data.reader_options)
    if config.task == _PROPERTY:
        keys = _property_keys(atoms, config.property.targets)
        options = keys | options
        keys = {key: options[key] for key in _PROPERTY_KEYS if key in options}
    items, labelled = atoms_list.from_atoms(atoms, **options)
    if not labelled and config.task != _PROPERTY:
        raise DatasetError(
            "the structures have no energies or forces: set the results of a calculator, or "
            'info["energy"] and arrays["forces"]'
        )
    data = make_subfolder(folder / "data")
    atoms_list.write_trajectory(data / _TRAJECTORY, items)
    config.data.path, config.data.directory = str(data / _TRAJECTORY), str(data)
    level = str(options.get("level_of_theory", "unknown")).replace(";", ",")
    config.data.reader, config.data.reader_options = (
        "ase",
        "; ".join(
            [
                atoms_list.TRAJECTORY_OPTIONS,
                f"level_of_theory={level}",
                *(f"{key}={names!r}" for key, names in keys.items()),
                *([] if labelled else ["energy_key=", "forces_key="]),
            ]
        ),
    )


def _property_keys(atoms: Sequence[Atoms], targets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the options of the reader that name the properties of structures and of atoms.

    Raises:
      DatasetError: A property occurs in no structure.
    """
    keys: dict[str, tuple[str, ...]] = {key: () for key in _PROPERTY_KEYS}
    for name in targets:
        per_atom = any(name in a.arrays for a in atoms)
        if not per_atom and not any(
            name in a.info or (a.calc is not None and name in a.calc.results) for a in atoms
        ):
            raise DatasetError(
                f"the structures have no property {name!r}: set info[{name!r}], or arrays[{name!r}] "
                "for a property of the atoms, or change property.targets"
            )
        keys[_PROPERTY_KEYS[per_atom]] += (name,)
    return {key: names for key, names in keys.items() if names}

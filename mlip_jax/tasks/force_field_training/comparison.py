"""Errors of a force field before and after fine-tuning, on the new and on the old data."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from mlip_jax.datasets import unseen_elements
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.held_out import RunData
from mlip_jax.potential import Potential
from mlip_jax.simulation.energies import energies_and_forces
from mlip_jax.tasks.force_field_training.preparation import TrainingRun

log = logging.getLogger(__name__)

_MAX_STRUCTURES = 1_000  # maximum number of test structures of each data set


def compare(run: TrainingRun, potential: Potential) -> dict[str, str]:
    """Return and log the test errors before and after fine-tuning, by data set.

    The new data are the test split of `run`, and the old data that of the initial force field if
    its workdir and its store still exist. On both, the two force fields have the reference energies
    of that data set.

    Args:
      run: Inputs of the run, which started from another force field.
      potential: Force field after fine-tuning.
    """
    errors = {}
    new = run.splits["test"].sample(_MAX_STRUCTURES, run.config.seed)
    if len(new):
        errors["new data"] = before_and_after(
            new.columns(), run.initial, potential, potential.reference_energies
        )
    try:
        data = RunData.load(run.config.init.workdir)
        old = np.asarray(data.parts.get("test", []), np.int64)
        rng = np.random.default_rng(run.config.seed)
        old = np.sort(rng.permutation(old)[:_MAX_STRUCTURES])
        if len(old):
            errors["old data"] = before_and_after(
                data.store.take(old), run.initial, potential, run.initial.reference_energies
            )
    except (DatasetError, OSError) as error:
        errors["old data"] = f"not available: {error}"
    for name, text in errors.items():
        log.info("fine-tuning, test errors on the %s: %s", name, text)
    return errors


def before_and_after(
    columns: Columns, initial: Potential, potential: Potential, reference: np.ndarray
) -> str:
    """Return the errors of both force fields with the given reference energies as text."""
    # The initial force field has no parameters of its own for elements that only the new data have.
    elements = tuple(sorted({*initial.elements, *potential.elements}))
    unseen = unseen_elements.of_columns(columns, elements)
    skipped = f"{len(unseen)} of {len(columns)} structures" if len(unseen) else ""
    if not unseen.known.any():
        return (
            "not available: all structures contain elements without training data "
            f"({unseen.symbols})"
        )
    columns = columns.take(np.flatnonzero(unseen.known))
    text = " → ".join(
        _errors(
            columns,
            dataclasses.replace(each, elements=elements, reference_energies=np.asarray(reference)),
        )
        for each in (initial, potential)
    )
    return text + (
        f"; without {skipped} with {unseen.symbols}, not in the training data" if skipped else ""
    )


def _errors(columns: Columns, potential: Potential) -> str:
    """Return the mean absolute errors of energies per atom and of force components as text."""
    energy, forces = energies_and_forces(potential, columns, np.arange(len(columns)))
    energy_errors = 1e3 * np.abs(energy - columns.energy) / columns.n_atoms  # meV/atom
    force_errors = 1e3 * np.abs(forces - columns.forces)  # meV/Å
    return " ".join(
        f"{errors[np.isfinite(errors)].mean():.1f} {unit}"
        for errors, unit in ((energy_errors, "meV/atom"), (force_errors, "meV/Å"))
        if np.isfinite(errors).any()
    )

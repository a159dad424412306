"""Outputs of a run: metrics of all strategies, and the labels as extended XYZ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ase.calculators.singlepoint import SinglePointCalculator
from ase.io.extxyz import write_extxyz

from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import one_line_values
from mlip_jax.label_budget.columns_file import load_columns
from mlip_jax.label_budget.geometry import to_atoms
from mlip_jax.label_budget.learning_curve import labels_to_reach
from mlip_jax.tasks.active_learning.rounds import LabelingInputs, round_folder
from mlip_jax.workdir import atomic_open


def label_metrics(
    inputs: LabelingInputs, evaluations: dict[str, list[dict[str, Any]]], main: str
) -> dict[str, Any]:
    """Return the content of metrics.json.

    Args:
      inputs: Inputs of the run.
      evaluations: Evaluations of the rounds, by strategy.
      main: Strategy of the run; the others are for comparison.
    """
    last = evaluations[main][-1]
    test = parse_json(read_bytes(inputs.workdir / "test.json"))
    return {
        "strategy": main,
        "budget": inputs.config.budget,
        "force_field": last["force_field"],
        "num_test_calls": test["calls"],  # also of failed ones
        "rounds": evaluations,
        "comparison": {
            other: _comparison(evaluations[main], rounds)
            for other, rounds in evaluations.items()
            if other != main
        },
    }


def _comparison(main: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the labels that the strategy needs for the final test error of another one."""
    if not main[-1]["test"]:
        return {}
    error = other[-1]["test"]["force_mae"]
    needed = labels_to_reach(
        [r["num_labels"] for r in main], [r["test"]["force_mae"] for r in main], error
    )
    return {
        "force_mae": error,
        "num_labels": other[-1]["num_labels"],
        "labels_needed": needed,
        "ratio": None if needed is None else needed / other[-1]["num_labels"],
    }


def write_labels(path: Path, workdir: Path, strategy: str, num_rounds: int) -> None:
    """Write all labels of training and validation as extended XYZ, atomically.

    Args:
      path: File to write.
      workdir: Folder of the run.
      strategy: Strategy.
      num_rounds: Number of its rounds.
    """
    files = [workdir / "valid.npz"]
    files += [round_folder(workdir, strategy, k) / "labels.npz" for k in range(num_rounds)]
    frames = []
    for number, file in enumerate(files):
        for structure in load_columns(file):
            atoms = to_atoms(structure)
            atoms.info |= {"molecule": structure.molecule, "kind": structure.subset}
            atoms.info |= {"smiles": structure.smiles} if structure.smiles else {}
            atoms.info |= {"split": "train", "round": number} if number else {"split": "valid"}
            atoms.info = one_line_values(atoms.info)
            atoms.calc = SinglePointCalculator(
                atoms, energy=structure.energy, forces=structure.forces
            )
            frames.append(atoms)
    with atomic_open(path, "w") as file:
        write_extxyz(file, frames)

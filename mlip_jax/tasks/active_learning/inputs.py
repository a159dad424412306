"""Inputs of a run: the pool of molecules, its candidates, and labels of held-out molecules."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections
import numpy as np

from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.files import fingerprint
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.entries import CsvColumns
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.label_budget import candidates, labels
from mlip_jax.label_budget.candidates import Displacements
from mlip_jax.label_budget.choice import spread_over_molecules
from mlip_jax.label_budget.columns_file import load_columns, save_columns
from mlip_jax.label_budget.pool import SPLITS, read_pool, split_pool
from mlip_jax.simulation.reference.oracle import Oracle
from mlip_jax.tasks.active_learning.rounds import LabelingInputs
from mlip_jax.wording import count_of
from mlip_jax.workdir import check_origin, write_json

log = logging.getLogger(__name__)


def prepare(config: ml_collections.ConfigDict, workdir: Path, oracle: Oracle) -> LabelingInputs:
    """Read the molecules, propose their candidates and label the held-out ones, or resume.

    Raises:
      ConfigError: The budget leaves no label for training.
      DatasetError: The file of molecules cannot be used.
      OracleError: The reference method fails, or its forces have the wrong sign or unit.
    """
    check_origin(workdir / "origin.json", fingerprint(config.input), "labels of other molecules")
    pool = workdir / "pool.json"
    if not pool.exists():
        _propose(config, workdir, oracle, pool)
    checked = parse_json(read_bytes(pool))["calls"]
    proposed = {name: load_columns(workdir / f"candidates_{name}.npz") for name in SPLITS}
    held_out, spent, seconds = {}, checked, 0.0
    num_valid = max(round(config.held_out.valid_labels * config.budget), 1)
    if checked + num_valid >= config.budget:
        raise ConfigError(
            f"budget={config.budget} leaves no label for training: the check of the oracle took "
            f"{count_of(checked, 'calculation')}, and validation requires {num_valid}. Increase it."
        )
    for name, count in (("valid", num_valid), ("test", config.held_out.num_test)):
        held_out[name], summary = _label_held_out(
            config, workdir, oracle, proposed[name], name, count
        )
        if name == "valid":
            spent, seconds = spent + summary["calls"], summary["seconds"]
    return LabelingInputs(
        config,
        workdir,
        oracle,
        proposed["train"],
        held_out["valid"],
        held_out["test"],
        spent,
        seconds,
    )


def _propose(config, workdir: Path, oracle: Oracle, pool: Path) -> None:
    """Split the molecules, check the oracle with some, and write the candidates of all splits."""
    options, processes = config.propose, config.oracle.num_processes or None
    molecules, unusable = read_pool(
        config.input,
        num_conformers=options.num_conformers,
        columns=CsvColumns(config.smiles_column, config.name_column),
        limit=config.limit,
        mmff=config.mmff,
        seed=config.seed,
        num_processes=processes,
    )
    test_fraction = config.held_out.test_fraction if config.held_out.num_test else 0.0
    fractions = (config.held_out.valid_fraction, test_fraction)
    parts = split_pool(molecules, fractions, config.seed)
    calls = labels.check_oracle(oracle, parts["train"], config.seed)
    for name in SPLITS:
        displacements = Displacements(
            tuple(options.kinds),
            options.per_molecule,
            tuple(options.temperatures),
            options.amplitude,
            config.seed,
        )
        proposed = candidates.propose(parts[name], displacements, processes)
        if not len(proposed) and parts[name]:
            raise DatasetError(f"{config.input}: no molecule for {name} has a physical geometry")
        log.info(
            "%s: %s of %s",
            name,
            count_of(len(proposed), "candidate"),
            count_of(len(parts[name]), "molecule"),
        )
        save_columns(workdir / f"candidates_{name}.npz", proposed)
    write_json(
        pool,
        {
            "calls": calls,
            "unusable": unusable,
            "molecules": {name: [m.name for m in parts[name]] for name in SPLITS},
        },
    )


def _label_held_out(
    config, workdir: Path, oracle: Oracle, proposed: Columns, name: str, count: int
) -> tuple[Columns, dict]:
    """Return labeled structures of held-out molecules, and the number and time of calculations."""
    path, summary = workdir / f"{name}.npz", workdir / f"{name}.json"
    if not summary.exists():
        rng = np.random.default_rng(config.seed)
        chosen = proposed.take(spread_over_molecules(proposed, count, rng))
        if len(chosen):
            result = labels.label(oracle, chosen, name)
            kept = ~labels.energy_outliers(
                result.columns, result.columns.take(np.zeros(0, np.int64))
            )
            save_columns(path, result.columns.take(np.flatnonzero(kept)))
            content = {"seconds": result.seconds, "failures": result.failures}
        else:
            save_columns(path, chosen)
            content = {"seconds": 0.0, "failures": {}}
        write_json(summary, {"calls": len(chosen)} | content)
    return load_columns(path), parse_json(read_bytes(summary))

"""Task `predict`: relax the molecules of a file and predict properties with expected errors."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import logging
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from mlip_jax import config as configs
from mlip_jax import defaults, distributed
from mlip_jax.config import ConfigError
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.files import (
    CsvColumns,
    count_molecules,
    fingerprint,
    read_molecules,
)
from mlip_jax.datasets.property_data import Target
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.smiles.embedding import MoleculeRecord
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.predictor import EMBEDDING, Predictor
from mlip_jax.reports.prediction import write_prediction_report
from mlip_jax.simulation.force_fields import load_mean_force_field
from mlip_jax.simulation.relaxation import journal as relax_journal
from mlip_jax.simulation.relaxation import merge
from mlip_jax.simulation.relaxation.inputs import close_records
from mlip_jax.simulation.relaxation.journal import Journal, Layout, check_any_succeeded
from mlip_jax.simulation.relaxation.progress import RelaxationProgressBar
from mlip_jax.simulation.relaxation.relax import Relaxer
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.structure import from_ase
from mlip_jax.workdir import check_origin, claimed

log = logging.getLogger(__name__)

RESULTS, PARTS, ORIGIN = "predictions.csv", "parts", "origin.json"
PREDICTED, FAILED = "predicted", "failed"


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Predict properties by `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function. Each takes a share of the molecules, and the leader
    merges the results.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, JournalError: The message explains
        how to fix the problem.
      RuntimeError: No molecule was predicted. Table and report are written before.
    """
    config = configs.complete(config, defaults.predict_defaults())
    _check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config)))
            workdir = Path(workdir)
            total = _count(config)
            ensemble = Ensemble.load(config.predictor)
            relaxer = _relaxer(config, ensemble)
            if distributed.leader():
                check_origin(
                    workdir / ORIGIN,
                    {
                        "input": fingerprint(config.input),
                        "force_field": relaxer.potential.digest() if relaxer else None,
                        "predictors": [m.digest() for m in ensemble.members],
                    },
                    "predictions of other molecules, at other geometries or by other predictors",
                )
        _predict_share(config, workdir / PARTS, ensemble, relaxer, total)
        distributed.barrier("predicted")
        return (
            _finish(config, workdir, total, ensemble, relaxer)
            if distributed.leader()
            else workdir / "report.html"
        )


def _check(c) -> None:
    for name, example in (("predictor", "runs/gap"), ("input", "molecules.csv")):
        if not c[name]:
            raise ConfigError(f"{name} is required, e.g. --config.{name}={example}")


def _columns(config) -> CsvColumns:
    return CsvColumns(config.smiles_column, config.name_column)


def _count(config) -> int:
    """Return the number of molecules to predict."""
    count = count_molecules(config.input, _columns(config))
    if not count:
        raise DatasetError(f"{config.input}: contains no molecules")
    return count if config.limit is None else min(count, config.limit)


# --- Predictors ---


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Predictors of the same properties, with a domain and a padding budget per predictor."""

    members: tuple[Predictor, ...]
    domains: tuple[Domain, ...]
    budgets: tuple[GrowingBudget, ...]

    @classmethod
    def load(cls, text: str) -> Ensemble:
        """Load the predictors of a comma-separated list of workdirs, e.g. "runs/gap-0,runs/gap-1".

        Raises:
          ConfigError: The members predict different properties.
          CheckpointError: A workdir has no readable checkpoint.
        """
        paths = [p.strip() for p in text.split(",") if p.strip()]
        members = tuple(Predictor.load(path) for path in paths)
        names = [[(t.name, t.kind) for t in m.targets] for m in members]
        if any(n != names[0] for n in names) or not names[0]:
            raise ConfigError(
                "predictor: members of an ensemble must predict the same properties, received "
                + "; ".join(
                    f"{path}: {', '.join(name for name, _ in member) or 'nothing'}"
                    for path, member in zip(paths, names)
                )
            )
        return cls(
            members,
            tuple(Domain.load(Path(p) / DOMAIN_FILE) for p in paths),
            tuple(GrowingBudget() for _ in paths),
        )

    @property
    def targets(self) -> tuple[Target, ...]:
        """Properties that the ensemble predicts, except properties of atoms."""
        return tuple(t for t in self.members[0].targets if t.kind != "atom")

    @property
    def elements(self) -> frozenset[int]:
        """Elements that all ensemble members were trained on."""
        return frozenset.intersection(*(frozenset(m.elements) for m in self.members))

    @property
    def layout(self) -> Layout:
        """Layout of the table of results, which has one line per molecule."""
        columns = ["index", "name", "smiles", "status", "reason", "n_atoms", "geometry"]
        for t in self.targets:
            columns += [t.name] if t.kind == "scalar" else [f"{t.name}_{x}" for x in "xyz"]
            columns += [f"{t.name}_std"] if len(self.members) > 1 else []
            columns += [f"{t.name}_expected_error"]
        return Layout((*columns, "domain_distance", "outside_domain"), ())

    def predict(self, molecules: Sequence[Atoms], batch_size: int) -> list[list[float]]:
        """Return, per molecule, the columns of `layout` from the first property on."""
        columns = Columns.from_structures(map(from_ase, molecules))
        predictions = [
            m.predict(columns, batch_size, budget, with_embedding=True)
            for m, budget in zip(self.members, self.budgets)
        ]
        distances = [d.distance(p[EMBEDDING]) for d, p in zip(self.domains, predictions)]
        # in units of the border of each domain, averaged over members: (S,)
        relative = np.mean([x / d.border for d, x in zip(self.domains, distances)], axis=0)
        cells = []
        for t in self.targets:
            values = np.array([p[t.name] for p in predictions])  # (members, S) or (members, S, 3)
            mean = values.mean(0)  # (S,) or (S, 3)
            cells += [mean] if t.kind == "scalar" else list(mean.T)
            if len(predictions) > 1:
                spread = values.std(0, ddof=1)  # of a vector, report the norm of its spread
                cells.append(spread if t.kind == "scalar" else np.linalg.norm(spread, axis=1))
            cells.append(
                np.mean(
                    [d.expected_error(t.name, x) for d, x in zip(self.domains, distances)], axis=0
                )
            )
        return [
            [float(c[s]) for c in cells] + [float(relative[s]), int(relative[s] > 1)]
            for s in range(len(columns))
        ]


def _relaxer(config, ensemble: Ensemble) -> Relaxer | None:
    """Return the relaxer, or None to predict at the given geometries.

    Only the config selects the force field, since a checkpoint of other people could contain any
    path.

    Raises:
      ConfigError: The predictor was trained on relaxed geometries, and the config does not say
        whether to relax.
    """
    path = config.force_field
    if path is None:
        trained = ensemble.members[0].metadata["config"]["data"].get("force_field")
        if trained:
            raise ConfigError(
                f"the predictor was evaluated at geometries relaxed with {trained!r}. Set "
                f"--config.force_field={shlex.quote(str(trained))} to relax the molecules with it, "
                "another force field, or --config.force_field=none to predict at the given "
                "geometries"
            )
        path = "none"
        log.info("predicting at the given geometries; set force_field to relax them first")
    if path in ("none", ""):
        return None
    return Relaxer(
        load_mean_force_field(path),
        fmax=config.fmax,
        max_steps=config.max_steps,
        devices=jax.local_devices(),
        molecules_only=True,
    )


# --- Prediction ---


def _predict_share(
    config, folder: Path, ensemble: Ensemble, relaxer: Relaxer | None, total: int
) -> None:
    """Predict the molecules in the share of this process that no process has predicted yet."""
    layout, share = ensemble.layout, (distributed.index(), distributed.count())
    with Journal(folder, distributed.index(), layout) as journal:
        done = relax_journal.finished(folder, layout)
        mine = range(share[0], total, share[1])
        before = sum(index in done for index in mine)
        failed = relax_journal.count_failures(folder, layout, lambda index: index in mine)
        if before == len(mine):
            return
        records = read_molecules(
            config.input,
            mmff=config.mmff,
            seed=config.seed,
            columns=_columns(config),
            limit=config.limit,
            skip=done,
            share=share,
            num_processes=config.num_processes or None,
        )
        journal.start_clock()
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(
                RelaxationProgressBar(len(mine), before, "predicting", failed=failed)
            )
            stack.callback(close_records, records)
            geometries = stack.enter_context(
                contextlib.closing(_geometries(records, relaxer, ensemble))
            )
            pending = []
            for record, atoms, geometry, reason in geometries:
                if reason:
                    journal.add(
                        [
                            record.index,
                            record.table_name,
                            record.smiles,
                            FAILED,
                            reason,
                            None if record.atoms is None else len(record.atoms),
                            geometry,
                            *[None] * (len(layout.columns) - 7),
                        ]
                    )
                    progress.add(FAILED)
                    continue
                pending.append((record, atoms, geometry))
                if len(pending) == config.batch_size:
                    _predict_batch(pending, ensemble, config.batch_size, journal, progress)
                    pending = []
            if pending:
                _predict_batch(pending, ensemble, config.batch_size, journal, progress)


def _geometries(
    records: Iterator[MoleculeRecord], relaxer: Relaxer | None, ensemble: Ensemble
) -> Iterator[tuple[MoleculeRecord, Atoms | None, str, str]]:
    """Yield (record, atoms, origin of the geometry, reason of a failure) for all records.

    The reason is "" for molecules that can be predicted; the atoms are None for the others.
    """
    failed, by_index = [], {}

    def usable():
        for record in records:
            reason = record.failure or _unknown_elements(record.atoms, ensemble.elements)
            if reason:
                failed.append((record, None, record.geometry, reason))
                continue
            by_index[record.index] = record
            yield record.index, record.atoms

    if relaxer is None:
        done = ((index, atoms, "", "") for index, atoms in usable())
    else:
        done = ((index, r.atoms, r.status, r.reason) for index, r in relaxer.stream(usable()))
    for index, atoms, status, reason in done:
        yield from (failed.pop() for _ in range(len(failed)))
        record = by_index.pop(index)
        if status in ("failed", "diverged"):
            yield record, None, record.geometry, f"relaxation {status}: {reason}"
        else:
            relaxed = {
                "": "",
                "converged": ", relaxed",
                "step limit": ", relaxed up to the step limit",
            }[status]
            yield record, atoms, record.geometry + relaxed, ""
    yield from failed


def _unknown_elements(atoms: Atoms, elements) -> str:
    """Return a message about elements that the ensemble was not trained on, or ""."""
    unknown = sorted(set(atoms.numbers.tolist()) - elements)
    return (
        f"the predictor was not trained on {', '.join(chemical_symbols[z] for z in unknown)}"
        if unknown
        else ""
    )


def _predict_batch(
    batch, ensemble: Ensemble, batch_size: int, journal: Journal, progress: RelaxationProgressBar
) -> None:
    """Predict a batch of molecules and write the results to the journal."""
    numbers = ensemble.predict([atoms for _, atoms, _ in batch], batch_size)
    for (record, atoms, geometry), cells in zip(batch, numbers):
        journal.add(
            [
                record.index,
                record.table_name,
                record.smiles,
                PREDICTED,
                "",
                len(atoms),
                geometry,
                *cells,
            ]
        )
        progress.add(PREDICTED)


def _finish(config, workdir: Path, total: int, ensemble: Ensemble, relaxer: Relaxer | None) -> Path:
    """Merge the parts and write the report."""
    seconds = merge.merge(workdir / PARTS, ensemble.layout, workdir / RESULTS, {}, total)
    with open(workdir / RESULTS, newline="", encoding="utf-8") as file:
        rows = sum(1 for _ in csv.reader(file)) - 1  # without the header
    if rows != total:
        raise RuntimeError(
            f"{workdir / RESULTS}: contains {rows} of {total} molecules. Rerun the same command."
        )
    report = write_prediction_report(
        workdir,
        workdir / RESULTS,
        ensemble.targets,
        seconds=seconds,
        title=f"{', '.join(t.name for t in ensemble.targets)} of {Path(config.input).name}",
        info=_settings(config, ensemble, relaxer),
    )
    log.info("%s; report: %s", workdir / RESULTS, report)
    check_any_succeeded(workdir / PARTS, ensemble.layout, total, workdir / RESULTS)
    return report


def _settings(config, ensemble: Ensemble, relaxer: Relaxer | None) -> dict[str, dict[str, Any]]:
    """Return names and values of molecules, predictors and settings for the report."""
    trained = {
        f"predictor {i}": ", ".join(
            f"{k}: {m.metadata['statistics'][k]}" for k in ("num_structures", "level_of_theory")
        )
        for i, m in enumerate(ensemble.members)
    }
    return {
        "Molecules": {"input": config.input, **fingerprint(config.input)},
        "Trained on": trained,
        "Geometries": {"force field": relaxer.potential.digest() if relaxer else "none"},
        "Settings": {k: str(v) for k, v in configs.to_dict(config).items() if k != "task"},
    }

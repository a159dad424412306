"""Files of an evaluation of relaxations: numbers for metrics.json, results.csv and geometries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.io import write as write_atoms

from mlip_jax.files import make_subfolder
from mlip_jax.foreign_text import TableWriter
from mlip_jax.reports.force2geo.comparison import EvaluatedForceField, ForceFieldComparison
from mlip_jax.simulation.relaxation import metrics
from mlip_jax.workdir import atomic_path

# From Fu et al., arXiv:2507.00407: PaiNN trained on PubChemQCR, with B3LYP/6-31G* as the oracle.
PUBLISHED = {
    "mean_percentage": 57.37,
    "success_rate": 10.29,
    "divergence_rate": 8.1,
    "force_convergence_rate": 4.2,
}
_CSV_COLUMNS = (
    *("force_field", "molecule", "smiles", "source", "n_atoms", "charge", "seen_in_training"),
    *("status", "reason", "steps", "energy_start_ev", "energy_relaxed_ev", "energy_opt_ev"),
    *("percentage", "residual_kcal_per_mol"),
    *("oracle_fmax_start_ev_per_ang", "oracle_fmax_ev_per_ang"),
    *("judged", "diverged", "success", "force_converged", "oracle_error", "oracle_steps"),
)


def comparison_metrics(content: ForceFieldComparison) -> dict[str, Any]:
    """Return the content of metrics.json."""
    m, names = content.molecules, [e.name for e in content.evaluated]
    evaluated = metrics.evaluable(next(iter(content.outcomes.values())))
    gap = np.array([a.energy - b.energy for a, b in zip(m.at_start, m.at_end)], float)
    result = {
        "oracle": m.oracle,
        "num_molecules": len(m.starts),
        "num_judged": int(evaluated.sum()),
        "num_without_gap": int((evaluated & (gap < content.limits.min_gap)).sum()),
        "num_seen": sum(s.seen for s in m.starts),
        "limits": dataclasses.asdict(content.limits),
        "published": PUBLISHED,
    }
    if m.end_at_oracle_minima:
        result["num_oracle_minima_not_converged"] = sum(
            not e.converged and not e.error for e in m.at_end
        )
    rows = {
        name: {k: dataclasses.asdict(v) for k, v in s.items()}
        for name, s in content.summaries.items()
    }
    for e in content.evaluated:
        statuses = [r["status"] for r in e.relaxed]
        rows[e.name]["status"] = {s: statuses.count(s) for s in sorted(set(statuses))}
        rows[e.name]["mean_steps"] = (
            float(np.mean([r["steps"] for r in e.relaxed])) if e.relaxed else np.nan
        )
    return result | {
        "force_fields": {n: rows[n] for n in names},
        "baselines": {n: row for n, row in rows.items() if n not in names},
    }


def write_csv(file: IO[str], content: ForceFieldComparison) -> None:
    """Write one line per force field and molecule."""
    writer = TableWriter(file)
    writer.writerow(_CSV_COLUMNS)
    for force_field in content.evaluated:
        writer.writerows(_csv_rows(content, force_field))


def _csv_rows(content: ForceFieldComparison, force_field: EvaluatedForceField) -> Iterator[list]:
    """Yield the rows of a force field in the order of _CSV_COLUMNS."""
    m, o, limits = content.molecules, content.outcomes[force_field.name], content.limits
    energies = (o.energy_start, o.energy_relaxed, o.energy_opt)
    values = (
        metrics.percentage(o, limits),
        metrics.residual_energy(o),
        [e.fmax for e in m.at_start],
        o.fmax,
    )
    flags = (
        metrics.evaluable(o),
        metrics.diverged(o, limits),
        metrics.succeeded(o, limits),
        metrics.force_converged(o, limits),
    )
    for i, (s, r) in enumerate(zip(m.starts, force_field.relaxed)):
        evaluations = (m.at_start[i], m.at_end[i], force_field.at_relaxed[i])
        yield [
            force_field.name,
            s.name,
            s.smiles,
            s.source,
            len(s.atoms),
            f"{s.atoms.info.get('charge', 0):g}",
            int(s.seen),
            r["status"],
            r["reason"],
            r["steps"],
            *("" if np.isnan(x[i]) else f"{x[i]:.8f}" for x in energies),
            *("" if np.isnan(x[i]) else f"{x[i]:.8g}" for x in values),
            *(int(flag[i]) for flag in flags),
            "; ".join(x.error for x in evaluations if x.error),
            getattr(m.at_end[i], "steps", ""),
        ]


def write_geometries(folder: Path, content: ForceFieldComparison) -> None:
    """Write start, reference (or the oracle's) and relaxed geometries as extended XYZ files."""
    m = content.molecules
    sets = {"start": [s.atoms.positions for s in m.starts]}
    if m.end_at_oracle_minima:
        sets["oracle"] = [e.positions for e in m.at_end]
    else:
        sets["reference"] = [s.reference for s in m.starts]
    for number, e in enumerate(content.evaluated):
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in e.name)
        sets[f"{number}_{name}"] = [r["positions"] for r in e.relaxed]
    for name, geometries in sets.items():
        frames = [
            Atoms(
                s.atoms.numbers,
                np.reshape(positions, (-1, 3)),
                info={"name": s.name, "smiles": s.smiles, **s.atoms.info},
            )
            for s, positions in zip(m.starts, geometries)
            if positions is not None
        ]
        target = make_subfolder(folder / "geometries") / f"{name}.xyz"
        with atomic_path(target) as path:
            write_atoms(path, frames, format="extxyz")

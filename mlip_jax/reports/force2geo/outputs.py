"""Files of an evaluation of relaxations: numbers for metrics.json, results.csv and geometries."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.io import write as write_atoms

from mlip_jax.reports.force2geo.comparison import ForceFieldComparison
from mlip_jax.simulation.relaxation import metrics
from mlip_jax.workdir import atomic_path

# From Fu et al., arXiv:2507.00407: PaiNN trained on PubChemQCR, with B3LYP/6-31G* as the oracle.
PUBLISHED = {
    "mean_percentage": 57.37,
    "success_rate": 10.29,
    "divergence_rate": 8.1,
    "force_convergence_rate": 4.2,
}


def comparison_metrics(content: ForceFieldComparison) -> dict[str, Any]:
    """Return the content of metrics.json."""
    m, names = content.molecules, [e.name for e in content.evaluated]
    evaluated = metrics.judged(next(iter(content.outcomes.values())))
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
    m = content.molecules
    writer = csv.writer(file)
    writer.writerow(
        [
            "force_field",
            "molecule",
            "smiles",
            "source",
            "n_atoms",
            "charge",
            "seen_in_training",
            "status",
            "reason",
            "steps",
            "energy_start_ev",
            "energy_relaxed_ev",
            "energy_opt_ev",
            "percentage",
            "residual_kcal_per_mol",
            "oracle_fmax_start_ev_per_ang",
            "oracle_fmax_ev_per_ang",
            "judged",
            "diverged",
            "success",
            "force_converged",
            "oracle_error",
            "oracle_steps",
        ]
    )
    for e in content.evaluated:
        o = content.outcomes[e.name]
        columns = [metrics.percentage(o, content.limits), metrics.residual_energy(o)]
        flags = [
            metrics.judged(o),
            *(
                f(o, content.limits)
                for f in (metrics.diverged, metrics.succeeded, metrics.force_converged)
            ),
        ]
        for i, (s, r) in enumerate(zip(m.starts, e.relaxed)):
            energies = (
                o.energy_start[i],
                o.energy_relaxed[i],
                o.energy_opt[i],
                *(c[i] for c in columns),
                m.at_start[i].fmax,
                o.fmax[i],
            )
            errors = "; ".join(
                x.error for x in (m.at_start[i], m.at_end[i], e.at_relaxed[i]) if x.error
            )
            writer.writerow(
                [
                    e.name,
                    s.name,
                    s.smiles,
                    s.source,
                    len(s.atoms),
                    f"{s.atoms.info.get('charge', 0):g}",
                    int(s.seen),
                    r["status"],
                    r["reason"],
                    r["steps"],
                    *(
                        "" if np.isnan(x) else f"{x:.8g}" if n > 2 else f"{x:.8f}"
                        for n, x in enumerate(energies)
                    ),
                    *(int(flag[i]) for flag in flags),
                    errors,
                    getattr(m.at_end[i], "steps", ""),
                ]
            )


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
        target = folder / "geometries" / f"{name}.xyz"
        target.parent.mkdir(exist_ok=True)
        with atomic_path(target) as path:
            write_atoms(path, frames, format="extxyz")

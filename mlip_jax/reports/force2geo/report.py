"""Report of an evaluation of relaxations: a page, metrics, a table of results, and geometries."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms
from ase.io import write as write_atoms

from mlip_jax.datasets.selection.initial_geometries import Start
from mlip_jax.reports import html_page as page
from mlip_jax.reports import sections
from mlip_jax.reports.errors import json_safe
from mlip_jax.reports.force2geo import figures
from mlip_jax.simulation.reference.oracle import ReferenceEvaluation, ReferenceRelaxation
from mlip_jax.simulation.relaxation import metrics
from mlip_jax.simulation.relaxation.metrics import Estimate, Limits, Outcomes
from mlip_jax.workdir import atomic_open, atomic_path, write_text

# From Fu et al., arXiv:2507.00407: PaiNN trained on PubChemQCR, with B3LYP/6-31G* as the oracle.
PUBLISHED = {
    "mean_percentage": 57.37,
    "success_rate": 10.29,
    "divergence_rate": 8.1,
    "force_convergence_rate": 4.2,
}
PUBLISHED_NAME = "PaiNN on PubChemQCR, as published"
_COLUMNS = {
    "mean_percentage": "energy minimisation (%)",
    "success_rate": "success (%)",
    "divergence_rate": "divergence (%)",
    "force_convergence_rate": "force convergence (%)",
    "mean_percentage_of_all": "energy minimisation, all (%)",
    "median_residual": "median residual (kcal/mol)",
    "mean_residual": "mean residual (kcal/mol)",
}
_MAX_FAILURES = 50


@dataclasses.dataclass(frozen=True)
class StartMolecules:
    """The M molecules to relax, with evaluations by the oracle.

    Attributes:
      starts: Start geometries.
      at_start: Evaluations of the start geometries by the oracle.
      at_end: Evaluations of the geometries to compare with: the oracle's own minima, or reference
        geometries.
      oracle: Name of the oracle.
    """

    starts: Sequence[Start]
    at_start: Sequence[ReferenceEvaluation]
    at_end: Sequence[ReferenceEvaluation]
    oracle: str

    @property
    def own_minima(self) -> bool:
        """Whether the geometries to compare with are the oracle's own minima."""
        return all(isinstance(e, ReferenceRelaxation) for e in self.at_end)


@dataclasses.dataclass(frozen=True)
class EvaluatedForceField:
    """Relaxations by a force field, with evaluations by the oracle.

    Attributes:
      name: Name of the force field.
      relaxed: Results for the M starts: "status", "reason", "steps" and "positions" (None if there
        is no geometry).
      at_relaxed: Evaluations of the relaxed geometries by the oracle.
    """

    name: str
    relaxed: Sequence[Mapping[str, Any]]
    at_relaxed: Sequence[ReferenceEvaluation]

    def outcomes(self, molecules: StartMolecules) -> Outcomes:
        """Return the energies and forces that the metrics are computed from."""
        return _outcomes(
            molecules,
            self.at_relaxed,
            np.array([r["status"] in ("diverged", "failed") for r in self.relaxed], bool),
        )


@dataclasses.dataclass(frozen=True)
class _ComparisonData:
    """Data of the report: outcomes and metrics by name, of force fields and baselines."""

    molecules: StartMolecules
    evaluated: Sequence[EvaluatedForceField]
    outcomes: dict[str, Outcomes]
    summaries: dict[str, dict[str, Estimate]]
    limits: Limits


def write_report(
    folder: str | os.PathLike,
    molecules: StartMolecules,
    evaluated: Sequence[EvaluatedForceField],
    limits: Limits,
    *,
    notes: Sequence[str] = (),
    num_bootstrap: int = 1000,
    seed: int = 0,
    info: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the report to `folder`, each file atomically.

    Args:
      folder: Folder of the run.
      molecules: Start geometries and their evaluations.
      evaluated: Force fields in the order of the table.
      limits: Thresholds of success and convergence.
      notes: Notes at the top of the page.
      num_bootstrap: Number of bootstrap samples for the error bars.
      seed: Seed of the bootstrap.
      info: Sections of names and values.

    Returns:
      Path of `report.html`.
    """
    folder = Path(folder)
    outcomes = {e.name: e.outcomes(molecules) for e in evaluated} | _baselines(molecules)
    summaries = {
        name: metrics.summarize(o, limits, num_bootstrap=num_bootstrap, seed=seed)
        for name, o in outcomes.items()
    }
    content = _ComparisonData(molecules, evaluated, outcomes, summaries, limits)
    # Write the metrics first, so that they exist even if a figure fails.
    text = json.dumps(json_safe(_numbers(content)), indent=2, allow_nan=False) + "\n"
    write_text(folder / "metrics.json", text)
    with atomic_open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        _write_csv(file, content)
    _write_geometries(folder, content)
    body = [
        page.heading("Relaxations judged by " + molecules.oracle, 1),
        *_headline(content, notes),
        *_table(content),
        *_figures(content),
        *_failures(content),
        *_definitions(content),
        *sections.provenance(info or {}),
    ]
    write_text(folder / "report.html", page.render("Relaxations", body))
    return folder / "report.html"


# --- Numbers ---


def _outcomes(molecules, at_relaxed, failed) -> Outcomes:
    """Combine the oracle's energies and largest forces of M molecules."""
    return Outcomes(
        *(
            np.array([e.energy for e in found], float)
            for found in (molecules.at_start, at_relaxed, molecules.at_end)
        ),
        fmax=np.array([e.fmax for e in at_relaxed], float),
        failed=failed,
    )


def _baselines(molecules: StartMolecules) -> dict[str, Outcomes]:
    """Return the outcomes of two baselines: the start geometries and the minima to compare with."""
    nothing = np.zeros(len(molecules.starts), bool)
    own = f"{molecules.oracle} itself" if molecules.own_minima else "reference geometries"
    return {
        "start geometries": _outcomes(molecules, molecules.at_start, nothing),
        own: _outcomes(molecules, molecules.at_end, nothing),
    }


def _numbers(content: _ComparisonData) -> dict[str, Any]:
    """Return the content of metrics.json."""
    m, names = content.molecules, [e.name for e in content.evaluated]
    judged = metrics.judged(next(iter(content.outcomes.values())))
    gap = np.array([a.energy - b.energy for a, b in zip(m.at_start, m.at_end)], float)
    numbers = {
        "oracle": m.oracle,
        "num_molecules": len(m.starts),
        "num_judged": int(judged.sum()),
        "num_without_gap": int((judged & (gap < content.limits.min_gap)).sum()),
        "num_seen": sum(s.seen for s in m.starts),
        "limits": dataclasses.asdict(content.limits),
        "published": PUBLISHED,
    }
    if m.own_minima:
        numbers["num_oracle_minima_not_converged"] = sum(
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
    return numbers | {
        "force_fields": {n: rows[n] for n in names},
        "baselines": {n: row for n, row in rows.items() if n not in names},
    }


def _write_csv(file: IO[str], content: _ComparisonData) -> None:
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


def _write_geometries(folder: Path, content: _ComparisonData) -> None:
    """Write start, reference (or the oracle's) and relaxed geometries as extended XYZ files."""
    m = content.molecules
    sets = {"start": [s.atoms.positions for s in m.starts]}
    if m.own_minima:
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


# --- The page ---


def _headline(content: _ComparisonData, notes) -> Iterator[str]:
    """Yield cards with published numbers for comparison, notes and warnings."""
    first = content.evaluated[0].name
    summary = content.summaries[first]
    published = "published: {} %, another method and data set"
    yield page.cards(
        (
            _COLUMNS[key].removesuffix(" (%)"),
            _value(summary[key]),
            "%",
            published.format(PUBLISHED[key]),
        )
        for key in PUBLISHED
    )
    others = f" The cards are of {first}." if len(content.evaluated) > 1 else ""
    numbers = _numbers(content)
    yield page.paragraph(
        f"{numbers['num_judged']:,} of {numbers['num_molecules']:,} molecules are judged: the oracle has energies of "
        f"their start and minimum.{others}"
    )
    yield from (page.callout(note) for note in notes)
    if numbers["num_without_gap"]:
        yield page.callout(
            f"{numbers['num_without_gap']:,} starts are less than {content.limits.min_gap:g} eV above the minimum that "
            "they are compared with, or below it. They have no percentage and are in the rates alone."
        )
    if numbers.get("num_oracle_minima_not_converged"):
        yield page.callout(
            f"The oracle's own relaxation came to its last step at {numbers['num_oracle_minima_not_converged']:,} "
            "molecules before its forces were small: their minima are lower than what force fields are compared with."
        )


def _table(content: _ComparisonData) -> Iterator[str]:
    """Yield the table of force fields, published numbers and baselines."""
    yield page.heading("Force fields")
    rows = [
        (name, *(_with_error(summary[key]) for key in _COLUMNS), *_course(content, name))
        for name, summary in content.summaries.items()
    ]
    published = [f"{PUBLISHED[key]:g}" if key in PUBLISHED else "–" for key in _COLUMNS]
    rows.insert(len(content.evaluated), (PUBLISHED_NAME, *published, "–", "–"))
    yield page.table(("", *_COLUMNS.values(), "own forces converged (%)", "steps"), rows)
    yield page.paragraph(
        "± is the standard error of a bootstrap over molecules. Energy minimisation is averaged over molecules that "
        "did not diverge, as published; the column “all” takes the diverged ones in, with nothing clipped, as far as "
        "the oracle has an energy of them, so that a single wild molecule can decide it. Rates are of all judged "
        "molecules, residuals of those that did not diverge. The published line is of PaiNN trained on PubChemQCR with "
        "DFT (B3LYP/6-31G*) as the oracle (Fu et al., arXiv:2507.00407): another level of theory and other molecules, "
        "to be read for its size, not as a competitor."
    )


def _course(content: _ComparisonData, name: str) -> tuple[str, str]:
    """Return the percentage of converged relaxations and the mean number of steps."""
    found = next((e for e in content.evaluated if e.name == name), None)
    if found is not None:
        steps, done = (
            [r["steps"] for r in found.relaxed],
            [r["status"] == "converged" for r in found.relaxed],
        )
    elif content.molecules.own_minima and name != "start geometries":
        steps, done = zip(*((e.steps, e.converged) for e in content.molecules.at_end), strict=True)
    else:
        return "–", "–"
    return page.number(float(100 * np.mean(done))), page.number(float(np.mean(steps)))


def _figures(content: _ComparisonData) -> Iterator[str]:
    """Yield figures of the molecules that the oracle can evaluate."""
    can = metrics.judged(next(iter(content.outcomes.values())))
    sizes = np.array([len(s.atoms) for s in content.molecules.starts])[can]
    names = [e.name for e in content.evaluated]
    pct = {name: metrics.percentage(content.outcomes[name], content.limits)[can] for name in names}
    residuals, forces = {}, {}
    for label, name in [
        *((n, n) for n in names),
        *zip(("start", "oracle"), list(content.outcomes)[len(names) :]),
    ]:
        o = content.outcomes[name]
        residuals[label], forces[label] = (
            np.where(o.failed, np.nan, v)[can] for v in (metrics.residual_energy(o), o.fmax)
        )
    residuals.pop("oracle")  # zero everywhere
    yield page.heading("How far down, and how close to the minimum")
    yield page.grid(
        [
            page.figure(
                figures.percentages(pct),
                "Energy minimisation percentage of each molecule: 100 % is the minimum "
                "that it is compared with, more is another and lower one, below 0 % is a divergence.",
            ),
            page.figure(
                figures.against_size(pct, sizes),
                "The same against the number of atoms, with the median of "
                "molecules of about one size.",
            ),
            page.figure(
                figures.residuals(residuals, content.limits.chemical_accuracy),
                "Share of molecules whose relaxed geometry is at most so far above the minimum, by the oracle; "
                "where a line crosses the dashed one is the success rate. Linear to ± 1 kcal/mol, logarithmic "
                "beyond.",
            ),
            page.figure(
                figures.largest_forces(forces, content.limits.fmax),
                "Share of molecules at whose relaxed geometry the oracle's largest force on an atom is at most so "
                "large; where a line crosses the dashed one is the force convergence rate.",
            ),
        ]
    )


def _failures(content: _ComparisonData) -> Iterator[str]:
    """Yield tables of failures of the oracle and of divergences."""
    m = content.molecules
    lost = [
        (s.name, a.error or b.error)
        for s, a, b in zip(m.starts, m.at_start, m.at_end)
        if a.error or b.error
    ]
    if lost:
        yield page.heading("Where the oracle fails")
        yield page.table(("molecule", "reason"), lost[:_MAX_FAILURES])
        yield from _more(len(lost))
    yield page.heading("Divergences")
    for e in content.evaluated:
        rows = list(_divergences(content, e))
        if len(content.evaluated) > 1:
            yield page.heading(e.name, 3)
        if not rows:
            yield page.paragraph("None.")
            continue
        yield page.table(
            ("molecule", "SMILES", "atoms", "percentage", "steps", "why"), rows[:_MAX_FAILURES]
        )
        yield from _more(len(rows))


def _divergences(content: _ComparisonData, e: EvaluatedForceField) -> Iterator[tuple]:
    """Yield the rows of the table of divergences, with the reason of each."""
    o = content.outcomes[e.name]
    pct = metrics.percentage(o, content.limits)
    for i in np.flatnonzero(metrics.diverged(o, content.limits)):
        s, r, at = content.molecules.starts[i], e.relaxed[i], e.at_relaxed[i]
        if o.failed[i]:
            why = f"{r['status']}: {r['reason']}"
        elif at.error:
            why = f"oracle at the relaxed geometry: {at.error}"
        else:
            risen = (o.energy_relaxed[i] - o.energy_start[i]) / metrics.KCAL_PER_MOL
            why = f"the oracle's energy rises by {page.number(float(risen))} kcal/mol"
        yield s.name, s.smiles, len(s.atoms), float(pct[i]), r["steps"], why


def _more(count: int) -> Iterator[str]:
    if count > _MAX_FAILURES:
        yield page.paragraph(f"{count - _MAX_FAILURES:,} more are in results.csv.")


def _definitions(content: _ComparisonData) -> Iterator[str]:
    """Yield the definitions of the metrics."""
    limits = content.limits
    end = (
        "the oracle's own minimum, which its BFGS reaches from the start"
        if content.molecules.own_minima
        else ("the reference geometry of the data")
    )
    yield page.heading("What is measured")
    yield page.pairs(
        {
            "energy minimisation": f"100 (E(start) − E(relaxed)) / (E(start) − E(opt)), by the oracle; opt is {end}",
            "success": f"E(relaxed) − E(opt) < {limits.chemical_accuracy:g} kcal/mol; lower than opt is a success",
            "divergence": "the percentage is negative, or the relaxation diverged or failed, or the oracle fails there",
            "force convergence": f"the oracle's largest force on an atom at the relaxed geometry < {limits.fmax:g} eV/Å",
            "no gap": f"where E(start) − E(opt) < {limits.min_gap:g} eV there is no percentage; such a molecule has "
            "diverged if its energy rises by more than that",
        }
    )


def _value(estimate: Estimate) -> str:
    return page.number(float(estimate.value))


def _with_error(estimate: Estimate) -> str:
    error = "" if np.isnan(estimate.stderr) else f" ± {page.number(float(estimate.stderr))}"
    return _value(estimate) + error

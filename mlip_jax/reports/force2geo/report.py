"""Report of an evaluation of relaxations: a page, metrics, a table of results, and geometries."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.reports import html_page as page
from mlip_jax.reports import sections
from mlip_jax.reports.errors import json_safe
from mlip_jax.reports.force2geo import figures
from mlip_jax.reports.force2geo.comparison import (
    EvaluatedForceField,
    ForceFieldComparison,
    StartMolecules,
    baselines,
)
from mlip_jax.reports.force2geo.outputs import (
    PUBLISHED,
    comparison_metrics,
    write_csv,
    write_geometries,
)
from mlip_jax.simulation.relaxation import metrics
from mlip_jax.simulation.relaxation.metrics import Estimate, Limits
from mlip_jax.workdir import atomic_open, write_text

PUBLISHED_NAME = "PaiNN on PubChemQCR, as published"
_COLUMNS = {
    "mean_percentage": "energy minimization (%)",
    "success_rate": "success (%)",
    "divergence_rate": "divergence (%)",
    "force_convergence_rate": "force convergence (%)",
    "mean_percentage_of_all": "energy minimization, all (%)",
    "median_residual": "median residual (kcal/mol)",
    "mean_residual": "mean residual (kcal/mol)",
}
_MAX_FAILURES = 50


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
    outcomes = {e.name: e.outcomes(molecules) for e in evaluated} | baselines(molecules)
    summaries = {
        name: metrics.summarize(o, limits, num_bootstrap=num_bootstrap, seed=seed)
        for name, o in outcomes.items()
    }
    content = ForceFieldComparison(molecules, evaluated, outcomes, summaries, limits)
    # Write the metrics first, so that they exist even if a figure fails.
    text = json.dumps(json_safe(comparison_metrics(content)), indent=2, allow_nan=False) + "\n"
    write_text(folder / "metrics.json", text)
    with atomic_open(folder / "results.csv", "w", newline="", encoding="utf-8") as file:
        write_csv(file, content)
    write_geometries(folder, content)
    body = [
        page.heading("Relaxations evaluated with " + molecules.oracle, 1),
        *_headline(content, notes),
        *_table(content),
        *_figures(content),
        *_failures(content),
        *_definitions(content),
        *sections.provenance(info or {}),
    ]
    write_text(folder / "report.html", page.render("Relaxations", body))
    return folder / "report.html"


def _headline(content: ForceFieldComparison, notes) -> Iterator[str]:
    """Yield cards with published numbers for comparison, notes and warnings."""
    first = content.evaluated[0].name
    summary = content.summaries[first]
    published = "published: {} %, for another level of theory and data set"
    yield page.cards(
        (
            _COLUMNS[key].removesuffix(" (%)"),
            _value(summary[key]),
            "%",
            published.format(PUBLISHED[key]),
        )
        for key in PUBLISHED
    )
    subject = f" The cards are for {first}." if len(content.evaluated) > 1 else ""
    numbers = comparison_metrics(content)
    yield page.paragraph(
        f"{numbers['num_judged']:,} of {numbers['num_molecules']:,} molecules are evaluated: the "
        f"reference method has energies of their start and of their minimum.{subject}"
    )
    yield from (page.callout(note) for note in notes)
    if numbers["num_without_gap"]:
        yield page.callout(
            f"{numbers['num_without_gap']:,} starts are less than {content.limits.min_gap:g} eV "
            "above the minimum that they are compared with, or below it. They have no percentage "
            "and only count in the rates."
        )
    if numbers.get("num_oracle_minima_not_converged"):
        yield page.callout(
            "The relaxation with the reference method reached its step limit for "
            f"{numbers['num_oracle_minima_not_converged']:,} molecules. Their minima are lower "
            "than the energies that force fields are compared with."
        )


def _table(content: ForceFieldComparison) -> Iterator[str]:
    """Yield the table of force fields, published numbers and baselines."""
    yield page.heading("Force fields")
    rows = [
        (name, *(_with_error(summary[key]) for key in _COLUMNS), *_course(content, name))
        for name, summary in content.summaries.items()
    ]
    published = [f"{PUBLISHED[key]:g}" if key in PUBLISHED else "–" for key in _COLUMNS]
    rows.insert(len(content.evaluated), (PUBLISHED_NAME, *published, "–", "–"))
    header = ("", *_COLUMNS.values(), "forces of the force field converged (%)", "steps")
    yield page.table(header, rows)
    yield page.paragraph(
        "± is the standard error of a bootstrap over molecules. Energy minimization is averaged "
        "over molecules that did not diverge, as published. The column “all” includes diverged "
        "molecules for which the reference method has an energy, without clipping, so a single "
        "molecule can dominate it. Rates refer to all evaluated molecules, residuals to those that "
        "did not diverge. The published row is for PaiNN trained on PubChemQCR and evaluated with "
        "DFT (B3LYP/6-31G*; Fu et al., arXiv:2507.00407): another level of theory and other "
        "molecules, so only the order of magnitude is comparable."
    )


def _course(content: ForceFieldComparison, name: str) -> tuple[str, str]:
    """Return the percentage of converged relaxations and the mean number of steps."""
    force_field = next((e for e in content.evaluated if e.name == name), None)
    if force_field is not None:
        steps = [r["steps"] for r in force_field.relaxed]
        done = [r["status"] == "converged" for r in force_field.relaxed]
    elif content.molecules.end_at_oracle_minima and name != "start geometries":
        steps, done = zip(*((e.steps, e.converged) for e in content.molecules.at_end), strict=True)
    else:
        return "–", "–"
    return page.number(float(100 * np.mean(done))), page.number(float(np.mean(steps)))


def _figures(content: ForceFieldComparison) -> Iterator[str]:
    """Yield figures of the molecules that the oracle can evaluate."""
    evaluated = metrics.evaluable(next(iter(content.outcomes.values())))
    sizes = np.array([len(s.atoms) for s in content.molecules.starts])[evaluated]
    names = [e.name for e in content.evaluated]
    pct = {
        name: metrics.percentage(content.outcomes[name], content.limits)[evaluated]
        for name in names
    }
    residuals, forces = {}, {}
    for label, name in [
        *((n, n) for n in names),
        *zip(("start", "oracle"), list(content.outcomes)[len(names) :]),
    ]:
        o = content.outcomes[name]
        residuals[label], forces[label] = (
            np.where(o.failed, np.nan, v)[evaluated] for v in (metrics.residual_energy(o), o.fmax)
        )
    residuals.pop("oracle")  # zero everywhere
    yield page.heading("Energies and forces at the relaxed geometries")
    yield page.grid(
        [
            page.figure(
                figures.percentages(pct),
                "Energy minimization percentage of each molecule. 100 % corresponds to the minimum "
                "that it is compared with, more to a lower minimum, and less than 0 % to a "
                "divergence.",
            ),
            page.figure(
                figures.against_size(pct, sizes),
                "The same against the number of atoms, with medians over molecules of similar "
                "size.",
            ),
            page.figure(
                figures.residuals(residuals, content.limits.chemical_accuracy),
                "Cumulative distribution of the reference energy of the relaxed geometry above the "
                "minimum. Each curve crosses the dashed line at its success rate. The axis is "
                "linear up to ± 1 kcal/mol and logarithmic beyond.",
            ),
            page.figure(
                figures.largest_forces(forces, content.limits.fmax),
                "Cumulative distribution of the largest force on an atom at the relaxed geometry, "
                "from the reference method. Each curve crosses the dashed line at its force "
                "convergence rate.",
            ),
        ]
    )


def _failures(content: ForceFieldComparison) -> Iterator[str]:
    """Yield tables of failures of the oracle and of divergences."""
    m = content.molecules
    failed = [
        (s.name, a.error or b.error)
        for s, a, b in zip(m.starts, m.at_start, m.at_end)
        if a.error or b.error
    ]
    if failed:
        yield page.heading("Failures of the reference method")
        yield page.table(("molecule", "reason"), failed[:_MAX_FAILURES])
        yield from _more(len(failed))
    yield page.heading("Divergences")
    for e in content.evaluated:
        rows = list(_divergences(content, e))
        if len(content.evaluated) > 1:
            yield page.heading(e.name, 3)
        if not rows:
            yield page.paragraph("None.")
            continue
        yield page.table(
            ("molecule", "SMILES", "atoms", "percentage", "steps", "reason"), rows[:_MAX_FAILURES]
        )
        yield from _more(len(rows))


def _divergences(content: ForceFieldComparison, e: EvaluatedForceField) -> Iterator[tuple]:
    """Yield the rows of the table of divergences, with the reason of each."""
    o = content.outcomes[e.name]
    pct = metrics.percentage(o, content.limits)
    for i in np.flatnonzero(metrics.diverged(o, content.limits)):
        s, r, at = content.molecules.starts[i], e.relaxed[i], e.at_relaxed[i]
        if o.failed[i]:
            reason = f"{r['status']}: {r['reason']}"
        elif at.error:
            reason = f"reference method at the relaxed geometry: {at.error}"
        else:
            increase = (o.energy_relaxed[i] - o.energy_start[i]) / metrics.KCAL_PER_MOL
            reason = f"the reference energy rises by {page.number(float(increase))} kcal/mol"
        yield s.name, s.smiles, len(s.atoms), float(pct[i]), r["steps"], reason


def _more(count: int) -> Iterator[str]:
    if count > _MAX_FAILURES:
        yield page.paragraph(f"{count - _MAX_FAILURES:,} more are in results.csv.")


def _definitions(content: ForceFieldComparison) -> Iterator[str]:
    """Yield the definitions of the metrics."""
    limits = content.limits
    end = (
        "the minimum that the reference method reaches with BFGS from the start"
        if content.molecules.end_at_oracle_minima
        else "the reference geometry of the data"
    )
    yield page.heading("Definitions")
    yield page.pairs(
        {
            "energies and forces": "those of the reference method",
            "energy minimization": "100 (E(start) − E(relaxed)) / (E(start) − E(opt)), where opt "
            f"is {end}",
            "success": f"E(relaxed) − E(opt) < {limits.chemical_accuracy:g} kcal/mol, which "
            "includes energies below opt",
            "divergence": "the percentage is negative, the relaxation diverged or failed, or the "
            "reference method fails at the relaxed geometry",
            "force convergence": "the largest force on an atom at the relaxed geometry is below "
            f"{limits.fmax:g} eV/Å",
            "no gap": f"if E(start) − E(opt) < {limits.min_gap:g} eV, the percentage is undefined; "
            "the molecule diverges if its energy rises by more than that",
        }
    )


def _value(estimate: Estimate) -> str:
    return page.number(float(estimate.value))


def _with_error(estimate: Estimate) -> str:
    error = "" if np.isnan(estimate.stderr) else f" ± {page.number(float(estimate.stderr))}"
    return _value(estimate) + error

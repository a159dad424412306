"""Report of a diversity study: `diversity.html`, a self-contained page, and `diversity.csv`.

This module reads the runs of task `diversity` from the folders of sweeps, and averages runs that
differ only in their seed.
"""

from __future__ import annotations

import io
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.foreign_files.archives import open_npz
from mlip_jax.foreign_files.texts import parse_json, read_bytes
from mlip_jax.foreign_text import TableWriter
from mlip_jax.reports import html_page as page
from mlip_jax.reports.diversity import figures, fingerprint_map
from mlip_jax.reports.diversity.findings import findings
from mlip_jax.reports.diversity.generalization import MEANINGS, NAMES
from mlip_jax.workdir import write_text

log = logging.getLogger(__name__)

RESULT, FINGERPRINTS = "diversity.json", "fingerprints.npz"
_SETS = {"train": "training", "iid_s": "IID-S", "ood_s": "OOD-S"}
METRICS = {
    "energy_mae_mev": "MAE of energies (meV)",
    "energy_mae_mev_per_atom": "MAE of energies (meV/atom)",
    "relative_mae_mev": "MAE of conformer energies (meV)",
    "force_mae_mev_per_ang": "MAE of forces (meV/Å)",
}
_MIN_BIN_SIZE = 5  # number of conformers in a bin of distances for a meaningful mean
_SAME_BUDGET = 0.02  # relative difference up to which n_s * n_c of two runs count as the same N


class DiversityRun(NamedTuple):
    """Completed run of a diversity study.

    Attributes:
      num_molecules: Number of training molecules, n_s.
      num_conformers: Number of conformers per molecule, n_c.
      model: Name of the model, followed by the selection of molecules and the weight of forces if
        they differ from the defaults: "painn, maxmin, beta 0.9".
      seed: Seed of the run.
      content: Content of diversity.json.
      folder: Folder of the run.
    """

    num_molecules: int
    num_conformers: int
    model: str
    seed: int
    content: Mapping[str, Any]
    folder: Path


class SeedGroup(NamedTuple):
    """Averages over runs that differ only in their seed.

    Attributes:
      num_molecules: Number of training molecules, n_s.
      num_conformers: Number of conformers per molecule, n_c.
      runs: Number of runs.
      metrics: {key of NAMES: (mean, sample standard deviation or None for a single run)}.
      counts: {key of NAMES: number of runs with this metric}.
      by_rmsd: {bin: (mean, standard deviation or None)} of the errors of all unseen conformers, for
        bins in which at least one run has enough conformers.
      edges: Edges of the bins in Å.
    """

    num_molecules: int
    num_conformers: int
    runs: int
    metrics: dict[str, tuple[float, float | None]]
    counts: dict[str, int]
    by_rmsd: dict[int, tuple[float, float | None]]
    edges: tuple[float, ...]


def read_results(sweeps: Sequence[str | Path]) -> list[DiversityRun]:
    """Read all evaluated runs in the folders of sweeps or of single runs.

    Runs that appear in two sweeps count once. If two different runs have the same sizes, model and
    seed, the first one counts, with a warning. Runs that trained on all conformers of their
    molecules are skipped.

    Raises:
      ValueError: A result is corrupted, or there are no results.
    """
    runs: dict[tuple, DiversityRun] = {}
    for sweep in map(Path, sweeps):
        for path in sorted([*sweep.glob(f"*/{RESULT}"), *sweep.glob(RESULT)]):
            try:
                content = parse_json(read_bytes(path))
                t = content["train"]
                result = DiversityRun(
                    t["num_molecules"],
                    t["num_conformers"],
                    _kind(t),
                    t["seed"],
                    content,
                    path.parent,
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: corrupted ({error}). Delete it and rerun the sweep, which "
                    "reevaluates this run."
                ) from error
            if result.num_conformers is None:
                log.warning("%s: skipped, trained on all conformers of its molecules", path)
                continue
            first = runs.setdefault(result[:4], result)
            if first.content.get("force_field") != content.get("force_field"):
                log.warning(
                    "%s: skipped, because %s has the same sizes, model and seed, but is another "
                    "force field. Report the two sweeps separately.",
                    path.parent,
                    first.folder,
                )
    if not runs:
        raise ValueError(
            f"no {RESULT} of a completed run of task diversity in {', '.join(map(str, sweeps))}"
        )
    return list(runs.values())


def _kind(t: Mapping[str, Any]) -> str:
    """Return the name of the model with non-default selection and weight of forces."""
    # results of earlier versions do not have these keys
    selection, beta = t.get("selection", "random"), t.get("beta", 0.0)
    others = [selection] * (selection != "random") + [f"beta {beta:g}"] * (beta != 0)
    return ", ".join([t["model"], *others])


def points(results: Sequence[DiversityRun], metric: str) -> list[SeedGroup]:
    """Average the runs of one model over seeds, in ascending order of n_s and n_c."""
    groups: dict[tuple[int, int], list[DiversityRun]] = {}
    for result in results:
        groups.setdefault((result.num_molecules, result.num_conformers), []).append(result)
    return [_point(*key, groups[key], metric) for key in sorted(groups)]


def _point(n_s: int, n_c: int, runs: list[DiversityRun], metric: str) -> SeedGroup:
    """Average runs with the same n_s and n_c."""
    values = {
        name: _finite_values([(r.content["metrics"].get(name) or {}).get(metric) for r in runs])
        for name in NAMES
    }
    metrics = {name: spread for name in NAMES if (spread := _spread(values[name]))}
    counts = {name: len(values[name]) for name in metrics}
    edges = tuple(runs[0].content["by_rmsd"]["edges_ang"])
    same = [r for r in runs if tuple(r.content["by_rmsd"]["edges_ang"]) == edges]
    bins = {
        b: spread
        for b in range(len(edges) - 1)
        if (
            spread := _spread(
                [
                    r.content["by_rmsd"][metric][b]
                    for r in same
                    if metric in r.content["by_rmsd"]
                    and r.content["by_rmsd"]["count"][b] >= _MIN_BIN_SIZE
                ]
            )
        )
    }
    return SeedGroup(n_s, n_c, len(runs), metrics, counts, bins, edges)


def _finite_values(values: Sequence[float | None]) -> list[float]:
    """Return the finite values."""
    return [v for v in values if v is not None and math.isfinite(v)]


def _spread(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Return mean and sample standard deviation of the known values, None if there are none."""
    known = _finite_values(values)
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def budgets(points: Sequence[SeedGroup]) -> dict[int, list[SeedGroup]]:
    """Group by the number of structures N = n_s n_c (up to rounding): {N: groups in order of n_c}.

    Numbers N with a single n_c are skipped.
    """
    groups: list[list[SeedGroup]] = []
    for point in sorted(points, key=lambda p: -p.num_molecules * p.num_conformers):
        total = point.num_molecules * point.num_conformers
        if (
            groups
            and total
            > (1 - _SAME_BUDGET) * groups[-1][0].num_molecules * groups[-1][0].num_conformers
        ):
            groups[-1].append(point)
        else:
            groups.append([point])
    return {
        g[0].num_molecules * g[0].num_conformers: sorted(g, key=lambda p: p.num_conformers)
        for g in reversed(groups)
        if len({p.num_conformers for p in g}) > 1
    }


def molecule_sets(points: Sequence[SeedGroup]) -> dict[int, list[SeedGroup]]:
    """Group by the number of molecules: {n_s: groups in order of n_c}, at least two n_c each."""
    groups: dict[int, list[SeedGroup]] = {}
    for point in points:
        groups.setdefault(point.num_molecules, []).append(point)
    return {n_s: g for n_s, g in groups.items() if len({p.num_conformers for p in g}) > 1}


def write_report(
    folder: str | Path, results: Sequence[DiversityRun], metric: str = "energy_mae_mev"
) -> Path:
    """Write diversity.html and diversity.csv, and return the path of the page.

    Args:
      folder: Folder of the report; created if missing.
      results: Runs to report.
      metric: Metric to show, a key of METRICS.

    Raises:
      ValueError: The metric is unknown, or no run has it.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; received {metric!r}")
    results = [
        r
        for r in results
        if any((errors or {}).get(metric) is not None for errors in r.content["metrics"].values())
    ]
    if not results:
        raise ValueError(
            f"no run has the metric {metric!r}"
            + (
                ": only runs trained on forces have force errors. Add :beta=0.9 to the config."
                if metric.startswith("force")
                else ""
            )
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    models = list(dict.fromkeys(r.model for r in results))
    by_model = {model: points([r for r in results if r.model == model], metric) for model in models}
    body = [
        page.heading("Molecules against conformers", 1),
        page.paragraph(
            f"{METRICS[metric]} of {len(results)} runs. Error bars and ± are sample standard "
            "deviations over seeds; each seed has its own split, subset and initial parameters. "
            + "; ".join(f"{NAMES[k]}: {MEANINGS[k]}" for k in ("iid_s", "ood_s", "iid_c", "ood_c"))
            + "."
        ),
    ]
    levels = sorted({r.content["level_of_theory"] for r in results})
    body += [page.paragraph("Labels: " + ", ".join(levels) + ".")] if any(levels) else []
    for note in sorted({note for r in results for note in r.content["notes"]})[:10]:
        body.append(page.callout(note))
    for model, groups in by_model.items():
        body += _model_section(model, groups, METRICS[metric])
    body += _map(results)
    # Use `shared`, because nothing locks the folder.
    write_text(folder / "diversity.csv", _csv(by_model), shared=True)
    write_text(
        folder / "diversity.html", page.render("Molecules against conformers", body), shared=True
    )
    return folder / "diversity.html"


def _model_section(model: str, points: list[SeedGroup], unit: str) -> list[str]:
    """Return the parts of the page about one model."""
    fixed, sets = budgets(points), molecule_sets(points)
    body = [page.heading(model), page.heading("Findings", 3)]
    body += [page.paragraph(f"{f.verdict.capitalize()}: {f.text}") for f in findings(fixed, sets)]
    curves = (
        (
            "N",
            fixed,
            "Errors at a fixed number of structures N: n_c conformers each of N / n_c molecules.",
        ),
        ("n_s", sets, "Errors at a fixed number of molecules n_s, with n_c conformers each."),
    )
    for name, groups, caption in curves:
        if groups:
            body.append(
                page.figure(figures.against_conformers(groups, name, unit), caption, wide=True)
            )
    groups = {n: [p for p in group if p.by_rmsd] for n, group in (fixed or sets).items()}
    groups = {n: group for n, group in groups.items() if group}
    if groups:
        body.append(
            page.figure(
                figures.against_rmsd(groups, "N" if fixed else "n_s", unit),
                "Error of unseen conformers against their RMSD to the nearest training conformer "
                "of their molecule.",
                wide=True,
            )
        )
    body += [
        page.heading("All runs", 3),
        page.table(
            ["n_s", "n_c", "N", "seeds", *NAMES.values()],
            [
                [
                    p.num_molecules,
                    p.num_conformers,
                    p.num_molecules * p.num_conformers,
                    p.runs,
                    *(_cell(p.metrics.get(name)) for name in NAMES),
                ]
                for p in points
            ],
        ),
    ]
    return body


def _map(results: Sequence[DiversityRun]) -> list[str]:
    """Return a map of the molecules of the largest run that has fingerprints."""
    for result in sorted(results, key=lambda r: -r.num_molecules):
        path = result.folder / FINGERPRINTS
        if path.exists():
            with open_npz(path) as file:
                sets = {
                    _SETS[name]: np.unpackbits(file[name], axis=1)
                    for name in _SETS
                    if name in file.files
                }
            sets = {name: rows for name, rows in sets.items() if len(rows)}
            if sum(map(len, sets.values())) > 1:
                return [
                    page.heading("Molecules"),
                    page.figure(
                        fingerprint_map.draw(sets),
                        (
                            "Molecules along the first two principal components of their Morgan "
                            "fingerprints (radius 2, 2,048 bits), for the run with "
                            f"{result.num_molecules:,} molecules; at most a few hundred per set."
                        ),
                    ),
                ]
    return []


def _cell(spread: tuple[float, float | None] | None) -> str:
    if spread is None:
        return "–"
    mean, std = spread
    return page.number(mean) if std is None else f"{page.number(mean)} ± {page.number(std)}"


def _csv(by_model: Mapping[str, Sequence[SeedGroup]]) -> str:
    """Return the text of diversity.csv."""
    text = io.StringIO()
    writer = TableWriter(text, lineterminator="\n")
    writer.writerow(
        [
            "model",
            "n_s",
            "n_c",
            "seeds",
            *(f"{name}_{statistic}" for name in NAMES for statistic in ("mean", "std")),
        ]
    )
    for model, groups in by_model.items():
        for p in groups:
            writer.writerow(
                [
                    model,
                    p.num_molecules,
                    p.num_conformers,
                    p.runs,
                    *(x for name in NAMES for x in p.metrics.get(name, (None, None))),
                ]
            )
    return text.getvalue()

"""Report of a fine-tuning: recipes, learning curve, forgetting and the next structures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_text

_ENERGY, _FORCE = "energy_mae_mev_per_atom", "force_mae_mev_per_ang"
_UNITS = {_ENERGY: "meV/atom", _FORCE: "meV/Å"}
_MIN_FIT = 3  # points of a fitted power law


def summarize(
    journal: Mapping[str, Any],
    *,
    chosen: Mapping[str, Any],
    result: Mapping[str, Any],
    before: Mapping[str, Any],
    curve: Mapping[int, Mapping[str, Any]],
    expected: Mapping[str, Any] | None,
    forgetting: float | None,
    rejected: Mapping[str, str],
    metric: str,
    next_structures: Mapping[str, Any] | None,
    out_of_time: bool,
) -> dict[str, Any]:
    """Return the content of metrics.json.

    Args:
      journal: Journal of the search: seconds, and results of the runs by folder and steps.
      chosen: Name, recipe and learning rate of the chosen candidate.
      result: Its errors by data: "valid", "test" and "probe", the structures of the old domain.
      before: Errors of the initial force field with refitted reference energies, likewise.
      curve: Errors by number of labels; 0 is the initial force field.
      expected: Expected error in the new domain, or None.
      forgetting: Relative increase of the error in the old domain, or None without labels.
      rejected: Reasons against recipes.
      metric: Name of the error that decided between the candidates.
      next_structures: File and numbers of the proposed structures, or None.
      out_of_time: Whether max_minutes ended the search.
    """
    return {
        "chosen": dict(chosen),
        "metric": metric,
        "before": dict(before),
        "after": {name: result[name] for name in ("valid", "test", "probe")},
        "forgetting": forgetting,
        "expected_error": expected,
        "curve": [{"labels": n, **point["test"]} for n, point in sorted(curve.items())],
        "gain_of_twice_the_labels": _gain(curve, metric),
        "candidates": [_row(name, runs) for name, runs in sorted(journal["runs"].items())],
        "rejected": dict(rejected),
        "next_structures": next_structures,
        "training_seconds": journal["seconds"],
        "training_steps": sum(max(map(int, runs)) for runs in journal["runs"].values()),
        "out_of_time": out_of_time,
    }


def _row(name: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last result of a run, with its folder."""
    steps = max(runs, key=int)
    return {"run": name, **runs[steps], "seconds": sum(r["seconds"] for r in runs.values())}


def _gain(curve: Mapping[int, Mapping[str, Any]], metric: str) -> float | None:
    """Return the fraction of the error that twice the labels would remove, from a power law.

    None if the curve has fewer than three points with labels.
    """
    points = [(n, p["test"].get(metric)) for n, p in sorted(curve.items()) if n]
    points = [(n, e) for n, e in points if e]
    if len(points) < _MIN_FIT:
        return None
    labels, values = np.log(np.array(points, float)).T
    return float(1.0 - 2.0 ** np.polyfit(labels, values, 1)[0])


def write_report(
    workdir: Path,
    metrics: Mapping[str, Any],
    *,
    notes: Sequence[str],
    info: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write report.html, one self-contained page, and return its path.

    Args:
      workdir: Folder of the report.
      metrics: Result of `summarize`.
      notes: Notes at the top of the page.
      info: Sections of names and values for `sections.provenance`.
    """
    chosen = metrics["chosen"]
    body = [page.heading("Fine-tuning", 1), page.cards(_cards(metrics))]
    body += [page.callout(note) for note in notes]
    if metrics["out_of_time"]:
        body.append(
            page.callout("max_minutes ended the search before all candidates were trained.")
        )
    if text := without_gain(metrics):
        body.append(page.callout(text))
    body.append(
        page.paragraph(
            f"Chosen: recipe {chosen['recipe']} with learning rate {chosen['rate']:g}, by the "
            "validation error. The test structures took part in no choice. This folder is the "
            "workdir of the fine-tuned force field, and runs/ contains those of all candidates."
        )
    )
    body += [*_recipes(metrics), *_curve(metrics), *_old_domain(metrics), *_proposal(metrics)]
    body += sections.provenance(dict(info), ("metrics.json", "search.json"))
    write_text(workdir / "report.html", page.render("Fine-tuning", body))
    return workdir / "report.html"


def without_gain(metrics: Mapping[str, Any]) -> str:
    """Return a warning if no candidate has a smaller validation error than the start, or ""."""
    name = metrics["metric"]
    before, after = (metrics[key]["valid"][name] for key in ("before", "after"))
    if before is None or after is None or after < before:
        return ""
    return (
        "Training has not reduced the validation error of the initial force field with refitted "
        f"reference energies, {page.number(before)} {_UNITS[name]}: after it, the error is "
        f"{page.number(after)} {_UNITS[name]}. Use the initial force field, or try more steps, lower "
        "learning rates or more labels."
    )


def outcome(metrics: Mapping[str, Any], workdir: Path) -> list[str]:
    """Return the outcome as the last lines of the log.

    Args:
      metrics: Result of `summarize`.
      workdir: Workdir of the fine-tuned force field.
    """
    chosen, before, after = metrics["chosen"], metrics["before"], metrics["after"]
    num = sum(row["run"].startswith("runs/") for row in metrics["candidates"])
    lines = [
        f"chosen of {count_of(num, 'candidate')}: recipe {chosen['recipe']}, learning rate "
        f"{chosen['rate']:g}"
    ]
    lines += [
        f"new domain, test: {text}"
        for text in [_before_and_after(before["test"], after["test"])]
        if text
    ]
    if text := _before_and_after(before["probe"], after["probe"]):
        lost = metrics["forgetting"]
        note = "changes, no labels" if lost is None else f"{100 * lost:+.0f} %"
        lines.append(f"old domain: {text} ({note})")
    use = f"mlip-jax relax molecules.smi --force_field={workdir}"
    return [*lines, f"force field: {workdir}. Use it, for instance: {use}"]


def _before_and_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return the errors before and after fine-tuning, "7.4 → 2.0 meV/atom, 347 → 42.6 meV/Å"."""
    return ", ".join(
        f"{before[name]:.3g} → {after[name]:.3g} {unit}"
        for name, unit in _UNITS.items()
        if before.get(name) is not None and after.get(name) is not None
    )


def _cards(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the most important results."""
    before, after = metrics["before"], metrics["after"]
    expected = metrics["expected_error"] or {}
    for name, key, short in (("force error", _FORCE, "force"), ("energy error", _ENERGY, "energy")):
        if (value := after["test"].get(key)) is None:
            continue
        interval = expected.get(short)
        detail = f"before: {page.number(before['test'].get(key))}"
        if interval:
            low, high = (page.number(interval[end]) for end in ("low", "high"))
            detail += f"; 95 % interval {low} to {high}"
        yield f"{name}, new domain", page.number(value), _UNITS[key], detail
    if (value := after["probe"].get(_FORCE)) is not None:
        forgetting = metrics["forgetting"]
        if forgetting is None:
            yield "change of forces, old domain", page.number(value), _UNITS[_FORCE], "no labels"
        else:
            yield (
                "force error, old domain",
                page.number(value),
                _UNITS[_FORCE],
                f"before: {page.number(before['probe'][_FORCE])} ({100 * forgetting:+.0f} %)",
            )
    seconds = metrics["training_seconds"]
    steps = f"{metrics['training_steps']:,} steps"
    yield "training time", page.duration(seconds), "", steps


def _recipes(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the comparison of the candidates."""
    yield page.heading("Recipes")
    yield page.paragraph(
        "All candidates train for the same number of steps in each round, and those with the larger "
        "validation errors are dropped. Errors are those after the steps in the table. The old "
        "domain is evaluated with the initial reference energies."
    )
    rows = []
    for row in metrics["candidates"]:
        if not row["run"].startswith("runs/"):
            continue
        name = row["run"].removeprefix("runs/")
        shown = page.mark(name) if name == metrics["chosen"]["name"] else name
        if "failure" in row:
            rows.append((shown, row["steps"], *["failed"] * 5, row["seconds"] / 60))
            continue
        rows.append(
            (
                shown,
                row["steps"],
                row["valid"][_FORCE],
                row["valid"][_ENERGY],
                row["test"][_FORCE],
                row["test"][_ENERGY],
                row["probe"][_FORCE],
                row["seconds"] / 60,
            )
        )
    start = metrics["before"]
    errors = [start[part][key] for part in ("valid", "test") for key in (_FORCE, _ENERGY)]
    rows.append(("start, reference energies refitted", 0, *errors, start["probe"][_FORCE], 0.0))
    yield page.table(
        [
            "candidate",
            "steps",
            "validation forces (meV/Å)",
            "validation energy (meV/atom)",
            "test forces (meV/Å)",
            "test energy (meV/atom)",
            "old domain, forces (meV/Å)",
            "time (min)",
        ],
        rows,
    )
    for recipe, reason in metrics["rejected"].items():
        yield page.callout(f"Recipe {recipe} was skipped: {reason}.")


def _curve(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the learning curve."""
    points = metrics["curve"]
    key = _FORCE if metrics["metric"] == _FORCE else _ENERGY
    known = [(p["labels"], p[key]) for p in points if p.get(key) is not None]
    if len(known) < 2:
        return
    yield page.heading("Learning curve")
    fig, ax = figures.figure("Test error", size=(5.6, 3.9))
    with_labels = [(n, e) for n, e in known if n]
    x, y = np.array(with_labels, float).T
    ax.plot(x, y, color=figures.BLUE, marker="o", markersize=5, label="fine-tuned")
    if known[0][0] == 0:
        ax.axhline(
            known[0][1], color=figures.GREY, linestyle=(0, (4, 3)), linewidth=1, label="start"
        )
        figures.add_legend(ax)
    if len(x) > 1:
        figures.set_log_scale(ax, x, "x")
    figures.set_log_scale(ax, np.array([e for _, e in known]))
    ax.set(xlabel="training labels", ylabel=f"MAE ({_UNITS[key]})")
    gain = metrics["gain_of_twice_the_labels"]
    outlook = (
        ""
        if gain is None
        else f" By a power law through these points, twice the labels remove {100 * gain:.0f} % of "
        "the error."
    )
    yield page.figure(
        fig,
        "Test errors of the chosen recipe with fewer training labels. The dashed line is the initial "
        f"force field with refitted reference energies.{outlook}",
    )
    yield page.table(
        ["training labels", "forces (meV/Å)", "energy (meV/atom)"],
        [(p["labels"], p[_FORCE], p[_ENERGY]) for p in points],
    )


def _old_domain(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors in both domains of the candidates of the last round."""
    rows = [
        r
        for r in metrics["candidates"]
        if r["run"].startswith("runs/")
        and "failure" not in r
        and r["probe"].get(_FORCE) is not None
    ]
    if not rows or rows[0]["test"].get(_FORCE) is None:
        return
    yield page.heading("Old and new domain")
    fig, ax = figures.figure("Force errors", size=(5.6, 3.9))
    for kind, color, is_kind in (
        ("with replay", figures.GREEN, lambda name: "_replay_" in name),
        ("without replay", figures.BLUE, lambda name: "_replay_" not in name),
    ):
        values = [(r["test"][_FORCE], r["probe"][_FORCE]) for r in rows if is_kind(r["run"])]
        if values:
            ax.scatter(*np.array(values).T, color=color, s=28, label=kind)
    start = metrics["before"]
    if start["test"][_FORCE] is not None:
        ax.scatter(
            start["test"][_FORCE],
            start["probe"][_FORCE] or 0.0,
            color=figures.VERMILLION,
            marker="x",
            label="start",
        )
    ax.set(xlabel="new domain (meV/Å)", ylabel="old domain (meV/Å)")
    figures.add_legend(ax)
    text = (
        "the change of the forces by fine-tuning, because the structures have no labels"
        if metrics["forgetting"] is None
        else "the error"
    )
    yield page.figure(
        fig,
        "Force errors of all candidates after their last round, on the test structures and on "
        f"structures of the old domain. There, the value is {text}.",
    )


def _proposal(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the numbers of the structures to label next."""
    proposal = metrics["next_structures"]
    if proposal is None:
        return
    yield page.heading("Structures to label next")
    yield page.paragraph(
        f"The pool has {count_of(proposal['num_pool'], 'structure')}, and "
        f"{proposal['num_outside']:,} of them are outside the domain of the fine-tuned force field. "
        f"{proposal['file']} contains {proposal['num_structures']:,} of the pool that are far from the "
        "training data and different from each other. The first one is the most useful."
    )

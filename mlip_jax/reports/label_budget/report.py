"""Report of active learning: `report.html`, a self-contained page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_jax.datasets.columns import Columns
from mlip_jax.reports import html_page as page
from mlip_jax.reports import sections
from mlip_jax.reports.label_budget import figures
from mlip_jax.reports.simulations.run_settings import hardware
from mlip_jax.structure import Structure, hill_formula
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_text

_WORST = 5  # molecules that are shown
_MAX_FAILURES = 20  # failed calculations that are listed


def write_label_report(
    workdir: Path,
    metrics: Mapping[str, Any],
    test: Columns,
    pool: Mapping[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write `report.html` atomically and return its path.

    Args:
      workdir: Folder of the report.
      metrics: Content of metrics.json.
      test: Labeled test structures.
      pool: Content of pool.json.
      settings: Sections of names and values.
    """
    rounds = metrics["rounds"][metrics["strategy"]]
    title = "Spending a label budget"
    parts = [
        page.heading(title, 1),
        _cards(metrics, rounds),
        *_learning_curve(metrics),
        *_budget(metrics),
        *_calibration(rounds),
        *_worst_molecules(rounds[-1]["test"], test),
        *_failures(rounds, pool),
        *sections.provenance({**settings, "Hardware": hardware()}, ["metrics.json", "labels.xyz"]),
    ]
    write_text(workdir / "report.html", page.render(title, parts))
    return workdir / "report.html"


def _cards(metrics: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> str:
    """Return the cards with the most important numbers."""
    last, test = rounds[-1], rounds[-1]["test"]
    cards = [
        ("labels", page.number(last["num_labels"]), "", f"{last['calls']} calculations in all"),
        (
            "expected force error",
            page.number(1e3 * last["expected_error"]),
            "meV/Å",
            "of validation molecules",
        ),
    ]
    if test:
        cards.append(
            (
                "test force error",
                page.number(1e3 * test["force_mae"]),
                "meV/Å",
                f"expected without labels: {page.number(1e3 * test['expected_force_mae'])}",
            )
        )
    for other, values in metrics["comparison"].items():
        if values:
            ratio = values["ratio"]
            text = "not reached" if ratio is None else page.number(ratio)
            cards.append((f"labels relative to {other}", text, "", "for the same test error"))
    return page.cards(cards)


def _learning_curve(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the learning curves and their table."""
    yield page.heading("Learning curve")
    yield page.figure(
        figures.learning_curves(metrics["rounds"]),
        "Mean absolute error of the force components on held-out molecules, after each round.",
        wide=True,
    )
    header = (
        *("strategy", "round", "labels", "calculations", "oracle time"),
        *("test force MAE (meV/Å)", "95 % quantile (meV/Å)", "test energy MAE (meV/atom)"),
        "validation force MAE (meV/Å)",
    )
    yield page.table(header, _curve_rows(metrics["rounds"]))


def _curve_rows(strategies: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[list[object]]:
    """Yield a row of the table of learning curves per strategy and round."""
    for strategy, rounds in strategies.items():
        for r in rounds:
            test = r["test"] or {"force_mae": np.nan, "force_p95": np.nan, "energy_mae": np.nan}
            yield [
                strategy,
                r["round"],
                r["num_labels"],
                r["calls"],
                page.duration(r["oracle_seconds"]),
                *(1e3 * test[key] for key in ("force_mae", "force_p95", "energy_mae")),
                1e3 * r["valid"]["force_mae"],
            ]


def _budget(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield how the budget was spent over molecules, conformers and kinds of candidates."""
    yield page.heading("How the budget was spent")
    kinds = sorted({k for rs in metrics["rounds"].values() for r in rs for k in r["kinds"]})
    rows = []
    for strategy, rounds in metrics["rounds"].items():
        for r in rounds:
            rows.append(
                [
                    strategy,
                    r["round"],
                    *(r["kinds"].get(kind, 0) for kind in kinds),
                    r["num_molecules"],
                    r["num_labels"] / r["num_molecules"],
                ]
            )
    header = ("strategy", "round", *kinds, "molecules so far", "labels per molecule")
    yield page.table(header, rows)
    last = {strategy: rounds[-1]["per_molecule"] for strategy, rounds in metrics["rounds"].items()}
    yield page.figure(figures.labels_per_molecule(last), "Molecules by their number of labels.")


def _calibration(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the expected error against the true one on the test molecules."""
    if not rounds[-1]["test"]:
        return
    yield page.heading("Expected error")
    yield page.paragraph(
        "The uncertainty of a structure, times a factor that is fitted to the validation molecules, "
        "is its expected error. No choice, training or fit used the test molecules."
    )
    header = ("round", "expected (meV/Å)", "true (meV/Å)", "expected / true")
    yield page.table(
        header,
        [
            [
                r["round"],
                1e3 * r["test"]["expected_force_mae"],
                1e3 * r["test"]["force_mae"],
                r["test"]["expected_force_mae"] / r["test"]["force_mae"],
            ]
            for r in rounds
        ],
    )
    yield page.figure(
        figures.calibration(rounds[-1]["test"]["structures"]),
        "Force error of each test structure against its expected error.",
    )


def _worst_molecules(test: Mapping[str, Any], columns: Columns) -> Iterator[str]:
    """Yield the test molecules with the largest errors."""
    if not test:
        return
    structures, rows = test["structures"], defaultdict(list)
    for k, name in enumerate(structures["molecule"]):
        rows[name].append(k)
    error = np.array(structures["force_error"])
    worst = sorted(rows, key=lambda name: -error[rows[name]].mean())[:_WORST]
    yield page.heading("What the force field does not know")
    first = {name: int(np.flatnonzero(columns.molecule == name)[0]) for name in worst}
    yield page.figure(
        figures.pictures(
            [
                (f"{number}. {hill_formula(columns[k].numbers)}", _atoms(columns[k]))
                for number, k in enumerate(first.values(), start=1)
            ]
        ),
        "Test molecules with the largest mean force errors, in the order of the table.",
        wide=True,
    )
    header = ("molecule", "structures", "force MAE (meV/Å)", "expected (meV/Å)", "worst atom")
    expected = np.array(structures["expected_force_error"])
    yield page.table(
        header,
        [
            [
                name,
                len(rows[name]),
                1e3 * error[rows[name]].mean(),
                1e3 * expected[rows[name]].mean(),
                structures["worst_atom"][max(rows[name], key=lambda k: error[k])],
            ]
            for name in worst
        ],
    )


def _atoms(structure: Structure) -> Atoms:
    return Atoms(structure.numbers, structure.positions)


def _failures(rounds: Sequence[Mapping[str, Any]], pool: Mapping[str, Any]) -> Iterator[str]:
    """Yield the molecules that cannot be used, and the failed calculations."""
    failures = {name: reason for r in rounds for name, reason in r["failures"].items()}
    unusable = pool["unusable"]
    if not failures and not unusable:
        return
    yield page.heading("Failures")
    if failures:
        yield page.paragraph(f"{count_of(len(failures), 'calculation')} gave no usable label.")
    listed = [*unusable.items(), *failures.items()]
    yield page.table(("structure", "reason"), listed[:_MAX_FAILURES])
    if len(listed) > _MAX_FAILURES:
        yield page.paragraph(f"{len(listed) - _MAX_FAILURES} more are in the files labels.json.")

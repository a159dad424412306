"""Sections of the report of a training run. Each function yields the HTML parts of its section."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlip_jax.reports import error_figures, errors, figures
from mlip_jax.reports import html_page as page
from mlip_jax.reports.predictions import Predictions
from mlip_jax.wording import count_of

MAX_OUTLIERS = 50
EVALUATED = "evaluated"  # key of the predictions of an evaluation, in place of a split
_MAX_GROUPS = 40
_GROUP_HEADER = (
    "structures",
    "atoms",
    "energy MAE (meV/atom)",
    "energy RMSE (meV/atom)",
    "force MAE (meV/Å)",
    "force RMSE (meV/Å)",
)


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Data of the report.

    Attributes:
      splits: Predictions by split.
      metrics: Content of metrics.json.
      curves: Columns of metrics.csv by name, see `training.read_metrics`.
    """

    splits: dict[str, Predictions]
    metrics: dict
    curves: dict[str, np.ndarray]

    @property
    def shown(self) -> str | None:
        """Split that is shown in detail, None if no split has structures."""
        return self.metrics["shown_split"]


def headline(content: ReportData, notes: Sequence[str]) -> Iterator[str]:
    """Yield cards with the most important numbers, notes and warnings."""
    shown = content.shown
    time = page.duration(content.metrics["seconds"])
    yield page.cards([*error_cards(content), ("training time", time, "", _extent(content))])
    yield from (page.callout(note) for note in notes)
    if shown != "test":
        yield page.callout(
            "There are no test structures. "
            + (f"Detailed results are for the {shown} split." if shown else "No results are shown.")
        )
    yield from nonfinite(content)


def error_cards(content: ReportData) -> list[tuple[str, str, str, str]]:
    """Return cards with the energy error, the force error and the slope against size."""
    shown, values = content.shown, content.metrics[content.shown] if content.shown else {}

    def card(name: str, key: str, unit: str, rmse: str) -> tuple[str, str, str, str]:
        return (
            name,
            page.number(values.get(key)),
            unit,
            f"RMSE {page.number(values.get(rmse))} {unit}",
        )

    prefix = "" if shown == EVALUATED else f"{shown or 'test'} "
    return [
        card(
            f"{prefix}energy MAE", "energy_mae_mev_per_atom", "meV/atom", "energy_rmse_mev_per_atom"
        ),
        card(f"{prefix}force MAE", "force_mae_mev_per_ang", "meV/Å", "force_rmse_mev_per_ang"),
        *(
            [card(f"{prefix}stress MAE", "stress_mae_gpa", "GPa", "stress_rmse_gpa")]
            if "stress_mae_gpa" in values
            else []
        ),
        _slope_card(values),
    ]


def _slope_card(values: dict) -> tuple[str, str, str, str]:
    """Return a card with the slope of the energy error against size, if it is defined."""
    name, slope = "energy error against size", _with_sign(values.get("energy_slope_mev_per_atom"))
    stderr = page.number(values.get("energy_slope_stderr_mev_per_atom"))
    if slope == page.number(None):
        return name, slope, "", "slope undefined"
    return name, slope, "meV/atom", f"slope, ± {stderr}; should be zero"


def nonfinite(content: ReportData) -> Iterator[str]:
    """Yield a warning per split with predictions that are not finite."""
    for name in content.splits:
        count = content.metrics[name]["num_nonfinite_predictions"]
        if count:
            yield page.callout(
                f"{count:,} predicted energies or force components of the {_phrase(name)} are NaN "
                "or infinite. They are excluded from all averages, which are therefore too low."
            )


def error_table(content: ReportData) -> Iterator[str]:
    """Yield a table of the errors of all splits, and remarks on missing labels."""
    stress = any("stress_mae_gpa" in content.metrics[name] for name in content.splits)
    header = ("split", "molecules", *_GROUP_HEADER, "energy MAE (eV)")
    header += ("stress MAE (GPa)",) * stress + ("slope (meV/atom)",)
    keys = ("num_molecules", "num_structures", "num_atoms")
    keys += ("energy_mae_mev_per_atom", "energy_rmse_mev_per_atom")
    keys += ("force_mae_mev_per_ang", "force_rmse_mev_per_ang", "energy_mae_ev")
    keys += ("stress_mae_gpa",) * stress
    rows = []
    for name in content.splits:
        values = content.metrics[name]
        slope, stderr = (
            values["energy_slope_mev_per_atom"],
            values["energy_slope_stderr_mev_per_atom"],
        )
        text = (
            _with_sign(slope) if stderr is None else f"{_with_sign(slope)} ± {page.number(stderr)}"
        )
        rows.append((name, *(values.get(key) for key in keys), text))
    yield page.heading("Errors")
    yield page.table(header, rows) if rows else page.paragraph("No predictions were given.")
    for name, size in content.metrics.get("split_sizes", {}).items():
        evaluated = content.splits[name].num_structures if name in content.splits else size
        if evaluated < size:
            yield page.paragraph(
                f"The errors of the {_phrase(name)} are those of {evaluated:,} of its {size:,} "
                "structures, which are drawn at random."
            )
    for name, split in content.splits.items():
        if split.num_structures == 0:
            yield page.paragraph(f"The {name} split is empty.")
            continue
        for quantity, labels in (("energies", split.energy), ("forces", split.forces)):
            if not np.isfinite(labels).any():
                yield page.paragraph(
                    f"There are no reference {quantity} of the {_phrase(name)}, so their errors "
                    "are unknown."
                )


def learning_curves(content: ReportData) -> Iterator[str]:
    """Yield learning curves."""
    yield page.heading("Learning curves")
    fig = figures.learning_curves(content.curves)
    if fig is None:
        yield page.paragraph("No learning curve recorded.")
    else:
        caption = (
            "Loss and errors on training batches (blue) and on the validation split (green) "
            "during training."
        )
        yield page.figure(fig, caption, wide=True)


def parity(content: ReportData) -> Iterator[str]:
    """Yield parity plots and distributions of errors."""
    if content.shown is None:
        return
    p, values = content.splits[content.shown], content.metrics[content.shown]
    color = figures.SPLIT_COLORS.get(content.shown, figures.BLUE)
    yield page.heading(f"Predictions of the {_phrase(content.shown)}")
    plots = []
    if values["energy_mae_ev"] is not None:
        caption = (
            "Predicted against reference energies per atom "
            f"({count_of(int(np.isfinite(p.energy).sum()), 'structure', ',')}), minus per-element "
            "energies fitted to the reference. A perfect model is on the dashed line."
        )
        plots.append(page.figure(error_figures.energy_parity(p, color), caption))
    if values["force_mae_mev_per_ang"] is not None:
        caption = (
            "Predicted against reference force components "
            f"({int(np.isfinite(p.forces).sum()):,}). A perfect model is on the dashed line."
        )
        plots.append(page.figure(error_figures.force_parity(p, color), caption))
    if not plots:
        yield page.paragraph("There are no labels.")
        return
    yield page.grid(plots)
    labelled = {name: split for name, split in content.splits.items() if split.num_structures}
    caption = "Distributions of errors on a logarithmic scale. "
    if "train" in labelled:
        caption += "A train curve that is much narrower than the others indicates overfitting. "
    caption += "A shifted curve indicates a bias, and wide tails indicate rare large errors."
    yield page.figure(error_figures.error_distributions(labelled), caption, wide=True)


def drift(content: ReportData) -> Iterator[str]:
    """Yield the slope of the energy error against molecule size, and errors by size."""
    yield page.heading("Energy error against molecule size")
    values = content.metrics[content.shown] if content.shown else {}
    slope, stderr = (
        values.get("energy_slope_mev_per_atom"),
        values.get("energy_slope_stderr_mev_per_atom"),
    )
    yield page.paragraph(
        "A line is fitted to the error of the total energy against the number of atoms. Its slope "
        "should be zero. Otherwise each additional atom adds a constant error, and energies of "
        "molecules of different sizes cannot be compared. The standard error is computed over "
        "molecules, because conformations of one molecule share most of their error."
    )
    if slope is None:
        yield page.paragraph(
            "The slope is undefined: it requires reference energies for at least two molecule "
            "sizes."
        )
    else:
        yield from _slope_section(content, slope, stderr)
    if content.shown:
        yield page.table(
            ("atoms per structure", *_GROUP_HEADER), _group_rows(content.metrics["per_size"])
        )
        yield from _correction(content)


def _slope_section(content: ReportData, slope: float, stderr: float | None) -> Iterator[str]:
    """Yield a sentence on the slope and its significance, and the figure with the fit."""
    text = f"The slope is {_with_sign(slope)}"
    if stderr is None:
        text += " meV/atom; there are too few molecules for a standard error."
    elif abs(slope) <= 2 * stderr:
        text += f" ± {page.number(stderr)} meV/atom, within two standard errors of zero."
    else:
        text += (
            f" ± {page.number(stderr)} meV/atom, more than two standard errors from zero: "
            "energies drift with molecule size."
        )
    yield page.paragraph(text)
    caption = (
        f"Error of the total energy of each {content.shown} structure against its number of atoms, "
        "with the fitted line and a band of two standard errors. Dots are shifted horizontally by "
        "random amounts to reduce overlap."
    )
    color = figures.SPLIT_COLORS["train"]
    fig = error_figures.energy_error_against_size(content.splits[content.shown], color)
    yield page.figure(fig, caption, wide=True)


def _correction(content: ReportData) -> Iterator[str]:
    """Yield tables on the improvement by energies per element that are fitted after training."""
    yield page.heading("Gain from a per-element correction", 3)
    if content.metrics[content.shown]["energy_mae_ev"] is None:
        yield page.paragraph("Unknown: there are no reference energies.")
        return
    yield page.paragraph(
        "A sum of energies per element is fitted to the energy errors by least squares and "
        "subtracted. A large gain indicates wrong reference energies, which can be corrected "
        "without training. A small gain indicates errors of the model, and a negative one that a "
        "few large errors dominate the fit. A gain fitted on the same split is optimistic."
    )
    fits = content.metrics["per_element_correction"]
    rows = []
    for name, fit in fits.items():
        before, after = fit["mae_before_mev_per_atom"], fit["mae_after_mev_per_atom"]
        gain = (
            f"{_with_sign(round(100 * (1 - after / before), 1))} %"
            if before and after is not None
            else "–"
        )
        rows.append(
            (name.removeprefix("fitted_on_"), fit["num_structures_fitted"], before, after, gain)
        )
    header = (
        "fitted on",
        "structures fitted",
        "energy MAE before (meV/atom)",
        "after (meV/atom)",
        "gain",
    )
    yield page.table(header, rows)
    elements = list(next(iter(fits.values()))["correction_mev_per_atom"])
    rows = [
        (
            name.removeprefix("fitted_on_"),
            *(_with_sign(fit["correction_mev_per_atom"].get(e)) for e in elements),
        )
        for name, fit in fits.items()
    ]
    yield page.table(("correction (meV per atom)", *elements), rows)


def per_group(content: ReportData) -> Iterator[str]:
    """Yield errors per element and per subset."""
    if content.shown is None:
        return
    p, color = content.splits[content.shown], figures.SPLIT_COLORS["train"]
    has_forces = content.metrics[content.shown]["force_mae_mev_per_ang"] is not None
    has_labels = has_forces or content.metrics[content.shown]["energy_mae_ev"] is not None
    elements, subsets = errors.per_element(p), errors.per_subset(p)
    yield page.heading("Per element")
    if has_forces:
        known = [g for g in elements if np.isfinite(g.force_mae_mev_per_ang)]
        worst = max(known, key=lambda g: g.force_mae_mev_per_ang)
        caption = (
            f"Force error by element. {worst.label}, with {count_of(worst.num_atoms, 'atom', ',')}, "
            "has the largest MAE."
        )
        yield page.figure(error_figures.element_errors(elements, color), caption, wide=True)
    rows = [
        (g.label, g.num_structures, g.num_atoms, g.force_mae_mev_per_ang, g.force_rmse_mev_per_ang)
        for g in elements
    ]
    yield page.table(
        ("element", "structures with it", "atoms", "force MAE (meV/Å)", "force RMSE (meV/Å)"), rows
    )
    yield page.heading("Per subset")
    if has_labels:
        caption = "Energy and force errors by subset of the data set, the largest subset on top."
        yield page.figure(error_figures.subset_errors(subsets, color), caption, wide=True)
    yield page.table(
        ("subset", *_GROUP_HEADER), _group_rows(content.metrics["per_subset"][:_MAX_GROUPS])
    )
    if len(subsets) > _MAX_GROUPS:
        yield page.paragraph(f"{len(subsets) - _MAX_GROUPS:,} smaller subsets are in metrics.json.")


def worst_cases(content: ReportData) -> Iterator[str]:
    """Yield tables of the molecules with the largest energy errors and of force outliers."""
    if content.shown is None:
        return
    total = content.metrics[content.shown]["num_force_outliers"]
    yield page.heading("Molecules with the largest energy errors")
    header = (
        "molecule",
        "conformations",
        "atoms",
        "MAE (meV/atom)",
        "mean error (meV/atom)",
        "MAE (eV)",
    )
    rows = [tuple(row.values()) for row in content.metrics["worst_molecules"]]
    yield (
        page.table(header, rows)
        if rows
        else page.paragraph("None: there are no reference energies.")
    )
    yield page.heading("Force outliers")
    threshold = f"{errors.OUTLIER_THRESHOLD:g} eV/Å"
    if content.metrics[content.shown]["force_mae_mev_per_ang"] is None:
        yield page.paragraph("Unknown: there are no reference forces.")
    elif total == 0:
        yield page.paragraph(f"None: no atom has a force error of more than {threshold}.")
    else:
        have = "atom has" if total == 1 else "atoms have"
        first = f" The {MAX_OUTLIERS} largest:" if total > MAX_OUTLIERS else ""
        yield page.paragraph(f"{total:,} {have} a force error of more than {threshold}.{first}")
        header = (
            "molecule",
            "conformation",
            "atom",
            "element",
            "error (eV/Å)",
            "reference force (eV/Å)",
        )
        yield page.table(header, [tuple(row.values()) for row in content.metrics["force_outliers"]])


def provenance(info: Mapping[str, Mapping[str, Any]], files: Sequence[str] = ()) -> Iterator[str]:
    """Yield the names of `files` next to the page, and a table per section of `info`."""
    if info or files:
        yield page.heading("Settings and versions")
    if files:
        yield page.paragraph("Further files in the workdir: " + ", ".join(files) + ".")
    if info:
        yield page.grid((page.section(name, values) for name, values in info.items()), "sections")


def _group_rows(groups: list[dict]) -> list[tuple]:
    return [tuple(group.values()) for group in groups]


def _phrase(name: str) -> str:
    """Return the phrase for a split, or for the structures of an evaluation."""
    return "evaluated structures" if name == EVALUATED else f"{name} split"


def _extent(content: ReportData) -> str:
    """Return the number of training structures as text."""
    train = content.metrics["train"]
    if not train:
        return ""
    count = content.metrics.get("split_sizes", {}).get("train", train["num_structures"])
    return f"{count:,} training structures"


def _with_sign(value: float | None) -> str:
    return "–" if value is None else ("+" if value > 0 else "") + page.number(value)

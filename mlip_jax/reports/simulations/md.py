"""Report of molecular dynamics: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.reports.molecules import Picture, molecule_figure
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_text

_COLUMNS = {
    "step": "step",
    "time": "time_fs",
    "potential": "potential_ev",
    "total": "total_ev",
    "temperature": "temperature_k",
    "conserved": "conserved_ev",
    "volume": "volume_ang3",
    "pressure": "pressure_bar",
}
_MAX_LINES, _MAX_NAMED, _MAX_ROWS, _MAX_POINTS = 12, 6, 40, 2000


@dataclasses.dataclass(frozen=True)
class Run:
    """Settings and outcome of a dynamics run.

    Attributes:
      names: Names of the molecules.
      sizes: Number of atoms per molecule.
      broken: (step, reason) by index, for molecules that broke.
      steps: Number of steps performed.
      timestep: Time step in fs.
      temperature: Temperature in K.
      ensemble: Name of the ensemble as in the config.
      seconds: Wall time in seconds, including compilation.
      nanoseconds_per_day: Simulated time per day and molecule in ns.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    broken: Mapping[int, tuple[int, str]]
    steps: int
    timestep: float
    temperature: float
    ensemble: str
    seconds: float
    nanoseconds_per_day: float


def read_thermo(path: Path) -> dict[int, dict[str, np.ndarray]]:
    """Read thermo.csv and return its columns by molecule and name; missing values are NaN.

    The columns are step, time (fs), energies (eV), temperature (K), volume (Å³) and pressure (bar).
    """
    rows: dict[int, list[list[float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(row["molecule"]), []).append(
                [float(row[c] or "nan") for c in _COLUMNS.values()]
            )
    return {m: dict(zip(_COLUMNS, np.array(values).T)) for m, values in rows.items()}


def drift(time: np.ndarray, conserved: np.ndarray, num_atoms: int) -> float:
    """Fit the slope of the conserved energy by least squares, in meV/atom/ps.

    The slope is NaN for fewer than three points, or if energies are not finite.

    >>> round(drift(np.array([0.0, 500.0, 1000.0]), np.array([1.0, 1.001, 1.002]), 2), 6)
    1.0
    """
    if len(time) < 3 or not np.isfinite(conserved).all():
        return math.nan
    return float(np.polyfit(time / 1000, 1000 * (conserved - conserved[0]) / num_atoms, 1)[0])


def metrics(about: Run, thermo: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Return the content of `metrics.json`; None for unknown values."""
    molecules = []
    for m, (name, size) in enumerate(zip(about.names, about.sizes)):
        columns = thermo.get(m)
        entry = {"molecule": m, "name": name, "n_atoms": size, "broken_at_step": None, "reason": ""}
        if m in about.broken:
            entry["broken_at_step"], entry["reason"] = about.broken[m]
        if columns is not None:
            late = slice(len(columns["time"]) // 2, None)  # the first half may depend on the start
            entry |= {
                "mean_temperature_k": _finite_or_none(columns["temperature"][late].mean()),
                "std_temperature_k": _finite_or_none(columns["temperature"][late].std()),
                "mean_potential_ev": _finite_or_none(columns["potential"][late].mean()),
                "drift_mev_per_atom_per_ps": _finite_or_none(
                    drift(columns["time"], columns["conserved"], size)
                ),
                "mean_volume_ang3": _finite_or_none(columns["volume"][late].mean()),
                "mean_pressure_bar": _finite_or_none(columns["pressure"][late].mean()),
            }
        molecules.append(entry)
    drifts = [
        e["drift_mev_per_atom_per_ps"]
        for e in molecules
        if e.get("drift_mev_per_atom_per_ps") is not None and e["broken_at_step"] is None
    ]
    return {
        "molecules": len(about.names),
        "steps": about.steps,
        "picoseconds": about.steps * about.timestep / 1000,
        "ensemble": about.ensemble,
        "broken": len(about.broken),
        "seconds": round(about.seconds, 3),
        "steps_per_second": _finite_or_none(
            about.steps / about.seconds if about.seconds > 0 else math.nan
        ),
        "nanoseconds_per_day": _finite_or_none(about.nanoseconds_per_day),
        "largest_drift_mev_per_atom_per_ps": max(map(abs, drifts), default=None),
        "each": molecules,
    }


def _finite_or_none(value: float) -> float | None:
    """Return the value as a float, or None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def write_md_report(
    workdir: str | os.PathLike,
    about: Run,
    thermo: Mapping[int, Mapping[str, np.ndarray]],
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    pictures: Sequence[Picture] = (),
    files: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      about: Settings and outcome of the run.
      thermo: Result of `read_thermo`.
      title: Headline of the page.
      info: Sections of names and values: settings, force field, hardware.
      pictures: Molecules at the start and at the end.
      files: Names of further files in the workdir, to list on the page.
      notes: Notes at the top of the page.

    Returns:
      Path of `report.html`.
    """
    workdir = Path(workdir)
    content = metrics(about, thermo)
    # Write the metrics first, so that they exist even if a figure fails.
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(content),
        *map(page.callout, notes),
        *_broken_molecules(about),
        *_curves(about, thermo),
        *_table(content),
        *_pictures(pictures),
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _headline(content: Mapping[str, Any]) -> Iterator[str]:
    yield page.cards(
        [
            ("molecules", page.number(content["molecules"]), "", f"ensemble {content['ensemble']}"),
            (
                "time",
                page.number(content["picoseconds"]),
                "ps",
                count_of(content["steps"], "step", ","),
            ),
            (
                "broken",
                page.number(content["broken"]),
                "",
                f"of {page.number(content['molecules'])}",
            ),
            (
                "speed",
                page.number(content["steps_per_second"]),
                "steps/s",
                f"{page.number(content['nanoseconds_per_day'])} ns/day per molecule; "
                f"{page.duration(content['seconds'])} in total, including compilation",
            ),
            *_drift_card(content["largest_drift_mev_per_atom_per_ps"]),
        ]
    )


def _broken_molecules(about: Run) -> Iterator[str]:
    if not about.broken:
        return
    lines = [
        f"{about.names[m]} broke at step {step} ({step * about.timestep / 1000:.4g} ps): {reason}"
        for m, (step, reason) in sorted(about.broken.items())
    ]
    more = (
        [f"… and {len(lines) - _MAX_ROWS} more, see metrics.json"] if len(lines) > _MAX_ROWS else []
    )
    yield page.callout("\n".join(lines[:_MAX_ROWS] + more))


def _drift_card(drift: float | None) -> Iterator[tuple[str, str, str, str]]:
    """Yield a card of the largest drift, if there is one; constant pressure conserves no energy."""
    if drift is not None and math.isfinite(drift):
        text = "slope of the conserved energy; molecules that did not break"
        yield "largest drift", page.number(drift), "meV/atom/ps", text


def _curves(about: Run, thermo) -> Iterator[str]:
    yield page.heading("Energy and temperature")
    if not thermo:
        yield page.paragraph("No steps were recorded.")
        return
    omitted = (
        "" if len(thermo) <= _MAX_LINES else f" {_MAX_LINES} of {len(thermo)} molecules are drawn."
    )
    yield page.figure(
        curve_figure(about, thermo),
        (
            "Conserved energy minus its initial value (its slope is the drift), or the volume at "
            "constant pressure; temperature; potential energy minus its mean; distribution of the "
            "temperature over all molecules in the second half of the run. Dashed lines mark the "
            "temperature of the thermostat." + omitted
        ),
        wide=True,
    )


def curve_figure(about: Run, thermo: Mapping[int, Mapping[str, np.ndarray]]) -> Figure:
    """Draw conserved energy, temperature, potential energy and the distribution of the temperature.

    At constant pressure, draw the volume in place of the conserved energy.
    """
    at_pressure = about.ensemble == "npt"
    fig, axes = figures.figure(
        "Volume" if at_pressure else "Conserved energy",
        "Temperature",
        "Potential energy",
        "Distribution of the temperature",
        size=(9.2, 6.2),
    )
    for m in list(thermo)[:_MAX_LINES]:
        columns, size = thermo[m], about.sizes[m]
        every = max(1, len(columns["time"]) // _MAX_POINTS)
        t = {k: v[::every] for k, v in columns.items()}
        x, style = t["time"] / 1000, {"linewidth": 0.9, "alpha": 0.8}
        style["label"] = figures.escape_label(str(about.names[m]), 24)
        first = t["volume"] if at_pressure else 1000 * (t["conserved"] - t["conserved"][0]) / size
        axes[0].plot(x, first, **style)
        axes[1].plot(x, t["temperature"], **style)
        axes[2].plot(x, 1000 * (t["potential"] - t["potential"].mean()) / size, **style)
    if 1 < len(thermo) <= _MAX_NAMED:
        figures.add_legend(axes[1])
    axes[0].set(xlabel="time (ps)", ylabel="volume (Å³)" if at_pressure else "change (meV/atom)")
    axes[1].set(xlabel="time (ps)", ylabel="temperature (K)")
    axes[2].set(xlabel="time (ps)", ylabel="energy − mean (meV/atom)")
    late = np.concatenate([c["temperature"][len(c["temperature"]) // 2 :] for c in thermo.values()])
    late = late[np.isfinite(late)]
    axes[3].set(xlabel="temperature (K)", ylabel="density (1/K)")
    if len(late) > 1 and np.ptp(late) > 0:
        bins = min(60, max(10, int(math.sqrt(len(late)))))
        axes[3].hist(late, bins=bins, density=True, color=figures.BLUE, alpha=0.8)
    if about.ensemble != "nve":
        axes[1].axhline(about.temperature, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes[3].axvline(about.temperature, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
    return fig


def _table(content: Mapping[str, Any]) -> Iterator[str]:
    yield page.heading("Molecules")
    header = (
        "molecule",
        "atoms",
        "mean T (K)",
        "std of T (K)",
        "drift (meV/atom/ps)",
        "broke at step",
    )
    rows = [
        (
            e["name"],
            e["n_atoms"],
            e.get("mean_temperature_k"),
            e.get("std_temperature_k"),
            e.get("drift_mev_per_atom_per_ps"),
            e["broken_at_step"],
        )
        for e in content["each"]
    ]
    yield page.table(header, rows[:_MAX_ROWS])
    if len(rows) > _MAX_ROWS:
        yield page.paragraph(f"{len(rows) - _MAX_ROWS} more are in metrics.json.")


def _pictures(pictures: Sequence[Picture]) -> Iterator[str]:
    if pictures:
        yield page.heading("Initial and final geometries")
        yield page.figure(
            molecule_figure(pictures),
            (
                "Molecules at the start (top) and in the last frame (bottom), aligned and viewed "
                "from the same direction."
            ),
            wide=True,
        )

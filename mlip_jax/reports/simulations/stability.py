"""Report of stability: `report.html`, a self-contained page, and `metrics.json`."""

from __future__ import annotations

import collections
import dataclasses
import itertools
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
from mlip_jax.simulation.dynamics import analysis
from mlip_jax.simulation.dynamics.analysis import SampledTrajectory
from mlip_jax.workdir import write_text

_MAX_ROWS, _MAX_COMPARED = 40, 6


@dataclasses.dataclass(frozen=True)
class Replica:
    """Simulation of one molecule at one temperature.

    Attributes:
      molecule: Index of the molecule.
      temperature: Temperature in K.
      broke_at: Time at which the molecule broke in ps, None if it did not break.
      reason: Reason why it broke, or "".
    """

    molecule: int
    temperature: float
    broke_at: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Dynamics of a molecule with the force field and the reference method, at one temperature.

    Attributes:
      name: Name of the molecule.
      distances: (x, density of the force field, density of the reference) of distances x in Å.
      spectrum: (x, density of the force field, density of the reference) of frequencies x in cm⁻¹.
      temperatures: Mean temperatures with the force field and the reference in K.
    """

    name: str
    distances: tuple[np.ndarray, np.ndarray, np.ndarray]
    spectrum: tuple[np.ndarray, np.ndarray, np.ndarray]
    temperatures: tuple[float, float]

    @property
    def overlaps(self) -> dict[str, float]:
        """Overlaps of the distances and of the spectra, from 0 to 1, see `analysis.overlap`."""
        return {
            kind: analysis.overlap(x, predicted, x, reference)
            for kind, (x, predicted, reference) in (
                ("distances", self.distances),
                ("spectrum", self.spectrum),
            )
        }


def compare(name: str, predicted: SampledTrajectory, reference: SampledTrajectory) -> Comparison:
    """Compare distances and spectra of the force field with those of the reference method.

    Distances are compared up to 8 Å, or half of the smallest height of a periodic cell if shorter.
    """
    longest = 8.0
    cell = predicted.cell
    if cell is not None:
        areas = np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
        longest = min(longest, 0.5 * abs(np.linalg.det(cell)) / areas.max())
    densities = []
    for measure in (lambda c: analysis.distances(c, longest), analysis.spectrum):
        (x, first), (other_x, second) = measure(predicted), measure(reference)
        densities.append((x, first, np.interp(x, other_x, second)))
    temperatures = analysis.temperature(predicted), analysis.temperature(reference)
    return Comparison(name, *densities, temperatures)


@dataclasses.dataclass(frozen=True)
class Stability:
    """Results of a stability run.

    Attributes:
      names: Names of the molecules.
      sizes: Number of atoms per molecule.
      drifts: Energy drift per molecule at constant energy in meV/atom/ps, NaN if unknown.
      replicas: All replicas.
      picoseconds: Requested duration of a replica in ps.
      timestep: Time step in fs.
      steps_per_second: Steps per second of all replicas together, without compilation; NaN if
        unknown.
      nve_steps_per_second: The same at constant energy.
      comparisons: Comparisons with the reference method.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    drifts: Sequence[float]
    replicas: Sequence[Replica]
    picoseconds: float
    timestep: float
    steps_per_second: float
    nve_steps_per_second: float
    comparisons: Sequence[Comparison] = ()

    @property
    def temperatures(self) -> list[float]:
        """Temperatures of the replicas in K, ascending, without duplicates."""
        return sorted({r.temperature for r in self.replicas})

    def at(self, temperature: float) -> list[Replica]:
        """Return the replicas at a temperature."""
        return [r for r in self.replicas if r.temperature == temperature]

    def survival(self, temperature: float) -> tuple[np.ndarray, np.ndarray]:
        """Return times (ps) and the fraction of replicas that are intact from each time on."""
        replicas = self.at(temperature)
        times = np.sort([r.broke_at for r in replicas if r.broke_at is not None])
        times = np.concatenate([[0.0], times, [self.picoseconds]])
        share = 1 - np.minimum(np.arange(len(times)), len(times) - 2) / len(replicas)
        return times, share


def metrics(result: Stability) -> dict[str, Any]:
    """Return the content of `metrics.json`; None for unknown values."""
    by_temperature = []
    for t in result.temperatures:
        replicas = result.at(t)
        times = [r.broke_at for r in replicas if r.broke_at is not None]
        lived = sum(result.picoseconds if r.broke_at is None else r.broke_at for r in replicas)
        by_temperature.append(
            {
                "temperature_k": t,
                "replicas": len(replicas),
                "survived": len(replicas) - len(times),
                "first_break_ps": min(times, default=None),
                "lived_ps": lived,
                # estimate for an exponential distribution: simulated time / number of breaks
                "mean_time_to_break_ps": lived / len(times) if times else None,
            }
        )
    # Stable means no break at this or any lower temperature.
    ascending = sorted(by_temperature, key=lambda e: e["temperature_k"])
    stable = [
        e["temperature_k"]
        for e in itertools.takewhile(lambda e: e["survived"] == e["replicas"], ascending)
    ]
    drifts = [abs(d) for d in result.drifts if math.isfinite(d)]
    num, known = len(result.replicas), math.isfinite(result.steps_per_second)
    # 0.0864 = 86,400 s/day * 1e-6 ns/fs
    return {
        "picoseconds": result.picoseconds,
        "temperatures": by_temperature,
        "highest_stable_temperature_k": max(stable, default=None),
        "largest_drift_mev_per_atom_per_ps": max(drifts, default=None),
        "molecules": [
            {
                "name": n,
                "n_atoms": s,
                "drift_mev_per_atom_per_ps": d if math.isfinite(d) else None,
                "broken": sum(r.molecule == m and r.broke_at is not None for r in result.replicas),
            }
            for m, (n, s, d) in enumerate(zip(result.names, result.sizes, result.drifts))
        ],
        "compared": [
            {
                "name": c.name,
                **{f"{kind}_overlap": value for kind, value in c.overlaps.items()},
                "temperature_k": c.temperatures[0],
                "reference_temperature_k": c.temperatures[1],
            }
            for c in result.comparisons
        ],
        "steps_per_second": result.steps_per_second if known else None,
        "nanoseconds_per_day_of_all": num * result.steps_per_second * result.timestep * 0.0864
        if known
        else None,
        "nve_steps_per_second": result.nve_steps_per_second
        if math.isfinite(result.nve_steps_per_second)
        else None,
    }


def write_stability_report(
    workdir: str | os.PathLike,
    result: Stability,
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      result: Results.
      title: Headline of the page.
      info: Sections of names and values: settings, force field, hardware.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    workdir, content = Path(workdir), metrics(result)
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(result, content),
        *_survival(result, content),
        *_molecules(content),
        *_reasons(result),
        *_comparison(result),
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _headline(result: Stability, content: Mapping[str, Any]) -> Iterator[str]:
    broken = sum(r.broke_at is not None for r in result.replicas)
    yield page.cards(
        [
            (
                "stable up to",
                page.number(content["highest_stable_temperature_k"]),
                "K",
                f"all replicas intact for {page.number(result.picoseconds)} ps",
            ),
            (
                "broken",
                page.number(broken),
                "",
                f"of {page.number(len(result.replicas))} replicas at "
                f"{len(result.temperatures)} temperatures",
            ),
            (
                "largest drift",
                page.number(content["largest_drift_mev_per_atom_per_ps"]),
                "meV/atom/ps",
                "at constant energy, by least squares",
            ),
            (
                "speed",
                page.number(content["steps_per_second"]),
                "steps/s",
                f"of {page.number(len(result.replicas))} replicas in parallel, "
                f"{page.number(content['nanoseconds_per_day_of_all'])} ns/day in total",
            ),
        ]
    )


def _survival(result: Stability, content: Mapping[str, Any]) -> Iterator[str]:
    yield page.heading("Survival")
    yield page.figure(
        survival_figure(result),
        (
            "Fraction of intact replicas by temperature. A replica breaks if a bond length leaves "
            "its range, its temperature is too high, values are not finite, or an atom moves too "
            "far in one step. At high temperatures, real molecules may dissociate as well."
        ),
        wide=True,
    )
    yield page.table(
        ("temperature (K)", "replicas", "survived", "first break (ps)", "mean time to break (ps)"),
        [
            (
                f"{e['temperature_k']:g}",
                e["replicas"],
                e["survived"],
                e["first_break_ps"],
                e["mean_time_to_break_ps"],
            )
            for e in content["temperatures"]
        ],
    )


def survival_figure(result: Stability) -> Figure:
    """Draw the fraction of intact replicas against time, one line per temperature."""
    fig, ax = figures.figure("Intact replicas", size=(9.2, 3.8))
    for t in result.temperatures:
        times, share = result.survival(t)
        ax.step(times, share, where="post", linewidth=1.8, label=f"{t:g} K")
    ax.set(xlabel="time (ps)", ylabel="fraction", ylim=(-0.03, 1.05), xlim=(0, result.picoseconds))
    figures.add_legend(ax, loc="lower left")
    return fig


def _molecules(content: Mapping[str, Any]) -> Iterator[str]:
    yield page.heading("Molecules")
    rows = [
        (e["name"], e["n_atoms"], e["drift_mev_per_atom_per_ps"], e["broken"])
        for e in content["molecules"]
    ]
    yield page.table(
        ("molecule", "atoms", "drift (meV/atom/ps)", "broken replicas"), rows[:_MAX_ROWS]
    )
    if len(rows) > _MAX_ROWS:
        yield page.paragraph(f"{len(rows) - _MAX_ROWS} more are in metrics.json.")


def _reasons(result: Stability) -> Iterator[str]:
    counts = collections.Counter(
        (result.names[r.molecule], f"{r.temperature:g}", r.reason)
        for r in result.replicas
        if r.broke_at is not None
    )
    if counts:
        yield page.heading("Reasons of breaks")
        yield page.table(
            ("molecule", "temperature (K)", "reason", "replicas"),
            [(*key, count) for key, count in counts.most_common(_MAX_ROWS)],
        )


def _comparison(result: Stability) -> Iterator[str]:
    if not result.comparisons:
        return
    yield page.heading("Comparison with the reference method")
    shown = result.comparisons[:_MAX_COMPARED]
    yield page.figure(
        comparison_figure(shown),
        (
            "Distributions of interatomic distances, and mass-weighted power spectra of the "
            "velocities, in dynamics with the force field (blue) and the reference method (gray)."
        ),
        wide=True,
    )
    yield page.table(
        (
            "molecule",
            "overlap of distances",
            "overlap of spectra",
            "temperature (K)",
            "reference (K)",
        ),
        [(c.name, *c.overlaps.values(), *c.temperatures) for c in result.comparisons[:_MAX_ROWS]],
    )


def comparison_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draw one row per molecule with distances and spectrum."""
    titles = [
        title for c in comparisons for title in (f"{c.name}: distances", f"{c.name}: vibrations")
    ]
    fig, axes = figures.figure(*titles, size=(9.2, 2.9 * len(comparisons)))
    for k, c in enumerate(comparisons):
        for ax, (x, predicted, reference), label in zip(
            axes[2 * k : 2 * k + 2], (c.distances, c.spectrum), ("Å", "cm⁻¹")
        ):
            ax.fill_between(x, reference, color="#c4c4c4", linewidth=0, label="reference method")
            ax.plot(x, predicted, color=figures.BLUE, linewidth=1.2, label="force field")
            ax.set(xlabel=label, ylabel="density", xlim=(0, x[-1]), ylim=(0, None))
        figures.add_legend(axes[2 * k], loc="upper right")
    return fig

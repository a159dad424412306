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

_MOST_ROWS, _MOST_COMPARED = 40, 6


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
            kind: analysis.overlap(x, own, x, other)
            for kind, (x, own, other) in (
                ("distances", self.distances),
                ("spectrum", self.spectrum),
            )
        }


def compare(name: str, own: SampledTrajectory, reference: SampledTrajectory) -> Comparison:
    """Compare distances and spectra of the force field with those of the reference method.

    Distances are compared up to 8 Å, or half of the smallest height of a periodic cell if shorter.
    """
    longest = 8.0
    if own.cell is not None:
        areas = np.linalg.norm(np.cross(own.cell[[1, 2, 0]], own.cell[[2, 0, 1]]), axis=1)
        longest = min(longest, 0.5 * abs(np.linalg.det(own.cell)) / areas.max())
    made = []
    for measure in (lambda c: analysis.distances(c, longest), analysis.spectrum):
        (x, first), (other_x, second) = measure(own), measure(reference)
        made.append((x, first, np.interp(x, other_x, second)))
    return Comparison(name, *made, (analysis.temperature(own), analysis.temperature(reference)))


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


def metrics(found: Stability) -> dict[str, Any]:
    """Return the content of `metrics.json`; None for unknown values."""
    by_temperature = []
    for t in found.temperatures:
        replicas = found.at(t)
        times = [r.broke_at for r in replicas if r.broke_at is not None]
        lived = sum(found.picoseconds if r.broke_at is None else r.broke_at for r in replicas)
        by_temperature.append(
            {
                "temperature_k": t,
                "replicas": len(replicas),
                "survived": len(replicas) - len(times),
                "first_break_ps": min(times, default=None),
                "lived_ps": lived,
                # estimate for an exponential distribution: total simulated time over number of breaks
                "mean_time_to_break_ps": lived / len(times) if times else None,
            }
        )
    # Stable means no break at this or any lower temperature.
    ascending = sorted(by_temperature, key=lambda e: e["temperature_k"])
    stable = [
        e["temperature_k"]
        for e in itertools.takewhile(lambda e: e["survived"] == e["replicas"], ascending)
    ]
    drifts = [abs(d) for d in found.drifts if math.isfinite(d)]
    num, known = len(found.replicas), math.isfinite(found.steps_per_second)
    # 0.0864 = 86,400 s/day * 1e-6 ns/fs
    return {
        "picoseconds": found.picoseconds,
        "temperatures": by_temperature,
        "highest_stable_temperature_k": max(stable, default=None),
        "largest_drift_mev_per_atom_per_ps": max(drifts, default=None),
        "molecules": [
            {
                "name": n,
                "n_atoms": s,
                "drift_mev_per_atom_per_ps": d if math.isfinite(d) else None,
                "broken": sum(r.molecule == m and r.broke_at is not None for r in found.replicas),
            }
            for m, (n, s, d) in enumerate(zip(found.names, found.sizes, found.drifts))
        ],
        "compared": [
            {
                "name": c.name,
                **{f"{kind}_overlap": value for kind, value in c.overlaps.items()},
                "temperature_k": c.temperatures[0],
                "reference_temperature_k": c.temperatures[1],
            }
            for c in found.comparisons
        ],
        "steps_per_second": found.steps_per_second if known else None,
        "nanoseconds_per_day_of_all": num * found.steps_per_second * found.timestep * 0.0864
        if known
        else None,
        "nve_steps_per_second": found.nve_steps_per_second
        if math.isfinite(found.nve_steps_per_second)
        else None,
    }


def write_stability_report(
    workdir: str | os.PathLike,
    found: Stability,
    *,
    title: str,
    info: Mapping[str, Mapping[str, Any]],
    files: Sequence[str] = (),
) -> Path:
    """Write `report.html` and `metrics.json` to `workdir`, each atomically.

    Args:
      workdir: Folder of the report.
      found: Results.
      title: Headline of the page.
      info: Sections of names and values: settings, force field, hardware.
      files: Names of further files in the workdir, to list on the page.

    Returns:
      Path of `report.html`.
    """
    workdir, content = Path(workdir), metrics(found)
    write_text(
        workdir / "metrics.json",
        json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n",
    )
    body = [
        page.heading(title, 1),
        *_headline(found, content),
        *_survival(found, content),
        *_molecules(content),
        *_reasons(found),
        *_compared(found),
        *sections.provenance(info, files),
    ]
    write_text(workdir / "report.html", page.render(title, body))
    return workdir / "report.html"


def _headline(found: Stability, content: Mapping[str, Any]) -> Iterator[str]:
    broken = sum(r.broke_at is not None for r in found.replicas)
    yield page.cards(
        [
            (
                "stable up to",
                page.number(content["highest_stable_temperature_k"]),
                "K",
                f"all replicas whole for {page.number(found.picoseconds)} ps",
            ),
            (
                "broken",
                page.number(broken),
                "",
                f"of {page.number(len(found.replicas))} replicas at "
                f"{len(found.temperatures)} temperatures",
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
                f"of {page.number(len(found.replicas))} replicas side by side, "
                f"{page.number(content['nanoseconds_per_day_of_all'])} ns/day in all",
            ),
        ]
    )


def _survival(found: Stability, content: Mapping[str, Any]) -> Iterator[str]:
    yield page.heading("Survival")
    yield page.figure(
        survival_figure(found),
        (
            "Share of the replicas that have not broken, by temperature. A replica breaks when a bond leaves its range, it "
            "gets too hot, numbers are not finite, or an atom moves too far in one step. Molecules may come apart at high "
            "temperatures in truth as well."
        ),
        wide=True,
    )
    yield page.table(
        (
            "temperature (K)",
            "replicas",
            "survived",
            "first break (ps)",
            "mean time to a break (ps)",
        ),
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


def survival_figure(found: Stability) -> Figure:
    """Draw the fraction of intact replicas against time, one line per temperature."""
    fig, ax = figures.figure("Replicas that are whole", size=(9.2, 3.8))
    for t in found.temperatures:
        times, share = found.survival(t)
        ax.step(times, share, where="post", linewidth=1.8, label=f"{t:g} K")
    ax.set(xlabel="time (ps)", ylabel="share", ylim=(-0.03, 1.05), xlim=(0, found.picoseconds))
    figures.add_legend(ax, loc="lower left")
    return fig


def _molecules(content: Mapping[str, Any]) -> Iterator[str]:
    yield page.heading("Molecules")
    rows = [
        (e["name"], e["n_atoms"], e["drift_mev_per_atom_per_ps"], e["broken"])
        for e in content["molecules"]
    ]
    yield page.table(
        ("molecule", "atoms", "drift (meV/atom/ps)", "replicas broken"), rows[:_MOST_ROWS]
    )
    if len(rows) > _MOST_ROWS:
        yield page.paragraph(f"{len(rows) - _MOST_ROWS} more are in metrics.json.")


def _reasons(found: Stability) -> Iterator[str]:
    counts = collections.Counter(
        (found.names[r.molecule], f"{r.temperature:g}", r.reason)
        for r in found.replicas
        if r.broke_at is not None
    )
    if counts:
        yield page.heading("Why they broke")
        yield page.table(
            ("molecule", "temperature (K)", "reason", "replicas"),
            [(*key, count) for key, count in counts.most_common(_MOST_ROWS)],
        )


def _compared(found: Stability) -> Iterator[str]:
    if not found.comparisons:
        return
    yield page.heading("Beside the reference method")
    shown = found.comparisons[:_MOST_COMPARED]
    yield page.figure(
        comparison_figure(shown),
        (
            "Distances between atoms and power spectrum of the velocities, weighted with the masses, in dynamics with the "
            "force field (blue) and with the reference method (grey)."
        ),
        wide=True,
    )
    yield page.table(
        (
            "molecule",
            "overlap of distances",
            "overlap of spectra",
            "temperature (K)",
            "of the reference (K)",
        ),
        [(c.name, *c.overlaps.values(), *c.temperatures) for c in found.comparisons[:_MOST_ROWS]],
    )


def comparison_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Draw one row per molecule with distances and spectrum."""
    titles = [
        title for c in comparisons for title in (f"{c.name}: distances", f"{c.name}: vibrations")
    ]
    fig, axes = figures.figure(*titles, size=(9.2, 2.9 * len(comparisons)))
    for k, c in enumerate(comparisons):
        for ax, (x, own, other), label in zip(
            axes[2 * k : 2 * k + 2], (c.distances, c.spectrum), ("Å", "cm⁻¹")
        ):
            ax.fill_between(x, other, color="#c4c4c4", linewidth=0, label="reference method")
            ax.plot(x, own, color=figures.BLUE, linewidth=1.2, label="force field")
            ax.set(xlabel=label, ylabel="density", xlim=(0, x[-1]), ylim=(0, None))
        figures.add_legend(axes[2 * k], loc="upper right")
    return fig

"""Task `inspect_data`: describe a data set as a table, a figure and JSON."""

from __future__ import annotations

import logging
from pathlib import Path

import ml_collections
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.datasets import source
from mlip_jax.datasets.quality.filters import REASONS
from mlip_jax.datasets.quality.histogram import Histogram
from mlip_jax.datasets.selection import splits
from mlip_jax.datasets.statistics import Summary, sum_reference
from mlip_jax.datasets.store.store import Store
from mlip_jax.datasets.stress import STRESS
from mlip_jax.reports.dataset.report import write_dataset_report
from mlip_jax.reports.dataset.summary import DatasetSummary, PropertySummary
from mlip_jax.reports.dataset.tables import print_summary
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Describe the data of `config` in `workdir`, and return the path of dataset.md.

    Raises:
      ConfigError, WorkdirError, DatasetError: The message explains how to fix the problem.
    """
    config = configs.complete(config, defaults.inspect_defaults())
    with claimed(workdir, configs.identity(config)) as folder:
        config.data.reject_invalid = False  # report invalid data instead of raising an error
        data = source.load(config.data)
        source.write_excluded(folder / "left_out.csv", data)
        summary = summarize(data)
        print_summary(summary)
        write_dataset_report(folder, summary)
    log.info("%s", folder / "dataset.md")
    return folder / "dataset.md"


def summarize(data: source.LoadedData) -> DatasetSummary:
    """Summarize the selected structures of a store for the report, in two passes over the store."""
    store, indices = data.store, data.indices
    total = Summary(columns for _, columns in store.chunks(indices, labels_only=True))
    reference = total.fit.solve() if total.fit.present.any() else None
    n_atoms = np.asarray(store.index("n_atoms")[indices])  # (S,) for S selected structures
    distances, molecule = (
        store.index("shortest_distance")[indices],
        store.index("molecule")[indices],
    )
    molecule_indices, num_molecules = splits.group(molecule)
    conformers = np.bincount(molecule_indices)  # (num_molecules,)
    known = np.isfinite(store.index("energy")[indices])
    forces = np.isfinite(store.index("force_rms")[indices])
    return DatasetSummary(
        title=data.name,
        level_of_theory=data.level_of_theory,
        files=[f["name"] for f in store.manifest["source"]["files"]][:20],
        elements={chemical_symbols[z]: int(total.atoms[z]) for z in total.elements},
        num_structures=len(indices),
        num_molecules=num_molecules,
        n_atoms=_integer_histogram(n_atoms),
        conformers=_integer_histogram(conformers),
        shortest_distance=_fill(Histogram.linear(0.0, 3.0, 120), distances),
        charges={
            float(c): int(n)
            for c, n in zip(*np.unique(store.index("charge")[indices], return_counts=True))
        },
        labels={"energy": float(known.mean()), "forces": float(forces.mean())},
        properties=_properties(store, indices),
        reference_energies={}
        if reference is None
        else {chemical_symbols[z]: float(reference[z]) for z in total.elements},
        counts={
            "read from the source": store.manifest["counts"]["read"],
            **{
                f"skipped by the reader: {k}": n
                for k, n in store.manifest["counts"]["skipped"].items()
            },
            **{
                f"removed from the store: {k}": n
                for k, n in store.manifest["counts"]["removed"].items()
                if k in REASONS
            },
            **{f"skipped here: {k}": n for k, n in data.counts["left out"].items()},
        },
        notes=[*store.manifest["notes"], *_reference_notes(total)],
        problems=[p["message"] for p in store.manifest["problems"]],
        **_atom_histograms(store, indices, total, reference),
    )


def _reference_notes(total: Summary) -> list[str]:
    """Return a remark on reference energies that the compositions do not determine."""
    undetermined = total.fit.undetermined()
    if not len(undetermined):
        return []
    symbols = ", ".join(chemical_symbols[z] for z in undetermined)
    return [
        f"The compositions do not determine the reference energies of {symbols}. Training uses "
        "isolated atoms of the data set if it has them."
    ]


def _integer_histogram(values: np.ndarray) -> Histogram:
    """Return a histogram with one bin per integer, or 200 bins if the range is 400 or more."""
    low, high = int(values.min()), int(values.max())
    return _fill(
        Histogram.integers(low, high)
        if high - low < 400
        else Histogram.linear(low - 0.5, high + 0.5, 200),
        values,
    )


def _fill(histogram: Histogram, values: np.ndarray) -> Histogram:
    histogram.add(values)
    return histogram


def _atom_histograms(
    store: Store, indices: np.ndarray, total: Summary, reference
) -> dict[str, Histogram]:
    """Compute the distributions that need a second pass over the store.

    These are the magnitudes of the forces on atoms, and energies per atom with and without the
    per-element reference energies subtracted.
    """
    force = Histogram.logarithmic(1e-4, 1e3, 140)
    energies = []
    for _, columns in store.chunks(indices, labels_only=True):
        if np.isfinite(columns.forces).any():
            force.add(np.linalg.norm(columns.forces, axis=1))
        if reference is not None:
            energies.append((columns.energy - sum_reference(reference, columns)) / columns.n_atoms)
    histograms = {"force": force} if np.isfinite(total.force_rms) else {}
    if energies:
        per_atom = np.concatenate(energies)
        histograms["energy_per_atom"] = _bulk_histogram(per_atom)
        histograms["total_energy_per_atom"] = _bulk_histogram(
            store.index("energy")[indices] / store.index("n_atoms")[indices]
        )
    return histograms


def _bulk_histogram(values: np.ndarray) -> Histogram:
    """Return a histogram over the bulk of the values; outliers are counted beyond the edges."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, [0.001, 0.999]) if len(known) else (0.0, 1.0)
    margin = max(0.1 * (high - low), 1e-3)
    return _fill(Histogram.linear(low - margin, high + margin, 120), values)


def _properties(store: Store, indices: np.ndarray) -> dict[str, PropertySummary]:
    """Summarize further labels: range of finite values, and fraction of structures with a label."""
    names = store.manifest["properties"]
    low, high, known = ({n: v for n in names} for v in (np.inf, -np.inf, 0))
    if names:
        for _, columns in store.chunks(indices):
            for name, values in columns.properties.items():
                finite = np.isfinite(values)
                if finite.any():
                    low[name] = min(low[name], float(values[finite].min()))
                    high[name] = max(high[name], float(values[finite].max()))
                    known[name] += int(finite.reshape(len(values), -1).all(1).sum())
    return {
        n: PropertySummary(
            low[n] if known[n] else float("nan"),
            high[n] if known[n] else float("nan"),
            known[n] / len(indices),
            unit="eV/Å³" if n == STRESS else "",
            shape=tuple(names[n]),
        )
        for n in sorted(names)
    }

"""Results of relaxations: the table results.csv, its metrics, and molecules to show."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_jax.datasets.identity import display_name
from mlip_jax.foreign_text import table_rows

MAX_OUTSIDE = 20  # number of molecules outside the domain whose names are kept
STATUSES = ("converged", "step limit", "diverged", "failed")
_NUMBERS = {
    "steps": "steps",
    "energy_start": "energy_start_ev",
    "energy": "energy_ev",
    "rmsd": "rmsd_ang",
    "fmax_start": "fmax_start_ev_per_ang",
    "fmax": "fmax_ev_per_ang",
    "n_atoms": "n_atoms",
}
# Columns of relaxations of cells; tables of molecules do not have them.
_CELL_NUMBERS = {
    "volume_start": "volume_start_ang3",
    "volume": "volume_ang3",
    "pressure": "pressure_gpa",
}


@dataclasses.dataclass(frozen=True)
class Relaxations:
    """Columns of results.csv, each (M,); unknown numbers are NaN.

    Attributes:
      index: Index of the molecule.
      status: Index in STATUSES.
      steps: Number of steps.
      n_atoms: Number of atoms.
      energy_start: Energy of the start geometry in eV.
      energy: Energy of the relaxed geometry in eV.
      fmax_start: Largest force on an atom of the start geometry in eV/Å.
      fmax: Largest force on an atom of the relaxed geometry in eV/Å.
      rmsd: Root mean square distance between start and relaxed geometry after alignment in Å.
      outside: 1 if the relaxed geometry is outside of the domain of the force field, otherwise 0.
      outside_names: Name, index and status of the first MAX_OUTSIDE molecules outside the domain.
      reasons: {(status, kind of reason): (count, an example with the name of its molecule)}.
      volume_start: Volume of the cell of the start geometry in Å³; NaN for molecules.
      volume: Volume of the cell of the relaxed geometry in Å³.
      pressure: Pressure of the relaxed geometry in GPa.
    """

    index: np.ndarray
    status: np.ndarray
    steps: np.ndarray
    n_atoms: np.ndarray
    energy_start: np.ndarray
    energy: np.ndarray
    fmax_start: np.ndarray
    fmax: np.ndarray
    rmsd: np.ndarray
    outside: np.ndarray
    reasons: Mapping[tuple[str, str], tuple[int, str]]
    outside_names: Sequence[tuple[str, int, str]] = ()
    volume_start: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    volume: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    pressure: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def __len__(self) -> int:
        return len(self.status)

    def count(self, status: str) -> int:
        """Return the number of molecules with a status."""
        return int((self.status == STATUSES.index(status)).sum())

    def of(self, *statuses: str) -> np.ndarray:
        """Return which molecules have one of the given statuses, (M,) bool."""
        return np.isin(self.status, [STATUSES.index(s) for s in statuses])

    @property
    def gained(self) -> np.ndarray:
        """Energy at the start minus energy at the end in eV, (M,)."""
        return self.energy_start - self.energy

    @property
    def volume_change(self) -> np.ndarray:
        """Relative change of the volume of the relaxed cells in %, those that are known."""
        if not len(self.volume):
            return self.volume
        done = self.of("converged", "step limit") & np.isfinite(self.volume)
        return 100 * (self.volume[done] / self.volume_start[done] - 1)


def read_results(path: Path) -> Relaxations:
    """Read a results.csv; reasons of failures are counted by kind, with one example each."""
    index, status, outside, outside_names = [], [], [], []
    numbers = {name: [] for name in (*_NUMBERS, *_CELL_NUMBERS)}
    reasons: dict[tuple[str, str], tuple[int, str]] = collections.OrderedDict()
    with open(path, newline="", encoding="utf-8") as file:
        for row in table_rows(file):
            index.append(int(row["index"]))
            status.append(STATUSES.index(row["status"]))
            for name, column in _NUMBERS.items():
                numbers[name].append(float(row[column] or "nan"))
            for name, column in _CELL_NUMBERS.items():
                numbers[name].append(float(row.get(column) or "nan"))
            # tables of earlier versions do not have this column
            outside.append(float(row.get("outside_domain") or "nan"))
            name = display_name(row["name"], row["smiles"], None, f"molecule {row['index']}")
            if outside[-1] == 1 and len(outside_names) < MAX_OUTSIDE:
                outside_names.append((name, index[-1], row["status"]))
            if row["reason"] or row["status"] != "converged":
                key = row["status"], kind_of_reason(row["reason"])
                count, example = reasons.get(
                    key, (0, f"{name}: {row['reason']}" if row["reason"] else name)
                )
                reasons[key] = count + 1, example
    return Relaxations(
        np.array(index, np.int64),
        np.array(status, np.int8),
        outside=np.array(outside, np.float64),
        **{k: np.array(v, np.float64) for k, v in numbers.items()},
        reasons=reasons,
        outside_names=tuple(outside_names),
    )


def kind_of_reason(reason: str) -> str:
    """Return the reason without details of one molecule: location in a file, quoted texts, numbers.

    >>> kind_of_reason("a.smi line 12: RDKit cannot read the SMILES 'C1CC'")
    'RDKit cannot read the SMILES …'
    >>> kind_of_reason("atoms 3 and 7 are 0.12 Å apart")
    'atoms … and … are … Å apart'
    """
    reason = re.sub(r"^\S.*? (line|structure|molecule|row) \d+: ", "", reason)
    reason = re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)
    return re.sub(r"(?<![A-Za-z])[-−]?\d+(\.\d+)?([eE][-+]?\d+)?(?![A-Za-z\d])", "…", reason)


def metrics(results: Relaxations, seconds: float) -> dict[str, Any]:
    """Return the content of `metrics.json`: counts, quantiles and reasons; None if unknown."""
    done = results.of("converged", "step limit")
    quantities = {
        "steps": results.steps,
        "energy_gained_ev": results.gained,
        "rmsd_ang": results.rmsd,
        "fmax_start_ev_per_ang": results.fmax_start,
        "fmax_ev_per_ang": results.fmax,
    }
    ran = len(results) - results.count("failed")
    known = np.isfinite(results.outside)
    return {
        "molecules": len(results),
        **{s.replace(" ", "_"): results.count(s) for s in STATUSES},
        "converged_share": results.count("converged") / len(results) if len(results) else None,
        "seconds": round(seconds, 3),
        "molecules_per_second": ran / seconds if seconds > 0 else None,
        "steps_in_all": int(np.nansum(results.steps)),
        "outside_domain": int(results.outside[known].sum()) if known.any() else None,
        **{name: _quantiles(values[done]) for name, values in quantities.items()},
        **_cell_metrics(results, done),
        "reasons": [
            {"status": s, "reason": kind, "count": count, "example": example}
            for (s, kind), (count, example) in reasons_by_count(results)
        ],
    }


def _cell_metrics(results: Relaxations, done: np.ndarray) -> dict[str, Any]:
    """Return the metrics of relaxed cells; none if there are only molecules."""
    if not len(results.volume_change):
        return {}
    return {
        "volume_change_percent": _quantiles(results.volume_change),
        "pressure_gpa": _quantiles(results.pressure[done]),
    }


def reasons_by_count(results: Relaxations):
    return sorted(results.reasons.items(), key=lambda item: -item[1][0])


def _quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Return mean and quantiles of the finite values, None if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    names = {"min": 0.0, "p05": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {
        "mean": float(values.mean()),
        **{k: float(np.quantile(values, q)) for k, q in names.items()},
    }


def choose(
    results: Relaxations, num_conformers: int = 1, count: int = 6, max_atoms: int = 60
) -> list[int]:
    """Choose converged molecules to show, and return their indices from small to large RMSD.

    Large molecules, and several conformers of one molecule, are chosen only if there are too few
    others.

    Args:
      results: Result of `read_results`.
      num_conformers: Number of conformers per molecule.
      count: Maximum number of molecules to show.
      max_atoms: Number of atoms up to which a molecule is small.
    """
    good = np.flatnonzero(
        results.of("converged") & np.isfinite(results.rmsd) & (results.n_atoms > 1)
    )
    small = good[results.n_atoms[good] <= max_atoms]
    good = small if len(small) >= count else good
    good = good[np.lexsort((results.index[good], results.rmsd[good]))]
    one_of_each = np.sort(np.unique(results.index[good] // num_conformers, return_index=True)[1])
    good = good[one_of_each] if len(one_of_each) >= count else good
    if not len(good):
        return []
    indices = np.unique(np.linspace(0, len(good) - 1, count).round().astype(int))
    return [int(results.index[good[i]]) for i in indices]

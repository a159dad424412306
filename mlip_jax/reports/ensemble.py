"""Report of an ensemble: calibration of its expected errors, and its spread as a sign of errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_jax.reports import figures, sections
from mlip_jax.reports import html_page as page
from mlip_jax.reports.domain import LARGE, roc
from mlip_jax.simulation.trust.ensemble_calibration import Calibration, EnsembleErrors
from mlip_jax.wording import count_of
from mlip_jax.workdir import write_text

_MAX_BINS, _MIN_BIN_SIZE = 12, 5
_TITLES = {
    "calibration": "Structures to which the factors were fitted",
    "test": "Other structures of the test split",
}


class _CalibratedErrors(NamedTuple):
    """Actual and expected errors of one kind, for N structures or atoms.

    Attributes:
      error: Root mean square of the error over the components, (N,) in `unit`.
      expected: Expected error, (N,) in `unit`.
      z: |error| divided by the expected error, (N, components).
      unit: Unit of the errors.
    """

    error: np.ndarray
    expected: np.ndarray
    z: np.ndarray
    unit: str


def _calibrate(calibration: Calibration, evaluated: EnsembleErrors) -> dict[str, _CalibratedErrors]:
    """Return errors of "energy" (structures, meV/atom) and "forces" (atoms, meV/Å), where known."""
    kinds = {
        "energy": (evaluated.energy_error[:, None], evaluated.energy_spread, "meV/atom"),
        "forces": (evaluated.force_error, evaluated.force_spread, "meV/Å"),
    }
    calibrated = {}
    for name, (errors, spread, unit) in kinds.items():
        scale, known = getattr(calibration, name), np.isfinite(errors).all(axis=1)
        if scale is not None and known.any():
            errors, expected = errors[known], scale.expected(spread[known])  # (N, components), (N,)
            calibrated[name] = _CalibratedErrors(
                1e3 * np.sqrt(np.mean(errors**2, axis=1)),
                1e3 * expected,
                np.abs(errors) / expected[:, None],
                unit,
            )
    return calibrated


def scores(calibration: Calibration, evaluated: EnsembleErrors) -> dict[str, Any]:
    """Measure the quality of the expected errors.

    Returns:
      A JSON-safe dictionary with num_structures, energy and forces. The latter two are None without
      labels, otherwise dictionaries with
        rms_error: Root mean square error (meV/atom or meV/Å).
        z_rms: Root mean square of error / expected error; 1 for perfect calibration.
        within_1, within_2: Fractions of errors below one and two expected errors; 0.68 and 0.95 for
          Gaussian errors.
        roc_auc: Area under the ROC curve of the spread as a predictor of the largest 10 % of the
          errors of structures or atoms; None if there are too few.
    """
    result: dict[str, Any] = {"num_structures": len(evaluated), "energy": None, "forces": None}
    for name, errors in _calibrate(calibration, evaluated).items():
        area = roc(errors.expected, errors.error)[2]
        result[name] = {
            "rms_error": float(np.sqrt(np.mean(errors.error**2))),
            "z_rms": float(np.sqrt(np.mean(errors.z**2))),
            "within_1": float(np.mean(errors.z < 1)),
            "within_2": float(np.mean(errors.z < 2)),
            "roc_auc": area if np.isfinite(area) else None,
        }
    return result


def write_ensemble_report(
    workdir: Path,
    calibration: Calibration,
    evaluated: Mapping[str, EnsembleErrors],
    scores: Mapping[str, Mapping[str, Any]],
    *,
    notes: Sequence[str],
    info: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write report.html, one self-contained page, and return its path.

    Args:
      workdir: Folder of the report.
      calibration: Calibration of the ensemble.
      evaluated: Errors of the structures of the fit, "calibration", and of the check, "test".
      scores: Result of the function `scores` for each of them.
      notes: Notes at the top of the page.
      info: Sections of names and values for `sections.provenance`.
    """
    scales = {"energy": calibration.energy, "forces": calibration.forces}
    detail = f"fitted to {count_of(calibration.num_structures, 'structure', ',')}"
    body = [
        page.heading("Expected errors of the ensemble", 1),
        page.cards(
            [
                (f"{name}: expected error / spread", f"{scale.factor:.2f}", "", detail)
                for name, scale in scales.items()
                if scale is not None
            ]
        ),
    ]
    body += [page.callout(note) for note in notes]
    body.append(
        page.paragraph(
            "The expected error is the standard deviation over the members times the factor above. "
            "For Gaussian errors, the root mean square of error / expected error is 1, and 68 % "
            "and 95 % of the errors are below one and two times the expected error. With few "
            "members, large errors are more frequent."
        )
    )
    for split, errors in evaluated.items():
        body += [page.heading(_TITLES[split]), *section(calibration, errors, scores[split])]
    body += sections.provenance(dict(info))
    write_text(workdir / "report.html", page.render("Ensemble", body))
    return workdir / "report.html"


def section(
    calibration: Calibration, evaluated: EnsembleErrors, scores: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the table of `scores` and the figures of expected and actual errors."""
    yield _table(scores)
    yield from _figures(_calibrate(calibration, evaluated))


def _table(scores: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            unit,
            s["rms_error"],
            s["z_rms"],
            100 * s["within_1"],
            100 * s["within_2"],
            s["roc_auc"],
        )
        for name, unit in (("energy", "meV/atom"), ("forces", "meV/Å"))
        if (s := scores[name]) is not None
    ]
    return page.table(
        [
            f"{count_of(scores['num_structures'], 'structure', ',')}",
            "unit",
            "RMS error",
            "RMS of error / expected error",
            "below 1 × expected (%)",
            "below 2 × expected (%)",
            "area under the ROC curve",
        ],
        rows,
    )


def _figures(calibrated: Mapping[str, _CalibratedErrors]) -> Iterator[str]:
    """Yield, per kind of error, a calibration plot and a ROC curve."""
    for name, errors in calibrated.items():
        fig, axes = figures.figure(
            "Actual against expected error",
            f"Largest {100 * LARGE:.0f} % of the errors",
            size=(9.2, 3.8),
        )
        expected, actual = _rms_in_bins(errors)
        axes[0].plot(expected, actual, color=figures.BLUE, marker="o", markersize=4)
        low, high = min(expected.min(), actual.min()), max(expected.max(), actual.max())
        ends = np.array([0.8 * low, 1.25 * high])
        axes[0].plot(ends, ends, color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        for which in "xy":
            figures.set_log_scale(axes[0], ends, which)
        axes[0].set(xlabel=f"expected error ({errors.unit})", ylabel=f"RMS error ({errors.unit})")
        false, true, area = roc(errors.expected, errors.error)
        axes[1].plot(false, true, color=figures.BLUE)
        axes[1].plot([0, 1], [0, 1], color=figures.GREY, linewidth=1, linestyle=(0, (4, 3)))
        axes[1].set(
            xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1)
        )
        samples = "structures" if name == "energy" else "atoms"
        yield page.figure(
            fig,
            f"{name} of {len(errors.error):,} {samples}. Left: root mean square error of {samples} "
            "with similar expected errors; both agree on the dashed line. Right: detection of "
            f"large errors by the spread; area under the ROC curve {area:.2f} (chance: 0.5).",
            wide=True,
        )


def _rms_in_bins(errors: _CalibratedErrors) -> tuple[np.ndarray, np.ndarray]:
    """Return RMS expected and actual errors in bins of equal counts, both (B,) and positive."""
    order = np.argsort(errors.expected, kind="stable")
    bins = np.array_split(order, int(np.clip(len(order) // _MIN_BIN_SIZE, 1, _MAX_BINS)))
    expected, actual = (
        np.array([np.sqrt(np.mean(x[b] ** 2)) for b in bins])
        for x in (errors.expected, errors.error)
    )
    return expected, np.maximum(actual, 1e-9)  # the axes are logarithmic

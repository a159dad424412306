"""Diagnosis of missing labels, overlapping atoms, net forces and outliers from checks.Findings."""

from __future__ import annotations

from mlip_jax.datasets.quality.checks import LARGE_FORCE, TOO_CLOSE
from mlip_jax.datasets.quality.problems import Problem, describe_count

# Limits of the median |ΣF| / sqrt(Σ|F|²), and the |ΣF| (eV/Å) below which net forces are ignored.
_NET_WARNING, _NET_ERROR, _NET_SMALL = 0.03, 0.3, 0.01
_TOO_CLOSE_SHARE = 0.01
_LARGE_FORCE_SHARE = 0.05


def diagnose_contacts(findings, length):
    """Return the problem of overlapping atoms."""
    close = findings.counts["too close"]
    if not close or length < 1:  # diagnose_lengths reports positions that are too short
        return []
    severity = "error" if close > _TOO_CLOSE_SHARE * findings.counts["structures"] else "warning"
    return [
        Problem(
            severity,
            "atoms too close",
            f"{describe_count(close, findings)} have two atoms within {TOO_CLOSE} Å; the closest "
            f"are in {_names(findings, 'shortest distance', 'Å')}. Set data.min_distance to "
            "exclude them",
        )
    ]


def diagnose_labels(findings):
    """Return the problems of missing labels and of positions that are not finite."""
    counts, total, problems = findings.counts, findings.counts["structures"], []
    if counts["no labels"] == total and counts["properties"]:
        return [
            Problem(
                "warning",
                "no labels",
                "no structure has an energy or forces: properties can be learned, but not a force "
                "field. If the file has such labels, check their names in the options of the "
                "reader",
            )
        ]
    if counts["no labels"] == total:
        return [
            Problem(
                "error",
                "no labels",
                "no structure has an energy or forces: nothing can be trained. Check the names of "
                "the labels in the options of the reader",
            )
        ]
    for label in ("energy", "forces"):
        missing = counts[f"no {label}"]
        if missing == total:
            problems.append(
                Problem(
                    "warning",
                    f"no {label}",
                    f"no structure has {label}: training and tests on them are impossible. If the "
                    "file has them, check their names in the options of the reader",
                )
            )
        elif missing:
            problems.append(
                Problem(
                    "warning",
                    f"no {label}",
                    f"{describe_count(missing, findings)} have no {label}; the loss omits these "
                    "labels",
                )
            )
    if counts["partly forces"]:
        problems.append(
            Problem(
                "warning",
                "partly forces",
                f"{describe_count(counts['partly forces'], findings)} have forces of some atoms "
                "only; the loss omits unknown components",
            )
        )
    if counts["positions not finite"]:
        problems.append(
            Problem(
                "error",
                "positions not finite",
                f"{describe_count(counts['positions not finite'], findings)} have NaN or infinite "
                "positions. Remove them from the source",
            )
        )
    return problems


def diagnose_net_force(findings):
    """Return the problem of forces that do not sum to zero."""
    relative, net = (findings.distributions[k].median for k in ("relative net force", "net force"))
    if not relative > _NET_WARNING or not net > _NET_SMALL:
        return []
    severity = "error" if relative > _NET_ERROR else "warning"
    return [
        Problem(
            severity,
            "net force",
            f"forces do not sum to zero: the median |ΣF| is {net:.3g} eV/Å, {relative:.2g} of "
            f"sqrt(Σ|F|²) (random forces: 1; expected below {_NET_WARNING}). Check that the forces "
            "are complete and belong to these atoms in this order",
        )
    ]


def diagnose_outliers(findings):
    """Return the problems of large forces and of energy outliers."""
    problems = []
    large = findings.counts["large force"]
    if large:
        severity = (
            "error" if large > _LARGE_FORCE_SHARE * findings.counts["structures"] else "warning"
        )
        problems.append(
            Problem(
                severity,
                "large forces",
                f"{describe_count(large, findings)} have a force component beyond {LARGE_FORCE:g} "
                f"eV/Å: {_names(findings, 'force component', 'eV/Å')}. Set data.max_force to "
                "exclude them",
            )
        )
    if findings.counts["energy outlier"]:
        problems.append(
            Problem(
                "warning",
                "energy outliers",
                f"{describe_count(findings.counts['energy outlier'], findings)} have an energy far "
                "from the sum of fitted element energies: "
                f"{_names(findings, 'energy residual', 'eV/atom')}. To exclude single "
                "conformations of a molecule, set data.max_energy_z; whole molecules may contain a "
                "rare element or charge",
            )
        )
    return problems


def _names(findings, quantity, unit, max_names=3):
    """Format at most `max_names` of the worst structures of a quantity with their values."""
    return ", ".join(
        f"{name} ({value:.3g} {unit})" for value, name in findings.worst[quantity][:max_names]
    )

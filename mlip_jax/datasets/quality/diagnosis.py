"""Diagnosis of the statistics of checks.examine: problems, with their likely cause and remedy."""

from __future__ import annotations

from mlip_jax.datasets.quality.checks import Findings
from mlip_jax.datasets.quality.label_diagnosis import (
    diagnose_contacts,
    diagnose_labels,
    diagnose_net_force,
    diagnose_outliers,
)
from mlip_jax.datasets.quality.problems import Problem, describe_count
from mlip_jax.datasets.quality.single_diagnosis import diagnose_without_pairs
from mlip_jax.datasets.quality.stress_check import diagnose_stress
from mlip_jax.datasets.quality.unit_diagnosis import (
    diagnose_lengths,
    diagnose_ratio,
    diagnose_scale,
)

_DUPLICATES = 0.05  # fraction of duplicates above which they are reported


def diagnose(findings: Findings, *, duplicates: int | None = None) -> list[Problem]:
    """Return the problems of a data set, errors first; an empty list if none are found.

    Args:
      findings: Combined findings of all blocks.
      duplicates: Number of duplicates from checks.count_duplicates; None if not counted.
    """
    if not findings.counts["structures"]:
        return [
            Problem("error", "empty", "there are no structures. Check the path and the filters")
        ]
    length, problems = diagnose_lengths(findings)
    fit = diagnose_ratio(findings, length)
    if not any(p.severity == "error" for p in fit):
        fit = fit + diagnose_scale(findings, length)
    problems += diagnose_without_pairs(findings, fit) if length == 1 else fit
    problems += diagnose_contacts(findings, length) + diagnose_labels(findings)
    problems += diagnose_net_force(findings) + diagnose_outliers(findings)
    problems += diagnose_stress(findings)
    if duplicates and duplicates > _DUPLICATES * findings.counts["structures"]:
        problems.append(
            Problem(
                "warning",
                "duplicates",
                f"{describe_count(duplicates, findings)} are exact copies of earlier ones, so a "
                "split by structure puts them into both training and test. Split by molecule, or "
                "remove them",
            )
        )
    return sorted(problems, key=lambda p: p.severity != "error")

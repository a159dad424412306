"""Problems of a data set, with the finding, the expectation and the remedy."""

from __future__ import annotations

from typing import NamedTuple

# Problem.what of units, signs and positions, which the first blocks of a data set reveal. Fractions
# of bad structures, missing labels and duplicates need the whole data set.
UNCONFIRMED = "unconfirmed units"  # a question, which data.confirm_units answers
WRONG_STRESS = "stress"  # a warning, which is an error of runs that use the stress
EARLY = frozenset(
    {
        "positions",
        "positions not finite",
        "units",
        "gradients",
        "forces and energies",
        "net force",
        UNCONFIRMED,
    }
)


class Problem(NamedTuple):
    """Problem of a data set.

    Attributes:
      severity: "error" or "warning".
      what: Short name of the problem.
      message: Finding, expectation and remedy.
    """

    severity: str
    what: str
    message: str


def describe_count(count, findings):
    """Format a number of structures with its fraction of all structures."""
    total = findings.counts["structures"]
    return f"{count} of {total} structures ({100 * count / total:.3g} %)"

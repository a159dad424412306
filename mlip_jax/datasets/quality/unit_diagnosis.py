"""Diagnosis of units and signs of positions, energies and forces from checks.Findings.

Positions are compared with typical bond lengths, forces with the energy differences of close pairs
and with the stiffness of bonds of hydrogen.
"""

from __future__ import annotations

import math

from ase import units

from mlip_jax.datasets.quality.checks import FLIPPED
from mlip_jax.datasets.quality.problems import Problem
from mlip_jax.datasets.quality.unit_guesses import (
    MAX_RATIO_DEVIATION,
    MAX_SCALE_FACTOR,
    describe_guesses,
    energy_and_force_guesses,
    force_guesses,
    near_guesses,
)

MIN_PAIRS = 20  # close pairs needed to accept the forces
# Number of pairs that suffices for an error if they all agree on a wrong ratio.
_MIN_PAIRS_OF_ERROR = 6
# Limits of ΔE/W of close pairs: its median, and the fraction of pairs within a factor of two of it.
_RATIO_GOOD = (0.9, 1.1)
_SHARE_GOOD, _SHARE_MIN = 0.85, 0.6
# Fraction and number of pairs whose forces have the wrong sign while other pairs are correct.
_FLIPPED_WARNING, _FLIPPED_ERROR, _FLIPPED_MIN_PAIRS = 0.03, 0.1, 3
# Minimum fraction of pairs with a ratio near 1 or -1. Random ratios do not reach it.
_FLIPPED_OR_NOT = 0.6
# Stiffness of bonds of H (eV/Å²). The medians of data sets, hot and relaxed, with several methods,
# are 27 to 42. A factor beyond _BOND_BAND indicates wrong units: the closest units in use, kcal/mol
# and hartree, differ by factors of 23 and 27.
_BOND, _BOND_BAND, MIN_BONDS = 33.0, 5.0, 20
# |ΔF|/|Δx| of pairs without bonds of H (eV/Å²), from soft metals to carbon.
_STIFFNESS = (0.5, 300.0)
_CONVERT = "Convert them, or set the unit in the options of the reader"
# Median shortest distance (Å) of structures with H and C, N or O: low, high, factor by which
# positions are too large, explanation. Bonds of H are 0.95 to 1.1 Å long, distorted ones shorter.
_LENGTHS = (
    (0.075, 0.135, 0.1, "nm: they are ten times too short. Multiply them by 10"),
    (
        0.42,
        0.62,
        units.Bohr,
        "Å converted twice from bohr: they are 0.529 times too short. Divide them by 0.529177",
    ),
    (0.75, 1.4, 1.0, ""),
    (1.6, 2.3, 1 / units.Bohr, "bohr: they are 1.89 times too long. Multiply them by 0.529177"),
    (7.5, 13.5, 10.0, "Å converted twice from nm: they are ten times too long. Divide them by 10"),
    (75.0, 135.0, 100.0, "pm: they are a hundred times too long. Divide them by 100"),
)


def diagnose_lengths(findings):
    """Return the factor by which positions are too large (1 if unknown), and the problems."""
    shortest = findings.distributions["shortest distance organic"]
    if shortest.count < 3:
        return 1.0, []
    median = shortest.median
    text = (
        f"the median shortest distance of {shortest.count} structures with H and C, N or O is "
        f"{median:.3g} Å, expected about 1.0 Å"
    )
    for low, high, factor, unit in _LENGTHS:
        if low <= median <= high:
            return factor, [
                Problem("error", "positions", f"positions look like {unit} ({text})")
            ] if unit else []
    return 1.0, [
        Problem(
            "error",
            "positions",
            f"positions have no known unit of length: {text}. Set the unit of the file in the "
            "options of the reader",
        )
    ]


def diagnose_ratio(findings, length):
    """Return the problems of forces that do not fit the energy differences of close pairs."""
    ratio = findings.distributions["pair ratio"]
    num_labeled = findings.counts["structures"] - max(
        findings.counts["no energy"], findings.counts["no forces"]
    )
    median = ratio.median
    # Fraction of pairs within a factor of two of the median.
    share = ratio.share(*sorted((0.5 * median, 2 * median)))
    good = _RATIO_GOOD[0] <= median * length <= _RATIO_GOOD[1]
    flipped = _diagnose_signs(findings, length)
    negative = ratio.count >= _MIN_PAIRS_OF_ERROR and ratio.largest < 0
    if (
        ratio.count < MIN_PAIRS
        and not negative
        and (ratio.count < _MIN_PAIRS_OF_ERROR or share < 1 or good)
    ):
        text = (
            f"too few close pairs: found {ratio.count} pairs of close conformations of one "
            f"molecule; comparing forces with energy differences requires {MIN_PAIRS}. It is not "
            "checked whether forces in eV/Å fit the energies in eV. Add conformations per "
            "molecule, or compare some by hand"
        )
        return flipped + ([Problem("warning", "few pairs", text)] if num_labeled > 0 else [])
    evidence = (
        f"over {ratio.count} close pairs of conformations the median of ΔE / (-½(F₁+F₂)·Δx) is "
        f"{median:.4g}, expected 1; {share:.0%} of the pairs agree with it to a factor of two"
    )
    corrected = median * length  # wrong positions explain the rest; they are reported separately
    if flipped:
        return flipped
    if negative and share < _SHARE_MIN:
        return [
            Problem(
                "error",
                "gradients",
                "these look like gradients (dE/dx), not forces: change their sign. All energy "
                f"differences have the wrong sign ({evidence})",
            )
        ]
    if share < _SHARE_MIN:
        return [
            Problem(
                "error",
                "forces and energies",
                f"forces do not fit the energy differences, and no unit explains it: {evidence}. "
                "Check that forces and energies belong to the same structures and level of theory, "
                "in the same order",
            )
        ]
    if not good:
        if length != 1:
            evidence += f", and {corrected:.4g} with corrected positions"
        return [
            Problem(
                "error", *_explain_ratio(corrected, abs(_force_scale(findings, length)), evidence)
            )
        ]
    if share < _SHARE_GOOD:
        return [
            Problem(
                "warning",
                "forces and energies",
                f"some forces do not fit the energies: {evidence}. Look for structures whose "
                "forces in eV/Å and energies in eV belong to different calculations",
            )
        ]
    return []


def _diagnose_signs(findings, length):
    """Return the problem of forces with the wrong sign in some pairs only."""
    ratio = findings.distributions["pair ratio"]
    share = ratio.share(*(edge / length for edge in FLIPPED))
    count = round(share * ratio.count) if ratio.count else 0
    correct = ratio.share(*sorted(-edge / length for edge in FLIPPED))
    if count < _FLIPPED_MIN_PAIRS or share <= _FLIPPED_WARNING:
        return []
    if correct <= _FLIPPED_WARNING or share + correct < _FLIPPED_OR_NOT:
        return []
    examples = ", ".join(name for _, name in findings.worst["pair ratio"][:3])
    return [
        Problem(
            "error" if share > _FLIPPED_ERROR else "warning",
            "some gradients",
            f"some forces have the wrong sign: in {count} of {ratio.count} close pairs of "
            f"conformations ({share:.0%}) ΔE / (-½(F₁+F₂)·Δx) is about -1, expected 1. Change the "
            "sign of gradients that were read as forces in eV/Å"
            + (f", for instance in {examples}" if examples else ""),
        )
    ]


def _force_scale(findings, length):
    """Return the factor by which forces are too large, after correcting the positions.

    It is negative for gradients and NaN if there are too few bonds of H.
    """
    bonds = findings.distributions["bond stiffness"]
    return bonds.median * length / _BOND if bonds.count >= MIN_BONDS else math.nan


def diagnose_scale(findings, length):
    """Return the problems of a factor common to energies and forces, or of forces without pairs."""
    scale, bonds = _force_scale(findings, length), findings.distributions["bond stiffness"]
    if math.isnan(scale):
        return _diagnose_stiffness(findings, length)
    evidence = (
        f"bonds of H to C, N or O have a stiffness of {scale * _BOND:.3g} eV/Å², the median of "
        f"{bonds.count}, expected about {_BOND:g}"
    )
    ratio = findings.distributions["pair ratio"]
    # The energies are known to fit the forces only if some pairs have been compared.
    fits = (
        ratio.count >= _FLIPPED_MIN_PAIRS
        and _RATIO_GOOD[0] <= ratio.median * length <= _RATIO_GOOD[1]
    )
    problems = []
    if scale < 0:
        also = ", and that of the energies, which fit them" if fits else ""
        problems.append(
            Problem(
                "error",
                "gradients",
                f"these look like gradients (dE/dx), not forces: change their sign{also} "
                f"({evidence})",
            )
        )
    if scale == 0:
        problems.append(
            Problem(
                "error",
                "units",
                f"forces do not change with the positions ({evidence}). Check whether they are all "
                "zero. Store unknown forces as NaN, or omit them",
            )
        )
    elif not 1 / _BOND_BAND <= abs(scale) <= _BOND_BAND:
        problems.append(
            Problem(
                "error", "units", f"{_explain_scale(abs(scale), fits)} ({evidence}). {_CONVERT}"
            )
        )
    return problems


def _explain_scale(scale, fits):
    """Explain a factor of the forces in words.

    Args:
      scale: Factor by which forces are too large.
      fits: Whether the energies fit the forces; otherwise the energies are unknown.
    """
    table = force_guesses()
    if fits:
        table = [
            g
            for g in energy_and_force_guesses()
            if abs(math.log(g.ratio)) <= math.log(1 + MAX_RATIO_DEVIATION)
        ]
    which = "energies and forces are both about" if fits else "forces are about"
    factor = float(f"{max(scale, 1 / scale):.2g}")
    size = f"{factor:g} times too {'large' if scale > 1 else 'small'}"
    near = [(abs(math.log(scale / g.scale)), g) for g in table] if scale else []
    near = sorted(
        (g.far, distance, g) for distance, g in near if distance <= math.log(MAX_SCALE_FACTOR)
    )
    if not near:
        return f"{which} {size}, and no unit explains the factor"
    return f"{which} {size}, as if {describe_guesses([g for *_, g in near])}"


def _diagnose_stiffness(findings, length):
    """Return the problem of an unusual stiffness of pairs in data without bonds of H.

    These are metals, crystals and carbon, whose stiffness varies more.
    """
    pairs = findings.distributions["pair stiffness"]
    median = pairs.median * length
    if pairs.count < MIN_PAIRS or _STIFFNESS[0] <= median <= _STIFFNESS[1]:
        return []
    return [
        Problem(
            "warning",
            "stiffness",
            f"forces change by {median:.3g} eV/Å per Å between close conformations (the median of "
            f"{pairs.count} pairs), expected {_STIFFNESS[0]:g} to {_STIFFNESS[1]:g}. Unless the "
            "material is very soft or stiff, energies and forces are not in eV and eV/Å: convert "
            "them, or set the unit in the options of the reader",
        )
    ]


def _explain_ratio(ratio, scale, evidence):
    """Return name and message of the problem of a median ratio that is not 1.

    Args:
      ratio: Median of ΔE/W after correcting the positions.
      scale: Factor by which forces are too large, or NaN if unknown.
      evidence: Description of the finding, for the message.
    """
    gradient = "gradients (dE/dx), not forces" if ratio < 0 else ""
    if gradient and abs(abs(ratio) - 1) <= MAX_RATIO_DEVIATION + 0.02:
        return "gradients", f"these look like {gradient}: change their sign ({evidence})"
    near = near_guesses(abs(ratio), scale)
    if not near:
        also = f"; they also look like {gradient}" if gradient else ""
        return (
            "forces and energies",
            f"forces do not fit the energies, and no unit explains the factor: {evidence}{also}",
        )
    factor = near[0].ratio
    size = f"{1 / factor:.4g} times too large" if factor < 1 else f"{factor:.4g} times too small"
    also = f", and they look like {gradient}: change their sign as well" if gradient else ""
    return (
        "units",
        f"forces are {size} against energies and positions, as if {describe_guesses(near)}{also} "
        f"({evidence}). " + _CONVERT,
    )

"""Diagnosis of units and signs of data that have no close pairs of conformations to compare.

Forces are compared with the stiffness of bonds of H, energies with those of isolated atoms. Clear
evidence is an error. Unclear evidence is a question to the user, which data.confirm_units answers.
"""

from __future__ import annotations

import math

from mlip_jax.datasets.quality.checks import Findings
from mlip_jax.datasets.quality.distribution import Distribution
from mlip_jax.datasets.quality.problems import UNCONFIRMED, Problem
from mlip_jax.datasets.quality.unit_diagnosis import MIN_BONDS, MIN_PAIRS
from mlip_jax.datasets.quality.unit_guesses import MAX_SCALE_FACTOR, force_guesses

# Stiffness (eV/Å²) of stretched bonds of H: the usual value, the range of the medians of data sets
# (26 to 40, hot and relaxed, with several methods) with a margin, and the factor beyond which the
# forces have another unit.
_STIFFNESS, _USUAL, _BAND, _MIN_BONDS = 33.0, (23.0, 47.0), 5.0, 10
_SAME_SIGN = 0.8  # minimum fraction of bonds with the wrong sign
_MIN_SHARE = 0.6  # minimum fraction of bonds near the median; others prove nothing
# Median force (eV/Å) on H along bonds that are not stretched; it is 0.3 to 1.3 in data sets. A
# larger one would belong to bonds stretched by more than an eighth of an Å.
_MAX_FORCE = 4.0
# Number of compositions for a question and for an error. The energy of one composition may have
# the ratio of another unit by chance.
_MIN_ASKED, _MIN_COMPOSITIONS = 3, 5
_ENERGY_UNITS = {
    "in hartree": 1 / 27.211386,
    "in kcal/mol": 23.0605,
    "in kJ/mol": 96.4853,
    "converted twice from hartree": 27.211386,
    "converted twice from kcal/mol": 1 / 23.0605,
    "converted twice from kJ/mol": 1 / 96.4853,
}
# Ratio of the energies of molecules and of their isolated atoms by method: range, relative
# deviation from the median, and the wider range of methods that are similar.
_RATIOS = {
    "all-electron": ((0.97, 1.05), 0.03, (0.95, 1.1)),
    "GFN2-xTB": ((1.03, 1.3), 0.15, (0.95, 1.5)),
}
_NEARLY_AS_CLOSE = 1.3  # factor between the deviations of two guesses that are both stated
_AGREE = 0.9  # minimum fraction of compositions within the deviation
_CORRECT = "Convert them, or set the unit in the options of the reader"


def diagnose_without_pairs(findings: Findings, problems: list[Problem]) -> list[Problem]:
    """Return `problems` and those that single structures show, if there are too few pairs.

    The warning of too few pairs is dropped if single structures show that energies and forces are
    right.

    Args:
      findings: Combined findings of all blocks.
      problems: Problems that pairs of conformations show.
    """
    pairs = findings.distributions["pair ratio"].count >= MIN_PAIRS
    if pairs or any(p.severity == "error" for p in problems):
        return problems
    counts = findings.counts
    checked, further = True, []
    for label, diagnose in (("forces", _diagnose_forces), ("energy", _diagnose_energies)):
        if counts[f"no {label}"] < counts["structures"]:
            problem, known = diagnose(findings)
            further += problem
            checked &= known
    return further + [p for p in problems if not (checked or further) or p.what != "few pairs"]


def _diagnose_forces(findings: Findings) -> tuple[list[Problem], bool]:
    """Return the problem of the forces, and whether they have been checked."""
    if findings.distributions["bond stiffness"].count >= MIN_BONDS:  # see diagnose_scale
        return [], True
    bonds, at_rest = (findings.distributions[k] for k in ("stretch stiffness", "bond force"))
    if bonds.count < _MIN_BONDS:
        if at_rest.count >= _MIN_BONDS and at_rest.median > _MAX_FORCE:
            scale = at_rest.median / 0.7
            return [_large_forces(at_rest, scale)], True
        return [], False
    scale = bonds.median / _STIFFNESS
    evidence = (
        f"the median stiffness of {bonds.count} stretched bonds of H to C, N or O is "
        f"{bonds.median:.3g} eV/Å², expected about {_STIFFNESS:g}"
    )
    if bonds.share(-math.inf, 0.0) >= _SAME_SIGN:
        unit = "" if _in_band(scale) else f" Also, {_explain(abs(scale))}."
        return [
            Problem(
                "error",
                "gradients",
                "these look like gradients (dE/dx), not forces: change their sign. They push "
                f"stretched bonds farther apart ({evidence}).{unit}".rstrip("."),
            )
        ], True
    if bonds.share(0.6 * bonds.median, 1.6 * bonds.median) < _MIN_SHARE:
        return [], False
    if not _in_band(scale):
        return [Problem("error", "units", f"{_explain(scale)} ({evidence}). {_CORRECT}")], True
    if _USUAL[0] <= bonds.median <= _USUAL[1]:
        return [], True
    return [_question(f"forces in eV/Å, and not gradients? {_explain(scale)} ({evidence})")], True


def _in_band(scale: float) -> bool:
    return 1 / _BAND <= abs(scale) <= _BAND


def _large_forces(at_rest: Distribution, scale: float) -> Problem:
    return Problem(
        "error",
        "units",
        f"{_explain(scale)} (the median force along {at_rest.count} bonds of H to C, N or O that "
        f"are not stretched is {at_rest.median:.3g} eV/Å, expected about 0.7). {_CORRECT}",
    )


def _explain(scale: float) -> str:
    """Explain the factor by which forces are too large in words."""
    size = (
        f"{float(f'{max(scale, 1 / scale):.2g}'):g} times too {'large' if scale > 1 else 'small'}"
    )
    near = sorted(
        (abs(math.log(scale / g.scale)), g.far, g)
        for g in force_guesses()
        if abs(math.log(scale / g.scale)) <= math.log(MAX_SCALE_FACTOR) and g.scale != 1
    )
    if not near:
        return f"forces are about {size}, and no unit explains the factor"
    # The closest guess, or one that is simpler and nearly as close.
    likely = [g for distance, _, g in near if distance < near[0][0] + math.log(_NEARLY_AS_CLOSE)]
    likely.sort(key=lambda g: g.far)
    return f"forces are about {size}, as if {' or '.join(g.words for g in likely[:2])}"


def _diagnose_energies(findings: Findings) -> tuple[list[Problem], bool]:
    """Return the problem of the energies, and whether they have been checked."""
    ratios = {method: findings.distributions[f"energy ratio {method}"] for method in _RATIOS}
    if any(_agrees(ratios[m], _RATIOS[m][2], 1.0, 1.0, 1) for m in _RATIOS):
        return [], True
    for method, (usual, deviation, _) in _RATIOS.items():
        ratio = ratios[method]
        evidence = (
            f"the median energy of {ratio.count} compositions is {ratio.median:.4g} times that of "
            f"their isolated atoms ({method}), expected about {sum(usual) / 2:.2g}"
        )
        if _agrees(ratio, (-usual[1], -usual[0]), 1.0, deviation):
            text = f"energies have the wrong sign ({evidence}). Change it"
            return [_by_count(ratio, text)], True
        for unit, factor in _ENERGY_UNITS.items():
            if _agrees(ratio, usual, factor, deviation):
                text = f"energies look as if they were {unit} ({evidence}). {_CORRECT}"
                return [_by_count(ratio, text)], True
    return [], False


def _agrees(
    ratio: Distribution,
    usual: tuple[float, float],
    factor: float,
    deviation: float,
    min_count: int = _MIN_ASKED,
) -> bool:
    """Return whether the ratios are in the usual range times a factor, and close to each other."""
    if ratio.count < min_count or not usual[0] * factor <= ratio.median <= usual[1] * factor:
        return False
    near = sorted((ratio.median * (1 - deviation), ratio.median * (1 + deviation)))
    return ratio.share(*near) >= _AGREE


def _by_count(ratio: Distribution, text: str) -> Problem:
    """Return an error, or a question if there are few compositions."""
    if ratio.count >= _MIN_COMPOSITIONS:
        return Problem("error", "units", text)
    return _question(f"energies total energies in eV? {text[0].upper()}{text[1:]}")


def _question(text: str) -> Problem:
    return Problem(
        "error", UNCONFIRMED, f"are the {text}. If the units are right, set data.confirm_units=True"
    )

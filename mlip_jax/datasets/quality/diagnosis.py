"""Diagnosis of the statistics of checks.examine: problems, with their likely cause and remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ase import units

from mlip_jax.datasets.quality.checks import FLIPPED, LARGE_FORCE, TOO_CLOSE, Findings
from mlip_jax.datasets.quality.unit_guesses import (
    MAX_RATIO_DEVIATION,
    MAX_SCALE_FACTOR,
    energy_and_force_guesses,
    force_guesses,
    in_words,
    near_guesses,
)

# Problem.what of units, signs and positions, which the first blocks of a data set reveal. Fractions
# of bad structures, missing labels and duplicates need the whole data set.
EARLY = frozenset(
    {"positions", "positions not finite", "units", "gradients", "forces and energies", "net force"}
)
MIN_PAIRS = 20  # close pairs needed to accept the forces
# Number of pairs that suffices for an error if they all agree on a wrong ratio.
_FEWEST = 6
# Limits of ΔE/W of close pairs: its median, and the fraction of pairs within a factor of two of it.
_RATIO_GOOD = (0.9, 1.1)
_SHARE_GOOD, _SHARE_LEAST = 0.85, 0.6
# Fraction and number of pairs whose forces have the wrong sign while other pairs are correct.
_FLIPPED_WARNING, _FLIPPED_ERROR, _FLIPPED_FEWEST = 0.03, 0.1, 3
# Minimum fraction of pairs with a ratio near 1 or -1. Random ratios do not reach it.
_FLIPPED_OR_NOT = 0.6
# Stiffness of bonds of H (eV/Å²). The medians of data sets, hot and relaxed, with several methods,
# are 27 to 42. A factor beyond _BOND_BAND indicates wrong units: the closest units in use, kcal/mol
# and hartree, differ by factors of 23 and 27.
_BOND, _BOND_BAND, _BONDS = 33.0, 5.0, 20
# |ΔF|/|Δx| of pairs without bonds of H (eV/Å²), from soft metals to carbon.
_STIFFNESS = (0.5, 300.0)
# Limits of the median |ΣF| / sqrt(Σ|F|²), and the |ΣF| (eV/Å) below which net forces are ignored.
_NET_WARNING, _NET_ERROR, _NET_SMALL = 0.03, 0.3, 0.01
_DUPLICATES = 0.05
_TOO_CLOSE_SHARE = 0.01
_LARGE_FORCE_SHARE = 0.05
_CONVERT = "Convert them, or give the reader the right unit"
# Median shortest distance (Å) of structures with H and C, N or O: low, high, factor by which
# positions are too large, explanation. Bonds of H are 0.95 to 1.1 Å long, distorted ones shorter.
_LENGTHS = (
    (0.075, 0.135, 0.1, "nm: they are ten times too short. Multiply them by 10"),
    (
        0.42,
        0.62,
        units.Bohr,
        "Å that were converted from bohr once too often: they are 0.529 times too short. "
        "Divide them by 0.529177",
    ),
    (0.75, 1.4, 1.0, ""),
    (1.6, 2.3, 1 / units.Bohr, "bohr: they are 1.89 times too long. Multiply them by 0.529177"),
    (
        7.5,
        13.5,
        10.0,
        "Å that were converted from nm once too often: they are ten times too long. Divide them by 10",
    ),
    (75.0, 135.0, 100.0, "pm: they are a hundred times too long. Divide them by 100"),
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


def diagnose(findings: Findings, *, duplicates: int | None = None) -> list[Problem]:
    """Return the problems of a data set, errors first; an empty list if none are found.

    Args:
      findings: Combined findings of all blocks.
      duplicates: Number of duplicates from checks.count_duplicates; None if not counted.
    """
    if not findings.counts["structures"]:
        return [
            Problem(
                "error", "empty", "there are no structures: look at the path and at the filters"
            )
        ]
    length, problems = _judge_lengths(findings)
    fit = _judge_ratio(findings, length)
    problems += (
        fit if any(p.severity == "error" for p in fit) else fit + _judge_scale(findings, length)
    )
    problems += _judge_close(findings, length) + _judge_labels(findings)
    problems += _judge_net_force(findings) + _judge_sizes(findings)
    if duplicates and duplicates > _DUPLICATES * findings.counts["structures"]:
        problems.append(
            Problem(
                "warning",
                "duplicates",
                f"{_share(duplicates, findings)} are exact copies of earlier "
                "ones. In a split by structure they stand in training and test; split by molecule or "
                "leave them out",
            )
        )
    return sorted(problems, key=lambda p: p.severity != "error")


def _judge_lengths(findings):
    """Return the factor by which positions are too large (1 if unknown), and the problems."""
    found = findings.distributions["shortest distance organic"]
    if found.count < 3:
        return 1.0, []
    median = found.median
    text = (
        f"the median shortest distance of {found.count} structures with H and C, N or O is {median:.3g} Å, "
        "expected about 1.0 Å"
    )
    for low, high, factor, looks in _LENGTHS:
        if low <= median <= high:
            return factor, [
                Problem("error", "positions", f"positions look like {looks} ({text})")
            ] if looks else []
    return 1.0, [
        Problem(
            "error",
            "positions",
            f"positions are in no known unit of length: {text}. Give the reader the "
            "unit in which the file has them",
        )
    ]


def _judge_ratio(findings, length):
    """Return the problems of forces that do not fit the energy differences of close pairs."""
    ratio = findings.distributions["pair ratio"]
    both = findings.counts["structures"] - max(
        findings.counts["no energy"], findings.counts["no forces"]
    )
    median = ratio.median
    share = ratio.share(*sorted((0.5 * median, 2 * median)))
    good = _RATIO_GOOD[0] <= median * length <= _RATIO_GOOD[1]
    flipped = _judge_flipped(findings, length)
    negative = ratio.count >= _FEWEST and ratio.largest < 0
    if ratio.count < MIN_PAIRS and not negative and (ratio.count < _FEWEST or share < 1 or good):
        text = (
            f"too few close pairs to judge: {ratio.count} pairs of close conformations of one molecule, "
            f"{MIN_PAIRS} are needed to compare forces with energy differences. Whether forces in eV/Å fit the "
            "energies in eV is not checked: take more conformations of each molecule, or compare some by hand"
        )
        return flipped + ([Problem("warning", "few pairs", text)] if both > 0 else [])
    found = (
        f"over {ratio.count} close pairs of conformations the median of ΔE / (-½(F₁+F₂)·Δx) is {median:.4g}, "
        f"expected 1; {share:.0%} of the pairs agree with it to a factor of two"
    )
    corrected = median * length  # wrong positions explain the rest; they are reported separately
    if flipped:
        return flipped
    if negative and share < _SHARE_LEAST:
        return [
            Problem(
                "error",
                "gradients",
                "these look like gradients (dE/dx), not forces: change their sign. All "
                f"energy differences have the wrong one ({found})",
            )
        ]
    if share < _SHARE_LEAST:
        return [
            Problem(
                "error",
                "forces and energies",
                "forces do not fit the energy differences and no unit explains "
                f"it: {found}. Do forces and energies belong to the same structures and level of theory, in "
                "the same order?",
            )
        ]
    if not good:
        if length != 1:
            found += f", and with positions put right {corrected:.4g}"
        return [Problem("error", *_explain(corrected, abs(_force_scale(findings, length)), found))]
    if share < _SHARE_GOOD:
        return [
            Problem(
                "warning",
                "forces and energies",
                f"a part of the forces does not fit the energies: {found}. "
                "Look for structures whose forces in eV/Å and energies in eV belong to different calculations",
            )
        ]
    return []


def _judge_flipped(findings, length):
    """Return the problem of forces with the wrong sign in some pairs only."""
    ratio = findings.distributions["pair ratio"]
    share = ratio.share(*(edge / length for edge in FLIPPED))
    count = round(share * ratio.count) if ratio.count else 0
    right = ratio.share(*sorted(-edge / length for edge in FLIPPED))
    if count < _FLIPPED_FEWEST or share <= _FLIPPED_WARNING:
        return []
    if right <= _FLIPPED_WARNING or share + right < _FLIPPED_OR_NOT:
        return []
    named = ", ".join(name for _, name in findings.worst["pair ratio"][:3])
    return [
        Problem(
            "error" if share > _FLIPPED_ERROR else "warning",
            "some gradients",
            f"a part of the forces has the wrong sign: in {count} of {ratio.count} close pairs of "
            f"conformations ({share:.0%}) ΔE / (-½(F₁+F₂)·Δx) is about -1, expected 1. Change the sign where "
            f"gradients in eV/Å were taken for forces"
            + (f", for instance in {named}" if named else ""),
        )
    ]


def _force_scale(findings, length):
    """Return the factor by which forces are too large, after correcting the positions.

    It is negative for gradients and NaN if there are too few bonds of H.
    """
    bonds = findings.distributions["bond stiffness"]
    return bonds.median * length / _BOND if bonds.count >= _BONDS else math.nan


def _judge_scale(findings, length):
    """Return the problems of a factor common to energies and forces, or of forces without pairs."""
    scale, bonds = _force_scale(findings, length), findings.distributions["bond stiffness"]
    if math.isnan(scale):
        return _judge_stiffness(findings, length)
    found = (
        f"bonds of H to C, N or O have a stiffness of {scale * _BOND:.3g} eV/Å², the median of {bonds.count}, "
        f"expected about {_BOND:g}"
    )
    ratio = findings.distributions["pair ratio"]
    fits = (
        ratio.count >= _FLIPPED_FEWEST and _RATIO_GOOD[0] <= ratio.median * length <= _RATIO_GOOD[1]
    )
    problems = []
    if scale < 0:
        also = ", and that of the energies, which fit them" if fits else ""
        problems.append(
            Problem(
                "error",
                "gradients",
                f"these look like gradients (dE/dx), not forces: change their sign{also} ({found})",
            )
        )
    if scale == 0:
        problems.append(
            Problem(
                "error",
                "units",
                f"forces do not change with the positions ({found}): are they all "
                "zero? Store unknown forces as NaN, or leave them out",
            )
        )
    elif not 1 / _BOND_BAND <= abs(scale) <= _BOND_BAND:
        problems.append(
            Problem("error", "units", f"{_explain_scale(abs(scale), fits)} ({found}). {_CONVERT}")
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
    return f"{which} {size}, as if {in_words([g for *_, g in near])}"


def _judge_stiffness(findings, length):
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
            f"forces change by {median:.3g} eV/Å per Å between close conformations "
            f"(the median of {pairs.count} pairs), expected {_STIFFNESS[0]:g} to {_STIFFNESS[1]:g}. If this "
            "is no very soft or stiff material, energies and forces are not in eV and eV/Å: convert them, or "
            "give the reader the right unit",
        )
    ]


def _explain(ratio, scale, found):
    """Return name and message of the problem of a median ratio that is not 1.

    Args:
      ratio: Median of ΔE/W after correcting the positions.
      scale: Factor by which forces are too large, or NaN if unknown.
      found: Description of the finding, for the message.
    """
    gradient = "gradients (dE/dx), not forces" if ratio < 0 else ""
    if gradient and abs(abs(ratio) - 1) <= MAX_RATIO_DEVIATION + 0.02:
        return "gradients", f"these look like {gradient}: change their sign ({found})"
    near = near_guesses(abs(ratio), scale)
    if not near:
        also = f"; they also look like {gradient}" if gradient else ""
        return (
            "forces and energies",
            f"forces do not fit the energies, and no unit explains the factor: {found}{also}",
        )
    factor = near[0].ratio
    size = f"{1 / factor:.4g} times too large" if factor < 1 else f"{factor:.4g} times too small"
    also = f", and they look like {gradient}: change their sign too" if gradient else ""
    return (
        "units",
        f"forces are {size} against energies and positions, as if {in_words(near)}{also} ({found}). "
        + _CONVERT,
    )


def _judge_close(findings, length):
    """Return the problem of overlapping atoms."""
    close = findings.counts["too close"]
    if not close or length < 1:  # _judge_lengths reports positions that are too short
        return []
    severity = "error" if close > _TOO_CLOSE_SHARE * findings.counts["structures"] else "warning"
    return [
        Problem(
            severity,
            "atoms too close",
            f"{_share(close, findings)} have two atoms within {TOO_CLOSE} Å; the "
            f"closest are {_names(findings, 'shortest distance', 'Å')}. Set data.min_distance to leave them "
            "out",
        )
    ]


def _judge_labels(findings):
    """Return the problems of missing labels and of positions that are not finite."""
    counts, total, problems = findings.counts, findings.counts["structures"], []
    if counts["no labels"] == total and counts["properties"]:
        return [
            Problem(
                "warning",
                "no labels",
                "no structure has an energy or forces: properties can be learned, but "
                "no force field. If the file has some, look at the names that the reader takes",
            )
        ]
    if counts["no labels"] == total:
        return [
            Problem(
                "error",
                "no labels",
                "no structure has an energy or forces: nothing can be trained. Look at "
                "the names of labels that the reader takes",
            )
        ]
    for label in ("energy", "forces"):
        missing = counts[f"no {label}"]
        if missing == total:
            problems.append(
                Problem(
                    "warning",
                    f"no {label}",
                    f"no structure has {label}: they can be neither trained "
                    "nor tested. If the file has some, look at the names that the reader takes",
                )
            )
        elif missing:
            problems.append(
                Problem(
                    "warning",
                    f"no {label}",
                    f"{_share(missing, findings)} have no {label}; these "
                    "labels are left out of the loss",
                )
            )
    if counts["partly forces"]:
        problems.append(
            Problem(
                "warning",
                "partly forces",
                f"{_share(counts['partly forces'], findings)} have forces "
                "of some atoms only; components that are not known are left out of the loss",
            )
        )
    if counts["positions not finite"]:
        problems.append(
            Problem(
                "error",
                "positions not finite",
                f"{_share(counts['positions not finite'], findings)} "
                "have positions that are NaN or infinite. Leave them out of the source",
            )
        )
    return problems


def _judge_net_force(findings):
    """Return the problem of forces that do not sum to zero."""
    relative, net = (findings.distributions[k].median for k in ("relative net force", "net force"))
    if not relative > _NET_WARNING or not net > _NET_SMALL:
        return []
    severity = "error" if relative > _NET_ERROR else "warning"
    return [
        Problem(
            severity,
            "net force",
            f"forces do not sum to zero: the median |ΣF| is {net:.3g} eV/Å, "
            f"{relative:.2g} of sqrt(Σ|F|²) (forces by chance: 1; expected below {_NET_WARNING}). Do the "
            "forces belong to these atoms, all of them and in this order?",
        )
    ]


def _judge_sizes(findings):
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
                f"{_share(large, findings)} have a "
                f"force component beyond {LARGE_FORCE:g} eV/Å: "
                f"{_names(findings, 'force component', 'eV/Å')}. Set data.max_force to leave them out",
            )
        )
    if findings.counts["energy outlier"]:
        problems.append(
            Problem(
                "warning",
                "energy outliers",
                f"{_share(findings.counts['energy outlier'], findings)} "
                "have an energy far from the sum of fitted element energies: "
                f"{_names(findings, 'energy residual', 'eV/atom')}. Single "
                "conformations of a molecule can be left out with data.max_energy_z; whole molecules "
                "may hold a rare element or charge",
            )
        )
    return problems


def _share(count, findings):
    """Format a number of structures with its fraction of all structures."""
    total = findings.counts["structures"]
    return f"{count} of {total} structures ({100 * count / total:.3g} %)"


def _names(findings, what, unit, most=3):
    """Format at most `most` of the worst structures of a quantity with their values."""
    return ", ".join(f"{name} ({value:.3g} {unit})" for value, name in findings.worst[what][:most])


_ROWS: Mapping[str, tuple[str, str]] = {
    "energy per atom": ("energy per atom", "eV"),
    "energy residual": ("energy per atom less fitted elements", "eV"),
    "force component": ("size of force components", "eV/Å"),
    "relative net force": ("net force / sqrt(Σ|F|²)", ""),
    "shortest distance": ("shortest distance", "Å"),
    "pair ratio": ("ΔE / (-½(F₁+F₂)·Δx) of close pairs", ""),
    "pair distance": ("RMSD of close pairs", "Å"),
    "pair stiffness": ("|F₂-F₁| / |Δx| of close pairs", "eV/Å²"),
    "bond stiffness": ("stiffness of bonds of H to C, N, O", "eV/Å²"),
}


def lines(findings: Findings, problems: list[Problem]) -> list[str]:
    """Return lines for the console: the counts, then one line per quantity and per problem."""
    made = [_counts(findings)]
    for name, (title, unit) in _ROWS.items():
        d = findings.distributions[name]
        if d.count:
            made.append(
                f"{title}: {d.smallest:.4g} to {d.largest:.4g}, median {d.median:.4g} {unit}".rstrip()
            )
    return (
        made
        + [f"{p.severity}: {p.message}" for p in problems]
        + ([] if problems else ["no problems found"])
    )


def to_markdown(findings: Findings, problems: list[Problem]) -> str:
    """Return a Markdown section for a report: counts, problems and a table of quantities."""
    text = ["## Checks", "", _counts(findings) + ".", ""]
    text += [f"- **{p.severity}** ({p.what}): {p.message}." for p in problems] or [
        "No problems found."
    ]
    text += [
        "",
        "| quantity | unit | values | smallest | 1 % | median | 99 % | largest | RMS |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, unit) in _ROWS.items():
        d = findings.distributions[name]
        if d.count:
            values = (d.smallest, d.quantile(0.01), d.median, d.quantile(0.99), d.largest, d.rms)
            text.append(
                f"| {title.replace('|', chr(92) + '|')} | {unit} | {d.count} | "
                + " | ".join(f"{v:.4g}" for v in values)
                + " |"
            )
    return "\n".join(text) + "\n"


def _counts(findings):
    """Format the number of structures, atoms and missing labels."""
    c = findings.counts
    return (
        f"{c['structures']} structures, {c['atoms']} atoms; without energy {c['no energy']}, without forces "
        f"{c['no forces']}"
    )

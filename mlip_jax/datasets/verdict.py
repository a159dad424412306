"""Judges what checks.examine found: problems in words that say what is wrong and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from ase import units

from mlip_jax.datasets.checks import LARGE_FORCE, TOO_CLOSE, Findings

MIN_PAIRS = 20
# So few pairs that all agree on a wrong ratio are enough for an error, not for a clean bill.
_FEWEST = 6
# ΔE/W of close pairs: its median, and the share of the pairs that agree with it to a factor of two.
_RATIO_GOOD = (0.9, 1.1)
_SHARE_GOOD, _SHARE_LEAST = 0.85, 0.6
# How near a ratio must be to a quotient of units to be named.
_NAMED = 0.08
# Median |ΣF| / sqrt(Σ|F|²), where |ΣF| is not small itself (eV/Å).
_NET_WARNING, _NET_ERROR, _NET_SMALL = 0.03, 0.3, 0.01
_DUPLICATES = 0.05
_TOO_CLOSE_SHARE = 0.01
# Median shortest distance in Å of structures with H and C, N or O: low, high, factor by which positions are too
# large, what they look like. Bonds of H are 0.95 to 1.1 Å, distorted ones less.
_LENGTHS = (
    (0.075, 0.135, 0.1, "nm: they are ten times too short. Multiply them by 10"),
    (0.42, 0.62, units.Bohr, "Å that were converted from bohr once too often: they are 0.529 times too short. "
                             "Divide them by 0.529177"),
    (0.75, 1.4, 1.0, ""),
    (1.6, 2.3, 1 / units.Bohr, "bohr: they are 1.89 times too long. Multiply them by 0.529177"),
    (7.5, 13.5, 10.0, "Å that were converted from nm once too often: they are ten times too long. Divide them by 10"),
    (75.0, 135.0, 100.0, "pm: they are a hundred times too long. Divide them by 100"))
_ENERGY = {"eV": 1.0, "hartree": units.Hartree, "kcal/mol": units.kcal / units.mol, "kJ/mol": units.kJ / units.mol}
# Unit of length of forces: what a force per Å is multiplied by, and how far-fetched that is.
_PER_LENGTH = {"Å": (1.0, 0), "bohr": (units.Bohr, 0), "nm": (10.0, 2)}


class Problem(NamedTuple):
    """severity: "error" or "warning". what: Short name. message: What was found, what was expected, what to do."""

    severity: str
    what: str
    message: str


def verdict(findings: Findings, *, duplicates: int | None = None) -> list[Problem]:
    """The problems of a data set, errors first; an empty list if it looks sound.

    Args:
      findings: Of all blocks together.
      duplicates: Of checks.count_duplicates, where they were counted.
    """
    if not findings.counts["structures"]:
        return [Problem("error", "empty", "there are no structures")]
    length, problems = _judge_lengths(findings)
    problems += _judge_ratio(findings, length) + _judge_close(findings, length) + _judge_labels(findings)
    problems += _judge_net_force(findings) + _judge_sizes(findings)
    if duplicates and duplicates > _DUPLICATES * findings.counts["structures"]:
        problems.append(Problem("warning", "duplicates", f"{_share(duplicates, findings)} are exact copies of earlier "
                                "ones. In a split by structure they stand in training and test; split by molecule or "
                                "leave them out"))
    return sorted(problems, key=lambda p: p.severity != "error")


def _judge_lengths(findings):
    """Factor by which positions are too large (1 where that is unknown), and the problem."""
    found = findings.distributions["shortest distance organic"]
    if found.count < 3:
        return 1.0, []
    median = found.median
    text = f"the median shortest distance of {found.count} structures with H and C, N or O is {median:.3g} Å, " \
           "expected about 1.0 Å"
    for low, high, factor, looks in _LENGTHS:
        if low <= median <= high:
            return factor, [Problem("error", "positions", f"positions look like {looks} ({text})")] if looks else []
    return 1.0, [Problem("error", "positions", f"positions are in no known unit of length: {text}. Look at the unit in "
                         "which the file has them")]


def _judge_ratio(findings, length):
    ratio = findings.distributions["pair ratio"]
    both = findings.counts["structures"] - max(findings.counts["no energy"], findings.counts["no forces"])
    median = ratio.median
    share = ratio.share(*sorted((0.5 * median, 2 * median)))
    good = _RATIO_GOOD[0] <= median * length <= _RATIO_GOOD[1]
    if ratio.count < MIN_PAIRS and (ratio.count < _FEWEST or share < 1 or good):
        text = f"too few close pairs to judge: {ratio.count} pairs of close conformations of one molecule, " \
               f"{MIN_PAIRS} are needed to compare forces with energy differences. Sign and units of the forces "\
               "are not checked"
        return [Problem("warning", "few pairs", text)] if both > 0 else []
    found = f"over {ratio.count} close pairs of conformations the median of ΔE / (-½(F₁+F₂)·Δx) is {median:.4g}, " \
            f"expected 1; {share:.0%} of the pairs agree with it to a factor of two"
    corrected = median * length  # what the positions alone explain is said once
    if share < _SHARE_LEAST:
        return [Problem("error", "forces and energies", "forces do not fit the energy differences and no unit explains "
                        f"it: {found}. Do forces and energies belong to the same structures and level of theory, in "
                        "the same order?")]
    if not good:
        if length != 1:
            found += f", and with positions put right {corrected:.4g}"
        return [Problem("error", *_explain(corrected, found))]
    if share < _SHARE_GOOD:
        return [Problem("warning", "forces and energies", f"a part of the forces does not fit the energies: {found}")]
    return []


def _explain(ratio, found):
    """Name and message of a median ratio that is not 1."""
    gradient = "gradients (dE/dx), not forces" if ratio < 0 else ""
    if gradient and abs(abs(ratio) - 1) <= _NAMED + 0.02:
        return "gradients", f"these look like {gradient}: change their sign ({found})"
    near = _near(abs(ratio))
    if not near:
        also = f"; they also look like {gradient}" if gradient else ""
        return "forces and energies", f"forces do not fit the energies, and no unit explains the factor: {found}{also}"
    # The simplest explanation, and one more that is hardly more far-fetched.
    names = [words for _, far, words, _ in near if far <= near[0][1] + 1][:2]
    factor = near[0][3]
    size = f"{1 / factor:.4g} times too large" if factor < 1 else f"{factor:.4g} times too small"
    also = f", and they look like {gradient}: change their sign too" if gradient else ""
    return "units", f"forces are {size} against energies and positions, as if {', or '.join(names)}{also} ({found})"


def _unit_table():
    """(ratio, how far-fetched, words) of energies in one unit and forces in another that were both read as eV."""
    table = []
    for energy, energy_unit in _ENERGY.items():
        for force, force_unit in _ENERGY.items():
            for length, (per_length, far) in _PER_LENGTH.items():
                simple = far + (energy != force) + (length != "Å") + 2 * ("eV" not in (energy, force))
                # A force of 1 eV/Å is per_length / force_unit in the other unit.
                table.append((force_unit / energy_unit / per_length, simple,
                              f"energies were in {energy} and forces in {force}/{length}"))
    for force, factor, far in (("eV/bohr", 1 / units.Bohr, 1), ("hartree/bohr", units.Hartree / units.Bohr, 1),
                               ("hartree/Å", units.Hartree, 2), ("kcal/mol/Å", _ENERGY["kcal/mol"], 2),
                               ("kJ/mol/Å", _ENERGY["kJ/mol"], 3)):
        table.append((1 / factor, far, f"forces were converted from {force} once too often"))
    return table


def _near(ratio):
    """[(distance, how far-fetched, words, ratio)] of all within _NAMED, the simplest first."""
    if not ratio > 0:
        return []
    named = [(abs(math.log(ratio / factor)), *rest, factor) for factor, *rest in _unit_table()]
    named = [entry for entry in named if entry[0] <= math.log(1 + _NAMED)]
    return sorted(named, key=lambda entry: (entry[1], round(entry[0], 6)))


def _judge_close(findings, length):
    close = findings.counts["too close"]
    if not close or length < 1:  # short positions are named already
        return []
    severity = "error" if close > _TOO_CLOSE_SHARE * findings.counts["structures"] else "warning"
    return [Problem(severity, "atoms too close", f"{_share(close, findings)} have two atoms within {TOO_CLOSE} Å; the "
                    f"closest are {_names(findings, 'shortest distance', 'Å')}. Set data.min_distance to leave them "
                    "out")]


def _judge_labels(findings):
    counts, total, problems = findings.counts, findings.counts["structures"], []
    if counts["no labels"] == total:
        return [Problem("error", "no labels", "no structure has an energy or forces")]
    for label in ("energy", "forces"):
        missing = counts[f"no {label}"]
        if missing == total:
            problems.append(Problem("warning", f"no {label}", f"no structure has {label}: they can be neither trained "
                                    "nor tested"))
        elif missing:
            problems.append(Problem("warning", f"no {label}", f"{_share(missing, findings)} have no {label}; these "
                                    "labels are left out of the loss"))
    if counts["partly forces"]:
        problems.append(Problem("warning", "partly forces", f"{_share(counts['partly forces'], findings)} have forces "
                                "of some atoms only"))
    if counts["positions not finite"]:
        problems.append(Problem("error", "positions not finite", f"{_share(counts['positions not finite'], findings)} "
                                "have positions that are NaN or infinite"))
    return problems


def _judge_net_force(findings):
    relative, net = (findings.distributions[k].median for k in ("relative net force", "net force"))
    if not relative > _NET_WARNING or not net > _NET_SMALL:
        return []
    severity = "error" if relative > _NET_ERROR else "warning"
    return [Problem(severity, "net force", f"forces do not sum to zero: the median |ΣF| is {net:.3g} eV/Å, "
                    f"{relative:.2g} of sqrt(Σ|F|²) (forces by chance: 1; expected below {_NET_WARNING}). Do the "
                    "forces belong to these atoms, all of them and in this order?")]


def _judge_sizes(findings):
    problems = []
    if findings.counts["large force"]:
        problems.append(Problem("warning", "large forces", f"{_share(findings.counts['large force'], findings)} have a "
                                f"force component beyond {LARGE_FORCE:g} eV/Å: "
                                f"{_names(findings, 'force component', 'eV/Å')}. Set data.max_force to leave them out"))
    if findings.counts["energy outlier"]:
        problems.append(Problem("warning", "energy outliers", f"{_share(findings.counts['energy outlier'], findings)} "
                                "have an energy far from the sum of fitted element energies: "
                                f"{_names(findings, 'energy residual', 'eV/atom')}. Single "
                                "conformations of a molecule can be left out with data.max_energy_z; whole molecules "
                                "may hold a rare element or charge"))
    return problems


def _share(count, findings):
    total = findings.counts["structures"]
    return f"{count} of {total} structures ({100 * count / total:.3g} %)"


def _names(findings, what, unit, most=3):
    return ", ".join(f"{name} ({value:.3g} {unit})" for value, name in findings.worst[what][:most])


_ROWS: Mapping[str, tuple[str, str]] = {
    "energy per atom": ("energy per atom", "eV"),
    "energy residual": ("energy per atom less fitted elements", "eV"),
    "force component": ("size of force components", "eV/Å"),
    "relative net force": ("net force / sqrt(Σ|F|²)", ""),
    "shortest distance": ("shortest distance", "Å"),
    "pair ratio": ("ΔE / (-½(F₁+F₂)·Δx) of close pairs", ""),
    "pair distance": ("RMSD of close pairs", "Å")}


def lines(findings: Findings, problems: list[Problem]) -> list[str]:
    """For the console: one line of counts, one for each quantity, one for each problem."""
    made = [_counts(findings)]
    for name, (title, unit) in _ROWS.items():
        d = findings.distributions[name]
        if d.count:
            made.append(f"{title}: {d.smallest:.4g} to {d.largest:.4g}, median {d.median:.4g} {unit}".rstrip())
    return made + [f"{p.severity}: {p.message}" for p in problems] + ([] if problems else ["no problems found"])


def to_markdown(findings: Findings, problems: list[Problem]) -> str:
    """A section for a report: problems, counts and a table of quantities."""
    text = ["## Checks", "", _counts(findings) + ".", ""]
    text += [f"- **{p.severity}** ({p.what}): {p.message}." for p in problems] or ["No problems found."]
    text += ["", "| quantity | unit | values | smallest | 1 % | median | 99 % | largest | RMS |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, (title, unit) in _ROWS.items():
        d = findings.distributions[name]
        if d.count:
            values = (d.smallest, d.quantile(0.01), d.median, d.quantile(0.99), d.largest, d.rms)
            text.append(f"| {title.replace('|', chr(92) + '|')} | {unit} | {d.count} | "
                        + " | ".join(f"{v:.4g}" for v in values) + " |")
    return "\n".join(text) + "\n"


def _counts(findings):
    c = findings.counts
    return f"{c['structures']} structures, {c['atoms']} atoms; without energy {c['no energy']}, without forces " \
           f"{c['no forces']}"

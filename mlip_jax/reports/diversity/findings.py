"""Findings of a diversity study in words: published statements that its runs confirm or contradict.

Shenoy et al. (arXiv:2311.00862) found for GEOM that force fields generalize poorly beyond their
training distribution, and that generalization to molecules and to conformers requires a balance of
both. The other statements here explain this balance: they state which of the two improves each
metric. A difference counts if it is more than twice its standard error over the seeds. A statement
without such a difference is undecided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlip_jax.reports.diversity.generalization import NAMES

_STRUCTURAL, _CONFORMATIONAL = ("iid_s", "ood_s"), ("iid_c", "ood_c")
_SIGNIFICANT = 2.0  # number of standard errors from which a difference counts


class Finding(NamedTuple):
    """Finding of a study.

    Attributes:
      verdict: "confirmed", "not confirmed" or "undecided".
      text: Statement with the numbers behind it.
    """

    verdict: str
    text: str


def findings(
    budgets: Mapping[int, Sequence[Any]], molecule_sets: Mapping[int, Sequence[Any]]
) -> list[Finding]:
    """Return the findings that the available runs allow.

    Args:
      budgets: Seed groups (reports/diversity/report.py) by N, each in the order of n_c.
      molecule_sets: Seed groups by n_s, each in the order of n_c.
    """
    every = {
        id(p): p for group in (*budgets.values(), *molecule_sets.values()) for p in group
    }.values()
    candidates = [
        _beyond(list(every), "iid_s", "ood_s"),
        _beyond(list(every), "iid_c", "ood_c"),
        *(_best(budgets, name) for name in (*_STRUCTURAL, *_CONFORMATIONAL)),
        _balance(budgets),
        *(_more(molecule_sets, name) for name in (*_STRUCTURAL, *_CONFORMATIONAL)),
    ]
    return [f for f in candidates if f is not None]


def _significance(p: Any, name: str, q: Any, other: str) -> float:
    """Return the difference between a metric of group q and one of group p over its standard error.

    It is zero for single runs, which have no standard error.
    """
    a, b = p.metrics[name], q.metrics[other]
    if a[1] is None or b[1] is None:
        return 0.0
    error = math.sqrt(a[1] ** 2 / p.counts[name] + b[1] ** 2 / q.counts[other])
    return (b[0] - a[0]) / error if error > 0 else math.copysign(math.inf, b[0] - a[0])


def _verdict(significances: Sequence[float]) -> str:
    """Return the verdict of the majority of the significant differences."""
    score = sum((s > _SIGNIFICANT) - (s < -_SIGNIFICANT) for s in significances)
    return "confirmed" if score > 0 else "not confirmed" if score < 0 else "undecided"


def _beyond(points: Sequence[Any], near: str, far: str) -> Finding | None:
    """State whether the metric `far` from the training distribution is larger than `near` it."""
    both = [p for p in points if near in p.metrics and far in p.metrics]
    if not both:
        return None
    ratios = [p.metrics[far][0] / p.metrics[near][0] for p in both if p.metrics[near][0] > 0]
    verdict = _verdict([_significance(p, near, p, far) for p in both])
    larger = sum(r > 1 for r in ratios)
    return Finding(
        verdict,
        f"errors grow beyond the training distribution. {NAMES[far]} is larger than {NAMES[near]} "
        f"in {larger} of {len(ratios)} settings, by a factor of {min(ratios):.2f} to "
        f"{max(ratios):.2f}."
        if ratios
        else f"{NAMES[near]} has no errors.",
    )


def _best(budgets: Mapping[int, Sequence[Any]], name: str) -> Finding | None:
    """State which n_c is best at a fixed number of structures.

    Structural metrics should be best with few conformers of many molecules, conformational metrics
    with many conformers of few molecules.
    """
    ends, texts = [], []
    for total, group in budgets.items():
        known = [p for p in group if name in p.metrics]
        if len(known) < 2:
            continue
        best = min(known, key=lambda p: p.metrics[name][0])
        first, last = known[0], known[-1]
        sign = 1 if name in _STRUCTURAL else -1
        ends.append(sign * _significance(first, name, last, name))
        texts.append(
            f"N = {total:,}: best at n_c = {best.num_conformers} ({best.metrics[name][0]:.3g}, "
            f"compared with {first.metrics[name][0]:.3g} at n_c = {first.num_conformers} and "
            f"{last.metrics[name][0]:.3g} at n_c = {last.num_conformers})"
        )
    if not texts:
        return None
    order = ("molecules", "conformers") if name in _STRUCTURAL else ("conformers", "molecules")
    return Finding(
        _verdict(ends),
        f"at a fixed number of structures, more {order[0]} reduce the {NAMES[name]} error more "
        f"than more {order[1]}. {'; '.join(texts)}.",
    )


def _balance(budgets: Mapping[int, Sequence[Any]]) -> Finding | None:
    """State whether the best n_c is larger for conformational than for structural metrics.

    If so, a training set needs a balance of molecules and conformers.
    """
    texts, apart = [], 0
    for total, group in budgets.items():
        best = {
            name: min(known, key=lambda p: p.metrics[name][0]).num_conformers
            for name in NAMES
            if len(known := [p for p in group if name in p.metrics]) > 1
        }
        sides = [[best[n] for n in side if n in best] for side in (_STRUCTURAL, _CONFORMATIONAL)]
        if all(sides):
            apart += max(sides[0]) < max(sides[1])
            texts.append(
                f"N = {total:,}: "
                + ", ".join(f"{NAMES[n]} {c}" for n, c in best.items() if n != "unseen_c")
            )
    if not texts:
        return None
    verdict = "confirmed" if 2 * apart > len(texts) else "not confirmed"
    return Finding(
        verdict,
        "a balance of molecules and conformers is needed: conformational metrics are best with "
        f"more conformers than structural ones. Best n_c by the means, {'; '.join(texts)}.",
    )


def _more(sets: Mapping[int, Sequence[Any]], name: str) -> Finding | None:
    """State whether more conformers of the same molecules reduce an error."""
    ends, texts = [], []
    for n_s, group in sets.items():
        known = [p for p in group if name in p.metrics]
        if len(known) < 2:
            continue
        first, last = known[0], known[-1]
        ends.append(_significance(last, name, first, name))
        change = (
            100 * (last.metrics[name][0] / first.metrics[name][0] - 1)
            if first.metrics[name][0]
            else 0.0
        )
        texts.append(
            f"n_s = {n_s:,}: {change:+.0f} % from n_c = {first.num_conformers} "
            f"to {last.num_conformers}"
        )
    if not texts:
        return None
    return Finding(
        _verdict(ends),
        f"for the same molecules, more conformers reduce {NAMES[name]}. {'; '.join(texts)}.",
    )

"""Findings and problems of a data set as text for the console and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from mlip_jax.datasets.quality.checks import Findings
from mlip_jax.datasets.quality.problems import Problem
from mlip_jax.wording import count_of

_ROWS: Mapping[str, tuple[str, str]] = {
    "energy per atom": ("energy per atom", "eV"),
    "energy residual": ("energy per atom minus fitted elements", "eV"),
    "force component": ("size of force components", "eV/Å"),
    "relative net force": ("net force / sqrt(Σ|F|²)", ""),
    "shortest distance": ("shortest distance", "Å"),
    "pair ratio": ("ΔE / (-½(F₁+F₂)·Δx) of close pairs", ""),
    "pair distance": ("RMSD of close pairs", "Å"),
    "pair stiffness": ("|F₂-F₁| / |Δx| of close pairs", "eV/Å²"),
    "bond stiffness": ("stiffness of bonds of H to C, N, O", "eV/Å²"),
    "stretch stiffness": ("the same from single structures", "eV/Å²"),
    "energy ratio all-electron": ("energy / that of isolated all-electron atoms", ""),
    "energy ratio GFN2-xTB": ("energy / that of isolated atoms with GFN2-xTB", ""),
}


def lines(findings: Findings, problems: list[Problem]) -> list[str]:
    """Return lines for the console: the counts, then one line per quantity and per problem."""
    text = [_counts(findings)]
    for name, (title, unit) in _ROWS.items():
        d = findings.distributions[name]
        if d.count:
            text.append(
                f"{title}: {d.smallest:.4g} to {d.largest:.4g}, "
                f"median {d.median:.4g} {unit}".rstrip()
            )
    return (
        text
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
        f"{count_of(c['structures'], 'structure')}, {count_of(c['atoms'], 'atom')}; without "
        f"energy {c['no energy']}, without forces {c['no forces']}"
    )

"""Self-contained HTML pages, rendered from the templates in reports/templates.

All text is escaped, and all figures are embedded. The functions return `Markup`, which the
templates insert unchanged; they escape plain strings.
"""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text


def _printable(value: object) -> object:
    """Replace characters that UTF-8 cannot encode, e.g. those of file names in other encodings."""
    return (
        value
        if isinstance(value, Markup)
        else str(value).encode("utf-8", "replace").decode("utf-8")
    )


_TEMPLATES = Environment(
    loader=PackageLoader("mlip_jax.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    finalize=_printable,
)


def _anchor(text: str) -> str:
    """Return the name of a heading in links: lower case, with hyphens."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


_TEMPLATES.globals["anchor"] = _anchor
_PARTS = _TEMPLATES.get_template("parts.html").module
# Largest size at which a figure is shown, in pixels of the page per inch: 300 for a molecule.
_SHOWN_PER_INCH = 130
_FORMULAS, _LONGEST_FORMULA = MathTextParser("agg"), 500  # characters


def render(title: str, body: Iterable[Markup]) -> str:
    """Return an HTML document with a title and the given parts as its body."""
    return _TEMPLATES.get_template("page.html").render(title=title, body=body)


def number(value: float | int | None) -> str:
    """Format a number with three or four significant digits; None and NaN become a dash.

    Integers, and numbers from 1000 to 1e12, are rounded to integers with thousands separators.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    size, sign = abs(value), "−" if value < 0 else ""
    if isinstance(value, int) or size >= 1000:
        return sign + (f"{size:,.0f}" if size < 1e12 else f"{size:.3g}")
    digits = 1 if size >= 100 else 2 if size >= 1 else 3
    return sign + (f"{size:.{digits}f}" if size >= 0.01 else f"{size:.2g}")


def scores_text(scores: dict[str, float | None]) -> str:
    """Return the known errors and the slope of a split, for a line of the log."""
    names = (
        ("energy", "energy_mae_mev_per_atom", "meV/atom"),
        ("force", "force_mae_mev_per_ang", "meV/Å"),
        ("stress", "stress_mae_gpa", "GPa"),
        ("slope", "energy_slope_mev_per_atom", "meV/atom"),
    )
    known = [
        (label, scores[key], unit) for label, key, unit in names if scores.get(key) is not None
    ]
    return ", ".join(f"{label} {value:.4g} {unit}" for label, value, unit in known) or "no labels"


def duration(seconds: float) -> str:
    """Format a time in its two largest units: 42 s, 12.5 min, 3 h 12 min, 2 d 3 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min"
    # Round once, in the smaller unit; otherwise 23 h 59.9 min would become 23 h 60 min.
    minutes = round(minutes)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def heading(value: str, level: int = 2) -> Markup:
    """Return a heading."""
    return _PARTS.heading(value, level)


def paragraph(value: str) -> Markup:
    """Return a paragraph of text."""
    return _PARTS.paragraph(value)


def callout(value: str) -> Markup:
    """Return a highlighted note."""
    return _PARTS.callout(value)


def cards(items: Iterable[tuple[str, str, str, str]]) -> Markup:
    """Return a row of cards, each given as (name, value, unit, detail)."""
    return _PARTS.cards(items)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table; `number` formats numbers, and the first column is left-aligned."""
    names = [name.partition(" (") for name in header]
    return _PARTS.table(
        [(name, unit) for name, _, unit in names], ([_cell(value) for value in row] for row in rows)
    )


def pairs(items: Mapping[str, object]) -> Markup:
    """Return a table of names and values without rounding, because settings must be exact."""
    return _PARTS.pairs(items.items())


def section(name: str, values: Mapping[str, object]) -> Markup:
    """Return a small heading with a table of names and values."""
    return _PARTS.section(name, values.items())


def _show_invalid_formulas_as_text(fig: Figure) -> None:
    """Turn off formulas in labels that are none, such as "$x" and "US$ (1$)", which raise errors.

    Names and units of properties come from files of other people.
    """
    for label in fig.findobj(Text):
        content = label.get_text()
        if content.count("$") > 1:
            try:
                if len(content) > _LONGEST_FORMULA:
                    raise ValueError("too long to parse")
                _FORMULAS.parse(content)
            except (ValueError, RecursionError):
                label.set_parse_math(False)


def figure(fig: Figure, caption: str, *, wide: bool = False) -> Markup:
    """Return the figure as an embedded PNG with a caption, which is also its alternative text."""
    buffer = io.BytesIO()
    _show_invalid_formulas_as_text(fig)
    fig.savefig(buffer, format="png", dpi=150)
    width, height = (round(150 * side) for side in fig.get_size_inches())
    return _PARTS.figure(
        base64.b64encode(buffer.getvalue()).decode("ascii"),
        width,
        height,
        round(_SHOWN_PER_INCH * fig.get_size_inches()[0]),
        caption,
        wide,
    )


def link(heading: str, text: str) -> Markup:
    """Return a link to a heading of the page."""
    return _PARTS.link(_anchor(heading), text)


def mark(text: str) -> Markup:
    """Return emphasized text for a cell that needs attention."""
    return _PARTS.mark(text)


def grid(items: Iterable[Markup], kind: str = "figures") -> Markup:
    """Return parts in columns if the window is wide enough; `kind` is "figures" or "sections"."""
    return _PARTS.grid(items, kind)


def _cell(value: object) -> object:
    return number(value) if value is None or isinstance(value, int | float) else value

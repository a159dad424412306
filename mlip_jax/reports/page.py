"""Pieces of a self-contained HTML page: every string is escaped, every figure lies within the page."""

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

from matplotlib.figure import Figure

_CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --panel: #ffffff; --text: #1c2128; --soft: #59636e;
  --line: #dfe3e8; --accent: #0072b2; --warn: #b35900; --warn-panel: #fff6e9; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --panel: #1d2229; --text: #e6e9ee; --soft: #a3adb9;
  --line: #343b45; --accent: #62b5e5; --warn: #f0a94b; --warn-panel: #2d2418; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 24px 0 8px; }
p { margin: 10px 0; max-width: 76ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(215px, 1fr)); gap: 14px; margin: 0 0 20px; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; }
.card .name { color: var(--soft); font-size: .86rem; }
.card .value { font-size: 1.75rem; font-weight: 650; line-height: 1.3; color: var(--accent); white-space: nowrap; }
.card .unit { font-size: .95rem; font-weight: 400; color: var(--soft); }
.card .detail { color: var(--soft); font-size: .84rem; }
.callout { background: var(--warn-panel); border-left: 4px solid var(--warn); border-radius: 6px;
  padding: 10px 16px; margin: 12px 0; overflow-wrap: anywhere; white-space: pre-line; }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td, th .unit { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 10em; }
table.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.pairs td:first-child { color: var(--soft); width: 34%; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 16px; }
.sections { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 0 20px; }
.sections > *, .figures > * { min-width: 0; }
figure { margin: 0; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  display: flex; flex-direction: column; }
figure.wide { margin: 16px 0; }
figure img { display: block; width: 100%; height: auto; padding: 8px; }
figcaption { margin-top: auto; padding: 9px 16px; color: var(--soft); background: var(--panel); font-size: .88rem;
  border-top: 1px solid var(--line); }
@media print { body { background: none; } figure, .card, tr { break-inside: avoid; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole document. `body` is HTML already; the title is text.

    The content policy forbids a browser to load anything, so that the page stays what it was when it was written.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """A value as HTML text: escaped, and with what UTF-8 cannot hold replaced."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"), quote=True)


def number(value: float | int | None) -> str:
    """Three or four significant digits, thousands separated; a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    size, sign = abs(value), "−" if value < 0 else ""
    if isinstance(value, int) or size >= 1000:
        return sign + (f"{size:,.0f}" if size < 1e12 else f"{size:.3g}")
    digits = 1 if size >= 100 else 2 if size >= 1 else 3
    return sign + (f"{size:.{digits}f}" if size >= 0.01 else f"{size:.2g}")


def duration(seconds: float) -> str:
    """A time in the two largest units that matter: 42 s, 12.5 min, 3 h 12 min, 2 d 3 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.1f} min"
    # Round once, in the smaller unit, or 23 h 59.9 min would become 23 h 60 min.
    minutes = round(minutes)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def heading(value: str, level: int = 2) -> str:
    return f"<h{level}>{text(value)}</h{level}>"


def paragraph(value: str) -> str:
    return f"<p>{text(value)}</p>"


def callout(value: str) -> str:
    return f'<div class="callout" role="note">{text(value)}</div>'


def cards(items: Iterable[tuple[str, str, str, str]]) -> str:
    """A row of (name, value, unit, detail)."""
    return '<div class="cards">' + "".join(_card(*item) for item in items) + "</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Numbers go through `number`, all else through `text`; the first column is left-aligned."""
    head = "".join(f'<th scope="col">{_with_unit(name)}</th>' for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table></div>'


def pairs(items: dict[str, object]) -> str:
    """A table of names and values; numbers are left as they are, for a setting must be told exactly."""
    rows = _rows((name, str(value)) for name, value in items.items())
    return f'<div class="scroll"><table class="pairs"><tbody>{rows}</tbody></table></div>'


def figure(fig: Figure, caption: str, *, wide: bool = False) -> str:
    """The figure as an embedded PNG with a caption, which is its alternative text too."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=150)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width, height = (round(150 * side) for side in fig.get_size_inches())
    image = f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{text(caption)}">'
    name = ' class="wide"' if wide else ""
    return f"<figure{name}>{image}<figcaption>{text(caption)}</figcaption></figure>"


def grid(items: Iterable[str], kind: str = "figures") -> str:
    """Pieces side by side where the window is wide enough; `kind` is "figures" or "sections"."""
    return f'<div class="{kind}">' + "".join(items) + "</div>"


def _with_unit(name: str) -> str:
    """Keeps "(meV/Å)" in one piece, which a browser would break at the slash."""
    what, bracket, unit = name.partition(" (")
    return f'{text(what)} <span class="unit">({text(unit)}</span>' if bracket else text(name)


def _card(name: str, value: str, unit: str, detail: str) -> str:
    return (
        f'<div class="card"><div class="name">{text(name)}</div><div class="value">{text(value)} '
        f'<span class="unit">{text(unit)}</span></div><div class="detail">{text(detail)}</div></div>'
    )


def _rows(rows: Iterable[Sequence[object]]) -> str:
    return "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in rows)


def _cell(value: object) -> str:
    return number(value) if value is None or isinstance(value, int | float) else text(value)

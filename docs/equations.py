"""Hook of mkdocs that converts equations to MathML, so that pages need no scripts."""

import html
import re

import latex2mathml.converter

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    """Hook of mkdocs: convert the equations in the HTML of a page."""
    return _EQUATION.sub(_to_mathml, content)


def _to_mathml(match: re.Match) -> str:
    latex = html.unescape(match[2]).strip()[2:-2]  # \( \) or \[ \]
    display = "block" if match[1] == "div" else "inline"
    shown = latex2mathml.converter.convert(latex, display=display)
    # The converter leaves unknown commands and environments in its output.
    if "\\" in shown or "<mi>&</mi>" in shown:
        raise ValueError(f"cannot convert to MathML: {latex}")
    return f"<{match[1]}>{shown}</{match[1]}>"

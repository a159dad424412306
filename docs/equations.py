"""Equations of the pages as MathML, which browsers show by themselves: no script, and nothing from another host."""

import html
import re

import latex2mathml.converter

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **_) -> str:
    """Called by mkdocs with the HTML of each page."""
    return _EQUATION.sub(_converted, content)


def _converted(match: re.Match) -> str:
    latex = html.unescape(match[2]).strip()[2:-2]  # \( \) or \[ \]
    display = "block" if match[1] == "div" else "inline"
    shown = latex2mathml.converter.convert(latex, display=display)
    if (
        "\\" in shown or "<mi>&</mi>" in shown
    ):  # a command or an environment that the converter does not know
        raise ValueError(f"not to be shown as MathML: {latex}")
    return f"<{match[1]}>{shown}</{match[1]}>"

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
    return f"<{match[1]}>{latex2mathml.converter.convert(latex, display=display)}</{match[1]}>"

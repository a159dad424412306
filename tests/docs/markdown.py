"""Parsing of the documentation for its tests: fenced blocks, links and pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```\s*$", re.M | re.S
)
_TITLE = re.compile(r'title="([^"]*)"')


class Block(NamedTuple):
    """A fenced block: its language, its title ("" for none) and its text."""

    language: str
    title: str
    text: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text, in order."""
    parsed = []
    for match in _FENCE.finditer(text):
        info, indent = match["info"].strip(), match["indent"]
        title = _TITLE.search(info)
        body = re.sub(f"^{indent}", "", match["body"], flags=re.M)
        parsed.append(Block(info.split(" ")[0], title[1] if title else "", body))
    return parsed


def without_blocks(text: str) -> str:
    """Return the text without fenced blocks."""
    return _FENCE.sub("", text)


def without_code(text: str) -> str:
    """Return the text without fenced blocks and code spans, which contain no links."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def pages() -> list[Path]:
    """Return the Markdown files of the documentation and of the root of the repository."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]

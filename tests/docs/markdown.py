"""Reads what the tests of the documentation follow: fenced blocks, links, flags of commands."""

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
    """The fenced blocks of a markdown text, in order."""
    found = []
    for match in _FENCE.finditer(text):
        info, indent = match["info"].strip(), match["indent"]
        title = _TITLE.search(info)
        body = re.sub(f"^{indent}", "", match["body"], flags=re.M)
        found.append(Block(info.split(" ")[0], title[1] if title else "", body))
    return found


def without_code(text: str) -> str:
    """The text without fenced blocks and code spans, where nothing is a link."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", text))


def pages() -> list[Path]:
    """The markdown files of the documentation, and the README."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

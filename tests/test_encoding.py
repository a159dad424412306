"""Tests for encodings: every text file is UTF-8, and the terminal shows what it can."""

import ast
import io
import sys
from pathlib import Path

import pytest

from mlip_jax.cli import console
from mlip_jax.workdir import atomic_open

PACKAGE = Path(__file__).parents[1] / "mlip_jax"


def opens_text(call: ast.Call) -> bool:
    """Return whether a call opens a text file with the encoding of the locale."""
    function = call.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    keywords = {k.arg for k in call.keywords}
    if None in keywords or "encoding" in keywords:
        return False
    if name in ("read_text", "write_text"):
        return isinstance(function, ast.Attribute)
    if not (isinstance(function, ast.Name) and name == "open"):
        return False
    mode = call.args[1] if len(call.args) > 1 else ast.Constant("r")
    return isinstance(mode, ast.Constant) and "b" not in mode.value


def test_text_files_are_opened_as_utf_8():
    """With another locale, training used to end with a codec error, for instance at an "Å"."""
    faults = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: add encoding='utf-8'"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node)
    ]
    assert not faults, "\n" + "\n".join(faults)


def test_atomically_written_text_is_utf_8(tmp_path, monkeypatch):
    with atomic_open(tmp_path / "a.txt", "w") as file:
        assert file.encoding == "utf-8"
        file.write("Å")
    assert (tmp_path / "a.txt").read_bytes() == "Å".encode()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_characters_that_the_terminal_lacks_are_replaced(monkeypatch, name):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, name, stream)
    console.replace_unknown_characters()
    print("0.1 eV/Å", file=stream, flush=True)
    assert stream.buffer.getvalue() == b"0.1 eV/?\n"

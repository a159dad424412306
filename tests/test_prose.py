"""Tests for the words of the documentation and the package, and for the script that counts them."""

from pathlib import Path

import pytest

from tests import prose

COLUMNS = ("docs", "package")
SOURCE = '''"""What `what` is: a docstring."""

x = "not # a comment, but what a message"  # made here
y = f"{x['made']} two words", "made"


def _judged(a):
    """One line
    and what follows."""
    told = "a" "b"
'''
PAGE = """What is [here](made.md) and `made`?

```sh
made
```

More made of it.
"""


@pytest.mark.parametrize("column", COLUMNS)
def test_rare_words_stay_rare(column):
    """`python tests/prose.py --list WORD` lists the places."""
    rates = prose.word_rates(prose.paths_of(column))
    limits = {name: limit for name, (_, limit) in prose.WORDS.items() if limit is not None}
    assert {
        name: round(rates[name], 1) for name, limit in limits.items() if rates[name] > limit
    } == {}


@pytest.mark.parametrize("column", COLUMNS)
def test_private_functions_are_named_by_verbs_or_nouns(column):
    names = [n for n in prose.private_functions(prose.paths_of(column)) if prose.is_participle(n)]
    assert len(names) <= prose.MAX_PARTICIPLES, sorted(names)


def test_prose_of_python(tmp_path):
    path = tmp_path / "source.py"
    path.write_text(SOURCE)
    assert [(p.line, p.kind, p.text.strip()) for p in prose.passages(path)] == [
        (1, "docstring", "What   is: a docstring."),
        (3, "message", "not # a comment, but what a message"),
        (3, "comment", "made here"),
        (8, "docstring", "One line"),
        (9, "docstring", "and what follows."),
    ]
    assert prose.word_rates([path])["what"] == pytest.approx(1e4 * 3 / 18)
    measures = prose.code_measures([path])
    assert measures["of these, bare participles"] == measures["assignments to told"] == 1
    assert measures["functions with a docstring, %"] == 100


def test_prose_of_markdown(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    rates = prose.word_rates([path])
    assert rates["words"] == 8 and rates["made"] == pytest.approx(1e4 / 8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("_judged", True), ("_told", True), ("_embed", False), ("_is_judged", False), ("told", False)],
)
def test_participles(name, expected):
    assert prose.is_participle(name) == expected


def test_table_has_a_column_per_entry(tmp_path):
    path = Path(tmp_path / "source.py")
    path.write_text(SOURCE)
    lines = prose.table({"one": [path], "two": [path]}).splitlines()
    assert lines[0].split()[-3:] == ["one", "two", "target"]
    assert any(line.split()[:3] == ["words", "18", "18"] for line in lines)

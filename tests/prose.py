"""Count the words, names and sizes that make code hard to read: `python tests/prose.py [PATH ...]`.

Prose is docstrings, comments, messages (string literals of three words or more) and Markdown
without its code. Of a notebook, the text cells count. Without paths, each part of the repository
has a column and the targets are printed.

    python tests/prose.py mlip_jax/graphs tests/graphs    # only these files and folders
    python tests/prose.py --list what made mlip_jax       # where "what" and "made" occur
"""

import argparse
import ast
import collections
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "package": ("mlip_jax", "configs"),
    "docs": ("docs", "README.md", "CONTRIBUTING.md", "notebooks", "benchmarks/README.md"),
    "tests": ("tests", "benchmarks", "launch"),
}

# Each pattern is counted per 10,000 words of prose. The limit of None is not a target.
WORDS = {
    "what": (r"what", 5),
    "made": (r"made", 1),
    "alone": (r"alone", 1),
    "told": (r"tell|tells|told|telling", 1),
    "stand-lie": (r"stand|stands|stood|standing|lie|lies|lay|lain|lying", 1),
    "go-on": (r"(?:go|goes|going|went|gone) on", 0.5),
    "so-many": (r"so many", 0.5),
    "anew": (r"anew|mend|mends|mended|begun|alike|damaged|whatever", None),
    "beside": (r"beside|but for|of which|of whom|less the|nor", None),
    "british": (
        r"\w*neighbour\w*|\w*(?:optimi|minimi|initiali|recogni|normali|organi|summari|generali|"
        r"visuali|speciali|parametri|seriali|locali|characteri|standardi|vectori)"
        r"s(?:e|es|ed|er|ers|ing|ation|ations)|behaviour\w*|colour\w*|centre\w*|centring|favour\w*"
        r"|labell\w*|modell\w*|analys(?:e|ed|es|ing)|grey|metre\w*",
        None,
    ),
}
# A private function whose whole name is one of these, or ends in "ed", is called by a participle.
PARTICIPLES = set(
    "told made begun found drawn kept held left given known seen shown written taken got gone sent "
    "built laid lain stood become chosen broken fallen grown hidden risen spoken sought brought "
    "bought thought caught meant met lost paid said sold spent stuck swept thrown torn worn won "
    "bound".split()
)
NOT_PARTICIPLES = set("embed feed seed need speed shed exceed proceed succeed red bed".split())
LOCALS = ("found", "made", "told", "own")
MAX_POSITIONAL, MAX_LINES, MAX_PARTICIPLES = 6, 400, 10

# Comments and string literals of Python code.
_TOKEN = re.compile(
    r"""#[^\n]*|[rRbBfFuU]{0,2}(?:\"{3}(?:[^"\\]|\\.|"(?!""))*\"{3}"""
    r"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')""",
    re.DOTALL,
)

# Names of files and folders that do not count; this script and its test contain the words.
EXCLUDED = {
    "__pycache__",
    "site",
    "runs",
    ".venv",
    ".ipynb_checkpoints",
    "prose.py",
    "test_prose.py",
}


class Passage(NamedTuple):
    """A piece of prose. kind: "docstring", "comment", "message" or "markdown"."""

    path: Path
    line: int
    kind: str
    text: str


class Measures(NamedTuple):
    """Measures of the code of one Python file.

    Attributes:
      functions: Functions and methods.
      lengths: Number of non-blank lines of each function, without docstring.
      widths: Width of each non-blank line.
      comment_lines: Number of lines with only a comment.
      locals: (name, line) of assignments to names in LOCALS.
    """

    functions: list[ast.FunctionDef]
    lengths: list[int]
    widths: list[int]
    comment_lines: int
    locals: list[tuple[str, int]]


def paths_of(column: str) -> list[Path]:
    """Return the files and folders of an entry of COLUMNS."""
    return [ROOT / path for path in COLUMNS[column]]


def files(paths: list[Path]) -> list[Path]:
    """Return the Python files, Markdown pages and notebooks in `paths`, each once."""
    selected = {}
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            parts = file.relative_to(path).parts if path.is_dir() else ()
            if file.suffix in {".py", ".md", ".ipynb"} and not EXCLUDED & set(parts):
                selected[file.resolve()] = file
    return list(selected.values())


def markdown(path: Path, text: str, line: int = 1) -> list[Passage]:
    """Return the prose of a Markdown text by line, without code and link targets."""
    passages, fenced = [], False
    for number, row in enumerate(text.splitlines(), line):
        if row.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not row.startswith("    "):
            row = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>|\$[^$]*\$", " ", row)
            passages.append(Passage(path, number, "markdown", row))
    return passages


def notebook(path: Path) -> list[Passage]:
    """Return the prose of the text cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [passage for text in texts for passage in markdown(path, text)]


def is_message(text: str) -> bool:
    """Return whether a string literal has three words or more."""
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= 3 and " " in text.strip()


def docstring(node: ast.AST) -> ast.Constant | None:
    """Return the docstring of a node, None if it has none."""
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
        value = body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value
    return None


@functools.cache
def passages(path: Path) -> list[Passage]:
    """Return the docstrings, comments and messages of a Python file, line by line."""
    text, result, line, end = path.read_text(encoding="utf-8"), [], 1, 0
    for token in _TOKEN.finditer(text):
        line, end = line + text.count("\n", end, token.start()), token.start()
        if token[0].startswith("#"):
            kind, content = "comment", token[0][1:]
        else:
            content = token[0].lstrip("rRbBfFuU").strip("\"'")
            before = text[text.rfind("\n", 0, token.start()) + 1 : token.start()]
            is_docstring = token[0].endswith('"""') and not before.strip()
            kind = "docstring" if is_docstring else "message"
            content = re.sub(r"`[^`]*`" if is_docstring else r"\{[^{}]*\}", " ", content)
            if not is_docstring and not is_message(content):
                continue
        result += [Passage(path, line + k, kind, row) for k, row in enumerate(content.split("\n"))]
    return result


@functools.cache
def measure(path: Path) -> Measures:
    """Parse a Python file once and return its measures."""
    text = path.read_text(encoding="utf-8")
    rows, nodes = text.splitlines(), list(ast.walk(ast.parse(text)))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = []
    for function in functions:
        first = function.body[1:] if docstring(function) else function.body
        start = first[0].lineno if first else function.end_lineno + 1
        lengths.append(1 + sum(bool(row.strip()) for row in rows[start - 1 : function.end_lineno]))
    names = [
        (n.id, n.lineno)
        for n in nodes
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in LOCALS
    ]
    widths = [len(row) for row in rows if row.strip()]
    comment_lines = sum(row.lstrip().startswith("#") for row in rows)
    return Measures(functions, lengths, widths, comment_lines, names)


def private_functions(paths: list[Path]) -> list[str]:
    """Return the names of private functions and methods."""
    texts = (f.read_text(encoding="utf-8") for f in files(paths) if f.suffix == ".py")
    return [name for text in texts for name in re.findall(r"(?m)^\s*def (_[a-z]\w*)", text)]


def prose(paths: list[Path]) -> list[Passage]:
    """Return the prose of all files in `paths`."""
    readers = {
        ".py": passages,
        ".md": lambda path: markdown(path, path.read_text(encoding="utf-8")),
        ".ipynb": notebook,
    }
    return [passage for path in files(paths) for passage in readers[path.suffix](path)]


def count(pattern: str, text: str) -> int:
    """Return the number of occurrences of a pattern as whole words."""
    return len(re.findall(rf"\b(?:{pattern})\b", text, re.IGNORECASE))


def word_rates(paths: list[Path]) -> dict[str, float]:
    """Return the number of words, and occurrences of each entry of WORDS per 10,000 words."""
    text = "\n".join(passage.text for passage in prose(paths))
    words = len(re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text))
    rates = {name: 1e4 * count(p, text) / max(words, 1) for name, (p, _) in WORDS.items()}
    return {"words": words, **rates}


def is_participle(name: str) -> bool:
    """Whether a function name is private and a single participle: `_judged`, `_told`."""
    if not re.fullmatch("_[a-z]+", name) or name[1:] in NOT_PARTICIPLES:
        return False
    return name.endswith("ed") or name[1:] in PARTICIPLES


def positional(function: ast.FunctionDef) -> int:
    """Return the number of positional arguments without self."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    return len([a for a in arguments if a.arg not in {"self", "cls"}])


def code_measures(paths: list[Path]) -> dict[str, float | str]:
    """Return the measures of the Python files in `paths` by their name in the table."""
    measures = [measure(f.resolve()) for f in files(paths) if f.suffix == ".py"]
    functions = [f for m in measures for f in m.functions]
    private = private_functions(paths)
    docs = [d.value for f in functions if (d := docstring(f))]
    first = collections.Counter(d.split()[0].lower() for d in docs if d.split())
    lengths = [n for m in measures for n in m.lengths] or [0]
    widths = [n for m in measures for n in m.widths] or [0]
    assigned = collections.Counter(name for m in measures for name, _ in m.locals)
    return {
        "functions with a docstring, %": 100 * len(docs) / max(len(functions), 1),
        "lines per function, median": np.median(lengths),
        "lines per function, 90 %": np.percentile(lengths, 90),
        "lines per function, maximum": max(lengths),
        "comment lines, %": 100 * sum(m.comment_lines for m in measures) / len(widths),
        "line width, 90 %": np.percentile(widths, 90),
        "line width, maximum": max(widths),
        "private helpers": len(private),
        "of these, bare participles": sum(map(is_participle, private)),
        **{f"assignments to {name}": assigned[name] for name in LOCALS},
        f"functions with over {MAX_POSITIONAL} positional arguments": sum(
            positional(f) > MAX_POSITIONAL for f in functions
        ),
        f"files over {MAX_LINES} lines": sum(
            f.read_text(encoding="utf-8").count("\n") > MAX_LINES
            for f in files(paths)
            if f.suffix == ".py"
        ),
        "first words of docstrings": ", ".join(f"{w} {n}" for w, n in first.most_common(5)),
    }


def targets() -> dict[str, str]:
    words = {name: f"≤ {limit:g}" for name, (_, limit) in WORDS.items() if limit is not None}
    return {
        **words,
        "functions with a docstring, %": "≥ 57",
        "comment lines, %": "≥ 2.5",
        "line width, 90 %": "≤ 88",
        "line width, maximum": "≤ 100",
        "of these, bare participles": f"≤ {MAX_PARTICIPLES}",
        **{f"assignments to {name}": "0" for name in LOCALS},
        f"functions with over {MAX_POSITIONAL} positional arguments": "0",
        f"files over {MAX_LINES} lines": "0 (package)",
    }


def table(columns: dict[str, list[Path]]) -> str:
    """Return the counts as text, one column per entry."""
    values = {name: {**word_rates(p), **code_measures(p)} for name, p in columns.items()}
    limits, lines = targets(), []
    lines.append(
        f"{'per 10,000 words of prose':<45}" + "".join(f"{n:>12}" for n in values) + "  target"
    )
    for measure_name in next(iter(values.values())):
        cells = [v[measure_name] for v in values.values()]
        if measure_name == "first words of docstrings":
            lines += [f"{measure_name}, {n}: {c or '-'}" for n, c in zip(values, cells)]
            continue
        row = "".join(f"{c:>12.1f}" if c % 1 else f"{c:>12.0f}" for c in cells)
        lines.append(f"{measure_name:<45}{row}  {limits.get(measure_name, '')}".rstrip())
    return "\n".join(lines)


def occurrences(names: list[str], paths: list[Path]) -> list[str]:
    """Return "path:line: kind: text" of each occurrence of entries of WORDS or of other words."""
    pattern = "|".join(WORDS.get(name, (re.escape(name),))[0] for name in names)
    lines = [
        f"{passage.path}:{passage.line}: {passage.kind}: {passage.text.strip()}"
        for passage in prose(paths)
        if count(pattern, passage.text)
    ]
    assignments = [
        f"{path}:{line}: assignment to {name}"
        for path in files(paths)
        if path.suffix == ".py"
        for name, line in measure(path.resolve()).locals
        if name in names
    ]
    return lines + assignments


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Count words and names that make code hard to read."
    )
    parser.add_argument("--list", nargs="+", metavar="WORD", help="List where these words occur.")
    parser.add_argument("paths", nargs="*", type=Path, help="Files and folders to count.")
    options = parser.parse_args()
    if options.list:  # the words come first; arguments that are paths follow them
        paths = [Path(a) for a in options.list if Path(a).exists()] + options.paths
        words = [a for a in options.list if not Path(a).exists()]
        everything = [path for name in COLUMNS for path in paths_of(name)]
        print("\n".join(occurrences(words, paths or everything)))
        return
    columns = {name: paths_of(name) for name in COLUMNS}
    columns["all"] = [path for paths in columns.values() for path in paths]
    print(table({"given": options.paths} if options.paths else columns))


if __name__ == "__main__":
    main()

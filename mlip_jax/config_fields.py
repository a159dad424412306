"""What is known of the fields of the configs: names, defaults, and the comments beside them in mlip_jax/defaults.py."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from collections.abc import Callable, Iterator

import ml_collections

from mlip_jax import defaults
from mlip_jax.config import TERMS


def tasks() -> dict[str, Callable]:
    """The functions of mlip_jax/defaults.py that make a whole config, by task."""
    functions = {name: f for name, f in vars(defaults).items()
                 if name.endswith("_defaults") and not name.startswith("_") and not inspect.signature(f).parameters}
    return {f().task: f for f in functions.values()}


def fields(config: ml_collections.ConfigDict, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of all fields; a part without fields is one itself (model.options)."""
    for name in config:
        value = config.get_ref(name).get() if not isinstance(config[name], ml_collections.ConfigDict) else config[name]
        if isinstance(value, ml_collections.ConfigDict) and len(value):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def comments(function: Callable, prefix: str = "") -> dict[str, str]:
    """The comments beside and above the assignments to fields in `function`, by dotted name, in code order."""
    source = inspect.getsource(function)
    beside, above = _comment_lines(source)
    tree = ast.parse(source).body[0]
    root = tree.args.args[0].arg if tree.args.args else None
    found: dict[str, str] = {}

    def visit(statements):
        for node in statements:
            if isinstance(node, ast.For):
                visit(node.body)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                _of_call(node.value)
            elif isinstance(node, ast.Assign):
                if isinstance(node.value, ast.Call):
                    _of_call(node.value)
                text = " ".join(x for x in (above.get(node.lineno, ""), beside.get(node.end_lineno, "")) if x)
                for target in _targets(node):
                    for name in _names(target):
                        if text or prefix + name not in found:
                            found[prefix + name] = text

    def _of_call(call):
        called = getattr(defaults, getattr(call.func, "id", ""), None)
        if called is not None and call.func.id.endswith("_defaults"):
            part = ".".join(_chain(call.args[0])[1:]) if call.args else ""
            found.update(comments(called, f"{prefix}{part}." if part else prefix))

    def _names(target):
        if isinstance(target, ast.Attribute):
            chain = _chain(target)
            return [".".join(chain[1:])] if chain else []
        if isinstance(target, ast.Subscript) and getattr(target.value, "id", None) == root:
            pattern = ast.unparse(target.slice)
            return [term if pattern == "term" else f"{term}_options" for term in TERMS]
        return []

    visit(tree.body)
    return found


def _targets(node: ast.Assign) -> list[ast.expr]:
    return [t for target in node.targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]


def _chain(node: ast.expr) -> list[str]:
    """c.train.num_steps -> ["c", "train", "num_steps"]."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def _comment_lines(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those beside code, and those on lines of their own by the line of code that follows."""
    beside, above, waiting = {}, {}, []
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, row = token.string.lstrip("# ").strip(), token.start[0]
            if lines[row - 1].lstrip().startswith("#"):
                waiting.append(text)
            else:
                beside[row] = text
        elif waiting and token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            above[token.start[0]] = " ".join(waiting)
            waiting = []
    return beside, above

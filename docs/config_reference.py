"""The page of all config fields, made from the code when the site is built; also the hook of mkdocs that adds it.

    python docs/config_reference.py > config-reference.md

Fields and defaults are those of `mlip_jax/defaults.py` as it runs, their descriptions the comments beside them there;
the experiments are the docstrings of `configs/*.py` and what each config sets.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ml_collections

from mlip_jax.config_fields import comments, fields, tasks

PAGE = "config-reference.md"


def _cell(text: object) -> str:
    return str(text).replace("|", r"\|").replace("<", "&lt;").replace("\n", " ").replace("*", r"\*")


def _value(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, ml_collections.ConfigDict):
        return "none set" if not len(value) else ", ".join(f"`{k}={v!r}`" for k, v in value.items())
    return f"`{value!r}`".replace("|", r"\|")


def _table(config, described: dict[str, str]) -> list[str]:
    lines = ["| field | default | what |", "|---|---|---|"]
    order = list(described)
    rows = sorted(fields(config), key=lambda row: order.index(row[0]) if row[0] in described else len(order))
    return lines + [f"| `{name}` | {_value(value)} | {_cell(described.get(name, ''))} |" for name, value in rows]


def experiments() -> dict[str, object]:
    """The modules of configs/ that have a get_config, by file name."""
    names = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
    modules = {name: importlib.import_module(f"mlip_jax.configs.{name}") for name in names}
    return {name: m for name, m in modules.items() if hasattr(m, "get_config")}


def config_of(module) -> ml_collections.ConfigDict | None:
    """Its config without an argument; None where it needs one."""
    try:
        return module.get_config()
    except (TypeError, ValueError):
        return None


def _experiment(name: str, module, known: dict[str, Callable]) -> list[str]:
    title, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    lines = [f"### `configs/{name}.py`", "", title.replace("\n", " "), "", rest, ""]
    config = config_of(module)
    if config is None:
        return [*lines, "This config needs an argument after the colon: see above.", ""]
    if config.task not in known:
        return [*lines, f"Task `{config.task}`.", "", *_table(config, comments(module.get_config)), ""]
    base = dict(fields(known[config.task]()))
    changed = [(k, v) for k, v in fields(config) if k not in base or not _same(base[k], v)]
    lines += [f"Task [`{config.task}`](#task-{config.task})" + (", with:" if changed else ", with its defaults."), ""]
    if changed:
        lines += ["| field | value here |", "|---|---|", *(f"| `{k}` | {_value(v)} |" for k, v in changed), ""]
    return lines


def _same(a, b) -> bool:
    return a == b or (a != a and b != b)


def page() -> str:
    """The page as markdown."""
    known = tasks()
    lines = [
        "# Config reference", "",
        "This page is made from `mlip_jax/defaults.py` and `configs/*.py` when the site is built.", "",
        "A field is changed on the command line with `--config.FIELD=VALUE`, for instance "
        "`--config.train.num_steps=50000`. \"unset\" is a field without a value. A misspelt name is an error that "
        "gives the nearest valid one. Fields of `model.options` are those of the model's class: see "
        "[Models](models.md).", "",
        "Units are eV and Å unless a comment names others.", "", "## Tasks", ""]
    for task, function in known.items():
        lines += [f"### Task `{task}` {{ #task-{task} }}", "", inspect.getdoc(function), "",
                  *_table(function(), comments(function)), ""]
    lines += ["## Experiments", "",
              "One file each; the text is the docstring of the file, the table what it changes of its task's defaults.",
              ""]
    for name, module in experiments().items():
        lines += _experiment(name, module, known)
    return "\n".join(lines) + "\n"


def on_files(files, config):
    """Hook of mkdocs: add the page to the site."""
    from mkdocs.structure.files import File
    files.append(File.generated(config, PAGE, content=page()))
    return files


if __name__ == "__main__":
    print(page(), end="")

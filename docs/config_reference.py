"""Page of all config fields, generated from the code, and the mkdocs hook that adds it to the site.

    python docs/config_reference.py > config-reference.md

The page lists the fields that `mlip_jax/defaults` declares, and the docstrings of `configs/*.py`
with the fields that each config sets.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ml_collections

from mlip_jax.cli.help import fields
from mlip_jax.defaults import TASKS
from mlip_jax.defaults.field import Part

PAGE = "config-reference.md"


def _cell(text: object) -> str:
    return str(text).replace("|", r"\|").replace("<", "&lt;").replace("\n", " ").replace("*", r"\*")


def _value(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, ml_collections.ConfigDict):
        return "none set" if not len(value) else ", ".join(f"`{k}={v!r}`" for k, v in value.items())
    return f"`{value!r}`".replace("|", r"\|")


def _table(task: Part) -> list[str]:
    values = dict(fields(task.build()))
    return ["| field | default | description |", "|---|---|---|"] + [
        f"| `{name}` | {_value(values[name])} | {_cell(field.explain())} |"
        for name, field in task.fields()
    ]


def experiments() -> dict[str, object]:
    """Return the modules of configs/ that have a get_config, by file name."""
    names = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
    modules = {name: importlib.import_module(f"mlip_jax.configs.{name}") for name in names}
    return {name: m for name, m in modules.items() if hasattr(m, "get_config")}


def config_of(module) -> ml_collections.ConfigDict | None:
    """Return the config without an argument, or None if it requires one."""
    try:
        return module.get_config()
    except (TypeError, ValueError):
        return None


def _experiment(name: str, module) -> list[str]:
    title, _, rest = inspect.cleandoc(module.__doc__ or "").partition("\n\n")
    lines = [f"### `configs/{name}.py`", "", title.replace("\n", " "), "", rest, ""]
    config = config_of(module)
    if config is None:
        return [*lines, "This config requires an argument after the colon; see above.", ""]
    base = dict(fields(TASKS[config.task].build()))
    changed = [(k, v) for k, v in fields(config) if k not in base or not _same(base[k], v)]
    lines += [
        f"Task [`{config.task}`](#task-{config.task})"
        + (", with:" if changed else ", with its defaults."),
        "",
    ]
    if changed:
        lines += [
            "| field | value here |",
            "|---|---|",
            *(f"| `{k}` | {_value(v)} |" for k, v in changed),
            "",
        ]
    return lines


def _same(a, b) -> bool:
    return a == b or (a != a and b != b)


def page() -> str:
    """Return the page as markdown."""
    lines = [
        "# Config reference",
        "",
        "Set a field on the command line with `--config.FIELD=VALUE`, for instance "
        "`--config.train.num_steps=50000`. For a misspelled field, the error message suggests the "
        "nearest valid name. The fields of `model.options` are those of the model's class; see "
        "[Models](models.md).",
        "",
        'In the tables, "unset" means that a field has no value. Descriptions start with the unit '
        "and the bounds of the value, in parentheses.",
        "",
        "This page is generated from `mlip_jax/defaults` and `configs/*.py`.",
        "",
        "## Tasks",
        "",
    ]
    for name, task in TASKS.items():
        lines += [
            f"### Task `{name}` {{ #task-{name} }}",
            "",
            task.description,
            "",
            *_table(task),
            "",
        ]
    lines += [
        "## Experiments",
        "",
        "Each experiment is a file with the following docstring. The tables list the fields that "
        "differ from the defaults of the task.",
        "",
    ]
    for name, module in experiments().items():
        lines += _experiment(name, module)
    return "\n".join(lines) + "\n"


def on_files(files, config):
    """Hook of mkdocs: add the page to the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


if __name__ == "__main__":
    print(page(), end="")

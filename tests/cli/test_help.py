"""Tests for the help of a config: its docstring and its fields."""

from pathlib import Path

import absl.flags
import pytest

from mlip_jax import importers
from mlip_jax.cli import flags, help
from mlip_jax.config import ConfigError, import_file

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted(p.name for p in (REPOSITORY / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_help_of_every_config_has_its_docstring_and_fields(name):
    text = help.help_text(f"configs/{name}")
    module = import_file(str(REPOSITORY / "configs" / name))
    assert text.startswith(module.__doc__.splitlines()[0])
    try:
        config = module.get_config()
    except TypeError:
        assert f"--config=configs/{name}:ARGUMENT --help" in text
        return
    for field, _ in help.fields(config):
        assert field == "task" or f"  {field} = " in text or f"  {field}." in text, field


def test_the_help_shows_the_values_of_the_config_with_its_argument():
    text = help.help_text("configs/spice.py:painn", width=100)
    assert "  model.name = 'painn' " in text and "Options of the model 'painn'" in text
    assert "PaiNN; the defaults are the published ones." in text
    line = next(line for line in text.splitlines() if line.startswith("  loss.huber_delta"))
    assert line.split("= ")[1].split(maxsplit=1) == [
        "0.05",
        "(eV and eV/Å, at least 0) Error at which the penalty",
    ]
    assert (
        text.index("  model.options.cutoff = ")
        < text.index("  loss: Training loss")
        < text.index("  loss.beta = ")
    )
    # docstrings' own width
    assert max(map(len, text.partition("Options of the model")[0].splitlines())) <= 120


def test_errors_contain_the_config():
    with pytest.raises(FileNotFoundError, match="configs/absent.py"):
        help.help_text("configs/absent.py")
    with pytest.raises(ConfigError, match="configs/md.py:x"):
        help.help_text("configs/md.py:x")


@pytest.mark.parametrize(
    "arguments", (["--config=configs/md.py", "--help"], ["-h", "--config", "configs/md.py"])
)
def test_the_command_prints_the_help_and_exits(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        flags.show_help(arguments, "")
    assert end.value.code == 0 and "  timestep = " in capsys.readouterr().out
    # without a request nothing is printed, and the run begins
    flags.show_help(["--config=configs/md.py"], "")
    assert not capsys.readouterr().out


def test_the_help_lists_every_importer():
    text = help.help_text("relax", width=1000)
    line = next(line for line in text.splitlines() if line.startswith("  force_field = "))
    assert line.split("Importers: ")[1] == f"{', '.join(importers.names())}."


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        (["--sweep_index=1"], False),
        (["--sweep_index=1", "--overrides={}"], False),
        (["--sweep_index=1", "--sweep"], True),
        (["--sweep_index=1", "--overrides={}", "--sweep", "--nosweep"], True),
    ],
)
def test_flags_of_sweeps_require_a_sweep(monkeypatch, arguments, valid):
    """Detects a --sweep_index that is ignored with --overrides. Variants receive --nosweep."""
    monkeypatch.setattr(flags.flags, "FLAGS", absl.flags.FlagValues())
    for define, name in (("string", "sweep_index"), ("bool", "sweep_list")):
        getattr(absl.flags, f"DEFINE_{define}")(name, None, "", flags.flags.FLAGS)
    for name in ("sweep", "sweep_collect"):
        absl.flags.DEFINE_bool(name, False, "", flags.flags.FLAGS)
    absl.flags.DEFINE_multi_string("overrides", None, "", flags.flags.FLAGS)
    flags.flags.FLAGS(["program", *arguments])
    if valid:
        flags.check([])
    else:
        with pytest.raises(ConfigError, match="--sweep_index requires --sweep"):
            flags.check([])

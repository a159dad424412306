"""Tests for the short form of the command line, unset fields and the default workdir."""

import ml_collections
import pytest
from absl import flags as absl_flags

from mlip_jax.cli import flags
from mlip_jax.cli.subcommands import expand
from mlip_jax.config import ConfigError, load_file, replaced_fields
from mlip_jax.sweeps.overrides import override


@pytest.fixture(scope="module", autouse=True)
def defined():
    if "workdir" not in absl_flags.FLAGS:
        flags.define_common_flags()


def short(text):
    return expand(["mlip-jax", *text.split()])[1:]


def test_the_short_form_becomes_the_long_form():
    assert short("relax --force_field runs/spice molecules.smi --workdir runs/x --limit=3") == [
        "--config=relax",
        "--config.force_field=runs/spice",
        "--config.input=molecules.smi",
        "--workdir",
        "runs/x",
        "--config.limit=3",
    ]
    # a boolean field takes no value from the next argument
    assert short("relax --nommff a.smi --debug") == [
        "--config=relax",
        "--noconfig.mmff",
        "--config.input=a.smi",
        "--debug",
    ]
    assert short("relax --mmff a.smi")[1:] == ["--config.mmff", "--config.input=a.smi"]
    # a task without an input file takes its data set; negative numbers are values
    assert short("spice:painn mine.xyz --data.charge -1 --config.train.num_steps=5") == [
        "--config=spice:painn",
        "--config.data.path=mine.xyz",
        "--config.data.charge=-1",
        "--config.train.num_steps=5",
    ]
    assert short("spice --data.refuse=False")[1:] == ["--config.data.refuse=False"]  # former name
    assert short("relax --force_field x --help") == ["--config=relax", "--help"]
    long = ["--config=relax", "--config.input", "a.smi"]
    assert expand(["mlip-jax", *long])[1:] == long


@pytest.mark.parametrize(
    "text, message",
    [
        ("relaxed a.smi", "Did you mean 'relax'.*Known: .*convert, .*stability"),
        ("relax --forcefield=x", "Did you mean 'force_field'"),
        ("relax a.smi b.smi", "input is given twice"),
        ("relax --force_field", "--force_field requires a value"),
        ("diversity_report a.smi", "has no input file"),
        ("spice:painnn", "unknown model of this config 'painnn'"),
    ],
)
def test_errors_of_the_short_form(text, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        short(text)


def test_an_unknown_field_is_named_with_its_path():
    """The error of the flag parser names only the last part, which several sections may have."""
    train = ml_collections.ConfigDict({"num_steps": 1})
    with pytest.raises(AttributeError) as unknown:
        train.num_stesp  # noqa: B018
    args = ["mlip-jax", "--config=spice", "--config.train.num_stesp=5"]
    text = flags.error_text(unknown.value, args)
    assert text.startswith("unknown field 'train.num_stesp' of the config. Did you mean")
    assert flags.error_text(KeyError("seed"), args) == "seed"
    args = ["mlip-jax", "--config=spice", "--config.model.num_features=5"]
    assert "model.options.NAME" in flags.error_text(KeyError("num_features"), args)


def test_the_config_is_required_and_its_names_are_listed():
    with pytest.raises(SystemExit, match="`mlip-jax spice`. Known: .*convert, "):
        flags.parse(["mlip-jax", "--workdir=x"], "")


def test_none_unsets_exactly_the_optional_fields():
    """Flags of tuples would read None as ("None",), and those of numbers reject it."""
    kept, unset = flags.without_unset(
        ["mlip-jax", "--config=spice", "--config.data.elements=None", "--config.data.charge=None"]
        + ["--config.data.split=None", "--config.data.max_atoms=30"]
    )
    assert unset == ["data.elements", "data.charge"]
    assert kept[2:] == ["--config.data.split=None", "--config.data.max_atoms=30"]


def test_the_default_workdir_is_named_after_config_and_variant():
    names = {
        "/a/configs/spice.py": "runs/spice",
        "spice.py:painn": "runs/spice-painn",
        "mine.py:scale=0.1,model=a/b": "runs/mine-scale=0.1-model=a-b",
    }
    assert {file: flags.default_workdir(file) for file in names} == names


def test_steps_of_a_command_replace_the_epochs_of_its_config():
    """Detects a short run that trains for all epochs of its config."""
    config = load_file("force2prop:small,scratch")
    assert config.train.num_epochs == 30
    assert override(config, {"train.num_steps": 7}).train.num_epochs is None
    assert override(config, {"train.num_epochs": 2.0}).train.num_epochs == 2
    assert replaced_fields(config, {"train.num_steps": 7}) == ["train.num_epochs"]
    assert not replaced_fields(config, {"seed": 1})
    with pytest.raises(ConfigError, match="both set the length of training, received 7 and 2"):
        override(config, {"train.num_steps": 7, "train.num_epochs": 2.0})

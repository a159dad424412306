"""Tests for variants of a config: grids, names, and checks before any of them runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.configs import spice_sweep
from mlip_jax.sweeps.names import SAFE, variant_names
from mlip_jax.sweeps.variants import differing, load, product

CONFIG = """
from mlip_jax.defaults import train_defaults

def get_config(model="so3krates"):
    config = train_defaults()
    config.model.name = model
    return config

"""


@pytest.fixture
def variants(tmp_path):
    """Function that returns the variants of a config file whose sweep() has the given body."""

    def variants(body, argument="", config=None, parameters=""):
        path = tmp_path / "config.py"
        path.write_text(CONFIG + f"def sweep({parameters}):\n    {body}\n")
        config = defaults.train_defaults() if config is None else config
        return load(f"{path}:{argument}" if argument else str(path), config)

    return variants


@given(
    st.dictionaries(
        st.sampled_from(["seed", "train.batch_size", "model.name"]),
        st.lists(st.integers(), min_size=1, max_size=3, unique=True),
    )
)
def test_product_is_every_combination_once(axes):
    grid = product(axes)
    assert len(grid) == math.prod(map(len, axes.values())) == len({tuple(v.items()) for v in grid})
    assert all(v[path] in values for v in grid for path, values in axes.items())


@pytest.mark.parametrize("values", ["abc", [], 3, {1, 2}])
def test_product_of_other_values_is_an_error(values):
    with pytest.raises(ConfigError, match="must be a list"):
        product({"seed": values})


def test_names_are_built_from_the_values(variants):
    found = variants("""return [{"model.name": "painn", "seed": 1}, {"loss.beta": 0.5}, {"data.elements": ("H", "C")},
        {"data.path": "a b/c.hdf5"}, {}, {"name": "mine", "seed": 3}]""")
    assert [v.name for v in found] == [
        "model=painn,seed=1",
        "beta=0.5",
        "elements=H-C",
        "path=a-b-c.hdf5",
        "base",
        "mine",
    ]


def test_names_distinguish_fields_with_the_same_last_part(variants):
    found = variants(
        'return [{"seed": 1, "data.split_seed": 2, "model.options.cutoff": 4.0, '
        '"potential.dispersion_options.cutoff": 9.0}]'
    )
    assert found[0].name.startswith("seed=1,split_seed=2,model.options.cutoff=4.0,potential.")
    assert len(found[0].name) == 80


@given(st.lists(st.text(), min_size=1, max_size=5, unique=True))
def test_names_are_safe_and_unique(paths):
    names = variant_names("file", [None] * len(paths), [{"data.path": p, "seed": 0} for p in paths])
    assert len({name.lower() for name in names}) == len(names)
    assert all(SAFE.fullmatch(name) and len(name) <= 80 for name in names)


@pytest.mark.parametrize(
    "body, message",
    [
        ('return [{"seed": 1}, {"seed": 1}]', r"variants \[0, 1\] of the sweep are identical"),
        ('return [{"name": "a", "seed": 1}, {"name": "A", "seed": 2}]', "same name 'a'"),
        ('return [{"name": "a/b"}]', "invalid name"),
        ('return [{"name": ".."}]', "invalid name"),
        ('return [{"name": "sweep.md"}]', "invalid name"),
        ("return []", "must return a list"),
        ('return {"seed": 1}', "must return a list"),
        ('return [{"seed": 1}, {"sed": 2}]', "variant 1 .*Did you mean 'seed'"),
        ('return [{"model.name": "pain"}]', "Did you mean 'painn'"),
        ('return [{"model.options.num_feature": 3}]', "Did you mean 'num_features'"),
        (
            'return [{"seed": 1}, {"optimizer.clip_norm": -1.0}]',
            "variant 1 .*clip_norm must be at least 0",
        ),
        ('return [{"train.batch_size": 0}]', "train.batch_size must be at least 1"),
        ('return [{"loss.penalty": "maee"}]', "Did you mean 'mae'"),
    ],
)
def test_invalid_sweeps_are_errors_before_anything_runs(variants, body, message):
    with pytest.raises(ConfigError, match=message):
        variants(body)


def test_config_file_without_sweep(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    with pytest.raises(ConfigError, match="no function sweep"):
        load(str(path), defaults.train_defaults())


def test_argument_of_the_config_goes_to_a_sweep_that_takes_it(variants):
    found = variants('return [{"model.name": model}]', "painn", parameters="model")
    assert found[0].overrides == {"model.name": "painn"}
    assert variants('return [{"seed": 1}]', "painn")[0].overrides == {"seed": 1}


def test_changes_of_the_command_line_hold_for_all_variants(variants):
    config = defaults.train_defaults()
    config.train.batch_size, config.seed = 3, 9
    found = variants('return [{"seed": 0}, {"train.num_steps": 5}]', config=config)
    assert [
        (v.config.train.batch_size, v.config.seed, v.config.train.num_steps) for v in found
    ] == [(3, 0, 10_000), (3, 9, 5)]


def test_columns_are_the_fields_that_differ(variants):
    found = variants("""return [{"seed": 0, "train.batch_size": 8},
        {"seed": 1, "train.batch_size": 8, "loss.beta": 0.5}]""")
    assert differing(found, defaults.train_defaults()) == [
        {"seed": 0, "loss.beta": 0.99},
        {"seed": 1, "loss.beta": 0.5},
    ]


def test_dictionaries_are_columns_only_if_needed_to_distinguish_variants():
    config = spice_sweep.get_config()
    found = load(spice_sweep.__file__, config)
    assert len(found) == 6 and list(differing(found, config)[0]) == ["model.name", "seed"]
    options = [
        v._replace(overrides={"model.options": v.overrides["model.options"]})
        for v in (found[0], found[-1])
    ]
    assert list(differing(options, config)[0]) == ["model.options"]


def test_variants_of_other_config_files(variants, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(
        "from mlip_jax.defaults import property_defaults\n\n\ndef get_config(model='schnet'):\n"
        "    c = property_defaults()\n    c.model.name = model\n    return c\n"
    )
    found = variants(
        f"return [{{'seed': 1}}, {{'name': 'p', 'config': '{other}:painn', 'seed': 2, "
        "'init.workdir': '{sweep}/seed=1'}]"
    )
    assert [v.config.task for v in found] == ["train", "property"] and found[
        1
    ].config.model.name == "painn"
    assert found[1].config_file == f"{other}:painn" and "config" not in found[1].overrides
    assert [v.needs for v in found] == [[], ["seed=1"]]
    with pytest.raises(ConfigError, match="no such config file"):
        variants("return [{'config': 'nowhere.py'}]")
    with pytest.raises(ConfigError, match="unknown config field 'property'"):
        variants("return [{'property.targets': ('gap',)}]")


def test_a_variant_can_be_initialized_from_another_one(variants):
    first, second = variants(
        "return [{'name': 'a'}, {'name': 'b', 'init.workdir': '{sweep}/a', 'model.name': ''}]"
    )
    assert second.needs == ["a"] and second.config.model.name == "" and not first.needs


@pytest.mark.parametrize("value", ["{sweep}/a", "{sweep}/a/split.json,{sweep}/b/x", "x {sweep}/b"])
def test_required_variants(variants, value):
    found = variants(
        f"return [{{'name': n, 'seed': i}} for i, n in enumerate('ab')] + [{{'name': 'c', "
        f"'data.split_files': {value!r}}}]"
    )
    assert found[2].needs == [n for n in "ab" if f"{{sweep}}/{n}" in value]
    with pytest.raises(
        ConfigError, match="c requires the folder of unknown variant 'd'. Did you mean"
    ):
        variants(
            "return [{'name': 'cd', 'seed': 0}, {'name': 'c', 'data.split_files': '{sweep}/d'}]"
        )


@pytest.mark.parametrize(
    "needs", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "b", "b": "c", "c": "a"}]
)
def test_variants_that_need_each_other(variants, needs):
    given = [{"name": name, "data.path": f"{{sweep}}/{other}"} for name, other in needs.items()]
    with pytest.raises(ConfigError, match="requires its own folder, directly or indirectly: .*a"):
        variants(f"return {given}")

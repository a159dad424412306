"""Variants of a config: grids, names, and values that come through a command line as they are."""

import math

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import spice, spice_sweep
from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.sweep import _SAFE, differing, load, override, parse, product, to_text

CONFIG = """
from mlip_jax.defaults import train_defaults

def get_config(model="so3krates"):
    config = train_defaults()
    config.model.name = model
    return config

"""
literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner), max_leaves=8)
# values of fields of a training config, each of the type of its field
fields = st.fixed_dictionaries({}, optional={
    "seed": st.integers(0, 2**31), "data.elements": st.lists(st.sampled_from("HCNO")).map(tuple),
    "data.path": st.none() | st.text(), "data.charge": st.none() | st.floats(), "data.num_molecules": st.none()
    | st.integers(1, 9), "data.reader_options": st.text(), "potential.long_range_cutoff": st.floats(1.0),
    "potential.zbl": st.booleans(), "optimizer.learning_rate": st.floats(0, 1), "optimizer.freeze": st.just(()),
    "model.options": st.fixed_dictionaries({"cutoff": st.floats(1), "degrees": st.lists(st.integers(1, 4)).map(tuple)}),
    "train": st.fixed_dictionaries({"batch_size": st.integers(1, 64), "resident": st.none() | st.booleans()})})


@pytest.fixture
def variants(tmp_path):
    """A function: the variants of a config file whose sweep() has this body."""

    def variants(body, argument="", config=None, parameters=""):
        path = tmp_path / "config.py"
        path.write_text(CONFIG + f"def sweep({parameters}):\n    {body}\n")
        config = defaults.train_defaults() if config is None else config
        return load(f"{path}:{argument}" if argument else str(path), config)

    return variants


def typed(value):
    """Text that tells types apart and in which nan is nan; ConfigDict sorts its fields."""
    value = dict(sorted(value.items())) if isinstance(value, dict) else value
    return f"{type(value).__name__} {value!r}"


@settings(deadline=None)
@given(st.dictionaries(st.text(), literals))
def test_overrides_come_through_text(overrides):
    text = to_text(overrides)
    assert text.isascii() and "\n" not in text and "\0" not in text
    assert typed(parse(text)) == typed(overrides)


@settings(deadline=None, max_examples=30)
@given(fields)
def test_overrides_of_a_config_come_through_text(overrides):
    config = defaults.train_defaults()
    there = override(config, parse(to_text(overrides)))
    for path, value in overrides.items():
        for name, inner in value.items() if path == "train" else [(None, value)]:
            found = there.train[name] if name else there
            for part in () if name else path.split("."):
                found = found[part]
            found = found.to_dict() if isinstance(found, ml_collections.ConfigDict) else found
            assert typed(found) == typed(inner)
    # it is a config that a task takes, and nothing else in it has changed
    before, after = (configs.to_dict(configs.complete(c, config)) for c in (config, there))
    changed = {line.split(": ")[0] for line in configs.differences(before, after)}
    assert all(any(line == path or line.startswith(f"{path}.") for path in overrides) for line in changed)


@pytest.mark.parametrize("text", ["[1]", "{1: 2}", "{'seed': open('x')}", "{'seed': 1", "{'seed': infinity}", ""])
def test_text_that_is_no_dictionary(text):
    with pytest.raises(ConfigError, match="dictionary"):
        parse(text)


def test_numpy_numbers_become_numbers_and_others_are_refused():
    assert typed(parse(to_text({"a": np.float32(0.5), "b": (np.int64(3),)}))) == typed({"a": 0.5, "b": (3,)})
    with pytest.raises(ConfigError, match="ndarray"):
        to_text({"a": np.zeros(2)})


def test_one_option_keeps_the_others_and_a_dictionary_replaces_them():
    config = spice.get_config("painn")
    one = override(config, {"model.options.cutoff": 4.0}).model.options
    assert one.cutoff == 4.0 and one.num_radial == config.model.options.num_radial == 20
    all_ = override(config, {"model.options.num_layers": 2, "model.options": {"cutoff": 3.0}}).model.options
    assert all_.to_dict() == {"cutoff": 3.0, "num_layers": 2}
    assert config.model.options.cutoff == 5.0


def test_fields_that_refer_to_others_follow():
    config = defaults.train_defaults()
    config.data.split_seed = config.get_ref("seed")
    assert override(config, {"seed": 7}).data.split_seed == 7 and config.seed == 0


@pytest.mark.parametrize("overrides, message", [
    ({"train.batch_sise": 3}, "Did you mean 'train.batch_size'"),
    ({"trian.batch_size": 3}, "Did you mean 'train'"),
    ({"trian": {"batch_size": 3}}, "Did you mean 'train'"),
    ({"seed.value": 3}, "'seed' holds no further fields"),
    ({"seed": "three"}, "'seed'.*str"),
    ({"train": 3}, "'train' holds further fields"),
    ({"train.batch_size": None}, "'train.batch_size' must have a value, received None"),
])
def test_wrong_fields(overrides, message):
    with pytest.raises(ConfigError, match=message):
        override(defaults.train_defaults(), overrides)


@given(st.dictionaries(st.sampled_from(["seed", "train.batch_size", "model.name"]),
                       st.lists(st.integers(), min_size=1, max_size=3, unique=True)))
def test_product_is_every_combination_once(axes):
    grid = product(axes)
    assert len(grid) == math.prod(map(len, axes.values())) == len({tuple(v.items()) for v in grid})
    assert all(v[path] in values for v in grid for path, values in axes.items())


@pytest.mark.parametrize("values", ["abc", [], 3, {1, 2}])
def test_product_of_no_list(values):
    with pytest.raises(ConfigError, match="must be a list"):
        product({"seed": values})


def test_names_are_made_of_the_values(variants):
    found = variants("""return [{"model.name": "painn", "seed": 1}, {"loss.beta": 0.5}, {"data.elements": ("H", "C")},
        {"data.path": "a b/c.hdf5"}, {}, {"name": "mine", "seed": 3}]""")
    assert [v.name for v in found] == [
        "model=painn,seed=1", "beta=0.5", "elements=H-C", "path=a-b-c.hdf5", "base", "mine"]


def test_names_tell_fields_of_the_same_name_apart(variants):
    found = variants('return [{"seed": 1, "data.split_seed": 2, "model.options.cutoff": 4.0, '
                     '"potential.dispersion_options.cutoff": 9.0}]')
    assert found[0].name.startswith("seed=1,split_seed=2,model.options.cutoff=4.0,potential.")
    assert len(found[0].name) == 80


@given(st.lists(st.text(), min_size=1, max_size=5, unique=True))
def test_names_are_safe_and_unique(paths):
    from mlip_jax.sweep import _names
    names = _names("file", [None] * len(paths), [({"data.path": p, "seed": 0}, None) for p in paths])
    assert len({name.lower() for name in names}) == len(names)
    assert all(_SAFE.fullmatch(name) and len(name) <= 80 for name in names)


@pytest.mark.parametrize("body, message", [
    ('return [{"seed": 1}, {"seed": 1}]', r"variants \[0, 1\] of the sweep are the same"),
    ('return [{"name": "a", "seed": 1}, {"name": "A", "seed": 2}]', "same name 'a'"),
    ('return [{"name": "a/b"}]', "cannot be the name"),
    ('return [{"name": ".."}]', "cannot be the name"),
    ('return [{"name": "sweep.md"}]', "cannot be the name"),
    ("return []", "must return a list"),
    ('return {"seed": 1}', "must return a list"),
    ('return [{"seed": 1}, {"sed": 2}]', "variant 1 .*Did you mean 'seed'"),
    ('return [{"model.name": "pain"}]', "Did you mean 'painn'"),
    ('return [{"model.options.num_feature": 3}]', "Did you mean 'num_features'"),
    ('return [{"seed": 1}, {"optimizer.clip_norm": -1.0}]', "variant 1 .*clip_norm must be at least 0"),
    ('return [{"train.batch_size": 0}]', "train.batch_size must be at least 1"),
    ('return [{"loss.penalty": "maee"}]', "Did you mean 'mae'"),
])
def test_wrong_sweeps_are_refused_before_anything_runs(variants, body, message):
    with pytest.raises(ConfigError, match=message):
        variants(body)


def test_config_file_without_sweep(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    with pytest.raises(ConfigError, match="has no function sweep"):
        load(str(path), defaults.train_defaults())


def test_argument_of_the_config_goes_to_a_sweep_that_takes_it(variants):
    found = variants('return [{"model.name": model}]', "painn", parameters="model")
    assert found[0].overrides == {"model.name": "painn"}
    assert variants('return [{"seed": 1}]', "painn")[0].overrides == {"seed": 1}


def test_changes_of_the_command_line_hold_for_all_variants(variants):
    config = defaults.train_defaults()
    config.train.batch_size, config.seed = 3, 9
    found = variants('return [{"seed": 0}, {"train.num_steps": 5}]', config=config)
    assert [(v.config.train.batch_size, v.config.seed, v.config.train.num_steps) for v in found] == [
        (3, 0, 10_000), (3, 9, 5)]


def test_columns_are_what_differs(variants):
    found = variants("""return [{"seed": 0, "train.batch_size": 8},
        {"seed": 1, "train.batch_size": 8, "loss.beta": 0.5}]""")
    assert differing(found, defaults.train_defaults()) == [
        {"seed": 0, "loss.beta": 0.99}, {"seed": 1, "loss.beta": 0.5}]


def test_dictionaries_are_columns_only_where_nothing_else_tells_them():
    config = spice_sweep.get_config()
    found = load(spice_sweep.__file__, config)
    assert len(found) == 6 and list(differing(found, config)[0]) == ["model.name", "seed"]
    options = [v._replace(overrides={"model.options": v.overrides["model.options"]}) for v in (found[0], found[-1])]
    assert list(differing(options, config)[0]) == ["model.options"]


def test_not_a_number_is_no_difference():
    """data.charge=nan, which takes any charge, must not keep a run from going on."""
    assert configs.differences({"charge": float("nan")}, {"charge": float("nan")}) == []
    assert configs.differences({"charge": float("nan")}, {"charge": 0.0}) == ["charge: nan -> 0.0"]


def test_variants_of_other_config_files(variants, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("from mlip_jax.defaults import property_defaults\n\n\ndef get_config(model='schnet'):\n"
                     "    c = property_defaults()\n    c.model.name = model\n    return c\n")
    found = variants(f"return [{{'seed': 1}}, {{'name': 'p', 'config': '{other}:painn', 'seed': 2, "
                     "'init.workdir': '{sweep}/seed=1'}]")
    assert [v.config.task for v in found] == ["train", "property"] and found[1].config.model.name == "painn"
    assert found[1].config_file == f"{other}:painn" and "config" not in found[1].overrides
    assert [v.needs for v in found] == [[], ["seed=1"]]
    with pytest.raises(ConfigError, match="there is no such config file"):
        variants("return [{'config': 'nowhere.py'}]")
    with pytest.raises(ConfigError, match="unknown config field 'property'"):
        variants("return [{'property.targets': ('gap',)}]")


def test_a_variant_may_begin_from_another_and_take_its_architecture(variants):
    first, second = variants("return [{'name': 'a'}, {'name': 'b', 'init.workdir': '{sweep}/a', 'model.name': ''}]")
    assert second.needs == ["a"] and second.config.model.name == "" and not first.needs


@pytest.mark.parametrize("value", ["{sweep}/a", "{sweep}/a/split.json,{sweep}/b/x", "x {sweep}/b"])
def test_what_a_variant_needs(variants, value):
    found = variants(f"return [{{'name': n, 'seed': i}} for i, n in enumerate('ab')] + [{{'name': 'c', "
                     f"'data.split_files': {value!r}}}]")
    assert found[2].needs == [n for n in "ab" if f"{{sweep}}/{n}" in value]
    with pytest.raises(ConfigError, match="c needs the folder of unknown variant 'd'. Did you mean"):
        variants("return [{'name': 'cd', 'seed': 0}, {'name': 'c', 'data.split_files': '{sweep}/d'}]")

"""Tests for overrides: values change config fields, and come through a command line unchanged."""

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlip_jax import config as configs
from mlip_jax import defaults
from mlip_jax.config import ConfigError
from mlip_jax.configs import spice
from mlip_jax.sweeps.overrides import override, parse, to_text

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
# values of fields of a training config, each of the type of its field
fields = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**31),
        "data.elements": st.lists(st.sampled_from("HCNO")).map(tuple),
        "data.path": st.none() | st.text(),
        "data.charge": st.none() | st.floats(),
        "data.num_molecules": st.none() | st.integers(1, 9),
        "data.reader_options": st.text(),
        "potential.long_range_cutoff": st.floats(1.0),
        "potential.zbl": st.booleans(),
        "optimizer.learning_rate": st.floats(1e-300, 1),
        "optimizer.freeze": st.just(()),
        "model.options": st.fixed_dictionaries(
            {"cutoff": st.floats(1), "degrees": st.lists(st.integers(1, 4)).map(tuple)}
        ),
        "train": st.fixed_dictionaries(
            {"batch_size": st.integers(1, 64), "resident": st.none() | st.booleans()}
        ),
    },
)


def typed(value):
    """Return a text that distinguishes types and in which nan equals nan."""
    value = dict(sorted(value.items())) if isinstance(value, dict) else value
    return f"{type(value).__name__} {value!r}"


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(), literals, max_size=3))
def test_overrides_survive_conversion_to_text(overrides):
    text = to_text(overrides)
    assert text.isascii() and "\n" not in text and "\0" not in text
    assert typed(parse(text)) == typed(overrides)


@settings(deadline=None, max_examples=30)
@given(fields)
def test_overrides_of_a_config_survive_conversion_to_text(overrides):
    config = defaults.train_defaults()
    there = override(config, parse(to_text(overrides)))
    for path, value in overrides.items():
        for name, inner in value.items() if path == "train" else [(None, value)]:
            found = there.train[name] if name else there
            for part in () if name else path.split("."):
                found = found[part]
            found = found.to_dict() if isinstance(found, ml_collections.ConfigDict) else found
            assert typed(found) == typed(inner)
    # a task accepts the config, and nothing else in it has changed
    before, after = (configs.to_dict(configs.complete(c, config)) for c in (config, there))
    changed = {line.split(": ")[0] for line in configs.differences(before, after)}
    assert all(
        any(line == path or line.startswith(f"{path}.") for path in overrides) for line in changed
    )


def test_overrides_with_former_names_set_the_new_fields(caplog):
    """The fault caught: overrides of an older version that set a field which no task reads."""
    configs.warn_renamed.cache_clear()
    config = override(spice.get_config(), {"optimizer.rates": "*=2", "data": {"refuse": False}})
    assert (config.optimizer.lr_multipliers, config.data.reject_invalid) == ("*=2", False)
    assert "rates" not in config.optimizer and "refuse" not in config.data
    assert caplog.text.count("is deprecated: use optimizer.lr_multipliers") == 1
    with pytest.raises(ConfigError, match="set only 'data.reject_invalid'"):
        override(config, {"data.refuse": True, "data.reject_invalid": False})


@pytest.mark.parametrize(
    "text", ["[1]", "{1: 2}", "{'seed': open('x')}", "{'seed': 1", "{'seed': infinity}", ""]
)
def test_text_that_is_not_a_dictionary_is_an_error(text):
    with pytest.raises(ConfigError, match="dictionary"):
        parse(text)


def test_numpy_numbers_become_numbers_and_other_types_are_errors():
    assert typed(parse(to_text({"a": np.float32(0.5), "b": (np.int64(3),)}))) == typed(
        {"a": 0.5, "b": (3,)}
    )
    with pytest.raises(ConfigError, match="ndarray"):
        to_text({"a": np.zeros(2)})


def test_one_option_keeps_the_others_and_a_dictionary_replaces_them():
    config = spice.get_config("painn")
    one = override(config, {"model.options.cutoff": 4.0}).model.options
    assert one.cutoff == 4.0 and one.num_radial == config.model.options.num_radial == 20
    all_ = override(
        config, {"model.options.num_layers": 2, "model.options": {"cutoff": 3.0}}
    ).model.options
    assert all_.to_dict() == {"cutoff": 3.0, "num_layers": 2}
    assert config.model.options.cutoff == 5.0


def test_fields_that_refer_to_others_follow():
    config = defaults.train_defaults()
    config.data.split_seed = config.get_ref("seed")
    assert override(config, {"seed": 7}).data.split_seed == 7 and config.seed == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.batch_sise": 3}, "Did you mean 'train.batch_size'"),
        ({"trian.batch_size": 3}, "Did you mean 'train'"),
        ({"trian": {"batch_size": 3}}, "Did you mean 'train'"),
        ({"seed.value": 3}, "'seed' contains no further fields"),
        ({"seed": "three"}, "'seed'.*str"),
        ({"train": 3}, "'train' contains further fields"),
        ({"train.num_steps": None}, "'train.num_steps' must have a value, received None"),
    ],
)
def test_invalid_fields_are_errors(overrides, message):
    with pytest.raises(ConfigError, match=message):
        override(defaults.train_defaults(), overrides)


def test_nan_equals_nan():
    """data.charge=nan, which allows any charge, must not prevent a run from resuming."""
    assert configs.differences({"charge": float("nan")}, {"charge": float("nan")}) == []
    assert configs.differences({"charge": float("nan")}, {"charge": 0.0}) == ["charge: nan -> 0.0"]

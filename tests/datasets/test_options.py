"""Tests for reader options: messages state the option, the expected type and the received value."""

from pathlib import Path

import numpy as np
import pytest

from mlip_jax.config import ConfigError
from mlip_jax.datasets import options
from mlip_jax.datasets.source import reader_options


def test_valid_values_are_returned():
    assert options.positive_integer("n", 3) == options.positive_integer("n", np.int64(3)) == 3
    assert options.positive_integer("n", None, allow_none=True) is None
    assert options.flag("f", True) is True and options.flag("f", np.bool_(False)) is False
    assert options.text("t", "") == "" and options.one_of("t", "a", ("a", "b")) == "a"
    assert options.path("p", Path("a/b")) == options.path("p", "a/b") == "a/b"
    assert options.path("p", None, allow_none=True) is None
    for value, expected in (
        ("a", ("a",)),
        ("", ()),
        ([], ()),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
    ):
        assert options.texts("t", value) == expected


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (options.positive_integer, "abc", "an integer of 1 or more; received 'abc' \\(str\\)"),
        (options.positive_integer, 2.5, "an integer of 1 or more; received 2.5 \\(float\\)"),
        (options.positive_integer, 2.0, "an integer"),
        (options.positive_integer, True, "an integer"),
        (options.positive_integer, 0, "an integer"),
        (options.positive_integer, -1, "an integer"),
        (options.positive_integer, None, "an integer"),
        (options.flag, 1, "True or False; received 1"),
        (options.flag, "True", "True or False"),
        (options.flag, None, "True or False"),
        (options.text, 1, "a text"),
        (options.text, None, "a text"),
        (options.path, 1, "a path"),
        (options.path, None, "a path"),
        (options.texts, 1, "a text or several"),
        (options.texts, ["a", 1], "a text or several"),
        (options.texts, None, "a text or several"),
        (options.texts, {"a": 1}, "a text or several"),
    ],
)
def test_wrong_types_are_rejected(check, value, expected):
    with pytest.raises(ConfigError, match=f"reader option stride must be {expected}"):
        check("stride", value)


def test_one_of_several_values():
    with pytest.raises(
        ConfigError, match="reader option unit must be one of 'eV', 'hartree'; received 5"
    ):
        options.one_of("unit", 5, ("eV", "hartree"))
    with pytest.raises(ConfigError, match="reader option unit 'hartre'.*hartree"):
        options.one_of("unit", "hartre", ("eV", "hartree"))


@pytest.mark.parametrize("value", ["''", "('a', 'b')", "NAME"])
def test_formatted_option_can_be_parsed(value):
    option = options.as_flag("split_files", value)
    assert option.startswith('--config.data.reader_options="') and option.endswith('"')
    assert reader_options(option.split('"')[1]) == {
        "split_files": {"''": "", "('a', 'b')": ["a", "b"]}.get(value, value)
    }

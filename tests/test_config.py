"""Tests for the identity of a config, to which a workdir belongs."""

import copy

from mlip_jax import config, defaults
from mlip_jax.workdir import claimed


def test_workdirs_of_earlier_versions_without_later_fields_are_resumed(tmp_path):
    for make in (
        defaults.train_defaults,
        defaults.property_defaults,
        defaults.stability_defaults,
        defaults.md_defaults,
    ):
        now = config.identity(make())
        before = copy.deepcopy(now)
        for part, name in (
            ("optimizer", "lr_multipliers"),
            ("data", "held_out"),
            ("data", "selection"),
            ("data", "below_min_conformers"),
            ("data", "selection_force_field"),
        ):
            assert name not in before.get(part, {})
        assert not {"trajectory_format", "draw_momenta"} & before.keys()
        with claimed(tmp_path / make.__name__, before):
            (tmp_path / make.__name__ / "results").write_text("results")
        with claimed(tmp_path / make.__name__, now):
            pass


def test_a_later_field_that_is_set_changes_the_identity():
    plain, chosen = defaults.train_defaults(), defaults.train_defaults()
    chosen.data.selection = "maxmin"
    assert config.differences(config.identity(plain), config.identity(chosen)) == [
        "data.selection: '(absent)' -> 'maxmin'"
    ]
    assert "max_domain" not in config.identity(plain)["report"]
    plain, chosen = defaults.md_defaults(), defaults.md_defaults()
    chosen.trajectory_format = "hdf5"
    assert config.differences(config.identity(plain), config.identity(chosen)) == [
        "trajectory_format: '(absent)' -> 'hdf5'"
    ]
    compared = defaults.stability_defaults()
    compared.compare_picoseconds = 2.0
    assert (
        len(
            config.differences(
                config.identity(defaults.stability_defaults()), config.identity(compared)
            )
        )
        == 3
    )

"""Tests for the identity of a config, to which a workdir belongs, and for the shipped configs."""

import copy

import pytest

from mlip_jax import config, defaults, models
from mlip_jax.config import load_file
from mlip_jax.configs import paper_force2geo
from mlip_jax.reports.force2geo import predictors
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


@pytest.mark.parametrize("name", models.names())
def test_every_model_is_offered_for_force_fields_and_properties(name):
    """Detects a new model that users of the configs cannot select."""
    for shipped in (f"spice:{name}", f"force2prop:scratch,{name}"):
        loaded = load_file(shipped)
        assert loaded.model.name == name
        models.create(name, **loaded.model.options)


@pytest.mark.parametrize("name", models.bond_graphs.names())
def test_every_model_of_bonds_is_offered_for_properties(name):
    for size in ("", ",small"):
        loaded = load_file(f"force2prop:scratch,{name}{size}")
        assert loaded.model.name == name
        models.create(name, **loaded.model.options)


def test_the_study_trains_every_architecture_of_its_report():
    """Detects rows of the report that no variant of the sweep fills."""
    variants = paper_force2geo.sweep("data.lmdb,width=32,second=other.db")
    names = [variant["name"] for variant in variants]
    assert len(set(names)) == len(names)
    by_name = {variant["name"]: variant for variant in variants}
    for _, row, *_, second in predictors.MODELS:
        prefixes = (
            "",
            "scaffold-",
            "subset-",
            "subset-scaffold-",
            *(["second-"] if second else []),
        )
        for prefix in prefixes:
            if prefix == "second-" and row in predictors.STARTS:
                continue
            variant = by_name[f"{prefix}{row}-2"]
            if "init.workdir" not in variant:
                models.create(variant["model.name"], **variant["model.options"])
    for prefix in ("", "scaffold-"):
        for _, row, geometry, _ in predictors.GEOMETRIES:
            assert geometry in by_name[f"{prefix}{row}-2"]["data.test_geometries"]


def test_words_of_the_study_select_its_size():
    """Detects a word that is ignored, and an unknown one that is taken for a path."""
    argument = "data.lmdb,tables,molecules=40,epochs=2,seeds=1,steps=100"
    by_name = {variant["name"]: variant for variant in paper_force2geo.sweep(argument)}
    assert by_name["scratch-0"]["data.num_molecules"] == 40
    assert by_name["scratch-0"]["train.num_epochs"] == 2.0
    assert by_name["force-field"]["train.num_steps"] == 100
    assert "scratch-1" not in by_name and "heads-0" not in by_name
    with pytest.raises(ValueError, match="epoch"):
        paper_force2geo.get_config("data.lmdb,epoch=3")

"""Tests for renamed config fields, whose former names keep working."""

import json
import logging

import pytest

from mlip_jax import config, defaults
from mlip_jax.cli import flags
from mlip_jax.config import ConfigError
from mlip_jax.sweeps.attempts import VariantFolder
from mlip_jax.sweeps.variants import Variant
from mlip_jax.workdir import WorkdirError, claimed

# Values of renamed fields, by their former names.
FORMER = {
    "minima": {
        "judged": 3,
        "geometries": 5,
        "batch": 2,
        "search.same_energy": 0.01,
        "search.same_rmsd": 0.2,
    },
    "train": {
        "data.refuse": False,
        "data.fewer_conformers": "last",
        "optimizer.rates": "params/*=0.1",
    },
    "md": {"watch_bonds": False},
}


def with_former_names(task):
    """Return the default config of a task with renamed fields set by their former names."""
    old = defaults.TASKS[task].build()
    for name, value in FORMER[task].items():
        part, _, last = name.rpartition(".")
        (old[part] if part else old)[last] = value
    return old


def with_new_names(task):
    """Return the same config with the current names."""
    new = defaults.TASKS[task].build()
    renamed = defaults.TASKS[task].renamed()
    new.update_from_flattened_dict({renamed[old]: v for old, v in FORMER[task].items()})
    return new


def old_identity(task):
    """Return config.json as an older version wrote it."""
    plain = config.identity(with_new_names(task))
    for old, new in defaults.TASKS[task].renamed().items():
        part, _, last = new.rpartition(".")
        values = plain[part] if part else plain
        if last in values:
            values[old.rpartition(".")[2]] = values.pop(last)
    return plain


def test_all_renamed_fields_are_tested():
    renamed = {t: sorted(part.renamed()) for t, part in defaults.TASKS.items()}
    assert all(renamed[task] == sorted(values) for task, values in FORMER.items())
    assert {name for names in renamed.values() for name in names} == set(config.RENAMED)


def test_a_former_name_means_one_field_in_all_tasks():
    """Flags are renamed before the task is known."""
    for part in defaults.TASKS.values():
        assert not config.RENAMED.keys() & {name for name, _ in part.fields()}
        assert part.renamed().items() <= config.RENAMED.items()


@pytest.mark.parametrize("task", FORMER)
def test_a_config_with_former_names_is_the_config_with_the_new_ones(task, caplog):
    """The fault caught: a former name that is ignored, or used silently."""
    config.warn_renamed.cache_clear()
    done = config.complete(with_former_names(task), defaults.TASKS[task].build())
    assert config.to_dict(done) == config.to_dict(with_new_names(task))
    for old in FORMER[task]:
        assert (
            caplog.text.count(f"config field {old} is deprecated: use {config.RENAMED[old]}") == 1
        )


@pytest.mark.parametrize("task", FORMER)
def test_a_workdir_with_former_names_belongs_to_the_config_with_the_new_ones(task, tmp_path):
    """The fault caught: a renamed field that turns an old workdir into one of another config."""
    before = old_identity(task)
    assert config.with_current_names(before) != before
    with claimed(tmp_path / "run", before):
        (tmp_path / "run/results").write_text("results")
    for new in (with_new_names(task), with_former_names(task)):
        with claimed(
            tmp_path / "run", config.identity(config.complete(new, defaults.TASKS[task].build()))
        ):
            pass
    assert json.loads((tmp_path / "run/config.json").read_text()) == json.loads(json.dumps(before))
    with pytest.raises(WorkdirError, match="num_conformers: |beta: |timestep: "):
        other = with_new_names(task)
        name = {"minima": "num_conformers", "train": "loss.beta", "md": "timestep"}[task]
        other.update_from_flattened_dict({name: 0.9 if "." in name else 7})
        with claimed(tmp_path / "run", config.identity(other)):
            pass


def test_a_variant_that_is_done_with_former_names_is_done(tmp_path):
    folder = VariantFolder(tmp_path, Variant("a", {}, with_new_names("minima"), ""))
    (tmp_path / "done.json").write_text(json.dumps({"config": old_identity("minima")}))
    assert folder.is_done()


def test_a_field_that_is_set_by_both_names_is_rejected():
    both = with_former_names("minima")
    both.num_conformers = 7
    with pytest.raises(ConfigError, match="'geometries' and 'num_conformers'.* 5 and 7; set only"):
        config.complete(both, defaults.minima_defaults())


def test_flags_with_former_names_set_the_new_fields(caplog):
    config.warn_renamed.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert flags.with_current_fields(
            ["main", "--config=md", "--config.watch_bonds=False", "-config.search.same_rmsd", "0.1"]
            + ["--noconfig.data.refuse", "--workdir=config.judged=1", "--config.train.batch_size=3"]
        ) == [
            *["main", "--config=md", "--config.stop_on_bond_break=False"],
            *["-config.search.rmsd_tolerance", "0.1", "--noconfig.data.reject_invalid"],
            *["--workdir=config.judged=1", "--config.train.batch_size=3"],
        ]
    assert [r.getMessage() for r in caplog.records] == [
        f"config field {old} is deprecated: use {config.RENAMED[old]}"
        for old in ("watch_bonds", "search.same_rmsd", "data.refuse")
    ]


def test_a_flag_takes_precedence_over_a_former_name_in_the_file():
    old = with_former_names("minima")
    flags.drop_former_fields(old, {"num_conformers"})
    assert "geometries" not in old and old.judged == 3
    flags.drop_former_fields(None, ())

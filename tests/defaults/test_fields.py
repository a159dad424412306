"""Tests for the declared config fields: descriptions, defaults, choices and checks of values."""

import math
import pkgutil
import re
from pathlib import Path

import pytest

from mlip_jax import config as configs
from mlip_jax import tasks
from mlip_jax.config import ConfigError
from mlip_jax.datasets.quality import filters
from mlip_jax.datasets.selection import initial_geometries, splits, subsets
from mlip_jax.defaults import TASKS
from mlip_jax.defaults.bounds import AT_LEAST_ONE
from mlip_jax.defaults.field import Field, Part, optional
from mlip_jax.label_budget import choice, uncertainty
from mlip_jax.models.layers import readouts
from mlip_jax.reports.diversity import report
from mlip_jax.simulation import export
from mlip_jax.simulation.dynamics import settings, trajectories
from mlip_jax.simulation.reference import oracle
from mlip_jax.simulation.relaxation import minimizers
from mlip_jax.tasks import active_learning, relax
from mlip_jax.training import losses, nonfinite, optimizer


def described(part):
    """Yield (name, description, field or None) of a part and all below it."""
    yield "", part.description, None
    for name, member in part.members.items():
        if isinstance(member, Part):
            yield from ((f"{name}.{below}".strip("."), *rest) for below, *rest in described(member))
        else:
            yield name, member.description, member


def problems_of(part, prefix=""):
    """Yield the names of members that violate the rules of declarations."""
    known = {name for name, _ in part.fields()}
    for name, description, field in described(part):
        if not re.fullmatch(r'["A-Z(].*[^ ]\.', description) or description.startswith("Of "):
            yield f"{name}: description {description!r}"
        if field is not None:
            if field.problem(name, field.default) or set(field.only_with) - known:
                yield f"{name}: default or only_with"
            # None is valid, and can be set, only with both
            if (field.type is not None) != bool(field.unset):
                yield f"{name}: meaning of unset"


@pytest.mark.parametrize("task", TASKS)
def test_every_field_is_described_and_has_a_valid_default(task):
    assert list(problems_of(TASKS[task])) == []


def test_the_contract_finds_bad_declarations():
    bad = Part(
        "A part.",
        a=Field(0, "Number of steps.", bounds=AT_LEAST_ONE),
        b=Field("x", "of steps"),
        c=Field("x", "Name.", choices=("y",)),
        d=Field(0, ""),
        e=Field(0, "Number.", only_with=("g",)),
        f=Field(0, "Number.", unset="none"),
    )
    assert [line.partition(":")[0] for line in problems_of(bad)] == list("abcdef")


def test_every_task_has_declared_fields():
    modules = pkgutil.iter_modules(tasks.__path__)
    folders = Path(tasks.__path__[0])
    assert set(TASKS) == {
        m.name
        for m in modules
        if not m.ispkg or "\ndef run(" in (folders / m.name / "__init__.py").read_text()
    }
    assert all(part.members["task"].default == task for task, part in TASKS.items())


@pytest.mark.parametrize(
    ("task", "name", "values"),
    [
        ("train", "data.require", filters.REQUIRE),
        ("train", "data.split", {"auto", *splits.METHODS}),
        ("train", "data.selection", subsets.SELECTIONS),
        ("train", "loss.penalty", losses.PENALTIES),
        ("train", "loss.force_penalty", losses.FORCE_PENALTIES),
        ("train", "loss.beta_schedule", losses.BETA_SCHEDULES),
        ("train", "optimizer.name", optimizer.OPTIMIZERS),
        ("train", "optimizer.schedule", optimizer.SCHEDULES),
        ("train", "train.on_nonfinite", nonfinite.CHOICES),
        ("property", "property.penalty", losses.PENALTIES),
        ("property", "property.pooling", readouts.POOLINGS),
        ("diversity_report", "metric", report.METRICS),
        ("relax", "optimizer", minimizers.names()),
        ("relax", "formats", relax.FORMATS),
        ("md", "ensemble", settings.INTEGRATORS),
        ("md", "trajectory_format", trajectories.FORMS),
        ("stability", "oracle.method", oracle.TBLITE),
        ("export", "platforms", export.PLATFORMS),
        ("force2geo_eval", "data.selection", initial_geometries.SELECTIONS),
        ("active_learning", "propose.kinds", active_learning.KINDS),
        ("active_learning", "choose.strategy", choice.STRATEGIES),
        ("active_learning", "choose.uncertainty", uncertainty.KINDS),
        ("active_learning", "control", active_learning.CONTROLS),
    ],
)
def test_choices_are_those_of_the_code(task, name, values):
    """Declarations repeat the names, because --help must not import the code."""
    assert set(dict(TASKS[task].fields())[name].choices) == set(values)


@pytest.mark.parametrize(
    ("task", "name", "value", "message"),
    [
        (
            "train",
            "optimizer.name",
            "adamm",
            "unknown optimizer.name 'adamm'. Did you mean 'adam'? Known: adam, adamw, ",
        ),
        (
            "train",
            "optimizer.name",
            None,
            "config field 'optimizer.name' must have a value, received None",
        ),
        (
            "train",
            "train.ema_decay",
            1.0,
            "train.ema_decay must be at least 0 and below 1, received 1.0",
        ),
        (
            "train",
            "train.num_epochs",
            math.nan,
            "train.num_epochs must be positive or unset, received nan",
        ),
        ("train", "data.reference_energies", "least_square", "Did you mean 'least_squares'"),
        ("relax", "maxstep", math.inf, "maxstep must be positive (Å), received inf"),
        ("relax", "formats", ("xyz", "sdff"), "unknown formats 'sdff'. Did you mean 'sdf'"),
        (
            "stability",
            "temperatures",
            (300.0, -1.0),
            "temperatures must be at least 0 (K), received [300.0, -1.0]",
        ),
        ("minima", "oracle.method", "GFN3-xTB", "A value with ':' is accepted as well"),
    ],
)
def test_invalid_values_are_rejected(task, name, value, message):
    config = TASKS[task].build()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError, match=re.escape(message)):
        configs.complete(config, TASKS[task].build())


def test_all_invalid_values_are_listed():
    config = TASKS["train"].build()
    config.train.log_every, config.train.on_nonfinite = 0, "skipp"
    with pytest.raises(
        ConfigError, match="train.log_every must be at least 1.*'skipp'. Did you mean 'skip'"
    ):
        configs.complete(config, TASKS["train"].build())


@pytest.mark.parametrize(
    ("task", "values"),
    [
        (
            "train",
            {
                "data.charge": math.nan,
                "data.reference_energies": "H=-13.6,C=-1029.4",
                "optimizer.clip_norm": 0.0,
                "potential.long_range_cutoff": math.inf,
                "init.workdir": "so3lr:params.pkl",
                "data.elements": None,
            },
        ),
        (
            "property",
            {
                "data.geometry": "relaxed(pm3)",
                "data.test_geometries": ("etkdg:mmff", "relaxed(etkdg)"),
                "data.num_train": 1_000,
                "train.num_epochs": 3,
            },
        ),
        ("minima", {"oracle.method": "ase.calculators.emt:EMT"}),
        ("train", {"optimizer.clip_norm": None}),
        ("relax", {"batch_atoms": 0, "formats": (), "limit": None}),
    ],
)
def test_valid_values_are_accepted(task, values):
    config = TASKS[task].build()
    config.update_from_flattened_dict(values)
    configs.complete(config, TASKS[task].build())


def test_a_field_that_may_be_unset_keeps_its_type_and_is_not_shared():
    part = Part(
        "A part.",
        limit=optional(int, "Limit.", unset="none"),
        charge=optional(int, "Charge.", unset="any", default=0),
    )
    one, other = part.build(), part.build()
    one.limit, one.charge = 3, None
    assert (other.limit, other.charge) == (None, 0)
    with pytest.raises(TypeError):
        one.limit = "three"


def test_an_audit_has_no_processes_of_the_reference_method():
    """An audit calls the method itself; it used to accept a number of processes and ignore it."""
    assert set(TASKS["audit"].build().oracle) == {"method", "options"}


# Fields that are absent in config.json of existing workdirs. They must not make them another run.
LEFT_OUT = {
    "train": "data.reject_invalid data.verify train.on_nonfinite train.resident "
    "train.steps_per_dispatch train.profile_steps data.held_out data.selection "
    "data.selection_force_field data.below_min_conformers optimizer.lr_multipliers "
    "report.max_domain potential.zbl init.workdir",
    "property": "data.test_geometries dens.weight dens.share",
    "convert": "store.num_processes",
    "diversity": "diversity.num_processes",
    "generate_conformers": "num_processes",
    "force2geo_eval": "oracle.num_processes oracle.cache relax.batch_atoms",
    "relax": "num_processes batch_atoms limit",
    "predict": "num_processes batch_size limit",
    "md": "num_steps restart_seconds trajectory_format",
    "minima": "oracle.num_processes",
    "stability": "restart_seconds compare_picoseconds compare_temperature trajectory_format oracle.method",
}


@pytest.mark.parametrize("task", LEFT_OUT)
def test_workdirs_of_existing_runs_are_recognized(task):
    plain, kept = configs.to_dict(TASKS[task].build()), configs.identity(TASKS[task].build())
    assert set(kept) <= set(plain)
    for name in LEFT_OUT[task].split():
        part, _, last = name.rpartition(".")
        assert last in (plain[part] if part else plain) and last not in (
            kept.get(part, {}) if part else kept
        ), name


@pytest.mark.parametrize("task", TASKS)
def test_the_identity_has_the_fields_that_change_results(task):
    # fields that replace an unset one, which is in the identity
    replacing = {field.unset_field for _, field in TASKS[task].fields()}
    for name, field in TASKS[task].fields():
        # of parts that are off
        without_effect = name.startswith(("dens.", "potential.")) or field.only_with
        if isinstance(field.default, int | float) and not without_effect:
            config = TASKS[task].build()
            before = configs.identity(config)
            config.update_from_flattened_dict(
                {name: not field.default if isinstance(field.default, bool) else field.default + 1}
            )
            expected = field.changes_results or name in replacing
            assert (configs.identity(config) != before) == expected, name

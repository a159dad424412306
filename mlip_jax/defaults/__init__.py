"""Config fields: declarations by task, and functions that return the default config of a task.

A field is declared once, in the file of its subject, with its default, meaning, unit and allowed
values. The defaults, the checks of a config, its --help, the config reference and the identity of a
run all use that declaration.
"""

from __future__ import annotations

import ml_collections

from mlip_jax.defaults.active_learning import ACTIVE_LEARNING
from mlip_jax.defaults.audit import AUDIT
from mlip_jax.defaults.crystal import CRYSTAL
from mlip_jax.defaults.data import CONVERT, GENERATE, GENERATE_CONFORMERS, INSPECT
from mlip_jax.defaults.diversity import DIVERSITY, DIVERSITY_REPORT
from mlip_jax.defaults.dynamics import MD, STABILITY
from mlip_jax.defaults.field import Part
from mlip_jax.defaults.fine_tuning import FINE_TUNE
from mlip_jax.defaults.force_field_tasks import ENSEMBLE, EXPORT, PUBLISHED
from mlip_jax.defaults.property import PROPERTY
from mlip_jax.defaults.reactions import NEB
from mlip_jax.defaults.simulation import EVALUATE, FORCE2GEO, MINIMA, PREDICT, RELAX
from mlip_jax.defaults.training import TRAIN
from mlip_jax.defaults.vibrations import VIBRATIONS

TASKS: dict[str, Part] = {
    config.members["task"].default: config
    for config in (
        TRAIN,
        PROPERTY,
        DIVERSITY,
        DIVERSITY_REPORT,
        CONVERT,
        INSPECT,
        GENERATE,
        GENERATE_CONFORMERS,
        FORCE2GEO,
        RELAX,
        ENSEMBLE,
        EVALUATE,
        EXPORT,
        PUBLISHED,
        PREDICT,
        MD,
        MINIMA,
        STABILITY,
        VIBRATIONS,
        CRYSTAL,
        NEB,
        AUDIT,
        ACTIVE_LEARNING,
        FINE_TUNE,
    )
}


def train_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "train" with the default of every field."""
    return TRAIN.build()


def property_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "property" with the default of every field."""
    return PROPERTY.build()


def diversity_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "diversity" with the default of every field."""
    return DIVERSITY.build()


def diversity_report_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "diversity_report" with the default of every field."""
    return DIVERSITY_REPORT.build()


def convert_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "convert" with the default of every field."""
    return CONVERT.build()


def inspect_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "inspect_data" with the default of every field."""
    return INSPECT.build()


def generate_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "generate" with the default of every field."""
    return GENERATE.build()


def conformers_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "generate_conformers" with the default of every field."""
    return GENERATE_CONFORMERS.build()


def force2geo_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "force2geo_eval" with the default of every field."""
    return FORCE2GEO.build()


def relax_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "relax" with the default of every field."""
    return RELAX.build()


def ensemble_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "ensemble" with the default of every field."""
    return ENSEMBLE.build()


def evaluate_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "evaluate" with the default of every field."""
    return EVALUATE.build()


def export_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "export" with the default of every field."""
    return EXPORT.build()


def published_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "published" with the default of every field."""
    return PUBLISHED.build()


def predict_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "predict" with the default of every field."""
    return PREDICT.build()


def md_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "md" with the default of every field."""
    return MD.build()


def minima_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "minima" with the default of every field."""
    return MINIMA.build()


def stability_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "stability" with the default of every field."""
    return STABILITY.build()


def crystal_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "crystal" with the default of every field."""
    return CRYSTAL.build()


def neb_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "neb" with the default of every field."""
    return NEB.build()


def vibrations_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "vibrations" with the default of every field."""
    return VIBRATIONS.build()


def audit_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "audit" with the default of every field."""
    return AUDIT.build()


def active_learning_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "active_learning" with the default of every field."""
    return ACTIVE_LEARNING.build()


def fine_tune_defaults() -> ml_collections.ConfigDict:
    """Return the config of task "fine_tune" with the default of every field."""
    return FINE_TUNE.build()

"""Task `property`: train a property predictor, from scratch or from a force field."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import defaults, distributed, models, predictor
from mlip_jax.config import ConfigError
from mlip_jax.datasets import property_data, readers, source, statistics
from mlip_jax.datasets.property_data import Target
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.store.store import is_store
from mlip_jax.defaults.training import LENGTH
from mlip_jax.models.layers.readouts import PropertyModel, with_heads
from mlip_jax.potential import example_graph
from mlip_jax.simulation.geometry_sources import LABELS, num_conformers
from mlip_jax.tasks.property_training.data import PropertyData, PropertyInputs
from mlip_jax.tasks.property_training.loop import build_loop, build_objective, optimizer_options
from mlip_jax.tasks.property_training.report import report_run
from mlip_jax.training import optimizer, property_objective
from mlip_jax.training.dens import ENCODED
from mlip_jax.training.device.batch_size import with_batch_size
from mlip_jax.training.noise import DISPLACEMENT
from mlip_jax.training.options import inherit_options, set_average_neighbors, set_model_options
from mlip_jax.training.outputs import restore
from mlip_jax.training.prepare import count_steps, describe, log_model, make_batches
from mlip_jax.training.property_objective import REFINEMENT
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train a predictor by `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function; only the leader writes files.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, TrainingError, Stopped: The message
        explains how to fix the problem.
    """
    config = configs.complete(config, defaults.property_defaults())
    _check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config), LENGTH))
        workdir = Path(workdir)
        set_model_options(config, Path(workdir))
        pretrained = _load_pretrained(config)
        _set_embedding(config)
        with distributed.leader_first("data"):
            data = PropertyData.load(config, workdir)
        return _train(config, workdir, data, pretrained)


def _check(config) -> None:
    """Raise ConfigError if options contradict each other."""
    property_objective.check(config.property, config.align, config.dens)
    if config.dens.weight and not config.model.options.get("force_encoding"):
        raise ConfigError(
            "dens.weight is set: the model must accept forces as input. Use painn with "
            "model.options.force_encoding=True."
        )
    if not config.model.name and not config.init.workdir:
        raise ConfigError("model.name and init.workdir are both empty. Set one of them.")
    for name in config.property.heads:
        if name not in config.property.targets:
            raise ConfigError(
                configs.unknown_name("target in property.heads", name, config.property.targets)
            )
    optimizer.create(optimizer_options(config), config.train.num_steps)


def _load_pretrained(config) -> dict[str, np.ndarray] | None:
    """Return the arrays of the run to initialize from, or None.

    If `config` names no model, set it to the model of that run.
    """
    if not config.init.workdir:
        return None
    model, arrays, _ = predictor.pretrained(config.init.workdir)
    if not config.model.name:
        config.model.name = model["name"]
        config.model.options = ml_collections.ConfigDict(model["options"])
    if config.model.name == model["name"]:
        inherit_options(config, model["options"])
    return arrays


def _set_embedding(config) -> None:
    """Switch off the embedding of a table of SMILES, in place, if the model only reads bonds."""
    c, model = config.data, models.find(config.model.name)
    if not models.reads_bonds(model) or models.reads_positions(model):
        return
    readable = c.path and not is_store(c.path)
    is_table = readable and readers.format_of(c.path, c.reader) == "smiles_table"
    if is_table and "embed" not in source.reader_options(c.reader_options):
        c.reader_options = "; ".join(filter(None, [c.reader_options, "embed=False"]))


def _train(config, workdir: Path, data: PropertyData, pretrained) -> Path:
    """Create model and batches, train, and write the report."""
    targets = _fit_targets(config, data)
    _check_geometries(config, targets)
    cutoff = float(predictor.backbone_of(config).cutoff)
    with distributed.leader_first("geometries"):  # the leader computes them, the others read them
        inputs = PropertyInputs.load(config, data, targets, cutoff)
    set_average_neighbors(config, inputs.sizes)
    model, heads = _create_model(config, targets)
    restored = restore(workdir)
    config = with_batch_size(config, inputs.train.sizes.n_edge, restored and restored.metadata)
    energies = distributed.broadcast(
        _energy_statistics(config, data) if distributed.leader() else None
    )
    batches, _ = make_batches(
        config,
        inputs.splits,
        model,
        np.array(energies["reference"]),
        restored,
        properties=(*config.property.targets, DISPLACEMENT, ENCODED),
        displace=inputs.displace,
    )
    per_epoch = batches.steps_per_epoch(inputs.train)
    num_steps = count_steps(config, per_epoch)
    metadata = describe(
        config, _statistics(data, inputs, targets, heads, cutoff) | {"energies": energies}
    )
    models.check_elements(predictor.backbone_of(config), metadata["statistics"]["elements"])
    params = _initial_parameters(config, model, pretrained)
    loop = build_loop(
        config,
        workdir,
        build_objective(config, model, targets, energies["scale"]),
        batches,
        inputs,
        metadata=metadata,
        num_steps=num_steps,
        per_epoch=per_epoch,
        params=params,
    )
    log_model(config.model.name, params)
    progress = loop.run(params, restored)
    return report_run(
        config,
        workdir,
        data,
        inputs,
        targets,
        seconds=progress.seconds,
        info=metadata | {"updates": num_steps},
    )


def _fit_targets(config, data: PropertyData) -> tuple[Target, ...]:
    """Fit the normalization of the properties to the training split, on the leader."""
    if not distributed.leader():
        return tuple(map(Target.from_json, distributed.broadcast(None)))
    options = {
        name: {"pooling": config.property.pooling} | dict(config.property.heads.get(name, {}))
        for name in config.property.targets
    }
    samples = data.splits["train"]
    targets = property_data.fit_targets(
        data.loaded.store,
        data.index[samples],
        {k: v[samples] for k, v in data.values.items()},
        config.property.targets,
        options,
    )
    return tuple(map(Target.from_json, distributed.broadcast([t.to_json() for t in targets])))


def _check_geometries(config, targets: Sequence[Target]) -> None:
    """Raise ConfigError if vectors or atom properties are used with geometries of other sources."""
    names = [t.name for t in targets if t.kind != "scalar"]
    model = models.find(config.model.name)
    reads_bonds, reads_positions = models.reads_bonds(model), models.reads_positions(model)
    if reads_bonds and names:
        raise ConfigError(
            f"{', '.join(names)}: {config.model.name} reads the bonds of a SMILES and predicts only "
            "scalars. Choose another model, or other property.targets."
        )
    sources = {
        config.data.geometry,
        config.data.valid_geometry or LABELS,
        *config.data.test_geometries,
    } - {LABELS}
    if not reads_positions and (sources or config.align.noise or config.align.frames):
        raise ConfigError(
            f"{config.model.name} reads the bonds of a SMILES: data.geometry, valid_geometry and "
            "test_geometries must be 'labels', and align.noise and align.frames unset"
        )
    if config.align.weight and (reads_bonds != (config.align.loss == REFINEMENT)):
        raise ConfigError(
            f"align.loss={config.align.loss!r}: a model of bonds that refines positions requires "
            f"{REFINEMENT!r}, and others 'cosine' or 'mse'; model.name is {config.model.name!r}"
        )
    inputs = (config.data.geometry, config.data.valid_geometry or LABELS)
    if several := [source for source in inputs if num_conformers(source) > 1]:
        raise ConfigError(
            f"data.geometry, data.valid_geometry: {several[0]!r} has several conformers per molecule. "
            "Only data.test_geometries averages over conformers."
        )
    if names and (sources or config.align.frames):
        raise ConfigError(
            f"{', '.join(names)}: vectors and atom properties belong to the geometry of the "
            "labels; data.geometry, valid_geometry and test_geometries must be 'labels' and "
            f"align.frames empty, received {', '.join(sorted(sources)) or config.align.frames}"
        )


def _create_model(config, targets: Sequence[Target]) -> tuple[PropertyModel, dict[str, Any]]:
    """Return the model, and the options of its heads by name."""
    heads = {t.name: {"kind": t.kind, "pooling": t.pooling} for t in targets}
    if (config.align.weight and config.align.loss != REFINEMENT) or config.dens.weight:
        heads[DISPLACEMENT] = {"kind": "atom_vector"}
    backbone = predictor.backbone_of(config)
    return with_heads(backbone, heads, frozen=config.init.train == "heads"), heads


def _statistics(
    data: PropertyData, inputs: PropertyInputs, targets: Sequence[Target], heads, cutoff: float
) -> dict[str, Any]:
    """Return the statistics of the training data that the predictor stores, ready for JSON."""
    elements = set()
    for _, columns in data.loaded.store.chunks(data.index[data.splits["train"]], labels_only=True):
        elements.update(np.unique(columns.numbers).tolist())
    return {
        "cutoff": cutoff,
        "targets": [t.to_json() for t in targets],
        "heads": heads,
        "elements": sorted(elements),
        "num_structures": len(inputs.train),
        "level_of_theory": data.loaded.level_of_theory,
    }


def _energy_statistics(config, data: PropertyData) -> dict[str, Any]:
    """Return reference energies and energy scale of the training split: 0 and 1 without DeNS."""
    if not config.dens.weight:
        return {"reference": [0.0] * statistics.NUM_ELEMENTS, "scale": 1.0}
    indices = data.index[data.splits["train"]]
    summary = statistics.Summary(
        columns for _, columns in data.loaded.store.chunks(indices, labels_only=True)
    )
    if not np.isfinite(summary.force_rms):
        raise DatasetError("dens.weight is set, but the training split has no forces")
    return {
        "reference": statistics.reference_energies(summary, "least_squares").tolist(),
        "scale": float(summary.force_rms),
    }


def _initial_parameters(config, model: PropertyModel, pretrained):
    """Return initial parameters: random, except those that the pretrained run contains."""
    params = jax.jit(model.init)(jax.random.key(config.seed), example_graph())
    if pretrained is None:
        return params
    params, new_heads = predictor.begin_from(params, pretrained, config.init.workdir)
    log.info(
        "initialized from %s%s",
        config.init.workdir,
        f"; new heads: {', '.join(new_heads)}" if new_heads else "",
    )
    return jax.tree.map(np.asarray, params)

"""Task `property`: train a property predictor, from scratch or from a force field."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import defaults, distributed, predictor
from mlip_jax.config import ConfigError
from mlip_jax.datasets import property_data, source, statistics
from mlip_jax.datasets.property_data import Samples, Target
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import splits as splits_module
from mlip_jax.graphs.edge_counts import edge_counts
from mlip_jax.graphs.padding import graph_sizes
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.importers import load_force_field
from mlip_jax.models.layers.readouts import PropertyModel, with_heads
from mlip_jax.potential import BEST, example_graph
from mlip_jax.reports.property import PredictedProperties, write_property_report
from mlip_jax.simulation.geometry_sources import LABELS, Geometries, Sources
from mlip_jax.simulation.trust import molecule_features
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.training import optimizer, property_objective
from mlip_jax.training.data import Split
from mlip_jax.training.dens import ENCODED, BatchNoise, DeNS, ForceFieldAdapter
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.noise import DISPLACEMENT, AlternativeGeometries, CoordinateNoise, NoisedRows
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.outputs import restore
from mlip_jax.training.prepare import (
    count_updates,
    describe,
    keep_split,
    make_batches,
    update_flops,
)
from mlip_jax.training.property_objective import Properties
from mlip_jax.training.recorder import writing
from mlip_jax.training.step import Trainer
from mlip_jax.training.throughput import ThroughputMeter
from mlip_jax.workdir import claimed, write_json

log = logging.getLogger(__name__)

SPLIT = "split_records.json"


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train a predictor by `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function; only the leader writes files.

    Raises:
      ConfigError, WorkdirError, DatasetError, CheckpointError, TrainingError, Stopped: The message
        explains how to fix the problem.
    """
    started = time.monotonic()
    config = configs.complete(config, defaults.property_defaults())
    _check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config)))
        workdir = Path(workdir)
        begin = _begin(config)
        with distributed.leader_first("data"):
            data = Data.load(config, workdir)
        return _train(config, workdir, data, begin, started)


def _check(config) -> None:
    """Raise ConfigError if options contradict each other."""
    property_objective.check(config.property, config.align, config.dens)
    if config.dens.weight and not config.model.options.get("force_encoding"):
        raise ConfigError(
            "dens.weight is set: the model must take forces in, which painn does with "
            "model.options.force_encoding=True"
        )
    if not config.model.name and not config.init.workdir:
        raise ConfigError(
            "model.name is empty and there is no init.workdir to take it from: set one of them"
        )
    for name in config.property.heads:
        if name not in config.property.targets:
            raise ConfigError(
                configs.unknown_name("target in property.heads", name, config.property.targets)
            )
    optimizer.create(_optimizer(config), config.train.num_steps)


def _optimizer(config) -> dict[str, Any]:
    """Return the optimizer options; the backbone is frozen if only heads are trained."""
    frozen = ("params/backbone/*",) if config.init.train == "heads" else ()
    return {**dict(config.optimizer), "freeze": (*config.optimizer.freeze, *frozen)}


def _begin(config) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """Return arrays and metadata of the run to initialize from, or None.

    If `config` names no model, set it to the model of that run.
    """
    if not config.init.workdir:
        return None
    model, arrays, metadata = predictor.pretrained(config.init.workdir)
    if not config.model.name:
        config.model.name, config.model.options = (
            model["name"],
            ml_collections.ConfigDict(model["options"]),
        )
    return arrays, metadata


# --- Data ---


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples of all splits: structures of the store that have the properties."""

    loaded: source.LoadedData
    index: np.ndarray  # structures of the store, (S,)
    values: dict[str, np.ndarray]  # properties of these structures by name
    parts: dict[str, np.ndarray]  # sample indices of the splits "train", "valid" and "test"
    sources: Sources  # geometries of the samples

    @classmethod
    def load(cls, config, workdir: Path) -> Data:
        """Load and split the data set of `config`; the leader writes the split to `workdir`."""
        c = config.data
        loaded = source.load(c)
        index, values = (
            property_data.labelled(loaded.store, loaded.indices, config.property.targets)
            if (config.property.targets)
            else (loaded.indices, {})
        )
        chosen = source.split(
            dataclasses.replace(loaded, indices=index), c, molecule_features.of(c)
        )
        if distributed.leader():
            with writing(workdir):
                _keep(loaded.store, chosen, c, workdir)
        parts = {name: np.searchsorted(index, numbers) for name, numbers in chosen.items()}
        for name, samples in parts.items():
            log.info("%s: %d structures", name, len(samples))
        sources = Sources(
            loaded.store,
            index,
            Path(c.directory) / "geometries",
            seed=config.seed,
            force_field=functools.partial(load_force_field, c.force_field)
            if c.force_field
            else None,
        )
        return cls(loaded, index, values, parts, sources)

    def split(
        self, part: str, geometry: str, targets: tuple[Target, ...], cutoff: float
    ) -> tuple[Split, Geometries]:
        """Return the samples of a split with the geometries of a source."""
        found = self.sources.get(geometry, self.parts[part])
        # Subtracting references requires only the elements, which all geometries share.
        labelled = self.loaded.store.take(self.index[found.samples], labels_only=True)
        properties = {
            t.name: t.to_training(self.values[t.name][found.samples], labelled)
            for t in targets
            if t.kind != "atom"
        }
        rows = Samples(
            found.rows, found.index, properties, tuple(t for t in targets if t.kind == "atom")
        )
        return Split(rows, np.arange(len(rows)), self._sizes(found, cutoff)), found

    def _sizes(self, found: Geometries, cutoff: float) -> Sizes:
        if found.rows is self.loaded.store:
            return Sizes(
                self.loaded.store.index("n_atoms"), edge_counts(self.loaded.store, cutoff)
            ).take(found.index)
        return graph_sizes(found.rows, cutoff).take(found.index)


def _keep(store, parts, c, workdir: Path) -> None:
    """Write the split as splits.npz and as lists of records."""
    molecule, record = store.index("molecule"), store.index("record")
    keep_split(
        workdir / "splits.npz",
        parts,
        {
            "store": str(store.path),
            "split": c.split_files or c.split,
            "seed": c.split_seed,
            "parts": splits_module.describe(parts, molecule),
        },
    )
    # Another run on the same file can use this as data.split_files: a force field must not be
    # trained on test molecules.
    write_json(
        workdir / SPLIT,
        {name: sorted(set(record[indices].tolist())) for name, indices in parts.items()},
    )


def _displaced(config, data: Data, found: Geometries, cutoff: float) -> CoordinateNoise | None:
    """Return the noise of the training inputs, None if the config asks for none."""
    a = config.align
    if not a.noise and not a.frames:
        return None
    if config.data.geometry != LABELS:
        raise ConfigError(
            "align.noise and align.frames displace training inputs from the geometries of the labels: "
            "set data.geometry='labels'"
        )
    frames = None
    if a.frames:
        first, numbers = data.sources.frames(a.frames, found.samples)
        log.info(
            "%d frames of %d of %d training molecules",
            len(numbers),
            (np.diff(first) > 0).sum(),
            len(first) - 1,
        )
        frames = AlternativeGeometries(data.loaded.store, numbers, first)
    return CoordinateNoise(
        a.noise, cutoff, config.seed, a.frames_share if a.frames else 0.0, frames
    )


# --- Training ---


def _train(config, workdir: Path, data: Data, begin, started: float) -> Path:
    """Prepare data, model and training loop; train; write the report."""
    names = tuple(config.property.targets)
    targets = tuple(
        map(
            Target.from_json,
            distributed.broadcast(
                [t.to_json() for t in _targets(config, data)] if distributed.leader() else None
            ),
        )
    )
    _check_frames(config, targets)
    heads = {t.name: {"kind": t.kind, "pooling": t.pooling} for t in targets}
    if config.align.weight or config.dens.weight:
        heads[DISPLACEMENT] = {"kind": "atom_vector"}
    model = with_heads(predictor.backbone_of(config), heads, frozen=config.init.train == "heads")
    cutoff = float(model.cutoff)
    with distributed.leader_first("geometries"):  # the leader computes them, the others read them
        train, valid, tests, displaced = _inputs(config, data, targets, cutoff)
    splits = {"train": train, "valid": valid, **{f"test {g}": s for g, (s, _) in tests.items()}}
    restored = restore(workdir)
    energies = distributed.broadcast(_energies(config, data) if distributed.leader() else None)
    batches, _ = make_batches(
        config,
        splits,
        model,
        np.array(energies["reference"]),
        restored,
        properties=(*names, DISPLACEMENT, ENCODED),
        displace=displaced,
    )
    per_epoch = batches.num_groups(train)
    num_steps = count_updates(config, per_epoch)
    metadata = describe(
        config, _statistics(data, train, targets, heads, cutoff) | {"energies": energies}
    )
    params = _initial(config, model, begin)
    loop = _loop(
        config,
        workdir,
        model,
        targets,
        batches,
        train,
        valid,
        metadata,
        num_steps,
        per_epoch,
        params,
    )
    log.info(
        "%s: %d parameters, %d device(s) of %s in %d process(es)",
        config.model.name,
        sum(p.size for p in jax.tree.leaves(params)),
        jax.device_count(),
        jax.devices()[0].device_kind,
        distributed.count(),
    )
    position = loop.run(params, restored)
    metadata["updates"] = num_steps
    metadata["seconds"] = {"training": position.seconds, "this process": time.monotonic() - started}
    return _report(
        config, workdir, loop.trainer, loop.batches, params, data, splits, tests, targets, metadata
    )


def _check_frames(config, targets) -> None:
    """Raise ConfigError if vectors or atom properties are used with other geometries than theirs."""
    turned = [t.name for t in targets if t.kind != "scalar"]
    sources = {
        config.data.geometry,
        config.data.valid_geometry or LABELS,
        *config.data.test_geometries,
    } - {LABELS}
    if turned and (sources or config.align.frames):
        raise ConfigError(
            f"{', '.join(turned)}: vectors and properties of atoms belong to the geometry of the labels; "
            "data.geometry, valid_geometry and test_geometries must be 'labels' and align.frames empty, "
            f"received {', '.join(sorted(sources)) or config.align.frames}"
        )


def _inputs(config, data: Data, targets, cutoff: float):
    """Return training and validation split, {source: (test split, geometries)}, and noise or None."""
    train, found = data.split("train", config.data.geometry, targets, cutoff)
    displaced = _displaced(config, data, found, cutoff)
    valid, _ = data.split(
        "valid", config.data.valid_geometry or config.data.geometry, targets, cutoff
    )
    if displaced is not None:
        edges = edge_counts(data.loaded.store, cutoff)
        train = dataclasses.replace(
            train,
            sizes=displaced.bounds(
                train.sizes, None if displaced.frames is None else edges[displaced.frames.index]
            ),
        )
        if config.dens.weight:
            displaced = BatchNoise(displaced, config.dens.share)
        elif not targets:  # denoising is the only objective, also in validation
            noise = dataclasses.replace(displaced, frames=None, share=0.0)
            valid = dataclasses.replace(
                valid, rows=NoisedRows(valid.rows, noise), sizes=noise.bounds(valid.sizes)
            )
    tests = (
        {
            geometry: data.split("test", geometry, targets, cutoff)
            for geometry in config.data.test_geometries
        }
        if targets and len(data.parts["test"])
        else {}
    )
    return train, valid, _same_molecules(tests), displaced


def _same_molecules(
    tests: dict[str, tuple[Split, Geometries]],
) -> dict[str, tuple[Split, Geometries]]:
    """Restrict the test splits to the molecules that have the geometries of all sources."""
    if not tests:
        return tests
    common = functools.reduce(np.intersect1d, [found.samples for _, found in tests.values()])
    most = max(len(found.samples) for _, found in tests.values())
    if len(common) < most:
        log.warning(
            "%d of %d test molecules have all geometries; the others are not judged",
            len(common),
            most,
        )
    kept = {}
    for geometry, (split, found) in tests.items():
        places = np.flatnonzero(np.isin(found.samples, common))
        kept[geometry] = (
            split.part(places),
            dataclasses.replace(found, index=found.index[places], samples=found.samples[places]),
        )
    return kept


def _targets(config, data: Data) -> list[Target]:
    """Fit the normalization of the properties to the training split."""
    options = {
        name: {"pooling": config.property.pooling} | dict(config.property.heads.get(name, {}))
        for name in config.property.targets
    }
    samples = data.parts["train"]
    return property_data.fit_targets(
        data.loaded.store,
        data.index[samples],
        {k: v[samples] for k, v in data.values.items()},
        config.property.targets,
        options,
    )


def _statistics(data: Data, train: Split, targets, heads, cutoff) -> dict[str, Any]:
    """Return the statistics of the training data that the predictor stores, ready for JSON."""
    elements = set()
    for _, columns in data.loaded.store.chunks(data.index[data.parts["train"]], labels_only=True):
        elements.update(np.unique(columns.numbers).tolist())
    return {
        "cutoff": cutoff,
        "targets": [t.to_json() for t in targets],
        "heads": heads,
        "elements": sorted(elements),
        "num_structures": len(train),
        "level_of_theory": data.loaded.level_of_theory,
    }


def _initial(config, model: PropertyModel, begin):
    """Return initial parameters: random, or from a pretrained run where it has them."""
    params = jax.jit(model.init)(jax.random.key(config.seed), example_graph())
    if begin is None:
        return params
    params, fresh = predictor.begin_from(params, begin[0], config.init.workdir)
    log.info("begun from %s%s", config.init.workdir, f"; new: {', '.join(fresh)}" if fresh else "")
    return jax.tree.map(np.asarray, params)


def _loop(
    config, workdir, model, targets, batches, train, valid, metadata, num_steps, per_epoch, params
) -> TrainingLoop:
    c, options = config, _optimizer(config)
    objective = _objective(c, model, targets, metadata["statistics"]["energies"]["scale"])
    trainer = Trainer(objective, optimizer.create(options, num_steps, per_epoch), c.train.ema_decay)
    schedules = {"learning_rate": optimizer.learning_rate(options, num_steps, per_epoch)}
    valid = valid.sample(c.train.max_valid, c.seed) if len(valid) else train
    meter = ThroughputMeter(train.sizes, update_flops(trainer, batches, train, params))
    batches = dataclasses.replace(batches, put=trainer.put)
    return TrainingLoop(
        trainer,
        batches,
        train,
        valid,
        workdir,
        metadata,
        schedules,
        c.train,
        num_steps,
        c.seed,
        meter,
        optimizer.plateau_options(c.optimizer),
    )


def _objective(c, model: PropertyModel, targets, energy_scale: float) -> Properties | DeNS:
    """Return the objective: properties and optional alignment, or energies and forces with DeNS."""
    if not c.dens.weight:
        return Properties(
            model,
            targets,
            c.property.penalty,
            c.property.huber_delta,
            c.align.weight,
            c.align.loss,
            c.align.noise or 1.0,
        )
    # norms of force errors, and errors of total energies, as in configs/pubchemqcr.py
    field = ForceField(
        ForceFieldAdapter(model),
        energy_scale,
        lambda step: c.dens.beta,
        c.dens.beta,
        {"penalty": "mae", "force_penalty": "norm", "energy_per_atom": False},
    )
    return DeNS(field, c.dens.weight, c.align.noise, energy_scale)


def _energies(config, data: Data) -> dict[str, Any]:
    """Return reference energies and energy scale of the training split: 0 and 1 without DeNS."""
    if not config.dens.weight:
        return {"reference": [0.0] * statistics.NUM_ELEMENTS, "scale": 1.0}
    summary = statistics.Summary(
        columns
        for _, columns in data.loaded.store.chunks(
            data.index[data.parts["train"]], labels_only=True
        )
    )
    if not np.isfinite(summary.force_rms):
        raise DatasetError("dens.weight is set, but the training part has no forces")
    return {
        "reference": statistics.reference_energies(summary, "least_squares").tolist(),
        "scale": float(summary.force_rms),
    }


# --- Report ---


def _report(
    config, workdir, trainer, batches, params, data: Data, splits, tests, targets, metadata
) -> Path:
    """Evaluate the best checkpoint on all splits, fit the domain and write the report."""
    best = restore(workdir, BEST)
    if best is None:
        raise TrainingError(
            "no validation gave a finite loss, so that there is no best checkpoint to evaluate. Look "
            "at valid_loss in metrics.csv, and lower optimizer.learning_rate"
        )
    log.info("evaluating the best checkpoint (step %d)", best.step)
    if not distributed.leader():
        return workdir / "report.html"
    made = predictor.Predictor.from_checkpoint(best.arrays, best.metadata)
    outcomes, features = {}, {}
    for name, split in splits.items() if targets else ():
        if not len(split):
            continue
        found = tests[name.removeprefix("test ")][1] if name.startswith("test ") else None
        most = config.report.max_domain if name == "train" else len(split)
        outcomes[name], features[name] = _outcome(
            made, split.sample(most, config.seed), targets, data, found
        )
    with writing(workdir):
        known = np.isfinite(features["valid"]).all(1) if "valid" in features else np.zeros(0, bool)
        if known.any():
            errors = {
                t.name: outcomes["valid"].absolute(t.name)[known]
                for t in targets
                if t.kind != "atom"
            }
            domain = Domain.fit(features["train"], features["valid"][known], errors)
            domain.save(workdir / DOMAIN_FILE)
            outcomes = {
                name: dataclasses.replace(
                    o, distance=domain.distance(features[name]) / domain.border
                )
                if features[name].shape[1] == len(domain.center)
                else o
                for name, o in outcomes.items()
            }
        return write_property_report(
            workdir,
            outcomes,
            targets,
            title=f"{', '.join(config.property.targets) or 'denoising'} on {data.loaded.name}",
            metrics_csv=workdir / "metrics.csv",
            seconds=metadata["seconds"]["training"],
            notes=data.loaded.notes,
            best_step=best.step,
            info=metadata,
        )


def _outcome(
    made: predictor.Predictor, split: Split, targets, data: Data, found: Geometries | None
) -> tuple[PredictedProperties, np.ndarray]:
    """Predict a split and return labels, predictions and the embeddings of its structures."""
    columns = split.rows.take(split.indices)
    predicted = _predicted(made, columns)
    labels = {
        t.name: t.to_physical(
            columns.atom_properties[t.name] if t.kind == "atom" else columns.properties[t.name],
            columns,
        )
        for t in targets
    }
    names = columns.molecule
    if found is not None:  # computed geometries have no names of their own
        names = data.loaded.store.take(data.index[found.samples]).molecule
    return PredictedProperties(
        names, columns.n_atoms, labels, {t.name: predicted[t.name] for t in targets}
    ), predicted[predictor.EMBEDDING]


def _predicted(made: predictor.Predictor, columns) -> dict[str, np.ndarray]:
    """Predict the properties; NaN for structures with an element absent from the training split."""
    strange = ~np.isin(columns.numbers, made.elements)  # (A,)
    known = ~np.logical_or.reduceat(strange, columns.offsets[:-1])  # (S,)
    if known.all():
        return made.predict(columns)
    log.warning(
        "%d of %d structures hold an element that is not in the training part, and are not judged",
        (~known).sum(),
        len(columns),
    )
    rows = np.flatnonzero(known)
    if not len(rows):
        shapes = {
            t.name: (len(columns.numbers),)
            if t.kind == "atom"
            else (len(columns), *[3] * (t.kind == "vector"))
            for t in made.targets
        }
        return {name: np.full(shape, np.nan) for name, shape in shapes.items()} | {
            predictor.EMBEDDING: np.full((len(columns), 1), np.nan)
        }
    atoms = columns.atoms_of(rows)
    result = {}
    for name, values in made.predict(columns.take(rows)).items():
        of_atoms = len(values) == len(atoms) != len(rows)  # or else per structure
        result[name] = np.full(
            (len(columns.numbers) if of_atoms else len(columns), *values.shape[1:]), np.nan
        )
        result[name][atoms if of_atoms else rows] = values
    return result

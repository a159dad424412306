"""Task `train`: data -> force field -> report."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mlip_jax import config as configs
from mlip_jax import models
from mlip_jax.checkpoint import CheckpointStore, from_arrays
from mlip_jax.datasets import selection, source, statistics
from mlip_jax.datasets.spice import DatasetError
from mlip_jax.graphs.batching import choose_budget, fill, measure, plan_epoch
from mlip_jax.potential import BEST, example_graph
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.training import write_report
from mlip_jax.training import losses, optimizer
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.evaluation import predict
from mlip_jax.training.loop import Loop
from mlip_jax.training.step import Trainer
from mlip_jax.workdir import claimed, write_json

log = logging.getLogger(__name__)

PACKAGES = ("mlip_jax", "jax", "jaxlib", "flax", "optax", "e3x", "jraph", "orbax-checkpoint", "numpy", "ase")


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train by `config`, or go on where a run in `workdir` was stopped; returns the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError: With what to do about it.
    """
    started = time.monotonic()
    config = configs.complete(config, configs.train_defaults())
    with claimed(workdir, configs.to_dict(config)) as workdir:
        model = models.create(config.model.name, **_plain(config.model.options))
        data = source.load(config.data)
        splits = _split(config, data, workdir, float(model.cutoff))
        return _train(config, workdir, model, data, splits, started)


def _plain(options) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in options.items()}


def _split(config, data, workdir, cutoff: float) -> dict[str, Split]:
    """The parts of the data with their sizes; which structure went where is written to splits.json."""
    c = config.data
    parts = selection.split(data.columns.molecule, (c.num_train, c.num_valid, c.num_test), by=c.split,
                            seed=c.split_seed)
    write_json(workdir / "splits.json", {
        name: [f"{data.columns.source[s]}#{data.columns.conformer[s]}" for s in indices]
        for name, indices in parts.items()})
    splits = {}
    for name, indices in parts.items():
        columns = data.columns.take(indices)
        splits[name] = Split(columns, measure(columns, cutoff))
        log.info("%s: %d conformations of %d molecules, %.1f atoms on average", name, len(columns),
                 len(np.unique(columns.molecule)), columns.n_atoms.mean() if len(columns) else 0)
    if not np.isfinite(splits["train"].columns.forces).any() and config.loss.beta == 1.0:
        raise DatasetError("loss.beta is 1 (forces alone) but the training set has no forces")
    return splits


def _train(config, workdir, model, data, splits, started) -> Path:
    train = splits["train"]
    reference = statistics.reference_energies(
        train.columns, source.parse_reference(config.data.reference_energies), isolated_atoms=data.isolated_atoms)
    scale = statistics.force_rms(train.columns)
    scale = scale if np.isfinite(scale) and scale > 0 else 1.0
    total = {name: np.concatenate([getattr(s.sizes, name) for s in splits.values()]) for name in ("n_node", "n_edge")}
    budget = choose_budget(train.sizes, config.train.batch_size)
    budget = budget._replace(nodes=max(budget.nodes, int(total["n_node"].max()) + 1),
                             edges=max(budget.edges, int(total["n_edge"].max())))
    batches = Batches(budget, model.cutoff, reference, jax.local_device_count())
    filled = fill(plan_epoch(train.sizes, budget, seed=config.seed), train.sizes, budget)
    log.info("batches of %d atoms, %d edges, %d graphs, filled to %.1f %%, %.1f %%, %.1f %%", *budget,
             *(100 * filled[k] for k in ("nodes", "edges", "graphs")))
    metadata = _metadata(config, data, train, reference, scale, model)
    beta = losses.beta_schedule(config.loss.beta, config.loss.beta_end, config.loss.beta_begin, config.train.num_steps)
    trainer = Trainer(model, scale, optimizer.create(config.optimizer, config.train.num_steps), beta,
                      config.train.ema_decay, {"penalty": config.loss.penalty, "huber_delta": config.loss.huber_delta,
                                               "energy_per_atom": config.loss.energy_per_atom})
    params = jax.jit(model.init)(jax.random.key(config.seed), example_graph())
    log.info("%s: %d parameters, %d device(s) of %s", config.model.name,
             sum(p.size for p in jax.tree.leaves(params)), trainer.num_devices, jax.devices()[0].device_kind)
    schedules = {"learning_rate": optimizer.learning_rate(config.optimizer, config.train.num_steps), "beta": beta}
    valid = splits["valid"] if len(splits["valid"].columns) else train
    position = Loop(trainer, batches, train, _sample(valid, config.train.max_valid, config.seed), workdir, metadata,
                    schedules, config.train, config.seed, config.loss.beta_end).run(params)
    metadata["seconds"] = {"training": position.seconds, "this process": time.monotonic() - started}
    return _report(config, workdir, trainer, batches, splits, metadata, params, data, filled)


def _sample(split: Split, most: int, seed: int) -> Split:
    if len(split.columns) <= most:
        return split
    return split.take(np.sort(np.random.default_rng(seed).permutation(len(split.columns))[:most]))


def _metadata(config, data, train: Split, reference, scale, model) -> dict[str, Any]:
    columns = train.columns
    return {
        "config": configs.to_dict(config),
        "statistics": {
            "cutoff": float(model.cutoff), "reference_energies": reference.tolist(), "energy_scale": scale,
            "elements": np.unique(columns.numbers).tolist(), "charges": np.unique(columns.charge).tolist(),
            "num_structures": len(columns), "num_molecules": len(np.unique(columns.molecule)),
            "mean_neighbors": float(train.sizes.n_edge.sum() / train.sizes.n_node.sum()),
            "level_of_theory": data.level_of_theory},
        "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        from mlip_jax import __version__
        return __version__ if package == "mlip_jax" else "unknown"


def _report(config, workdir, trainer, batches, splits, metadata, params, data, filled) -> Path:
    store = CheckpointStore(workdir / BEST, read_only=True)
    best = store.restore()
    store.close()
    best_params = trainer.replicate(from_arrays(params, best.arrays, "params/"))
    log.info("evaluating the best checkpoint (step %d)", best.step)
    predictions = {}
    for name, split in splits.items():
        split = _sample(split, config.report.max_train, config.seed) if name == "train" else split
        predictions[name] = _predictions(split, predict(trainer, best_params, split, batches))
    for name, p in predictions.items():
        p.save(workdir / f"predictions_{name}.npz")
    training = metadata["seconds"]["training"]
    report = write_report(
        workdir, predictions, title=f"{config.model.name} on {data.path.name}", metrics_csv=workdir / "metrics.csv",
        seconds=training, notes=data.notes, info=_info(config, metadata, data, best.step, filled, params))
    scores = json.loads((workdir / "metrics.json").read_text())["test"] or {}
    log.info("test: energy %s meV/atom, force %s meV/Å, slope %s meV/atom", *(
        "-" if scores.get(k) is None else f"{scores[k]:.2f}" for k in
        ("energy_mae_mev_per_atom", "force_mae_mev_per_ang", "energy_slope_mev_per_atom")))
    log.info("report: %s", report)
    return report


def _predictions(split: Split, predicted) -> Predictions:
    c = split.columns
    return Predictions(
        numbers=c.numbers, offsets=c.offsets, energy=c.energy, energy_predicted=predicted.energy, forces=c.forces,
        forces_predicted=predicted.forces, molecule=c.molecule, conformer=c.conformer, subset=c.subset, source=c.source)


def _info(config, metadata, data, step, filled, params) -> dict[str, dict[str, Any]]:
    s = metadata["statistics"]
    return {
        "Data": {"file": data.path.name, "level of theory": s["level_of_theory"], "split": f"by {config.data.split}",
                 **{k: ", ".join(f"{a}: {b}" for a, b in v.items()) or "none" if isinstance(v, dict) else v
                    for k, v in data.counts.items()},
                 "training structures": s["num_structures"], "training molecules": s["num_molecules"],
                 "force RMS (eV/Å)": round(s["energy_scale"], 4), "mean neighbours": round(s["mean_neighbors"], 2),
                 "reference energies": config.data.reference_energies},
        "Model": {"architecture": config.model.name, "parameters": sum(p.size for p in jax.tree.leaves(params)),
                  **{k: str(v) for k, v in config.model.options.items()}},
        "Training": {"steps": config.train.num_steps, "best checkpoint at step": step,
                     "training seconds": round(metadata["seconds"]["training"], 1),
                     "real share of padded edges": round(filled["edges"], 4),
                     **{f"{a}.{b}": str(v) for a in ("loss", "optimizer", "train") for b, v in config[a].items()}},
        "Hardware": {"devices": f"{jax.local_device_count()} × {jax.devices()[0].device_kind}",
                     "machine": platform.machine(), "system": platform.platform()},
        "Versions": metadata["versions"],
    }

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
from mlip_jax import terms
from mlip_jax.checkpoint import CheckpointStore, from_arrays
from mlip_jax.datasets import source, statistics
from mlip_jax.datasets import splits as splits_module
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.split_files import load_split, save_split
from mlip_jax.graphs.batching import Sizes, choose_budget, enlarge, fill, plan_window
from mlip_jax.graphs.edge_counts import edge_counts, pair_counts
from mlip_jax.potential import BEST, create_model, example_graph, long_range_cutoff
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.training import write_report
from mlip_jax.training import losses, optimizer
from mlip_jax.training.data import Batches, Split
from mlip_jax.training.evaluation import predict
from mlip_jax.training.loop import Loop
from mlip_jax.training.step import Trainer
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)

PACKAGES = ("mlip_jax", "jax", "jaxlib", "flax", "optax", "e3x", "jraph", "orbax-checkpoint", "numpy", "ase")


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train by `config`, or go on where a run in `workdir` was stopped; returns the path of the report.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError: With what to do about it.
    """
    started = time.monotonic()
    config = configs.complete(config, configs.train_defaults())
    with claimed(workdir, configs.identity(config)) as workdir:
        model = create_model(config.model, config.potential)
        _log_terms(model)
        data = source.load(config.data)
        splits = _split(config, data, workdir, model)
        return _train(config, workdir, model, data, splits, started)


def _log_terms(model) -> None:
    for name, options in getattr(model, "terms", ()):
        log.info("energy term %s: %s", name, ", ".join(f"{k}={v}" for k, v in options) or "defaults")
    cutoff = long_range_cutoff(model)
    if cutoff is not None:
        log.info("long-range pairs: %s", "all" if np.isinf(cutoff) else f"within {cutoff:g} Å")


def _split(config, data, workdir, model) -> dict[str, Split]:
    """The parts of the data with their sizes; which structure went where is written to splits.npz."""
    c = config.data
    parts = source.split(data, c)
    molecule = data.store.index("molecule")
    about = splits_module.describe(parts, molecule)
    if not (workdir / "left_out.csv").exists():
        source.write_left_out(workdir / "left_out.csv", data)
    _keep_split(workdir / "splits.npz", parts, {
        "store": str(data.store.path), "split": c.split_files or c.split, "seed": c.split_seed, "parts": about})
    cutoff = long_range_cutoff(model)
    sizes = Sizes(data.store.index("n_atoms"), edge_counts(data.store, float(model.cutoff)),
                  None if cutoff is None else pair_counts(data.store, cutoff))
    splits = {}
    for name, indices in parts.items():
        splits[name] = Split(data.store, indices, sizes.take(indices))
        log.info("%s: %d structures of %d molecules, %.1f atoms on average", name, len(indices),
                 about[name]["molecules"], splits[name].sizes.n_node.mean() if len(indices) else 0)
    return splits


def _keep_split(path: Path, parts, meta) -> None:
    """Write the split, or make sure that a run goes on with the one that it was begun with."""
    if path.with_suffix(".json").exists():  # written last
        before, _ = load_split(path)
        if any(not np.array_equal(before[name], parts[name]) for name in parts):
            raise DatasetError(f"{path}: the data or the split are no longer those that this run was begun with. Give "
                               "another --workdir, or the data as they were.")
        return
    save_split(path, parts, meta)


def _train(config, workdir, model, data, splits, started) -> Path:
    train = splits["train"]
    summary = statistics.Summary(columns for _, columns in data.store.chunks(train.indices, labels_only=True))
    terms.check_elements([name for name, _ in getattr(model, "terms", ())], summary.elements.tolist())
    if config.loss.beta == 1.0 and not np.isfinite(summary.force_rms):
        raise DatasetError("loss.beta is 1 (forces alone) but the training set has no forces")
    method = source.parse_reference(config.data.reference_energies)
    reference = statistics.reference_energies(
        summary, method, isolated_atoms=source.isolated_atoms(data) if method == "isolated_atoms" else None)
    scale = summary.force_rms
    scale = scale if np.isfinite(scale) and scale > 0 else 1.0
    budget = choose_budget(train.sizes, config.train.batch_size)
    for split in splits.values():
        budget = enlarge(budget, split.sizes)
    batches = Batches(budget, model.cutoff, reference, jax.local_device_count(),
                      long_range_cutoff=long_range_cutoff(model))
    filled = fill(plan_window(np.arange(min(len(train), 20_000)), train.sizes, budget), train.sizes, budget)
    room = {"nodes": "atoms", "edges": "edges", "graphs": "graphs", "pairs": "long-range pairs"}
    log.info("batches of %s", ", ".join(
        f"{getattr(budget, k)} {room[k]} ({100 * share:.1f} % filled)" for k, share in filled.items()))
    metadata = _metadata(config, data, train, summary, reference, scale, model)
    beta = losses.beta_schedule(config.loss.beta, config.loss.beta_end, config.loss.beta_begin, config.train.num_steps)
    trainer = Trainer(model, scale, optimizer.create(config.optimizer, config.train.num_steps), beta,
                      config.train.ema_decay, {"penalty": config.loss.penalty, "huber_delta": config.loss.huber_delta,
                                               "energy_per_atom": config.loss.energy_per_atom})
    params = jax.jit(model.init)(jax.random.key(config.seed), example_graph())
    log.info("%s: %d parameters, %d device(s) of %s", config.model.name,
             sum(p.size for p in jax.tree.leaves(params)), trainer.num_devices, jax.devices()[0].device_kind)
    schedules = {"learning_rate": optimizer.learning_rate(config.optimizer, config.train.num_steps), "beta": beta}
    valid = splits["valid"] if len(splits["valid"]) else train
    position = Loop(trainer, batches, train, valid.sample(config.train.max_valid, config.seed), workdir, metadata,
                    schedules, config.train, config.seed, config.loss.beta_end).run(params)
    metadata["seconds"] = {"training": position.seconds, "this process": time.monotonic() - started}
    return _report(config, workdir, model, trainer, batches, splits, metadata, params, data, filled)


def _metadata(config, data, train: Split, summary, reference, scale, model) -> dict[str, Any]:
    molecules = splits_module.group(data.store.index("molecule")[train.indices])[1]
    return {
        "config": configs.to_dict(config),
        "statistics": {
            "cutoff": float(model.cutoff), "reference_energies": reference.tolist(), "energy_scale": scale,
            "elements": summary.elements.tolist(), "charges": sorted(summary.charges),
            "num_structures": len(train), "num_molecules": molecules,
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


def _report(config, workdir, model, trainer, batches, splits, metadata, params, data, filled) -> Path:
    store = CheckpointStore(workdir / BEST, read_only=True)
    best = store.restore()
    store.close()
    best_params = trainer.replicate(from_arrays(params, best.arrays, "params/"))
    log.info("evaluating the best checkpoint (step %d)", best.step)
    predictions = {}
    for name, split in splits.items():
        split = split.sample(config.report.max_train if name == "train" else config.report.max_test, config.seed)
        predictions[name] = _predictions(split, predict(trainer, best_params, split, batches))
    for name, p in predictions.items():
        p.save(workdir / f"predictions_{name}.npz")
    training = metadata["seconds"]["training"]
    report = write_report(
        workdir, predictions, title=f"{config.model.name} on {data.name}", metrics_csv=workdir / "metrics.csv",
        seconds=training, notes=data.notes, info=_info(config, model, metadata, data, best.step, filled, params))
    scores = json.loads((workdir / "metrics.json").read_text())["test"] or {}
    log.info("test: energy %s meV/atom, force %s meV/Å, slope %s meV/atom", *(
        "-" if scores.get(k) is None else f"{scores[k]:.2f}" for k in
        ("energy_mae_mev_per_atom", "force_mae_mev_per_ang", "energy_slope_mev_per_atom")))
    log.info("report: %s", report)
    return report


def _predictions(split: Split, predicted) -> Predictions:
    c = split.columns()
    return Predictions(
        numbers=c.numbers, offsets=c.offsets, energy=c.energy, energy_predicted=predicted.energy, forces=c.forces,
        forces_predicted=predicted.forces, molecule=c.molecule, conformer=c.conformer, subset=c.subset, source=c.source)


def _info(config, model, metadata, data, step, filled, params) -> dict[str, dict[str, Any]]:
    s = metadata["statistics"]
    return {
        "Data": {"file": data.name, "level of theory": s["level_of_theory"],
                 "split": config.data.split_files or f"by {config.data.split}",
                 **{k: ", ".join(f"{a}: {b}" for a, b in v.items()) or "none" if isinstance(v, dict) else v
                    for k, v in data.counts.items()},
                 "training structures": s["num_structures"], "training molecules": s["num_molecules"],
                 "force RMS (eV/Å)": round(s["energy_scale"], 4), "mean neighbours": round(s["mean_neighbors"], 2),
                 "reference energies": config.data.reference_energies},
        "Model": {"architecture": config.model.name, "parameters": sum(p.size for p in jax.tree.leaves(params)),
                  **{k: str(v) for k, v in config.model.options.items()},
                  **{f"energy term {k}": ", ".join(f"{a}={b}" for a, b in v) or "on"
                     for k, v in getattr(model, "terms", ())}},
        "Training": {"steps": config.train.num_steps, "best checkpoint at step": step,
                     "training seconds": round(metadata["seconds"]["training"], 1),
                     "real share of padded edges": round(filled["edges"], 4),
                     **{f"{a}.{b}": str(v) for a in ("loss", "optimizer", "train") for b, v in config[a].items()}},
        "Hardware": {"devices": f"{jax.local_device_count()} × {jax.devices()[0].device_kind}",
                     "machine": platform.machine(), "system": platform.platform()},
        "Versions": metadata["versions"],
    }

"""Task `train`: train a force field on a data set and write a report."""

from __future__ import annotations

import contextlib
import dataclasses
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
from mlip_jax import defaults, distributed, fine_tuning, terms
from mlip_jax.checkpoint import from_arrays
from mlip_jax.datasets import source, statistics
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import splits as splits_module
from mlip_jax.graphs import resident
from mlip_jax.graphs.edge_counts import edge_counts, pair_counts
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.potential import (
    BEST,
    Potential,
    create_model,
    example_graph,
    is_conservative,
    long_range_cutoff,
)
from mlip_jax.reports.predictions import Predictions
from mlip_jax.reports.training import write_report
from mlip_jax.simulation.trust import atom_domain, molecule_features
from mlip_jax.simulation.trust.atom_domain import DomainEvaluation
from mlip_jax.simulation.trust.domain import FILE as DOMAIN_FILE
from mlip_jax.simulation.trust.domain import Domain
from mlip_jax.training import losses, optimizer
from mlip_jax.training.data import Split
from mlip_jax.training.evaluation import predict
from mlip_jax.training.loop import TrainingLoop
from mlip_jax.training.nonfinite import TrainingError
from mlip_jax.training.objectives import ForceField
from mlip_jax.training.options import check
from mlip_jax.training.outputs import restore
from mlip_jax.training.prepare import (
    count_updates,
    describe,
    keep_split,
    make_batches,
    update_flops,
)
from mlip_jax.training.recorder import writing
from mlip_jax.training.step import Trainer
from mlip_jax.training.throughput import ThroughputMeter
from mlip_jax.workdir import claimed

log = logging.getLogger(__name__)

# If the data stay on the device: steps per dispatch, and the fraction of its memory for the data.
_STEPS_PER_CALL, _RESIDENT_SHARE = 25, 0.2


def run(config: ml_collections.ConfigDict, workdir: str | Path) -> Path:
    """Train a force field by `config`, or resume a run in `workdir`; return the path of the report.

    All processes of a run call this function; only the leader writes files.

    Raises:
      ConfigError, WorkdirError, DatasetError, TrainingError, Stopped: The message explains how to
        fix the problem.
    """
    started = time.monotonic()
    config = configs.complete(config, defaults.train_defaults())
    check(config)
    with contextlib.ExitStack() as stack:
        with distributed.leader_first("workdir"):
            if distributed.leader():
                stack.enter_context(claimed(workdir, configs.identity(config)))
        workdir = Path(workdir)
        begin = fine_tuning.begin_from(config)
        model = create_model(config.model, config.potential)
        _log_terms(model)
        if config.optimizer.freeze:  # report a wrong pattern before the data are read
            optimizer.frozen(
                jax.eval_shape(model.init, jax.random.key(0), example_graph()),
                config.optimizer.freeze,
            )
        embed = molecule_features.of(config.data)
        with distributed.leader_first("data"):  # the leader builds the store, others open it
            data = source.load(config.data)
            splits = _split(config, data, workdir, model, embed)
        return _train(config, workdir, model, data, splits, begin, started)


def _log_terms(model) -> None:
    """Log the energy terms of the model and its long-range cutoff."""
    for name, options in getattr(model, "terms", ()):
        log.info(
            "energy term %s: %s", name, ", ".join(f"{k}={v}" for k, v in options) or "defaults"
        )
    cutoff = long_range_cutoff(model)
    if cutoff is not None:
        log.info("long-range pairs: %s", "all" if np.isinf(cutoff) else f"within {cutoff:g} Å")


def _split(config, data, workdir, model, embed) -> dict[str, Split]:
    """Split the data and compute the sizes of all structures; write the split to splits.npz."""
    c = config.data
    parts = source.split(data, c, embed)
    molecule = data.store.index("molecule")
    about = splits_module.describe(parts, molecule)
    if distributed.leader():
        with writing(workdir):
            if not (workdir / "left_out.csv").exists():
                source.write_left_out(workdir / "left_out.csv", data)
            keep_split(
                workdir / "splits.npz",
                parts,
                {
                    "store": str(data.store.path),
                    "split": c.split_files or c.split,
                    "seed": c.split_seed,
                    "parts": about,
                },
            )
    cutoff = long_range_cutoff(model)
    sizes = Sizes(
        data.store.index("n_atoms"),
        edge_counts(data.store, float(model.cutoff)),
        None if cutoff is None else pair_counts(data.store, cutoff),
    )
    splits = {}
    for name, indices in parts.items():
        splits[name] = Split(data.store, indices, sizes.take(indices))
        log.info(
            "%s: %d structures of %d molecules, %.1f atoms on average",
            name,
            len(indices),
            about[name]["molecules"],
            splits[name].sizes.n_node.mean() if len(indices) else 0,
        )
    return splits


def _train(config, workdir, model, data, splits, begin: Potential | None, started) -> Path:
    """Prepare statistics, batches and training loop; train; write the report."""
    statistics_ = distributed.broadcast(
        _statistics(config, data, splits["train"], model, begin) if distributed.leader() else None
    )
    terms.check_elements([name for name, _ in getattr(model, "terms", ())], statistics_["elements"])
    restored = restore(workdir)
    batches, filled = make_batches(
        config, splits, model, np.array(statistics_["reference_energies"]), restored
    )
    per_epoch = batches.num_groups(splits["train"])
    num_steps = count_updates(config, per_epoch)
    metadata = describe(config, statistics_)
    if begin is None:
        params = jax.jit(model.init)(jax.random.key(config.seed), example_graph())
    else:
        params = fine_tuning.parameters(begin)
        log.info("begun from the force field %s", config.init.workdir)
    loop = _loop(config, workdir, model, batches, splits, metadata, num_steps, per_epoch, params)
    trainer = loop.trainer
    log.info(
        "%s: %d parameters, %d device(s) of %s in %d process(es)",
        config.model.name,
        sum(p.size for p in jax.tree.leaves(params)),
        jax.device_count(),
        jax.devices()[0].device_kind,
        distributed.count(),
    )
    position = loop.run(params, restored)
    spent = loop.meter.summary()
    log.info(
        "of the time, %s", ", ".join(f"{100 * share:.2f} % {part}" for part, share in spent.items())
    )
    metadata["updates"] = num_steps
    metadata["seconds"] = {"training": position.seconds, "this process": time.monotonic() - started}
    return _report(
        config, workdir, model, trainer, loop.batches, splits, metadata, params, data, filled
    )


def _loop(
    config, workdir, model, batches, splits, metadata, num_steps, per_epoch, params
) -> TrainingLoop:
    """Build the training loop with its objective, optimizer and schedules."""
    train, c = splits["train"], config
    scale = metadata["statistics"]["energy_scale"]
    beta = losses.beta_schedule(
        c.loss.beta, c.loss.beta_end, c.loss.beta_begin, num_steps, c.loss.beta_schedule
    )
    build, data = _resident(config, batches, train, model)
    objective = ForceField(
        model,
        scale,
        beta,
        c.loss.beta_end,
        {
            "penalty": c.loss.penalty,
            "force_penalty": c.loss.force_penalty,
            "huber_delta": c.loss.huber_delta,
            "force_floor": c.loss.force_floor,
            "energy_per_atom": c.loss.energy_per_atom,
        },
        energy_only=energy_only(c),
    )
    trainer = Trainer(
        objective,
        optimizer.create(c.optimizer, num_steps, per_epoch),
        c.train.ema_decay,
        build=build,
        data=data,
    )
    per_call = c.train.steps_per_dispatch or (_STEPS_PER_CALL if build else 1)
    batches = dataclasses.replace(
        batches, resident=build is not None, put=trainer.put if per_call == 1 else batches.put
    )
    schedules = {
        "learning_rate": optimizer.learning_rate(c.optimizer, num_steps, per_epoch),
        "beta": beta,
    }
    valid = splits["valid"] if len(splits["valid"]) else train
    return TrainingLoop(
        trainer,
        batches,
        train,
        valid.sample(c.train.max_valid, c.seed),
        workdir,
        metadata,
        schedules,
        c.train,
        num_steps,
        c.seed,
        ThroughputMeter(train.sizes, update_flops(trainer, batches, train, params)),
        optimizer.plateau_options(c.optimizer),
        per_call,
    )


def _resident(config, batches, train: Split, model):
    """Return (build, data) of `Trainer` for data that stay on the device, or else (None, ())."""
    wanted = config.train.resident
    if wanted is None:
        memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
        wanted = (
            jax.default_backend() != "cpu"
            and resident.indexable(train.sizes)
            and resident.estimate_bytes(train.sizes, periodic=train.periodic)
            < _RESIDENT_SHARE * memory
        )
    # All processes must run the same program, but the memory of their devices may differ.
    if not distributed.broadcast(bool(wanted)):
        return None, ()
    data = resident.collect(
        (c for _, c in train.rows.chunks(train.indices, labels_only=True)),
        model.cutoff,
        batches.reference,
        long_range_cutoff=batches.long_range_cutoff,
    )
    log.info("training data on the device: %.1f MB", resident.nbytes(data) / 1e6)
    return lambda data, places, bucket: resident.gather(data, places, batches.budgets[bucket]), data


def _statistics(config, data, train: Split, model, begin: Potential | None) -> dict[str, Any]:
    """Return the statistics of the training data that a force field stores, ready for JSON."""
    summary = statistics.Summary(
        columns for _, columns in data.store.chunks(train.indices, labels_only=True)
    )
    if config.loss.beta == 1.0 and not np.isfinite(summary.force_rms):
        raise DatasetError("loss.beta is 1 (forces alone) but the training set has no forces")
    method = source.parse_reference(config.data.reference_energies)
    if begin is not None and method == "least_squares":
        reference = fine_tuning.reference_energies(begin, train, summary.elements, config.seed)
    else:
        reference = statistics.reference_energies(
            summary,
            method,
            isolated_atoms=source.isolated_atoms(data) if method == "isolated_atoms" else None,
        )
    scale = summary.force_rms if begin is None else begin.energy_scale
    elements = sorted({*summary.elements.tolist(), *(begin.elements if begin is not None else ())})
    return {
        "cutoff": float(model.cutoff),
        "reference_energies": reference.tolist(),
        "energy_scale": float(scale) if np.isfinite(scale) and scale > 0 else 1.0,
        "elements": elements,
        "charges": sorted(summary.charges),
        "num_structures": len(train),
        "num_molecules": splits_module.group(data.store.index("molecule")[train.indices])[1],
        "mean_neighbors": float(train.sizes.n_edge.sum() / train.sizes.n_node.sum()),
        "level_of_theory": data.level_of_theory,
        "conservative": is_conservative(model),
    }


def _report(
    config, workdir, model, trainer, batches, splits, metadata, params, data, filled
) -> Path:
    """Evaluate the best checkpoint on all splits, fit the domain and write the report."""
    best = restore(workdir, BEST)
    if best is None:
        raise TrainingError(
            "no validation gave a finite loss, so that there is no best checkpoint to evaluate. Look "
            "at valid_loss in metrics.csv, and lower optimizer.learning_rate"
        )
    best_params = trainer.replicate(from_arrays(params, best.arrays, "params/"))
    log.info("evaluating the best checkpoint (step %d)", best.step)
    splits = {
        name: split.sample(
            config.report.max_train if name == "train" else config.report.max_test, config.seed
        )
        for name, split in splits.items()
    }
    predictions = {
        name: _predictions(
            split, predict(trainer, best_params, split, batches), not energy_only(config)
        )
        for name, split in splits.items()
    }
    if not distributed.leader():
        return workdir / "report.html"
    potential = Potential.from_checkpoint(best.arrays, best.metadata)
    domain, judged = _domain(config, potential, splits, predictions)
    with writing(workdir):
        for name, p in predictions.items():
            p.save(workdir / f"predictions_{name}.npz")
        if domain is not None:
            domain.save(workdir / DOMAIN_FILE)
        report = write_report(
            workdir,
            predictions,
            title=f"{config.model.name} on {data.name}",
            metrics_csv=workdir / "metrics.csv",
            seconds=metadata["seconds"]["training"],
            judged=judged,
            notes=data.notes
            + (
                [
                    "Energies alone were trained on (loss.beta is 0): no forces were computed, and the "
                    "report has none."
                ]
                if energy_only(config)
                else []
            ),
            info=_info(config, potential, metadata, data, best.step, filled),
        )
    scores = json.loads((workdir / "metrics.json").read_text())["test"] or {}
    log.info(
        "test: energy %s meV/atom, force %s meV/Å, slope %s meV/atom",
        *(
            "-" if scores.get(k) is None else f"{scores[k]:.2f}"
            for k in (
                "energy_mae_mev_per_atom",
                "force_mae_mev_per_ang",
                "energy_slope_mev_per_atom",
            )
        ),
    )
    log.info("report: %s", report)
    return report


def energy_only(config) -> bool:
    """Return whether a run trains only on energies, so that it never computes forces."""
    return config.loss.beta == config.loss.beta_end == 0.0


def _predictions(split: Split, predicted, with_forces: bool) -> Predictions:
    """Combine labels and predictions of a split; drop force labels if no forces are computed."""
    c = split.columns()
    forces = c.forces if with_forces else np.full_like(c.forces, np.nan)  # no predictions
    return Predictions(
        numbers=c.numbers,
        offsets=c.offsets,
        energy=c.energy,
        energy_predicted=predicted.energy,
        forces=forces,
        forces_predicted=predicted.forces,
        molecule=c.molecule,
        conformer=c.conformer,
        subset=c.subset,
        source=c.source,
    )


def _domain(
    config, potential: Potential, splits, predictions
) -> tuple[Domain | None, DomainEvaluation | None]:
    """Fit the domain of the force field, and compute errors and distances of test structures.

    Return (None, None) without training or validation structures, and no evaluation without test
    structures.
    """
    rng, found = np.random.default_rng(config.seed), {}
    for name, split in splits.items():
        p = predictions[name]
        # The force field cannot describe structures with elements that training lacks.
        strange = ~np.isin(p.numbers, potential.elements)  # (A,)
        known = (
            np.flatnonzero(~np.logical_or.reduceat(strange, p.offsets[:-1]))
            if len(split)
            else np.zeros(0, int)
        )
        places = np.sort(rng.permutation(known)[: config.report.max_domain])
        if len(places):
            columns = split.columns(places, labels_only=True)
            atoms = np.concatenate([np.arange(p.offsets[s], p.offsets[s + 1]) for s in places])
            found[name] = (
                columns,
                p.energy_predicted[places] - p.energy[places],
                p.forces_predicted[atoms] - p.forces[atoms],
            )
    if not {"train", "valid"} <= set(found):
        return None, None
    domain = atom_domain.fit(
        potential, found["train"][0], found["valid"][0], found["valid"][2], config.seed
    )
    return domain, atom_domain.judge(potential, domain, *found["test"]) if "test" in found else None


def _info(config, potential, metadata, data, step, filled) -> dict[str, dict[str, Any]]:
    model, params, s = potential.model, potential.params, metadata["statistics"]
    return {
        "Data": {
            "file": data.name,
            "level of theory": s["level_of_theory"],
            "split": config.data.split_files or f"by {config.data.split}",
            **{
                k: ", ".join(f"{a}: {b}" for a, b in v.items()) or "none"
                if isinstance(v, dict)
                else v
                for k, v in data.counts.items()
            },
            "training structures": s["num_structures"],
            "training molecules": s["num_molecules"],
            "force RMS (eV/Å)": round(s["energy_scale"], 4),
            "mean neighbours": round(s["mean_neighbors"], 2),
            "reference energies": config.data.reference_energies,
        },
        "Model": {
            "architecture": config.model.name,
            "parameters": sum(p.size for p in jax.tree.leaves(params)),
            "forces": potential.origin_of_forces,
            **{k: str(v) for k, v in config.model.options.items()},
            **{
                f"energy term {k}": ", ".join(f"{a}={b}" for a, b in v) or "on"
                for k, v in getattr(model, "terms", ())
            },
        },
        "Training": {
            "updates": metadata["updates"],
            "best checkpoint at step": step,
            "training seconds": round(metadata["seconds"]["training"], 1),
            "real share of padded edges": round(filled["n_edge"], 4),
            **{
                f"{a}.{b}": str(v)
                for a in ("loss", "optimizer", "train")
                for b, v in config[a].items()
            },
        },
        "Hardware": {
            "devices": f"{jax.local_device_count()} × {jax.devices()[0].device_kind}",
            "machine": platform.machine(),
            "system": platform.platform(),
        },
        "Versions": metadata["versions"],
    }

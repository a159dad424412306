"""Preparations that all training tasks share: stored split, batches and checkpoint metadata."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from mlip_jax import __version__, distributed, models
from mlip_jax import config as configs
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection.split_files import load_split, save_split
from mlip_jax.datasets.unseen_elements import UnseenElements
from mlip_jax.graphs.packing import fill_fraction, plan_buckets
from mlip_jax.graphs.padding import choose_budgets, grow_to_fit
from mlip_jax.potential import long_range_cutoff
from mlip_jax.training.data import Batches
from mlip_jax.training.device.intervals import default_intervals
from mlip_jax.training.throughput import peak_flops
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)

# Warn if a step is larger than train.batch_size by this factor.
_LARGER = 1.2
PACKAGES = (
    "mlip_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "e3x",
    "jraph",
    "orbax-checkpoint",
    "numpy",
    "ase",
)


def save_or_check_split(path: Path, parts, meta) -> None:
    """Write the split of a new run, or check that a resumed run has the same split.

    Raises:
      DatasetError: The split differs from the stored one.
    """
    if path.with_suffix(".json").exists():  # written last, so the split is complete
        stored, _ = load_split(path)
        if any(not np.array_equal(stored[name], parts[name]) for name in parts):
            raise DatasetError(
                f"{path}: the data or the split have changed since this run was started. Choose "
                "another --workdir, or restore the data."
            )
        return
    save_split(path, parts, meta)


def make_batches(
    config, splits, model, reference, restored, **options
) -> tuple[Batches, dict[str, float]]:
    """Choose size buckets and create the batches of a run.

    A resumed run keeps the number of micro-batches of its first start.

    Args:
      config: Config of the task. Only config.train is used.
      splits: Splits by name, including "train".
      model: Model, which determines the cutoff radii.
      reference: Reference energy of each element (eV), (119,).
      restored: Checkpoint to resume from, or None.
      **options: Further fields of `Batches`.

    Returns:
      The batches, and the fraction of each padded size that is filled.
    """
    train, c = splits["train"], config.train
    micro_batches = c.micro_batches or jax.device_count()
    if restored is not None:
        micro_batches = restored.metadata["position"].get("micro_batches", micro_batches)
    budgets = choose_budgets(train.sizes, c.batch_size / micro_batches)
    for split in splits.values():
        budgets = (*budgets[:-1], grow_to_fit(budgets[-1], split.sizes))
    batches = Batches(
        budgets,
        model.cutoff,
        reference,
        jax.local_device_count(),
        micro_batches,
        distributed.count(),
        distributed.index(),
        long_range_cutoff(model),
        bonds=models.reads_bonds(model),
        **options,
    )
    # shuffled, because the store has the conformations of a molecule next to each other
    sample = np.random.default_rng(0).permutation(len(train))[:20_000]
    plan = plan_buckets(sample, train.sizes, budgets)
    fill = fill_fraction(plan, train.sizes, budgets)
    _log_batches(config, budgets, micro_batches, plan, fill)
    return batches, fill


def _log_batches(config, budgets, micro_batches: int, plan, fill) -> None:
    """Log the padded sizes of the batches; warn if a step is larger than train.batch_size."""
    names = {
        "n_node": "atoms",
        "n_edge": "edges",
        "n_graph": "graphs",
        "n_pair": "long-range pairs",
    }
    for bucket, budget in enumerate(budgets):
        log.info(
            "batches of %s: %.1f %%",
            ", ".join(f"{getattr(budget, k)} {names[k]}" for k in fill),
            100 * np.mean([b == bucket for b, _ in plan]),
        )
    mean = np.mean([len(members) for _, members in plan])
    log.info(
        "step: %d micro-batch(es) of about %.4g structures; padding: %s",
        micro_batches,
        mean,
        ", ".join(f"{100 * (1 - share):.1f} % of {names[k]}" for k, share in fill.items()),
    )
    batch_size = config.train.batch_size
    if mean * micro_batches > _LARGER * batch_size:
        log.warning(
            "step: about %.4g structures instead of train.batch_size = %.4g, because each of the "
            "%d micro-batches contains at least one. Use fewer devices or micro-batches for "
            "smaller steps.",
            mean * micro_batches,
            batch_size,
            micro_batches,
        )


def warn_of_unseen(split: str, unseen: UnseenElements) -> None:
    """Log that structures of a split are excluded, and a split that has no other structures."""
    log.warning(
        "%s: excluded from validation and from the errors: %s",
        split,
        unseen.describe(f"{split} structures"),
    )
    if split == "valid" and not unseen.known.any():
        log.warning(
            "valid: no structure is left, so the training split decides which checkpoint is the "
            "best. Add structures with %s to the training split, or choose another data.split_seed",
            unseen.symbols,
        )


def count_steps(config: ml_collections.ConfigDict, per_epoch: float) -> int:
    """Return the number of steps of a run with `per_epoch` steps per epoch."""
    num_steps = (
        config.train.num_steps
        if config.train.num_epochs is None
        else max(round(config.train.num_epochs * per_epoch), 1)
    )
    log.info(
        "training: %s, %.4g epochs of %.4g steps",
        count_of(num_steps, "step"),
        num_steps / per_epoch,
        per_epoch,
    )
    warmup = config.optimizer.warmup_steps
    if warmup is not None and warmup >= num_steps:
        log.warning(
            "optimizer.warmup_steps (%d) is not below the number of training steps (%d): the "
            "learning rate never decays. Lower optimizer.warmup_steps.",
            warmup,
            num_steps,
        )
    return num_steps


def with_intervals(options: ml_collections.ConfigDict, num_steps: int) -> ml_collections.ConfigDict:
    """Return config.train with the intervals that are unset, computed from the number of steps."""
    options = options.copy_and_resolve_references()
    for name, value in default_intervals(num_steps).items():
        options[name] = value if options[name] is None else options[name]
    return options


def describe(config: ml_collections.ConfigDict, statistics: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of all checkpoints of a run: config, statistics and package versions."""
    return {
        "config": configs.to_dict(config),
        "statistics": statistics,
        "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
    }


def log_model(name: str, params: Any) -> None:
    """Log the number of parameters of the model, and the devices that it is trained on."""
    log.info(
        "%s: %d parameters, %d device(s) of %s in %d process(es)",
        name,
        sum(p.size for p in jax.tree.leaves(params)),
        jax.device_count(),
        jax.devices()[0].device_kind,
        distributed.count(),
    )


def step_flops(trainer, batches, train, params) -> float | None:
    """Return the FLOPs of one step on the local devices, or None if their peak is unknown.

    Without the peak, the utilization of the devices cannot be computed.
    """
    if not peak_flops():
        return None
    with contextlib.closing(batches.in_order(train)) as stream:
        graph = jax.tree.map(lambda x: x[0], next(stream)[1])
    return trainer.flops(params, graph) * batches.per_device * trainer.num_devices


def _version(package: str) -> str:
    """Return the version of an installed package, or "unknown"."""
    if package == "mlip_jax":  # the name of its distribution is different
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"

"""Preparation of a training run of a force field: model, data, splits and statistics."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from mlip_jax import distributed, fine_tuning, models, terms
from mlip_jax.checkpoint import Restored
from mlip_jax.config import ConfigError, to_dict
from mlip_jax.datasets import source, statistics
from mlip_jax.datasets.quality.problems import WRONG_STRESS
from mlip_jax.datasets.reader import DatasetError
from mlip_jax.datasets.selection import data_split
from mlip_jax.datasets.selection import splits as splits_module
from mlip_jax.datasets.stress import STRESS, stress_labels
from mlip_jax.datasets.unseen_elements import UnseenElements
from mlip_jax.graphs.edge_counts import edge_counts, pair_counts
from mlip_jax.graphs.long_range import LatticeSumCutoff
from mlip_jax.graphs.shapes import Sizes
from mlip_jax.models.layers.forces import NO_ENERGY_DERIVATIVES, has_energy_derivatives
from mlip_jax.potential import (
    Potential,
    create_model,
    example_graph,
    is_conservative,
    long_range_cutoff,
)
from mlip_jax.simulation.trust import molecule_features
from mlip_jax.training import optimizer
from mlip_jax.training.data import Split
from mlip_jax.training.device.batch_size import with_batch_size
from mlip_jax.training.options import set_average_neighbors
from mlip_jax.training.prepare import describe, save_or_check_split, warn_of_unseen
from mlip_jax.training.recorder import writing
from mlip_jax.wording import count_of

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """Inputs of a training run, which all of its stages share.

    Attributes:
      config: Complete config of the task.
      workdir: Directory of the run.
      initial: Force field that training is initialized from, or None for random parameters.
      model: Model of the energy.
      data: Data set.
      splits: Splits of the data set: "train", "valid" and "test", without the structures of
        `unseen`.
      unseen: Structures of the splits "valid" and "test" with elements that the training split
        lacks, and their numbers; only of splits that have any.
      metadata: Metadata of all checkpoints: config, statistics and package versions.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    initial: Potential | None
    model: nn.Module
    data: source.LoadedData
    splits: dict[str, Split]
    unseen: dict[str, tuple[Split, UnseenElements]]
    metadata: dict[str, Any]

    @classmethod
    def prepare(cls, config: ml_collections.ConfigDict, workdir: Path) -> TrainingRun:
        """Load force field and data, create the model and split the data.

        If the config names no model, its part "model" is filled in from the initial force field.
        """
        initial = fine_tuning.load_initial_force_field(config)
        model = create_model(config.model, config.potential)
        _log_terms(model)
        if config.optimizer.freeze or config.optimizer.lr_multipliers:
            # report a wrong pattern before the data are read
            _, shapes = models.outline(model)
            optimizer.check_patterns(shapes, config.optimizer)
        embed = molecule_features.of(config.data)
        with distributed.leader_first("data"):  # the leader builds the store, others open it
            data = source.load(config.data)
            splits, sizes = _split(config, data, workdir, model, embed)
        set_average_neighbors(config, sizes.take(data.indices))
        model = create_model(config.model, config.potential)
        train_statistics = distributed.broadcast(
            _compute_statistics(config, data, splits["train"], model, initial)
            if distributed.leader()
            else None
        )
        terms.check_elements(
            [name for name, _ in getattr(model, "terms", ())], train_statistics["elements"]
        )
        models.check_elements(model, train_statistics["elements"])
        warn_of_charges(model, train_statistics["train_charges"])
        splits, unseen = separate_unseen(splits, train_statistics["train_elements"])
        metadata = describe(config, train_statistics)
        return cls(config, workdir, initial, model, data, splits, unseen, metadata)

    def with_batch_size(self, restored: Restored | None) -> TrainingRun:
        """Return the run with a batch size for the device, if its config sets none."""
        config = with_batch_size(
            self.config, self.splits["train"].sizes.n_edge, restored and restored.metadata
        )
        metadata = self.metadata | {"config": to_dict(config)}
        return dataclasses.replace(self, config=config, metadata=metadata)

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the training data that the force field stores."""
        return self.metadata["statistics"]

    @property
    def energy_only(self) -> bool:
        """Whether the run trains only on energies, so that it never computes forces."""
        return energy_only(self.config)

    def initial_parameters(self) -> Any:
        """Return the parameters of the initial force field, or random ones."""
        if self.initial is None:
            return jax.jit(self.model.init)(jax.random.key(self.config.seed), example_graph())
        log.info("initialized from force field %s", self.config.init.workdir)
        return fine_tuning.parameters(self.initial)


def energy_only(config: ml_collections.ConfigDict) -> bool:
    """Return whether a run trains only on energies, so that it never computes forces."""
    return config.loss.beta == config.loss.beta_end == 0.0


def _log_terms(model) -> None:
    """Log the energy terms of the model and its long-range cutoff."""
    for name, options in getattr(model, "terms", ()):
        log.info(
            "energy term %s: %s", name, ", ".join(f"{k}={v}" for k, v in options) or "defaults"
        )
    cutoff = long_range_cutoff(model)
    if cutoff is not None:
        log.info(
            "long-range pairs: %s%s",
            "all" if np.isinf(cutoff) else f"within {cutoff:g} Å",
            f", within {cutoff.periodic:g} Å in crystals"
            if isinstance(cutoff, LatticeSumCutoff)
            else "",
        )


def warn_of_charges(model, charges: Sequence[float]) -> None:
    """Warn if the training split contains several total charges, on which the model does not depend."""
    electrostatics = "electrostatics" in (name for name, _ in getattr(model, "terms", ()))
    base = getattr(model, "model", model)
    if len(charges) < 2 or electrostatics or getattr(base, "charge_embedding", False):
        return
    log.warning(
        "the training split contains the total charges %s, but the energy of this model does not "
        "depend on the charge: it learns ions from their geometries only. Set "
        "potential.electrostatics=True (any model) or model.options.charge_embedding=True "
        "(so3krates, painn) if molecules of the same atoms have several charges",
        ", ".join(f"{charge:+g}" if charge else "0" for charge in sorted(charges)),
    )


def _split(
    config, data: source.LoadedData, workdir: Path, model, embed
) -> tuple[dict[str, Split], Sizes]:
    """Split the data and write the split to splits.npz.

    Returns:
      The splits, and the sizes of all structures of the store.
    """
    c = config.data
    split_indices = data_split.split_data(data, c, embed)
    description = splits_module.describe(split_indices, data.store.index("molecule"))
    if distributed.leader():
        with writing(workdir):
            if not (workdir / "left_out.csv").exists():
                source.write_excluded(workdir / "left_out.csv", data)
            save_or_check_split(
                workdir / "splits.npz",
                split_indices,
                {
                    "store": str(data.store.path),
                    "split": c.split_files or c.split,
                    "seed": c.split_seed,
                    "parts": description,
                },
            )
    cutoff = long_range_cutoff(model)
    sizes = Sizes(
        data.store.index("n_atoms"),
        edge_counts(data.store, float(model.cutoff)),
        None if cutoff is None else pair_counts(data.store, cutoff),
    )
    splits = {}
    for name, indices in split_indices.items():
        splits[name] = Split(data.store, indices, sizes.take(indices))
        log.info(
            "%s: %s of %s, %.1f atoms on average",
            name,
            count_of(len(indices), "structure"),
            count_of(description[name]["molecules"], "molecule"),
            splits[name].sizes.n_node.mean() if len(indices) else 0,
        )
    return splits, sizes


def separate_unseen(
    splits: dict[str, Split], elements: Sequence[int]
) -> tuple[dict[str, Split], dict[str, tuple[Split, UnseenElements]]]:
    """Separate the structures with elements that the training split lacks, and log them.

    Args:
      splits: Splits by name.
      elements: Atomic numbers that occur in the training split.

    Returns:
      The splits without these structures, and these structures with their numbers by split.
    """
    known, unseen = {"train": splits["train"]}, {}
    for name in sorted(set(splits) - {"train"}):
        known[name], others, numbers = splits[name].separate(elements)
        if len(others):
            unseen[name] = (others, numbers)
            warn_of_unseen(name, numbers)
    return {name: known[name] for name in splits}, unseen


def seen_states(summary: statistics.Summary, initial: Potential | None) -> dict[str, Any]:
    """Return charges, spins, periodicity and sizes of the data of this and the initial training.

    Those of an imported initial force field may be unknown (None, or a missing field); so are those
    of the result then, unless the training data have them.

    Args:
      summary: Statistics of the training split.
      initial: Force field that training is initialized from, or None.
    """
    states = {
        "charges": sorted(summary.charges),
        "spins": sorted(summary.spins),
        "periodic": summary.periodic,
        "odd_electrons": summary.odd_electrons,
        "sizes": summary.sizes,
    }
    if initial is None:
        return states
    before = [m.get("statistics", {}) for m in initial.metadata.get("members", [initial.metadata])]
    for name in ("charges", "spins"):
        known = [b.get(name, [0.0]) for b in before]
        states[name] = None if None in known else sorted({*states[name], *sum(known, [])})
    for name in ("periodic", "odd_electrons"):
        known = [b.get(name) for b in before]
        states[name] = states[name] or any(known) or (None if None in known else False)
    sizes = [b.get("sizes") for b in before]
    states["sizes"] = None if None in sizes else statistics.merge_sizes([summary.sizes, *sizes])
    return states


def check_stress(data: source.LoadedData, train: Split, model, reject_invalid: bool) -> None:
    """Raise an error if the model has no stress, or the training split none that is usable.

    Args:
      data: Data set.
      train: Training split.
      model: Model of the energy.
      reject_invalid: Whether stresses that do not fit the energies are an error.
    """
    if not has_energy_derivatives(model):
        raise ConfigError(f"loss.stress: {NO_ENERGY_DERIVATIVES.format(what='stress')}")
    wrong = [p["message"] for p in data.store.manifest["problems"] if p["what"] == WRONG_STRESS]
    if wrong and reject_invalid:
        raise DatasetError(
            f"loss.stress is set, but {wrong[0]}. If the stress is correct, set "
            "--config.data.reject_invalid=False."
        )
    for _, columns in data.store.chunks(train.indices):
        stress = stress_labels(columns)
        if stress is not None and np.isfinite(stress).any():
            return
    path, manifest = data.store.path, data.store.manifest
    if not manifest.get("reads_stress") and STRESS not in manifest["properties"]:
        raise DatasetError(
            f"loss.stress is set, but the store {path} was written by an earlier version of "
            f"mlip_jax, which did not read stresses. Delete it and convert "
            f"{manifest['source']['path']} again, or set loss.stress to 0."
        )
    raise DatasetError(
        f"loss.stress is set, but no structure of the training split of {path} is periodic in "
        "three directions and has a stress. Give its name in the data set with the option "
        "stress_key of the reader, or set loss.stress to 0."
    )


def _compute_statistics(
    config, data: source.LoadedData, train: Split, model, initial: Potential | None
) -> dict[str, Any]:
    """Return the statistics of the training data that a force field stores, ready for JSON."""
    if config.loss.stress:
        check_stress(data, train, model, config.data.reject_invalid)
    summary = statistics.Summary(
        columns for _, columns in data.store.chunks(train.indices, labels_only=True)
    )
    if config.loss.beta == 1.0 and not np.isfinite(summary.force_rms):
        raise DatasetError(
            "loss.beta is 1 (forces only), but the training split has no forces. Lower loss.beta."
        )
    method = source.parse_reference(config.data.reference_energies)
    if initial is not None and method == "least_squares":
        reference = fine_tuning.reference_energies(initial, train, summary.elements, config.seed)
    else:
        needed = method == "isolated_atoms" or len(summary.fit.undetermined())
        reference = statistics.reference_energies(
            summary, method, isolated_atoms=source.isolated_atoms(data) if needed else None
        )
    scale = summary.force_rms if initial is None else initial.energy_scale
    initial_elements = initial.elements if initial is not None else ()
    return {
        "cutoff": float(model.cutoff),
        "reference_energies": reference.tolist(),
        "energy_scale": float(scale) if np.isfinite(scale) and scale > 0 else 1.0,
        "force_rms": summary.force_rms if np.isfinite(summary.force_rms) else None,
        "elements": sorted({*summary.elements.tolist(), *initial_elements}),
        "train_elements": summary.elements.tolist(),
        "train_charges": sorted(summary.charges),
        **seen_states(summary, initial),
        "num_structures": len(train),
        "num_molecules": splits_module.group(data.store.index("molecule")[train.indices])[1],
        "mean_neighbors": float(train.sizes.n_edge.sum() / train.sizes.n_node.sum()),
        "level_of_theory": data.level_of_theory,
        "conservative": is_conservative(model),
    }

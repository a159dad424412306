"""Predictors of properties: a `Predictor` combines a model, its parameters and targets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import models
from mlip_jax.checkpoint import CheckpointError, from_arrays
from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.arguments import molecule_list
from mlip_jax.datasets.property_data import Target
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.packing import plan_batches
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.shapes import GrowingBudget
from mlip_jax.matmul_precision import at_full_precision
from mlip_jax.models.layers.readouts import BACKBONE, PropertyModel, with_heads
from mlip_jax.potential import active_terms, create_model, read_checkpoint
from mlip_jax.structure import from_ase

TASK = "property"
EMBEDDING = "embedding"


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Result of a training run of the task "property".

    Attributes:
      model: Backbone with readouts, see readouts.PropertyModel.
      params: Parameters of the model.
      targets: Predicted properties.
      cutoff: Cutoff radius (Å).
      elements: Atomic numbers that occur in the training split.
      metadata: Config, statistics and versions, as stored in the checkpoint.
    """

    model: PropertyModel
    params: Any
    targets: tuple[Target, ...]
    cutoff: float
    elements: tuple[int, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Load the predictor of a workdir (its best checkpoint) or of a checkpoint directory.

        Raises:
          CheckpointError: There is no readable checkpoint, or it is that of a force field.
        """
        keep_compiled_programs()
        restored = read_checkpoint(path)
        if restored.metadata["config"].get("task") != TASK:
            raise CheckpointError(
                f"{path}: contains a force field, not a predictor of properties. Train one "
                f"from it: --config=configs/force2prop.py --config.init.workdir={path}"
            )
        try:
            return cls.from_checkpoint(restored.arrays, restored.metadata)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: invalid metadata ({error})") from error

    @classmethod
    def from_checkpoint(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Predictor:
        """Create the predictor from the contents of a checkpoint.

        Args:
          arrays: Arrays of the checkpoint; the parameters have names that begin with "params/".
          metadata: Metadata of the checkpoint.
        """
        statistics = metadata["statistics"]
        targets = tuple(Target.from_json(t) for t in statistics["targets"])
        model = with_heads(backbone_of(metadata["config"]), statistics["heads"])
        _, template = models.outline(model)
        return cls(
            model,
            from_arrays(template, arrays, "params/"),
            targets,
            float(statistics["cutoff"]),
            tuple(statistics["elements"]),
            metadata,
        )

    def predict(
        self,
        structures: Any,
        batch_size: int = 64,
        budget: GrowingBudget | None = None,
        *,
        with_embedding: bool = False,
    ) -> dict[str, np.ndarray]:
        """Predict the properties of structures.

        Args:
          structures: S structures with A atoms in total: ASE's Atoms, a SMILES, the path of a file
            of molecules, a list of these, or `Columns`.
          batch_size: Average number of structures per batch.
          budget: Padding budget that consecutive calls share, so that they use the same compiled
            program.
          with_embedding: Whether to return also "embedding", shape (S, F), the position of each
            structure in the model's feature space (PropertyModel.embed).

        Returns:
          Each property by name, float64 in its unit: shape (S,) or (S, 3), or (A,) for properties
          of atoms.

        Raises:
          ValueError: There are no structures, one cannot be read, or one has an element that is
            missing from the training split.
        """
        columns = (
            structures
            if isinstance(structures, Columns)
            else Columns.from_structures(map(from_ase, molecule_list(structures)))
        )
        self.check_elements(columns.numbers)
        outputs = self._outputs(columns, batch_size, GrowingBudget() if budget is None else budget)
        predictions = {t.name: t.to_physical(outputs[t.name], columns) for t in self.targets}
        if with_embedding:
            predictions[EMBEDDING] = outputs[EMBEDDING].astype(np.float64)
        return predictions

    def check_elements(self, numbers: np.ndarray) -> None:
        """Raise ValueError that lists the elements that are missing from the training split."""
        unknown = sorted(set(np.asarray(numbers).tolist()) - set(self.elements))
        if unknown:
            raise ValueError(
                "this predictor was not trained on "
                f"{', '.join(chemical_symbols[z] for z in unknown)}, only on "
                f"{', '.join(chemical_symbols[z] for z in self.elements)}"
            )

    def _outputs(
        self, columns: Columns, batch_size: int, growing: GrowingBudget
    ) -> dict[str, np.ndarray]:
        """Compute the outputs in batches; return them in the order of the structures."""
        if not len(columns):
            raise ValueError("there are no structures to predict: give at least one")
        sizes = graph_sizes(columns, self.cutoff, self.model.long_range_cutoff)
        budget = growing.fit(choose_budget(sizes, min(batch_size, len(columns))))
        parts, order = [], []
        params = jax.device_put(self.params)  # once for all batches
        for indices in plan_batches(np.arange(len(columns)), sizes, budget):
            graph = build_batch(
                columns.take(indices),
                budget,
                self.cutoff,
                long_range_cutoff=self.model.long_range_cutoff,
            )
            outputs = jax.device_get(_apply(self.model, params, graph))
            rows = len(columns.atoms_of(indices))  # without padding
            parts.append(
                {
                    name: values[: rows if name in self._of_atoms else len(indices)]
                    for name, values in outputs.items()
                }
            )
            order.append(indices)
        # undo the order of the batches: for rows of structures and for rows of atoms
        order = np.concatenate(order)
        in_batch_order = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        back = {False: np.argsort(order), True: np.argsort(columns.atoms_of(order))}
        return {
            name: values[back[name in self._of_atoms]] for name, values in in_batch_order.items()
        }

    @property
    def _of_atoms(self) -> set[str]:
        """Names of the properties that have one row per atom."""
        return {
            name
            for name, options in self.model.heads
            if dict(options).get("kind", "").startswith("atom")
        }

    def digest(self) -> str:
        """Return a short digest of model, parameters and targets.

        It identifies the predictor.
        """
        sha256 = hashlib.sha256(
            repr((self.model, self.cutoff, [t.to_json() for t in self.targets])).encode()
        )
        for leaf in jax.tree.leaves(self.params):
            sha256.update(np.ascontiguousarray(leaf).tobytes())
        return sha256.hexdigest()[:16]


@functools.partial(jax.jit, static_argnums=0)
@at_full_precision
def _apply(model, params, graph):
    params, graph = jax.tree.map(jnp.asarray, (params, graph))
    return {**model.apply(params, graph), EMBEDDING: model.apply(params, graph, method="embed")}


def backbone_of(config: Mapping[str, Any]) -> Any:
    """Create the model of a config without its energy terms.

    Terms contribute only to the energy; the features do not depend on them.
    """
    return create_model(config["model"])


def pretrained(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """Read the model, parameters and metadata of a workdir to initialize another predictor.

    Returns:
      Part "model" of the config; arrays of the parameters by path, "backbone/..." and, for a
      predictor, "head_NAME/..."; metadata of the checkpoint.

    Raises:
      CheckpointError: There is no readable checkpoint.
    """
    restored = read_checkpoint(path)
    prefix = "params/params/"
    arrays = {k[len(prefix) :]: v for k, v in restored.arrays.items() if k.startswith(prefix)}
    config = restored.metadata["config"]
    if config.get("task") != TASK:
        with_terms = bool(active_terms(config.get("potential") or {}))
        prefix_of_model = "model/" if with_terms else ""
        arrays = {
            f"{BACKBONE}/{k[len(prefix_of_model) :]}": v
            for k, v in arrays.items()
            if k.startswith(prefix_of_model)
        }
    return config["model"], arrays, restored.metadata


def begin_from(params: Any, arrays: Mapping[str, np.ndarray], source: str) -> tuple[Any, list[str]]:
    """Replace parameters of a PropertyModel by those of a pretrained model.

    Args:
      params: Initial parameters of the PropertyModel.
      arrays: Arrays of the pretrained model, see `pretrained`.
      source: Origin of the arrays, for error messages.

    Returns:
      `params` with the backbone and the heads that `arrays` contains, and the names of the heads
      that keep their initial values.

    Raises:
      CheckpointError: The backbone, or a head of the same name, differs. The message lists
        parameters that are missing, left over or have another shape.
    """
    parts, fresh = dict(params["params"]), []
    for name, initial in parts.items():
        stored = {k: v for k, v in arrays.items() if k.startswith(f"{name}/")}
        if not stored and name != BACKBONE:
            fresh.append(name.removeprefix("head_"))
            continue
        try:
            parts[name] = from_arrays(initial, stored, f"{name}/")
        except CheckpointError as error:
            raise CheckpointError(
                f"{source} cannot initialize this model: in {name!r} {error}\nLeave "
                "config.model.name empty to use its architecture, or change "
                "config.model.options."
            ) from error
    return {**params, "params": parts}, fresh

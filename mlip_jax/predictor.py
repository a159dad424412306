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
import jraph
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import models
from mlip_jax.checkpoint import CheckpointError, from_arrays
from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.datasets.columns import Columns
from mlip_jax.datasets.molecules.arguments import molecule_records, usable_atoms
from mlip_jax.datasets.property_data import Target
from mlip_jax.files import VALUE_ERRORS
from mlip_jax.graphs.batch import build_batch
from mlip_jax.graphs.bonds import bond_sizes, build_bond_batch
from mlip_jax.graphs.packing import plan_batches
from mlip_jax.graphs.padding import choose_budget, graph_sizes
from mlip_jax.graphs.shapes import GrowingBudget, PaddingBudget, Sizes
from mlip_jax.matmul_precision import at_full_precision
from mlip_jax.models.layers.batch_norm import STATISTICS
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
        except VALUE_ERRORS as error:
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
            missing from the training split. For a model of bonds: one has no SMILES.
        """
        columns = structures if isinstance(structures, Columns) else self._columns(structures)
        self.check_elements(columns.numbers)
        outputs = self._outputs(columns, batch_size, GrowingBudget() if budget is None else budget)
        predictions = {t.name: t.to_physical(outputs[t.name], columns) for t in self.targets}
        if with_embedding:
            predictions[EMBEDDING] = outputs[EMBEDDING].astype(np.float64)
        return predictions

    @property
    def reads_bonds(self) -> bool:
        """Whether predictions depend on the bonds of a SMILES."""
        return models.reads_bonds(self.model)

    @property
    def reads_positions(self) -> bool:
        """Whether predictions depend on positions."""
        return models.reads_positions(self.model)

    def _columns(self, molecules: Any) -> Columns:
        """Return the structures of an argument of `predict`. They are embedded only if necessary."""
        groups = molecule_records(molecules, embed=self.reads_positions)
        return Columns.from_structures(
            from_ase(usable_atoms(record), smiles=record.smiles)
            for records in groups
            for record in records
        )

    def attributions(self, structures: Any, batch_size: int = 64) -> list[dict[str, np.ndarray]]:
        """Attribute the scalar properties of structures to their atoms, as gradient times input.

        The input is the features of the atoms that the model computes, not their positions. The
        result shows what the readout uses, not what a change of the molecule would cause.

        Args:
          structures: S structures, as in `predict`.
          batch_size: Average number of structures per batch.

        Returns:
          For each structure, each scalar property by name in its unit, (n,): one number per atom.
          For a model of bonds, per heavy atom in the order of the SMILES.
        """
        scales = {t.name: t.scale for t in self.targets if t.kind == "scalar"}
        return [
            {name: scale * outputs[name] for name, scale in scales.items()}
            for outputs in self._of_nodes(structures, batch_size, "attributions")
        ]

    def refine(self, structures: Any, batch_size: int = 64) -> list[np.ndarray]:
        """Return the refined positions (Å) of the heavy atoms of structures, (n, 3) each.

        Only a model that refines positions has them, such as unimol_plus. The center of the heavy
        atoms is the origin. Arguments are those of `predict`.

        Raises:
          ValueError: As in `predict`, or the model does not refine positions.
        """
        return [outputs["refine"] for outputs in self._of_nodes(structures, batch_size, "refine")]

    def _of_nodes(self, structures, batch_size: int, method: str) -> list[dict[str, np.ndarray]]:
        """Return the outputs of a method of the model for the nodes of each structure."""
        columns = structures if isinstance(structures, Columns) else self._columns(structures)
        self.check_elements(columns.numbers)
        sizes = self._sizes(columns)
        budget = choose_budget(sizes, min(batch_size, len(columns)))
        params = jax.device_put(self.params)  # once for all batches
        result: dict[int, dict[str, np.ndarray]] = {}
        for indices in plan_batches(np.arange(len(columns)), sizes, budget):
            graph = self._batch(columns.take(indices), budget)
            outputs = jax.device_get(_apply_method(self.model, method, params, graph))
            outputs = outputs if isinstance(outputs, dict) else {method: outputs}
            ends = np.cumsum(sizes.n_node[indices])
            parts = {name: np.split(values, ends)[:-1] for name, values in outputs.items()}
            for k, index in enumerate(indices):
                result[int(index)] = {n: p[k].astype(np.float64) for n, p in parts.items()}
        return [result[s] for s in range(len(columns))]

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
        sizes = self._sizes(columns)
        budget = growing.fit(choose_budget(sizes, min(batch_size, len(columns))))
        parts, order = [], []
        params = jax.device_put(self.params)  # once for all batches
        for indices in plan_batches(np.arange(len(columns)), sizes, budget):
            graph = self._batch(columns.take(indices), budget)
            outputs = jax.device_get(batch_outputs(self.model, params, graph))
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

    def _sizes(self, columns: Columns) -> Sizes:
        """Return the sizes of the graphs of structures."""
        if self.reads_bonds:
            sizes, limit = bond_sizes(columns.smiles), models.max_heavy_atoms(self.model)
            if limit is not None and sizes.n_node.max(initial=0) > limit:
                raise ValueError(
                    f"a molecule has {sizes.n_node.max()} heavy atoms; this predictor reads at most "
                    f"{limit} (model.options.num_tokens)"
                )
            return sizes
        return graph_sizes(columns, self.cutoff, self.model.long_range_cutoff)

    def _batch(self, columns: Columns, budget: PaddingBudget) -> jraph.GraphsTuple:
        """Build the padded batch of structures."""
        if self.reads_bonds:
            return build_bond_batch(columns, budget)
        cutoffs = {"long_range_cutoff": self.model.long_range_cutoff}
        return build_batch(columns, budget, self.cutoff, **cutoffs)

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
def batch_outputs(model, params, graph):
    """Return the outputs of the heads and the embeddings of a padded batch, by name."""
    params, graph = jax.tree.map(jnp.asarray, (params, graph))
    return {**model.apply(params, graph), EMBEDDING: model.apply(params, graph, method="embed")}


@functools.partial(jax.jit, static_argnums=(0, 1))
@at_full_precision
def _apply_method(model, method, params, graph):
    params, graph = jax.tree.map(jnp.asarray, (params, graph))
    return model.apply(params, graph, method=method)


def backbone_of(config: Mapping[str, Any]) -> Any:
    """Create the model of a config without its energy terms.

    Terms contribute only to the energy; the features do not depend on them.
    """
    return create_model(config["model"])


def pretrained(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """Read the model, parameters and metadata of a workdir to initialize another predictor.

    Returns:
      Part "model" of the config; arrays of the parameters by path, "backbone/..." and, for a
      predictor, "head_NAME/..." and "batch_stats/..."; metadata of the checkpoint.

    Raises:
      CheckpointError: There is no readable checkpoint.
    """
    restored = read_checkpoint(path)
    prefix = "params/params/"
    arrays = {k[len(prefix) :]: v for k, v in restored.arrays.items() if k.startswith(prefix)}
    statistics = f"params/{STATISTICS}/"
    arrays |= {
        k.removeprefix("params/"): v for k, v in restored.arrays.items() if k.startswith(statistics)
    }
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
    if STATISTICS not in params:
        return {**params, "params": parts}, fresh
    stored = {k: v for k, v in arrays.items() if k.startswith(f"{STATISTICS}/")}
    statistics = from_arrays(params[STATISTICS], stored, f"{STATISTICS}/")
    return {**params, "params": parts, STATISTICS: statistics}, fresh

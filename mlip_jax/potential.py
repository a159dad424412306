"""Force fields: a `Potential` combines a model, its parameters and reference energies.

This is the only module that differentiates, energies as well as losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
from ase.data import chemical_symbols

from mlip_jax import models, terms
from mlip_jax.checkpoint import CheckpointError, CheckpointStore, Restored, from_arrays
from mlip_jax.compilation_cache import keep_compiled_programs
from mlip_jax.files import VALUE_ERRORS
from mlip_jax.graphs.graph import example_graph as example_graph  # part of the interface
from mlip_jax.graphs.graph import node_graph_index, sum_by_graph
from mlip_jax.graphs.neighbor_slots import with_slots
from mlip_jax.matmul_precision import at_full_precision
from mlip_jax.models.layers.forces import (
    NO_ENERGY_DERIVATIVES,
    check_forces,
    has_direct_forces,
    has_energy_derivatives,
    is_conservative,
)

log = logging.getLogger(__name__)

BEST = "best"
_AVERAGED = "ema/"  # prefix of the averaged parameters in a checkpoint to resume from


class Evaluation(NamedTuple):
    """Energies and forces of a padded batch, without reference energies.

    Attributes:
      energy: Energy of each graph (eV), shape (G,); zero for padding graphs.
      forces: Forces (eV/Å), shape (N, 3); zero for padding atoms.
      energies: Atomic energies (eV), shape (N,); zero for padding atoms.
      stress: Stress (eV/Å³), shape (G, 3, 3), or None.
      properties: Per-atom predictions by name, shape (N, ...) each; zero for padding atoms.
    """

    energy: jax.Array
    forces: jax.Array
    energies: jax.Array
    stress: jax.Array | None = None
    properties: dict[str, jax.Array] = {}


@at_full_precision
def evaluate(
    model: nn.Module,
    params: Any,
    graph: jraph.GraphsTuple,
    energy_scale: float,
    with_stress: bool = False,
    with_forces: bool = True,
) -> Evaluation:
    """Compute energies, forces and, optionally, stress of a padded batch.

    Energies include those of further terms. Forces are minus the gradient of the energy. A model
    with direct forces predicts its part of them instead; those of further terms stay minus their
    gradient. The function is pure; call it under jit.

    Args:
      model: Model that follows the contract of mlip_jax.models.
      params: Parameters of the model.
      graph: Padded batch in the layout of graphs/graph.py.
      energy_scale: Energy per unit of the model's output (eV).
      with_stress: Also compute the stress, the strain derivative of the energy divided by the
        volume. It requires globals["cell"].
      with_forces: If False and there is no stress, nothing is differentiated and forces are zero.

    Raises:
      ValueError: The stress is requested of a model whose energy has no derivatives (see
        `has_energy_derivatives`), or a model returns forces although it has no direct forces.
    """
    # a traced index fails on NumPy arrays
    params, graph = jax.tree.map(jnp.asarray, (params, with_slots(model, graph)))
    node_graph, num = node_graph_index(graph), graph.n_node.shape[0]
    node_mask = jraph.get_node_padding_mask(graph)
    direct, with_forces = has_direct_forces(model), with_forces or with_stress
    if with_stress and not has_energy_derivatives(model):
        raise ValueError(NO_ENERGY_DERIVATIVES.format(what="stress"))

    def total(positions, strain):
        outputs = model.apply(params, _moved(graph, positions, strain, node_graph))
        energies = sum(outputs.terms.values(), outputs.energies * energy_scale)
        energies = jnp.where(node_mask, energies, 0.0)
        properties = {
            name: jnp.where(node_mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0.0)
            for name, values in outputs.properties.items()
        }
        check_forces(model, outputs)
        return energies.sum(), (energies, properties, outputs.forces, outputs.terms)

    def total_of_terms(positions):
        further = model.apply(params, _moved(graph, positions, None, node_graph)).terms
        return jnp.where(node_mask, sum(further.values()), 0.0).sum()

    # derivatives of the energy by positions (N, 3) and by strain (G, 3, 3), as far as needed
    positions = graph.nodes["positions"]
    strain = jnp.zeros((num, 3, 3), positions.dtype) if with_stress else None
    wanted = ((0,) if with_forces and not direct else ()) + ((1,) if with_stress else ())
    if wanted:
        derivatives, outputs = jax.grad(total, wanted, has_aux=True)(positions, strain)
    else:
        derivatives, outputs = (), total(positions, None)[1]
    energies, properties, predicted, further = outputs
    if direct and with_forces:
        forces = predicted * energy_scale
        if further:
            forces = forces - jax.grad(total_of_terms)(positions)
    else:
        forces = -derivatives[0] if with_forces else jnp.zeros_like(positions)
    stress = _stress(derivatives[-1], graph) if with_stress else None
    forces = jnp.where(node_mask[:, None], forces, 0.0)
    energy = sum_by_graph(energies, node_graph, num)
    return Evaluation(energy, forces, energies, stress, properties)


def _stress(by_strain, graph):
    """Return the stress (G, 3, 3): d energy / d strain / volume."""
    # graphs without a cell are divided by 1, not by 0
    volume = jnp.abs(jnp.linalg.det(graph.globals["cell"]))
    by_strain = 0.5 * (by_strain + by_strain.transpose(0, 2, 1))
    return by_strain / jnp.where(volume > 0, volume, 1.0)[:, None, None]


@at_full_precision
def hessian_columns(
    model: nn.Module,
    params: Any,
    graph: jraph.GraphsTuple,
    energy_scale: float,
    directions: jax.Array,
) -> jax.Array:
    """Compute derivatives of the energy's gradient along displacements of the atoms (eV/Å²).

    With unit vectors as directions these are columns of the Hessian, also if the forces are not the
    gradient. The function is pure. It uses forward-over-reverse mode: the gradient is linearized
    once, its intermediate values are kept, and each direction costs about one evaluation.

    Args:
      model, params, graph, energy_scale: See `evaluate`.
      directions: Displacements of all atoms, shape (C, N, 3).

    Returns:
      Derivatives, shape (C, N, 3).

    Raises:
      ValueError: The energy of the model has no derivatives (see `has_energy_derivatives`).
    """
    if not has_energy_derivatives(model):
        raise ValueError(NO_ENERGY_DERIVATIVES.format(what="Hessian"))
    params, graph = jax.tree.map(jnp.asarray, (params, graph))

    @jax.grad
    def gradient(positions):
        moved = graph._replace(nodes={**graph.nodes, "positions": positions})
        return evaluate(model, params, moved, energy_scale, with_forces=False).energy.sum()

    _, derivative = jax.linearize(gradient, graph.nodes["positions"])
    return jax.vmap(derivative)(directions)


def _moved(graph, positions, strain, node_graph):
    """Replace the positions; a strain (G, 3, 3), if given, deforms positions and cell."""
    if strain is None:
        return graph._replace(nodes={**graph.nodes, "positions": positions})
    deformation = jnp.eye(3, dtype=positions.dtype) + 0.5 * (strain + strain.transpose(0, 2, 1))
    exact = jax.lax.Precision.HIGHEST  # no rounding to bfloat16 or TF32
    cell = jnp.einsum("gcx,gxy->gcy", graph.globals["cell"], deformation, precision=exact)
    positions = jnp.einsum("nx,nxy->ny", positions, deformation[node_graph], precision=exact)
    return graph._replace(
        nodes={**graph.nodes, "positions": positions}, globals={**graph.globals, "cell": cell}
    )


def gradient(
    loss: Callable[[Any], tuple[jax.Array, Any]], params: Any
) -> tuple[jax.Array, Any, Any]:
    """Differentiate a loss of `Evaluation`s with respect to the parameters.

    Args:
      loss: Function of the parameters that returns the loss and an auxiliary output.
      params: Parameters.

    Returns:
      (loss, auxiliary output, gradient with respect to the parameters).
    """
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, aux, grads


@dataclasses.dataclass(frozen=True)
class Potential:
    """A force field.

    Attributes:
      model: Model that follows the contract of mlip_jax.models.
      params: Parameters of the model.
      cutoff: Cutoff radius (Å).
      reference_energies: Reference energy of each element (eV), shape (119,), float64; added on the
        host.
      energy_scale: Energy per unit of the model's output (eV).
      elements: Atomic numbers that occur in the training split.
      metadata: Config, statistics, versions and label origin, as stored in the checkpoint.
    """

    model: nn.Module
    params: Any
    cutoff: float
    reference_energies: np.ndarray
    energy_scale: float
    elements: tuple[int, ...]
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Potential:
        """Load the force field of a workdir (its best checkpoint) or of a checkpoint directory.

        Raises:
          CheckpointError: There is no readable checkpoint, or it is not that of a force field.
        """
        keep_compiled_programs()
        restored = read_checkpoint(path)
        try:
            if "reference_energies" in restored.metadata["statistics"]:
                return cls.from_checkpoint(restored.arrays, restored.metadata)
        except VALUE_ERRORS as error:
            raise CheckpointError(f"{path}: invalid metadata ({error})") from error
        content = "contains a predictor of properties, not a force field"
        raise CheckpointError(f"{path}: {content}. Open it with mlip_jax.predictor.Predictor.load.")

    @classmethod
    def from_checkpoint(cls, arrays: dict[str, np.ndarray], metadata: dict[str, Any]) -> Potential:
        """Create the force field from the contents of a checkpoint.

        Args:
          arrays: Arrays of the checkpoint; the parameters have names that begin with "params/".
          metadata: Metadata of the checkpoint.
        """
        statistics, config = metadata["statistics"], metadata["config"]
        model = create_model(config["model"], config.get("potential"))
        _, template = models.outline(model)
        return cls(
            model=model,
            params=from_arrays(template, arrays, "params/"),
            cutoff=float(statistics["cutoff"]),
            reference_energies=np.array(statistics["reference_energies"], np.float64),
            energy_scale=float(statistics["energy_scale"]),
            elements=tuple(statistics["elements"]),
            metadata=metadata,
        )

    @property
    def long_range_cutoff(self) -> float | None:
        """Cutoff of long-range pairs (Å); see the function `long_range_cutoff`."""
        return long_range_cutoff(self.model)

    @property
    def conservative(self) -> bool:
        """Whether forces are minus the gradient of the energy; see `is_conservative`."""
        return is_conservative(self.model)

    @property
    def origin_of_forces(self) -> str:
        """Origin of the forces in words, for reports and messages."""
        if self.conservative:
            return "minus the gradient of the energy"
        return (
            "predicted directly"
            if has_direct_forces(self.model)
            else "a part of the gradient of the energy"
        )

    def digest(self) -> str:
        """Return a short digest of model, parameters and reference energies.

        It identifies the force field.
        """
        sha256 = hashlib.sha256(repr((self.model, self.cutoff, self.energy_scale)).encode())
        for leaf in [*jax.tree.leaves(self.params), self.reference_energies]:
            sha256.update(np.ascontiguousarray(leaf).tobytes())
        return sha256.hexdigest()[:16]

    def check_elements(self, numbers: np.ndarray) -> None:
        """Raise ValueError that lists the elements that are missing from the training split."""
        unknown = sorted(set(np.asarray(numbers).tolist()) - set(self.elements))
        if unknown:
            raise ValueError(
                "this force field was not trained on "
                f"{', '.join(chemical_symbols[z] for z in unknown)}, only on "
                f"{', '.join(chemical_symbols[z] for z in self.elements)}"
            )


def read_checkpoint(path: str | Path) -> Restored:
    """Read the best checkpoint of a workdir, or the newest one of a checkpoint directory.

    The parameters are the averaged ones; those before the average are dropped.

    Raises:
      CheckpointError: There is no readable checkpoint.
    """
    if not (path := Path(path)).is_dir():
        raise CheckpointError(f"{path}: no such directory. Give the workdir of a training run.")
    store = CheckpointStore(path / BEST if (path / BEST).is_dir() else path, read_only=True)
    restored = store.restore()
    store.close()
    if restored is None:
        raise CheckpointError(
            f"{path}: no complete checkpoint. The first one is written by the first validation."
        )
    if not all(isinstance(restored.metadata.get(k), dict) for k in ("config", "statistics")):
        raise CheckpointError(f"{path}: invalid metadata: expected a config and statistics")
    averaged = {
        f"params/{name.removeprefix(_AVERAGED)}": values
        for name, values in restored.arrays.items()
        if name.startswith(_AVERAGED)
    }
    if not averaged:
        return restored
    log.warning(
        "%s: loaded the averaged parameters of step %d, the newest checkpoint. For the best "
        "checkpoint, give the workdir of the run.",
        *(path, restored.step),
    )
    return restored._replace(arrays=averaged)


def create_model(model: Mapping[str, Any], potential: Mapping[str, Any] | None = None) -> nn.Module:
    """Create the model of a config, with the further energy terms that the config switches on.

    Args:
      model: Part "model" of the config: name and options.
      potential: Part "potential" of the config, see `active_terms`; None for no terms.

    Raises:
      ValueError: Unknown model, term or option; the message lists the known ones.
    """
    module = models.create(model["name"], **_options(model["options"]))
    return terms.with_terms(module, active_terms(potential or {}))


def active_terms(potential: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each energy term that is switched on: {name: options}.

    Args:
      potential: Part "potential" of the config. For each term it has the fields `name`
        (whether the term is on) and `name_options`. Its field long_range_cutoff
        (Å, inf for all pairs) is the cutoff of the long-range terms whose options give no other,
        except that of d3.

    Raises:
      ValueError: Unknown term, or a cutoff that is not positive.
    """
    cutoff = float(potential.get("long_range_cutoff", math.inf))
    if not cutoff > 0:
        raise ValueError(
            "potential.long_range_cutoff must be positive (Å, or inf for all pairs), received "
            f"{cutoff}"
        )
    switches = [k for k in potential if k != "long_range_cutoff" and not k.endswith("_options")]
    active = {}
    for name in sorted(switches):
        options = _options(potential.get(f"{name}_options", {}))
        term = terms.create(name, **options)
        if term.long_range and not getattr(term, "own_cutoff", False):
            options.setdefault("cutoff", None if math.isinf(cutoff) else cutoff)
        if potential[name]:
            active[name] = options
    return active


def long_range_cutoff(model: nn.Module) -> float | None:
    """Return the distance (Å) up to which a model needs long-range pairs.

    It is inf for all pairs, and None if the model needs none.
    """
    return getattr(model, "long_range_cutoff", None)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace lists by tuples: JSON has no tuples, and flax modules need hashable fields."""
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in options.items()}

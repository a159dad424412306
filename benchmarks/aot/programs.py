"""Programs of the package with shapes in the place of arrays, to be compiled for absent devices.

The code is that of the package: the function that `Trainer` passes to pmap, and the loops of
relaxation and dynamics with their own setup. A batch has the sizes of SPICE: 30 atoms per molecule
with 19 neighbors each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax import defaults
from mlip_jax.configs import spice
from mlip_jax.graphs.neighbor_slots import add_neighbor_slots, wants_slots
from mlip_jax.graphs.shapes import PaddingBudget
from mlip_jax.matmul_precision import full_precision
from mlip_jax.potential import Potential, create_model, evaluate, example_graph
from mlip_jax.training import losses, optimizer, step
from mlip_jax.training.objectives import ForceField

ATOMS, NEIGHBORS = 30, 19
OPTIONS: dict[str, dict[str, Any]] = {
    "painn": dict(num_features=128, num_layers=3, num_radial=20),
    "so3krates": dict(num_features=132, num_layers=3, num_heads=4, num_radial=32),
    "equivariant_transformer": dict(num_features=128, num_layers=8, num_heads=8, num_radial=64),
    "schnet": dict(num_features=128, num_layers=6, num_radial=20),
    "nequip": dict(num_features=32, num_layers=3, max_degree=2, elements=(1, 6, 7, 8, 16)),
    "mace": dict(num_features=64, elements=(1, 6, 7, 8, 16)),
    "sevennet": dict(num_features=32, elements=(1, 6, 7, 8, 16)),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """Function to compile.

    Attributes:
      name: Description.
      function: Pure function.
      args: Its arguments, with shapes in the place of arrays.
      per_device: Whether arguments have a leading axis of devices, over which it is mapped.
      donated: Indices of arguments whose memory is reused.
      structures: Number of structures of a call.
    """

    name: str
    function: Callable
    args: tuple
    per_device: bool = False
    donated: tuple[int, ...] = ()
    structures: int = 1


def build(spec: str) -> Program:
    """Return the program of a text such as "train:painn:256", "md:painn:60" or "calc:schnet:30".

    The model "default" is that of `configs/spice.py`, trained with the optimizer of that config.

    Args:
      spec: Kind, model and size; then options such as "slots=0". The sizes are those of `train`,
        `forces`, `relax` (molecules) and of `md`, `calc` (atoms).

    Raises:
      ValueError: Unknown kind.
    """
    kind, name, *words = spec.split(":")
    if kind not in KINDS:
        raise ValueError(f"{spec!r}: expected one of {', '.join(KINDS)}, received {kind!r}")
    options = dict(word.split("=") for word in words if "=" in word)
    if kind not in ("train", "forces"):
        options.pop("slots", None)  # the program chooses them
    size = [int(word) for word in words if "=" not in word]
    program = KINDS[kind](name, *size, **{k: int(v) for k, v in options.items()})
    return dataclasses.replace(program, name=spec)


def train(name: str, molecules: int = 256, slots: int = 32) -> Program:
    """Return a training step, with Adam unless the model is "default".

    Args:
      name: Model.
      molecules: Molecules of the batch.
      slots: Neighbor slots per atom, if the model uses them on the device.
    """
    model, budget = _model(name), _budget(molecules)
    objective = ForceField(
        model,
        1.0,
        losses.beta_schedule(0.95, 0.8, 0.5, 10_000, "geometric"),
        0.8,
        {"penalty": "mae", "energy_per_atom": False},
    )
    if name == "default":
        config = spice.get_config()
    else:
        config = defaults.train_defaults()
        config.optimizer.name = "adam"

    def in_slots(data, graph, bucket):
        return add_neighbor_slots(graph, slots if wants_slots(model) else 0)

    functions = {}

    def catch(function, *args, **options):
        functions[function.__name__] = function
        return jax.jit(function)

    with mock.patch.object(jax, "pmap", catch):
        trainer = step.Trainer(
            objective, optimizer.create(config.optimizer, 10_000, 100.0), 0.999, build=in_slots
        )
    state = shapes(trainer.init(_zeros(model)))
    inputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, 1, 1, *x.shape), x.dtype), _batch(budget)
    )
    number = jax.ShapeDtypeStruct((1,), jnp.int32)

    def perform(state, inputs, count, stop):
        return functions["train"](state, (), inputs, count, stop, 0)

    return Program("", perform, (state, inputs, number, number), True, (0,), molecules)


def forces(name: str, molecules: int = 256, slots: int = 32) -> Program:
    """Return energies and forces of a batch, see `train`."""
    model = _model(name)

    def energies_and_forces(params, graph):
        graph = add_neighbor_slots(graph, slots if wants_slots(model) else 0)
        out = evaluate(model, params, graph, 1.0)
        return out.energy, out.forces

    args = shapes(_zeros(model)), _batch(_budget(molecules))
    return Program("", energies_and_forces, args, structures=molecules)


def relax(name: str, molecules: int = 548) -> Program:
    """Return the loop of a batched relaxation with BFGS; the counts are those of an iteration."""
    from mlip_jax.simulation.relaxation import minimizers
    from mlip_jax.simulation.relaxation.loop import RelaxationLoop
    from mlip_jax.simulation.relaxation.state import empty_molecules

    model, budget, size = _model(name), _budget(molecules), ATOMS + 2
    loop = RelaxationLoop(
        model,
        1.0,
        float(model.cutoff),
        None,
        minimizers.create("bfgs"),
        fmax=0.05,
        max_steps=500,
        size=size,
        num=molecules,
        dtype=np.dtype(np.float32),
    )
    queue = shapes(empty_molecules(molecules, size, np.dtype(np.float32)))
    number = jax.ShapeDtypeStruct((), jnp.int32)

    def run(params, state, queue, length, iterations, active):
        with full_precision():
            return loop.run(
                budget._replace(n_graph=molecules + 1),
                molecules,
                params,
                state,
                queue,
                queue_length=length,
                max_iterations=iterations,
                min_active=active,
            )

    args = shapes(_zeros(model)), shapes(loop.init()), queue, number, number, number
    return Program("", run, args, donated=(1,), structures=molecules)


def md(name: str, atoms: int = 60, molecules: int = 1) -> Program:
    """Return the loop of Langevin dynamics; the counts are those of a step."""
    from mlip_jax.simulation.dynamics.device.loop import StepInputs
    from mlip_jax.simulation.dynamics.md import MolecularDynamics

    md = MolecularDynamics(_molecules(molecules, atoms), _potential(name), ensemble="langevin")
    [batch] = md.batches
    loop, capacity, compiled = batch._program.loop, batch.capacity, batch._program
    key = jax.eval_shape(lambda: jax.random.key(0))
    inputs = StepInputs(
        shapes(compiled._params), shapes(compiled._particles), key, shapes(compiled._timestep)
    )

    def run(inputs, state, until):
        with full_precision():
            return loop.run(capacity, inputs, state, until)

    args = inputs, shapes(batch._state), jax.ShapeDtypeStruct((), jnp.int32)
    return Program("", run, args, structures=molecules)


def calc(name: str, atoms: int = 30) -> Program:
    """Return the program that the ASE calculator calls for a structure."""
    from mlip_jax.simulation.calculators.calculator import MLIPCalculator
    from mlip_jax.simulation.calculators.padded import centered

    field = MLIPCalculator(_potential(name)).compiled
    structure = _molecules(1, atoms)[0]
    bucket, (floats, ints) = field.pack(structure, centered(structure))
    evaluation, _, leaves = field._programs

    def calculate(leaves, floats, ints):
        return evaluation(leaves, bucket, floats, ints, False)

    return Program("", calculate, (shapes(leaves), shapes(floats), shapes(ints)))


KINDS = {"train": train, "forces": forces, "relax": relax, "md": md, "calc": calc}


def shapes(tree: Any) -> Any:
    """Return a tree with shapes in the place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def _model(name: str):
    if name == "default":
        config = spice.get_config().model
        return create_model({"name": config.name, "options": dict(config.options)})
    return create_model({"name": name, "options": OPTIONS.get(name, {})})


def _zeros(model) -> Any:
    """Return parameters; only their shapes count."""
    found = jax.eval_shape(lambda: model.init(jax.random.key(0), example_graph()))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found)


def _potential(name: str) -> Potential:
    model = _model(name)
    elements = tuple(range(1, 93))
    return Potential(model, _zeros(model), float(model.cutoff), np.zeros(119), 1.0, elements)


def _budget(molecules: int) -> PaddingBudget:
    edges = molecules * ATOMS * NEIGHBORS
    return PaddingBudget(molecules * ATOMS // 8 * 8 + 8, edges // 128 * 128 + 128, molecules + 1)


def _batch(budget: PaddingBudget) -> Any:
    """Return the shapes of a batch as `batch.build_batch` builds it."""

    def floats(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    n_node, n_edge, n_graph = budget.n_node, budget.n_edge, budget.n_graph
    return example_graph()._replace(
        nodes={
            "positions": floats(n_node, 3),
            "numbers": ints(n_node),
            "forces": floats(n_node, 3),
        },
        edges={"pair_order": ints(n_edge)},
        senders=ints(n_edge),
        receivers=ints(n_edge),
        globals={"energy": floats(n_graph), "charge": floats(n_graph)},
        n_node=ints(n_graph),
        n_edge=ints(n_graph),
    )


def _molecules(count: int, atoms: int) -> list:
    """Return random structures with the density of a drug: at most one atom within 1.25 Å."""
    from ase import Atoms

    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        points = [np.zeros(3)]
        while len(points) < atoms:
            direction = rng.normal(size=3)
            new = points[rng.integers(len(points))] + 1.4 * direction / np.linalg.norm(direction)
            if np.linalg.norm(np.array(points) - new, axis=1).min() > 1.25:
                points.append(new)
        found.append(Atoms(rng.choice([1, 1, 6, 7, 8], atoms), np.array(points)))
    return found

"""ASE calculator of a force field: compiled once per size bucket, reference energies added in float64."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jraph
import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, PropertyNotImplementedError, all_changes
from ase.geometry import wrap_positions
from ase.stress import full_3x3_to_voigt_6_stress

from mlip_jax.graphs.neighbors import Neighbors, neighbor_list
from mlip_jax.potential import Evaluation, Potential, evaluate

_GROWTH = 1.25
_NODE_MULTIPLE, _EDGE_MULTIPLE = 8, 64
# Edges come and go while atoms move: a new shape has room for some more of them.
_EDGE_ROOM = 1.1
# A compiled shape serves structures down to this share of it; smaller ones are worth a program of their own.
_MAX_WASTE = 3


class Shape(NamedTuple):
    """Static shape of a padded structure: atoms (the padding atom included) and directed edges."""

    nodes: int
    edges: int


class MLIPCalculator(Calculator):
    """Energies, forces and stress of a `Potential` for ASE.

    Units are ASE's: energy, free_energy (the same number) and energies (n_atoms,) in eV, forces (n_atoms, 3) in
    eV/Å, stress (6,) in eV/Å³ in Voigt order xx, yy, zz, yz, xz, xy, positive under tension; stress needs all
    three directions to be periodic. All are float64 arrays; energies hold the reference energies and add up to
    energy. The total charge is read from `atoms.info["charge"]`.

    Structures are padded to a few sizes, and the force field is compiled once for each: molecular dynamics of
    one molecule compiles once, and so do molecules of similar size. The neighbour list is made anew on every
    call. Copies and pickles compile again.

    Attributes:
      potential: The force field, parameters on the host.
      dtype: float32, or float64 for all of the calculation. Does not depend on JAX's x64 flag, nor changes it.
      num_compiles: Programs compiled so far.
    """

    implemented_properties = ["energy", "free_energy", "forces", "energies", "stress"]

    def __init__(self, potential: Potential, dtype: str = "float32"):
        """
        Args:
          potential: See `Potential.load`.
          dtype: "float32" or "float64".

        Raises:
          ValueError: Another dtype.
        """
        super().__init__()
        if dtype not in ("float32", "float64"):
            raise ValueError(f'dtype must be "float32" or "float64", received {dtype!r}')
        self.dtype = np.dtype(dtype)
        params = jax.tree.map(lambda leaf: np.asarray(leaf, self.dtype), potential.params)
        self.potential = dataclasses.replace(potential, params=params)
        self._warned_of_charge = False
        self._forget_programs()

    @classmethod
    def from_workdir(cls, path: str | Path, dtype: str = "float32") -> MLIPCalculator:
        """The calculator of a training run's directory, or of a checkpoint directory.

        Raises:
          CheckpointError: Nothing readable is there.
        """
        return cls(Potential.load(path), dtype)

    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes) -> None:
        """Fill `results` with everything that there is for `atoms`, whatever part of it is asked for.

        Raises:
          ValueError: No atoms, positions that are not finite, or an element that the force field never saw.
          PropertyNotImplementedError: Stress of a structure that is not periodic in all directions.
          CalculationFailed: The force field gives NaN or infinite numbers.
        """
        # not through Calculator.calculate, which also looks after a directory on disk
        if atoms is not None:
            self.atoms = atoms.copy()
        if not system_changes and all(name in self.results for name in properties):
            return
        self.results = {}
        atoms = self.atoms
        self._check(atoms, properties)
        charge = _charge(atoms)
        self._check_charge(charge)
        with_stress = bool(atoms.pbc.all())
        graph = self._graph(atoms, charge)
        with jax.enable_x64(self.dtype == np.float64):
            out = jax.device_get(self._run(graph, with_stress))
        self.results = self._results(atoms, out)

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What has changed since the last calculation, as ASE names it, and "charge".

        Compares exactly, whatever `tol` is: ASE's comparison costs as much as all else on the host together.
        """
        old = self.atoms
        if old is None:
            return list(all_changes)
        pairs = {"positions": (old.positions, atoms.positions), "numbers": (old.numbers, atoms.numbers),
                 "cell": (old.cell.array, atoms.cell.array), "pbc": (old.pbc, atoms.pbc),
                 "charge": (_charge(old), _charge(atoms))}
        return [name for name, (a, b) in pairs.items() if not np.array_equal(a, b)]

    def _check(self, atoms, properties) -> None:
        if len(atoms) == 0:
            raise ValueError("the structure has no atoms; a force field needs at least one")
        bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
        if len(bad):
            raise ValueError(
                f"positions must be finite, received NaN or infinite values for {len(bad)} of {len(atoms)} atoms, "
                f"the first of them atom {bad[0]}: {atoms.positions[bad[0]]}")
        self.potential.check_elements(atoms.numbers)
        if "stress" in properties and not atoms.pbc.all():
            raise PropertyNotImplementedError(
                f"stress needs a cell that is periodic in all three directions, received pbc={atoms.pbc.tolist()}")

    def _check_charge(self, charge: float) -> None:
        known = self.potential.metadata.get("statistics", {}).get("charges") or [0.0]
        if charge == 0 or charge in known or self._warned_of_charge:
            return
        self._warned_of_charge = True
        warnings.warn(
            f"atoms.info['charge'] is {charge:g}, but this force field was trained on total charges "
            f"{', '.join(f'{c:g}' for c in known)} only; do not expect its energies to be right",
            UserWarning, stacklevel=2)

    def _results(self, atoms, out: Evaluation) -> dict[str, Any]:
        n = len(atoms)
        energies = self.potential.reference_energies[atoms.numbers] + out.energies[:n].astype(np.float64)
        forces = out.forces[:n].astype(np.float64)
        energy = float(energies.sum())
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise CalculationFailed(
                "the force field gives NaN or infinite energies or forces here; are atoms on top of each other, or "
                "has the dynamics blown up?")
        results = {"energy": energy, "free_energy": energy, "energies": energies, "forces": forces}
        if out.stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(out.stress[0].astype(np.float64))
        return results

    def _graph(self, atoms, charge) -> jraph.GraphsTuple:
        pbc = atoms.pbc
        cell = atoms.cell.array if pbc.any() else None
        # Close to the origin first: float32 has fewer digits for a molecule that drifted away.
        if cell is None:
            positions = atoms.positions - atoms.positions.sum(axis=0) / len(atoms)
            neighbors = neighbor_list(positions, self.potential.cutoff)
        else:
            positions = wrap_positions(atoms.positions, cell, pbc, eps=0)
            neighbors = neighbor_list(positions, self.potential.cutoff, cell, pbc)
        shape = self._shape(len(atoms), len(neighbors.senders), tuple(pbc))
        return padded_graph(atoms.numbers, positions, neighbors, shape, charge, cell, self.dtype)

    def _shape(self, n_node: int, n_edge: int, pbc: tuple) -> Shape:
        """The tightest compiled shape that holds the structure and is not far too large, or else a new one."""
        known = self._shapes.setdefault(pbc, set())
        nodes = n_node + 1
        fitting = [s for s in known if nodes <= s.nodes <= _MAX_WASTE * nodes
                   and n_edge <= s.edges <= _MAX_WASTE * n_edge]
        if fitting:
            return min(fitting, key=lambda s: (s.edges, s.nodes))
        edges = int(np.ceil(n_edge * _EDGE_ROOM))
        if not any(pbc):
            edges = min(edges, n_node * (n_node - 1))
        shape = Shape(bucket(nodes, _NODE_MULTIPLE), bucket(edges, _EDGE_MULTIPLE))
        known.add(shape)
        return shape

    def _forget_programs(self) -> None:
        self.num_compiles = 0
        self._shapes: dict[tuple, set[Shape]] = {}
        self._program = None

    def _run(self, graph, with_stress: bool) -> Evaluation:
        if self._program is None:
            # Parameters are an argument: as fast as constants, and not copied into each program.
            self._program = jax.jit(self._traced, static_argnums=2), jax.device_put(self.potential.params)
        function, params = self._program
        return function(params, graph, with_stress)

    def _traced(self, params, graph, with_stress):
        self.num_compiles += 1  # runs when JAX traces, which it does once for each program
        out = evaluate(self.potential.model, params, graph, self.potential.energy_scale, with_stress)
        return out._replace(energy=None)  # the sum is made on the host, in float64

    def __getstate__(self):
        return {**self.__dict__, "num_compiles": 0, "_shapes": {}, "_program": None}


def bucket(size: int, multiple: int) -> int:
    """The smallest bucket that holds `size`; buckets are multiples of `multiple` that grow by about 1.25."""
    edge = multiple
    while edge < size:
        edge = -(-max(int(edge * _GROWTH), edge + 1) // multiple) * multiple
    return edge


def padded_graph(numbers: np.ndarray, positions: np.ndarray, neighbors: Neighbors, shape: Shape, charge: float,
                 cell: np.ndarray | None, dtype) -> jraph.GraphsTuple:
    """One structure and one padding graph as graphs/graph.py says; what build_batch makes of it, with less work.

    Args:
      numbers, positions: (n_atoms,) and (n_atoms, 3) in Å.
      neighbors: Of these positions.
      shape: Holds n_atoms + 1 atoms and all edges; its number of edges is even.
      charge: e. cell: (3, 3) in Å, or None for open boundaries.
      dtype: Of all that is floating.
    """
    n, e = len(numbers), len(neighbors.senders)

    def padded(values, length, fill, dtype):
        out = np.full((length, *values.shape[1:]), fill, dtype)
        out[:len(values)] = values
        return out

    # the reverse of the padding edge at place p of the first half stands at place p of the second
    half, idle = e // 2, np.arange(e, shape.edges, dtype=np.int32)
    order = neighbors.pair_order
    edges = {"pair_order": np.concatenate([order[:half], idle[0::2], order[half:], idle[1::2]])}
    globals_ = {"charge": np.array([charge, 0.0], dtype)}
    if cell is not None:
        edges["shifts"] = padded(neighbors.shifts, shape.edges, 0, np.int32)
        globals_["cell"] = np.stack([cell, np.zeros((3, 3))]).astype(dtype)
    return jraph.GraphsTuple(
        nodes={"positions": padded(positions, shape.nodes, 0, dtype),
               "numbers": padded(numbers, shape.nodes, 0, np.int32)},
        edges=edges, globals=globals_,
        senders=padded(neighbors.senders, shape.edges, n, np.int32),
        receivers=padded(neighbors.receivers, shape.edges, n, np.int32),
        n_node=np.array([n, shape.nodes - n], np.int32), n_edge=np.array([e, shape.edges - e], np.int32))


def _charge(atoms) -> float:
    return float(atoms.info.get("charge", 0.0))

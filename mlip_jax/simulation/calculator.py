"""ASE calculator of a force field: compiled once per size bucket, reference energies added in float64."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, PropertyNotImplementedError, all_changes
from ase.geometry import wrap_positions
from ase.stress import full_3x3_to_voigt_6_stress

from mlip_jax.graphs.neighbors import long_range_list, neighbor_list
from mlip_jax.importers import schnetpack, so3lr
from mlip_jax.potential import Potential, evaluate, example_graph
from mlip_jax.simulation.packing import Shape, pack, unpack

_GROWTH = 1.25
_NODE_MULTIPLE, _EDGE_MULTIPLE = 8, 64
# Edges and pairs come and go while atoms move: a new shape has room for some more of them.
_ROOM = 1.1
# A compiled shape serves structures down to this share of it; smaller ones are worth a program of their own.
_MAX_WASTE = 3


class MLIPCalculator(Calculator):
    """Energies, forces and stress of a `Potential` for ASE.

    Units are ASE's: energy, free_energy (the same number) and energies (n_atoms,) in eV, forces (n_atoms, 3) in
    eV/Å, stress (6,) in eV/Å³ in Voigt order xx, yy, zz, yz, xz, xy, positive under tension; stress needs all
    three directions to be periodic. All are float64 arrays; energies hold the reference energies and add up to
    energy. The total charge is read from `atoms.info["charge"]`, the number of unpaired electrons from
    `atoms.info["num_unpaired_electrons"]`.

    Where the force field predicts partial charges there are also charges (n_atoms,) in e and, for structures without
    periodicity, dipole (3,) in e·Å about the mean of the positions (for a neutral molecule: about any point).

    Structures are padded to a few sizes, and the force field is compiled once for each: molecular dynamics of
    one molecule compiles once, and so do molecules of similar size. The neighbour list is made anew on every
    call. Copies and pickles compile again.

    Attributes:
      potential: The force field, parameters on the host.
      dtype: float32, or float64 for all of the calculation. Does not depend on JAX's x64 flag, nor changes it.
      num_compiles: Programs compiled so far.
      implemented_properties: Of this force field.
      predictions: What the force field predicts for each atom of the last structure besides energies, (n_atoms,) each,
        by name: "partial_charges" (e), "hirshfeld_ratios"; empty if nothing.
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
        self._warned_of = set()
        self.predictions: dict[str, np.ndarray] = {}
        self._forget_programs()
        self._long_range_cutoff = self.potential.long_range_cutoff
        self._predicted = self._predictions()
        if "partial_charges" in self._predicted:
            self.implemented_properties = [*self.implemented_properties, "charges", "dipole"]

    def _predictions(self) -> tuple[str, ...]:
        """Names of what the model predicts for each atom besides energies; traces it, compiles nothing."""
        with jax.enable_x64(self.dtype == np.float64):
            out = jax.eval_shape(self.potential.model.apply, self.potential.params, example_graph(self.dtype))
        return tuple(sorted(out.properties))

    @classmethod
    def from_workdir(cls, path: str | Path, dtype: str = "float32") -> MLIPCalculator:
        """The calculator of a training run's directory, or of a checkpoint directory.

        Raises:
          CheckpointError: Nothing readable is there.
        """
        return cls(Potential.load(path), dtype)

    @classmethod
    def from_schnetpack(cls, path: str | Path, dtype: str = "float32", **options) -> MLIPCalculator:
        """The calculator of a PaiNN or SchNet that SchNetPack 2 trained, from its saved weights.

        Save them in SchNetPack's environment with `safetensors.torch.save_file(model.state_dict(),
        "weights.safetensors")` or `numpy.savez("weights.npz", **{k: v.cpu().numpy() for k, v in
        model.state_dict().items()})`, where `model` is what `torch.load("best_model", weights_only=False)` gives. The
        file best_model itself is not opened: it is a pickle, and a pickle can run any code when it is read.

        Args:
          path: .npz or .safetensors.
          dtype: "float32" or "float64".
          **options: What the weights do not say, see importers/schnetpack.py: energy_unit, elements, activation, ...

        Raises:
          FileNotFoundError: No such file.
          WeightsError (a ValueError): A pickle, a damaged file, or weights that have no counterpart.
        """
        return cls(schnetpack.load(path, **options), dtype)

    @classmethod
    def from_so3lr(cls, path: str | Path = "params.pkl", dtype: str = "float32",
                   long_range_cutoff: float | None = so3lr.LONG_RANGE_CUTOFF) -> MLIPCalculator:
        """The calculator of SO3LR, a pretrained force field for molecules of H, C, N, O, F, P, S and Cl.

        Args:
          path: params.pkl of the SO3LR release, a pickle; the unpickler admits nothing but arrays.
          dtype: "float32" or "float64".
          long_range_cutoff: Å, of electrostatics and dispersion; None: all pairs, for open boundaries alone.

        Raises:
          FileNotFoundError: No such file.
          ValueError: It holds no weights, or others than SO3LR's.
        """
        return cls(so3lr.load(path, long_range_cutoff), dtype)

    def calculate(self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes) -> None:
        """Fill `results` with everything that there is for `atoms`, whatever part of it is asked for.

        Raises:
          ValueError: No atoms, positions that are not finite, an element that the force field never saw, or a
            periodic structure for a force field whose long-range terms have no cutoff.
          PropertyNotImplementedError: Stress of a structure that is not periodic in all directions, or the dipole
            of one that is periodic.
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
        positions = _centred(atoms)
        shape, packed = self._pack(atoms, positions)
        with jax.enable_x64(self.dtype == np.float64):
            out, stress = self._run(shape, *packed, bool(atoms.pbc.all()))
        self.results = self._results(atoms, positions, np.asarray(out)[:len(atoms)].astype(np.float64), stress)

    def check_state(self, atoms: Atoms, tol: float = 0.0) -> list[str]:
        """What has changed since the last calculation, as ASE names it, "charge" and "num_unpaired_electrons".

        Compares exactly, whatever `tol` is: ASE's comparison costs as much as all else on the host together.
        """
        old = self.atoms
        if old is None:
            return list(all_changes)
        arrays = {"positions": (old.positions, atoms.positions), "numbers": (old.numbers, atoms.numbers),
                  "cell": (old.cell.array, atoms.cell.array), "pbc": (old.pbc, atoms.pbc)}
        # their bytes: NumPy's own comparison is ten times slower for small arrays
        changed = [name for name, (a, b) in arrays.items() if a.tobytes() != b.tobytes()]
        states = ("charge", "num_unpaired_electrons")
        return changed + [name for name in states if _state(old, name) != _state(atoms, name)]

    def _check(self, atoms, properties) -> None:
        if len(atoms) == 0:
            raise ValueError("the structure has no atoms; a force field needs at least one")
        if not np.isfinite(atoms.positions).all():
            bad = np.flatnonzero(~np.isfinite(atoms.positions).all(axis=1))
            raise ValueError(
                f"positions must be finite, received NaN or infinite values for {len(bad)} of {len(atoms)} atoms, "
                f"the first of them atom {bad[0]}: {atoms.positions[bad[0]]}")
        if atoms.pbc.any() and not atoms.cell.array.any(axis=1)[atoms.pbc].all():
            raise ValueError(f"pbc is {atoms.pbc.tolist()} but a periodic direction has no lattice vector: "
                             f"{atoms.cell.array.tolist()}; give the cell, or set pbc to False there")
        self.potential.check_elements(atoms.numbers)
        if "stress" in properties and not atoms.pbc.all():
            raise PropertyNotImplementedError(
                f"stress needs a cell that is periodic in all three directions, received pbc={atoms.pbc.tolist()}")
        if "dipole" in properties and atoms.pbc.any():
            raise PropertyNotImplementedError(
                f"a periodic structure has no dipole moment, received pbc={atoms.pbc.tolist()}")
        self._check_state_known(atoms, "charge", "charges", "total charges")
        self._check_state_known(atoms, "num_unpaired_electrons", "spins", "numbers of unpaired electrons")

    def _check_state_known(self, atoms, key: str, statistic: str, words: str) -> None:
        value = _state(atoms, key)
        if value == 0 or key in self._warned_of:
            return
        known = self.potential.metadata.get("statistics", {}).get(statistic, [0.0])
        if known is None or value in (known or [0.0]):  # None: not known of an imported force field
            return
        self._warned_of.add(key)
        warnings.warn(
            f"atoms.info['{key}'] is {value:g}, but this force field was trained on {words} "
            f"{', '.join(f'{c:g}' for c in known or [0.0])} only; do not expect its energies to be right",
            UserWarning, stacklevel=2)

    def _results(self, atoms, positions, out: np.ndarray, stress) -> dict[str, Any]:
        """Results from atomic energies, forces and predictions side by side, (n_atoms, 4 + predictions)."""
        energies, forces = self.potential.reference_energies[atoms.numbers] + out[:, 0], np.array(out[:, 1:4])
        energy = float(energies.sum())
        if not np.isfinite(out).all():
            raise CalculationFailed(
                "the force field gives NaN or infinite energies or forces here; are atoms on top of each other, or "
                "has the dynamics blown up?")
        results = {"energy": energy, "free_energy": energy, "energies": energies, "forces": forces}
        if stress is not None:
            results["stress"] = full_3x3_to_voigt_6_stress(np.asarray(stress)[0].astype(np.float64))
        self.predictions = {name: np.array(out[:, 4 + n]) for n, name in enumerate(self._predicted)}
        if "partial_charges" in self._predicted:
            charges = results["charges"] = self.predictions["partial_charges"].copy()
            if not atoms.pbc.any():
                results["dipole"] = charges @ positions
        return results

    def _pack(self, atoms, positions) -> tuple[Shape, tuple[np.ndarray, np.ndarray]]:
        pbc = atoms.pbc
        periodic = bool(pbc.any())
        box = (atoms.cell.array, pbc) if periodic else (None, None)
        neighbors = neighbor_list(positions, self.potential.cutoff, *box)
        _check_apart(positions, neighbors)
        reach = self._long_range_cutoff
        long_range = None if reach is None else long_range_list(positions, reach, *box)
        shape = self._shape(len(atoms), len(neighbors.senders), None if reach is None else len(long_range[0]), periodic)
        return shape, pack(
            atoms.numbers, positions, neighbors, shape, self.dtype, charge=_state(atoms, "charge"),
            spin=_state(atoms, "num_unpaired_electrons"), cell=box[0], long_range=long_range)

    def _shape(self, n_node: int, n_edge: int, n_pair: int | None, periodic: bool) -> Shape:
        """The tightest compiled shape that holds the structure and is not far too large, or else a new one."""
        nodes = n_node + 1
        fitting = [s for s in self._shapes if s.periodic == periodic and nodes <= s.nodes <= _MAX_WASTE * nodes
                   and n_edge <= s.edges <= _MAX_WASTE * n_edge
                   and (n_pair is None or n_pair <= s.pairs <= _MAX_WASTE ** 2 * n_pair)]
        if fitting:
            return min(fitting, key=lambda s: (s.edges, s.pairs or 0, s.nodes))
        nodes, edges = bucket(nodes, _NODE_MULTIPLE), int(np.ceil(n_edge * _ROOM))
        if not periodic:
            edges = min(edges, n_node * (n_node - 1))
        shape = Shape(nodes, bucket(edges, _EDGE_MULTIPLE), self._room_for_pairs(n_node, nodes, n_pair, periodic),
                      periodic)
        self._shapes.add(shape)
        return shape

    def _room_for_pairs(self, n_node, nodes, n_pair, periodic) -> int | None:
        if n_pair is None:
            return None
        if np.isinf(self._long_range_cutoff):
            pairs = (nodes - 1) * (nodes - 2) // 2  # of any structure that there are atoms for
        else:
            pairs = int(np.ceil(n_pair * _ROOM))
            pairs = pairs if periodic else min(pairs, n_node * (n_node - 1) // 2)
        return bucket(pairs, _EDGE_MULTIPLE)

    def _forget_programs(self) -> None:
        self.num_compiles = 0
        self._shapes: set[Shape] = set()
        self._program = None

    def _run(self, shape: Shape, floats: np.ndarray, ints: np.ndarray, with_stress: bool):
        if self._program is None:
            # Parameters are an argument: as fast as constants, and not copied into each program.
            leaves, structure = jax.tree.flatten(self.potential.params)
            traced = functools.partial(self._traced, structure)
            self._program = jax.jit(traced, static_argnums=(1, 4)), jax.device_put(leaves)
        function, leaves = self._program
        return function(leaves, shape, floats, ints, with_stress)

    def _traced(self, structure, leaves, shape, floats, ints, with_stress):
        """Atomic energies, forces and predictions side by side, (nodes, 4 + predictions), and the stress or None."""
        self.num_compiles += 1  # runs when JAX traces, which it does once for each program
        params, graph = jax.tree.unflatten(structure, leaves), unpack(shape, floats, ints)
        out = evaluate(self.potential.model, params, graph, self.potential.energy_scale, with_stress)
        columns = [out.energies, *out.forces.T, *(out.properties[name] for name in self._predicted)]
        # the sum of the energies is made on the host, in float64
        return jnp.stack(columns, axis=1), out.stress

    def __getstate__(self):
        return {**self.__dict__, "num_compiles": 0, "_shapes": set(), "_program": None}


def bucket(size: int, multiple: int) -> int:
    """The smallest bucket that holds `size`; buckets are multiples of `multiple` that grow by about 1.25."""
    edge = multiple
    while edge < size:
        edge = -(-max(int(edge * _GROWTH), edge + 1) // multiple) * multiple
    return edge


def _centred(atoms) -> np.ndarray:
    """Positions close to the origin: float32 has fewer digits for a molecule that drifted away."""
    positions = atoms.positions
    if atoms.pbc.any():
        positions = wrap_positions(positions, atoms.cell.array, atoms.pbc, eps=0)
    return positions if atoms.pbc.all() else positions - positions.sum(axis=0) / len(atoms)


def _check_apart(positions, neighbors) -> None:
    """Raise CalculationFailed for two atoms in one place: an edge of length zero would pass for padding."""
    same = (positions[neighbors.senders] == positions[neighbors.receivers]).all(axis=1)
    if neighbors.shifts is not None:
        same &= ~neighbors.shifts.any(axis=1)
    if same.any():
        edge = int(np.argmax(same))
        raise CalculationFailed(f"atoms {neighbors.receivers[edge]} and {neighbors.senders[edge]} are in the same "
                                "place; forces are not defined there")


def _state(atoms, name: str) -> float:
    given = atoms.info.get(name, 0.0)
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):
        raise ValueError(f"atoms.info[{name!r}] must be a finite number, received {given!r}; leave it out for 0")
    return value

"""ASE calculator of a force field: compiled once per size bucket, reference energies added in float64."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_changes

from mlip_jax.importers import load_force_field, schnetpack, so3lr
from mlip_jax.potential import Potential, evaluate, hessian_columns
from mlip_jax.simulation.calculators.packing import unpack
from mlip_jax.simulation.calculators.padded import PaddedCalculator, centred
from mlip_jax.simulation.energies import invariant_features
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.domain import Domain


class MLIPCalculator(PaddedCalculator):
    """Energies, forces and stress of a `Potential` for ASE.

    Units are ASE's: energy, free_energy (the same number) and energies (n_atoms,) in eV, forces (n_atoms, 3) in
    eV/Å, stress (6,) in eV/Å³ in Voigt order xx, yy, zz, yz, xz, xy, positive under tension; stress needs all
    three directions to be periodic. All are float64 arrays; energies hold the reference energies and add up to
    energy. The total charge is read from `atoms.info["charge"]`, the number of unpaired electrons from
    `atoms.info["num_unpaired_electrons"]`.

    Where the force field predicts partial charges there are also charges (n_atoms,) in e and, for structures without
    periodicity, dipole (3,) in e·Å about the mean of the positions (for a neutral molecule: about any point).

    `get_hessian` and `get_vibrations` give exact second derivatives. One calculator may be used from several threads,
    one at a time computes; it can be copied, and pickled to other processes.

    Where the domain of the force field is known (domain.npz of a training run) there are also "outside_domain", whether
    an atom lies farther from those of training than nearly all of validation; "domain_distance" (n_atoms,), 1 at the
    border; and "forces_expected_error" (n_atoms,) in eV/Å. `calc.get_property("outside_domain", atoms)` gives them;
    they cost a forward pass and are computed when they are asked for.

    Structures are padded to a few sizes, and the force field is compiled once for each: molecular dynamics of
    one molecule compiles once, and so do molecules of similar size. The neighbour list is made anew on every
    call. Copies and pickles compile again.

    Attributes:
      potential: The force field, parameters on the host.
      domain: Of the force field, or None.
      dtype: float32, or float64 for all of the calculation. Does not depend on JAX's x64 flag, nor changes it.
      num_compiles: Programs compiled so far.
      implemented_properties: Of this force field.
      predictions: What the force field predicts for each atom of the last structure besides energies, (n_atoms,) each,
        by name: "partial_charges" (e), "hirshfeld_ratios"; empty if nothing.
    """

    def __init__(self, potential: Potential | str | Path, dtype: str = "float32", domain: Domain | None = None):
        """
        Args:
          potential: A force field, or where it lies (importers.load_force_field), for programs that hand over texts
            alone: "runs/spice", "schnetpack:painn.safetensors".
          dtype: "float32" or "float64".
          domain: Of the force field.

        Raises:
          ValueError: Another dtype.
          CheckpointError, FileNotFoundError: Nothing readable is there.
        """
        if not isinstance(potential, Potential):
            potential = load_force_field(str(potential))
        super().__init__([potential], dtype)
        self.potential = self._members[0]
        self.domain = domain
        if domain is not None:
            self.implemented_properties = [*self.implemented_properties, *atom_domain.properties(domain)]

    @classmethod
    def from_workdir(cls, path: str | Path, dtype: str = "float32") -> MLIPCalculator:
        """The calculator of a training run's directory, or of a checkpoint directory.

        The domain is known if the directory is that of a run that has come to its report.

        Raises:
          CheckpointError: Nothing readable is there.
        """
        return cls(Potential.load(path), dtype, atom_domain.of_workdir(path))

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
        """As PaddedCalculator's; what is known of the domain is computed if it is among `properties`."""
        wanted = self.domain is not None and not set(properties).isdisjoint(atom_domain.properties(self.domain))
        own = atom_domain.properties(self.domain) if wanted else ()
        super().calculate(atoms, ["energy", *(p for p in properties if p not in own)], system_changes)
        if wanted:
            self.results = self.results | atom_domain.results(self.domain, self._features(self.atoms))

    def _features(self, atoms: Atoms) -> np.ndarray:
        """Invariant features of the atoms, (n_atoms, F)."""
        bucket, packed = self._pack(atoms, centred(atoms))
        with jax.enable_x64(self.dtype == np.float64):
            features = invariant_features(self.potential.model, self.potential.params, unpack(bucket, *packed))
            return np.asarray(features)[:len(atoms)]

    def _params(self):
        return self.potential.params

    def _evaluate(self, params, graph, with_stress):
        return evaluate(self.potential.model, params, graph, self.potential.energy_scale, with_stress)

    def _hessian_columns(self, params, graph, directions):
        return hessian_columns(self.potential.model, params, graph, self.potential.energy_scale, directions)

    def _results(self, atoms, positions, out, stress):
        results, self.predictions = self._results_of(self.potential, atoms, positions, out, stress)
        return results

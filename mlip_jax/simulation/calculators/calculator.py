"""ASE calculator of a force field, compiled once per size bucket.

A calculation has these steps:

1. check the structure: finite positions, known elements, a complete cell (`padded._check`);
2. center or wrap the positions, which keeps digits in float32 (`padded.centered`);
3. build the neighbor list and choose a size bucket for the structure (`CompiledForceField.pack`);
4. copy everything into two padded flat arrays (`packing.pack`);
5. run the compiled program, which restores the graph (`packing.unpack`) and evaluates the model
   (`CompiledForceField.run`);
6. remove the padding and add the reference energies in float64 (`padded._results_of`);
7. if a property of the domain is requested, compute the features and their distances.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from mlip_jax.defaults.bundled import BUNDLED
from mlip_jax.importers import load_force_field, published, schnetpack, so3lr
from mlip_jax.importers.catalog.added_terms import add_terms, split_term_options
from mlip_jax.potential import Potential, evaluate, hessian_columns
from mlip_jax.simulation.calculators.packing import unpack
from mlip_jax.simulation.calculators.padded import PaddedCalculator, centered
from mlip_jax.simulation.energies import invariant_features
from mlip_jax.simulation.trust import atom_domain
from mlip_jax.simulation.trust.coverage import unseen_states
from mlip_jax.simulation.trust.domain import Domain


@dataclasses.dataclass(frozen=True)
class _OneForceField:
    """`PureForceField` of one model."""

    model: nn.Module
    energy_scale: float

    def evaluate(self, params, graph, with_stress):
        return evaluate(self.model, params, graph, self.energy_scale, with_stress)

    def hessian_columns(self, params, graph, directions):
        return hessian_columns(self.model, params, graph, self.energy_scale, directions)


class MLIPCalculator(PaddedCalculator):
    """Calculator for ASE that evaluates one `Potential`.

    All results are float64 arrays in ASE's units:

        energy            ()             eV, including the reference energies
        free_energy       ()             eV, equal to energy
        energies          (n_atoms,)     eV, including the reference energies; the sum is energy
        forces            (n_atoms, 3)   eV/Å
        stress            (6,)           eV/Å³, Voigt order xx, yy, zz, yz, xz, xy, positive under
                                         tension; requires periodicity in all three directions
        charges           (n_atoms,)     e, if the force field predicts partial charges
        dipole            (3,)           e·Å about the mean of the positions (if neutral, about any
                                         point); as charges, and not for periodic structures

    Forces are minus the gradient of the energy unless `conservative` is False. Then a
    `NonConservativeWarning` is issued once, at creation; energies drift in dynamics, and finite
    differences of the energy do not give the forces. If the force field predicts forces directly,
    stress and Hessian remain exact derivatives of its energy; otherwise it has neither.

    The total charge is read from `atoms.info["charge"]` and the number of unpaired electrons from
    `atoms.info["num_unpaired_electrons"]`, or from their other usual names, such as "total_charge",
    "spin" and "multiplicity". Without any, the initial magnetic moments of a molecule state its
    unpaired electrons.

    If the domain of the force field is known (domain.npz of a training run), three more properties
    are available through, for example, `calc.get_property("outside_domain", atoms)`. They cost a
    forward pass and are computed only on request:

        outside_domain          whether an atom is farther from the training atoms than nearly all
                                validation atoms, or the charge, the number of unpaired electrons or
                                periodicity never occurs in the training data
        domain_distance         (n_atoms,), 1 at the border
        forces_expected_error   (n_atoms,) eV/Å; NaN outside, where no validation data calibrate it

    `get_hessian` and `get_vibrations` return exact second derivatives. Several threads may share a
    calculator; they compute one at a time. A calculator can be copied, and pickled to other
    processes. Copies and unpickled calculators compile again.

    Structures are padded to a few sizes and the force field is compiled once per size: molecular
    dynamics of one molecule compiles once, and so do molecules of similar size. The neighbor list
    is rebuilt on every call.

    Attributes:
      potential: The force field, with its parameters on the host.
      domain: Domain of the force field, or None.
      dtype: float32, or float64 for the whole calculation. Independent of JAX's x64 flag, which is
        left unchanged.
      conservative: Whether forces are minus the gradient of the energy.
      num_compiles: Number of compiled programs used so far.
      compiled: Compiled programs, shared by calculators with equal settings.
      implemented_properties: Names of the properties of this force field.
      predictions: Per-atom predictions other than energies for the last structure, (n_atoms,) each,
        by name: "partial_charges" (e), "hirshfeld_ratios"; empty if there are none.
    """

    def __init__(
        self,
        potential: Potential | Calculator | str | Path,
        dtype: str = "float32",
        domain: Domain | None = None,
    ):
        """Create a calculator.

        Args:
          potential: Force field in any form that `importers.load_force_field` accepts:
            "runs/spice", "X.model", "sevennet-0", another calculator.
          dtype: "float32" or "float64".
          domain: Domain of the force field. By default that of its workdir or calculator, if any.

        Raises:
          ValueError: If dtype is neither of the two.
          CheckpointError, FileNotFoundError: If there is no readable force field at the location.
        """
        domain = atom_domain.of(potential) if domain is None else domain
        super().__init__([load_force_field(potential)], dtype)
        self.potential = self._members[0]
        self.domain = domain
        if domain is not None:
            self.implemented_properties = [
                *self.implemented_properties,
                *atom_domain.properties(domain),
            ]

    @classmethod
    def load(cls, force_field: str | Path, dtype: str = "float32", **options) -> MLIPCalculator:
        """Create a calculator from a workdir, a file of another program, or a name.

            MLIPCalculator.load("X.model", head="omol")
            MLIPCalculator.load("checkpoint.pth", modality="PBE")
            MLIPCalculator.load("runs/oxides", dispersion="pbe")

        Args:
          force_field: Path or name, see `importers.load_force_field`.
          dtype: "float32" or "float64".
          **options: Options of the importer, see the function `load` of its file in
            mlip_jax/importers. `dispersion="pbe"` adds the D3(BJ) dispersion of a functional to any
            force field.

        Raises:
          CheckpointError, ValueError, FileNotFoundError: There is no readable force field, or it has
            a part that is not supported.
        """
        if not options:
            return cls(force_field, dtype)
        return cls(load_force_field(force_field, **options), dtype, atom_domain.of(force_field))

    @classmethod
    def pretrained(cls, name: str = BUNDLED, dtype: str = "float32", **options) -> MLIPCalculator:
        """Create a calculator of a published force field, by default that of this package.

        The file is downloaded once into a cache, or taken from the Python package that contains it.
        License and citation are logged.

            atoms = from_smiles("CC(=O)Oc1ccccc1C(=O)O")
            atoms.calc = MLIPCalculator.pretrained()

        Args:
          name: Name in the list of `python -m mlip_jax.main --config=configs/published.py`.
          dtype: "float32" or "float64".
          **options: `modality` of SevenNet or `head` of MACE, for force fields with several;
            `dispersion` as in `load`.

        Raises:
          ValueError: Unknown name, or the file is not the published one.
          DownloadError (an OSError): The file cannot be downloaded.
        """
        options, of_terms = split_term_options(options)
        potential = add_terms(published.load(name, **options), of_terms)
        return cls(potential, dtype, atom_domain.load_domain(name))

    @classmethod
    def from_workdir(cls, path: str | Path, dtype: str = "float32") -> MLIPCalculator:
        """Create a calculator from the directory of a training run or of a checkpoint.

        The domain is known if the training run has finished its report.

        Raises:
          CheckpointError: If the directory contains no readable force field.
        """
        return cls(Potential.load(path), dtype, atom_domain.load_domain(path))

    @classmethod
    def from_schnetpack(cls, path: str | Path, dtype: str = "float32", **options) -> MLIPCalculator:
        """Create a calculator from a file of SchNetPack 2 with a PaiNN or SchNet.

        Args:
          path: File with the model (best_inference_model, .task, .ckpt), or its weights as .npz or
            .safetensors.
          dtype: "float32" or "float64".
          **options: Settings that the weights do not contain, see importers/schnetpack.py:
            energy_unit, elements, activation, ...

        Raises:
          FileNotFoundError: If the file does not exist.
          WeightsError (a ValueError): If the file is corrupted, or if weights have no counterpart
            here.
        """
        return cls(schnetpack.load(path, **options), dtype)

    @classmethod
    def from_so3lr(
        cls,
        path: str | Path = "params.pkl",
        dtype: str = "float32",
        long_range_cutoff: float | None = so3lr.LONG_RANGE_CUTOFF,
    ) -> MLIPCalculator:
        """Create a calculator of SO3LR, a pretrained force field for H, C, N, O, F, P, S and Cl.

        Args:
          path: params.pkl of the SO3LR release, or so3lr.model of so3krates-torch. No code in the
            files is run.
          dtype: "float32" or "float64".
          long_range_cutoff: Cutoff of electrostatics and dispersion (Å). None includes all pairs;
            non-periodic systems only.

        Raises:
          FileNotFoundError: If the file does not exist.
          ValueError: If the file contains no weights, or weights of another model than SO3LR.
        """
        return cls(so3lr.load(path, long_range_cutoff), dtype)

    def calculate(
        self, atoms: Atoms | None = None, properties=("energy",), system_changes=all_changes
    ) -> None:
        """Fill `results` as `PaddedCalculator.calculate` does.

        Properties of the domain are computed only if `properties` requests one of them.
        """
        needs_domain = self.domain is not None and not set(properties).isdisjoint(
            atom_domain.properties(self.domain)
        )
        # the base class does not know the properties of the domain
        domain_properties = atom_domain.properties(self.domain) if needs_domain else ()
        super().calculate(
            atoms,
            ["energy", *(p for p in properties if p not in domain_properties)],
            system_changes,
        )
        if needs_domain:
            self.results = self.results | atom_domain.results(
                self.domain,
                self._features(self.atoms),
                unseen=bool(unseen_states(self.atoms, self._members)),
            )

    def _features(self, atoms: Atoms) -> np.ndarray:
        """Compute the invariant features of the atoms, (n_atoms, F)."""
        bucket, packed = self.compiled.pack(atoms, centered(atoms))
        with jax.enable_x64(self.dtype == np.float64):
            features = invariant_features(
                self.potential.model, self.potential.params, unpack(bucket, *packed)
            )
            # (nodes, F) -> (n_atoms, F), without padding
            return np.asarray(features)[: len(atoms)]

    def _params(self):
        return self.potential.params

    def _force_field(self):
        return _OneForceField(self.potential.model, self.potential.energy_scale)

    def _results(self, atoms, positions, out, stress):
        results, self.predictions = self._results_of(self.potential, atoms, positions, out, stress)
        return results

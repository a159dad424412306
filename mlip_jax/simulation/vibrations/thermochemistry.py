"""Zero-point energies and free energies from frequencies, by ase.thermochemistry."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
from ase import Atoms, units
from ase.thermochemistry import HarmonicThermo, IdealGasThermo

IDEAL_GAS, HARMONIC = "ideal_gas", "harmonic"
APPROXIMATIONS = (IDEAL_GAS, HARMONIC)


@dataclasses.dataclass(frozen=True)
class Thermochemistry:
    """Thermodynamic quantities of a molecule. Energies include the energy of the minimum.

    Imaginary modes contribute nothing.

    Attributes:
      zero_point_energy: Energy of the vibrations at 0 K (eV).
      enthalpy: Enthalpy; internal energy in the harmonic approximation (eV).
      entropy: Entropy (eV/K).
      free_energy: Gibbs free energy; Helmholtz free energy in the harmonic approximation (eV).
      temperature: Temperature (K).
      pressure: Pressure (bar); NaN in the harmonic approximation.
      symmetry_number: Rotational symmetry number.
    """

    zero_point_energy: float
    enthalpy: float
    entropy: float
    free_energy: float
    temperature: float
    pressure: float
    symmetry_number: int


def thermochemistry(
    atoms: Atoms,
    energy: float,
    frequencies: np.ndarray,
    *,
    linear: bool,
    symmetry_number: int,
    unpaired: float = 0.0,
    temperature: float = 298.15,
    pressure: float = 1.01325,
    approximation: str = IDEAL_GAS,
) -> Thermochemistry:
    """Compute the thermodynamic quantities of a molecule at a minimum.

    Args:
      atoms: Molecule with its masses.
      energy: Energy of the minimum (eV).
      frequencies: Wave numbers (1/cm), (K,); negative ones are imaginary and left out.
      linear: Whether the molecule is linear.
      symmetry_number: Rotational symmetry number.
      unpaired: Number of unpaired electrons.
      temperature: Temperature (K).
      pressure: Pressure (bar), for an ideal gas.
      approximation: "ideal_gas" (translation, rigid rotor, harmonic vibrations) or "harmonic"
        (vibrations alone).
    """
    quanta = units.invcm * frequencies[frequencies > 0]  # eV
    if approximation == HARMONIC:
        thermo = HarmonicThermo(vib_energies=quanta, potentialenergy=energy)
        enthalpy = thermo.get_internal_energy(temperature, verbose=False)
        entropy = thermo.get_entropy(temperature, verbose=False)
        return Thermochemistry(
            float(quanta.sum() / 2),
            float(enthalpy),
            float(entropy),
            float(enthalpy - temperature * entropy),
            temperature,
            float("nan"),
            symmetry_number,
        )
    modes = units.invcm * np.where(frequencies > 0, frequencies, 1j * frequencies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the imaginary modes that are left out
        ideal = IdealGasThermo(
            vib_energies=modes.tolist(),
            geometry="monatomic" if len(atoms) == 1 else "linear" if linear else "nonlinear",
            potentialenergy=energy,
            atoms=atoms,
            symmetrynumber=symmetry_number,
            spin=unpaired / 2,
            ignore_imag_modes=True,
        )
    enthalpy = ideal.get_enthalpy(temperature, verbose=False)
    entropy = ideal.get_entropy(temperature, 1e5 * pressure, verbose=False)
    return Thermochemistry(
        float(quanta.sum() / 2),
        float(enthalpy),
        float(entropy),
        float(enthalpy - temperature * entropy),
        temperature,
        pressure,
        symmetry_number,
    )

"""Machine-learning interatomic potentials in JAX: train them, and use them for relaxation and dynamics."""

import importlib

__version__ = "0.1.0"

# Loaded at first use: importing the package alone must not start JAX.
_EXPORTS = {
    "EnsembleCalculator": "mlip_jax.simulation.calculators.ensemble",
    "MLIPCalculator": "mlip_jax.simulation.calculators.calculator",
    "MolecularDynamics": "mlip_jax.simulation.dynamics.md",
    "Relaxer": "mlip_jax.simulation.relaxation.relax",
    "Potential": "mlip_jax.potential",
    "Structure": "mlip_jax.structure",
    "find_minima": "mlip_jax.simulation.relaxation.minima",
    "from_smiles": "mlip_jax.datasets.molecules.files",
    "read_trajectory": "mlip_jax.simulation.dynamics.trajectories",
    "relax": "mlip_jax.simulation.relaxation.relax",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted({*globals(), *_EXPORTS})

"""Machine-learning interatomic potentials in JAX: training, relaxation and molecular dynamics."""

import importlib

__version__ = "0.1.0"

# Public names and their modules, which are imported at first use: `import mlip_jax` must not import
# JAX.
_EXPORTS = {
    "CellFilter": "mlip_jax.simulation.relaxation.cells.filters",
    "Domain": "mlip_jax.simulation.trust.domain",
    "EnsembleCalculator": "mlip_jax.simulation.calculators.ensemble",
    "MLIPCalculator": "mlip_jax.simulation.calculators.calculator",
    "MolecularDynamics": "mlip_jax.simulation.dynamics.md",
    "Relaxer": "mlip_jax.simulation.relaxation.relax",
    "Potential": "mlip_jax.potential",
    "Predictor": "mlip_jax.predictor",
    "Structure": "mlip_jax.structure",
    "active_learning": "mlip_jax.tasks.active_learning.function",
    "audit": "mlip_jax.simulation.audit.audit",
    "crystal_properties": "mlip_jax.simulation.crystals.analysis",
    "evaluate": "mlip_jax.library",
    "find_minima": "mlip_jax.simulation.relaxation.minima",
    "fine_tune": "mlip_jax.library",
    "from_smiles": "mlip_jax.datasets.molecules.files",
    "load": "mlip_jax.library",
    "load_force_field": "mlip_jax.importers",
    "neb": "mlip_jax.simulation.reactions.neb",
    "predict": "mlip_jax.tasks.property_prediction.function",
    "read_trajectory": "mlip_jax.simulation.dynamics.trajectories",
    "relax": "mlip_jax.simulation.relaxation.relax",
    "train": "mlip_jax.library",
    "use_executor": "mlip_jax.executors",
    "vibrations": "mlip_jax.simulation.vibrations.analysis",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted({*globals(), *_EXPORTS})

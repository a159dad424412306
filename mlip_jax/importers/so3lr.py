"""SO3LR, a pretrained force field for molecules (Kabylda et al., J. Am. Chem. Soc. 147, 33723, 2025).

So3krates with embeddings of charge and spin, trainable repulsion, electrostatics of predicted charges and dispersion
of predicted Hirshfeld ratios. It was trained on forces, dipoles and Hirshfeld ratios: only differences of its energies
between structures of the same atoms mean anything. Ions of both signs were among the structures, but none with
unpaired electrons: the embedding of spin kept its initial values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_jax.importers import mlff
from mlip_jax.potential import Potential

# The elements of its training set: those whose rows in the tables of its parameters are no longer the initial ones.
ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17)
LONG_RANGE_CUTOFF = 12.0
DISPERSION_SWITCH_WIDTH = 2.0
HYPERPARAMETERS: Mapping[str, Any] = {
    "num_layers": 3, "num_features": 128, "num_heads": 4, "degrees": (1, 2, 3, 4), "cutoff": 4.5, "cutoff_fn": "phys",
    "radial_basis_fn": "bernstein", "num_radial_basis_fn": 32, "activation_fn": "silu", "qk_non_linearity": "identity",
    "message_normalization": "avg_num_neighbors", "avg_num_neighbors": 13.168995780096482,
    "layer_normalization_1": True, "layer_normalization_2": True, "residual_mlp_1": True, "residual_mlp_2": False,
    "energy_regression_dim": 128, "energy_activation_fn": "silu", "energy_learn_atomic_type_scales": True,
    "energy_learn_atomic_type_shifts": True, "use_charge_embed": True, "use_spin_embed": True,
    "zbl_repulsion_bool": True, "electrostatic_energy_bool": True, "electrostatic_energy_scale": 4.0,
    "dispersion_energy_bool": True, "dispersion_energy_scale": 1.2}


def load(path: str | Path = "params.pkl", long_range_cutoff: float | None = LONG_RANGE_CUTOFF,
         hyperparameters: str | Path | None = None) -> Potential:
    """The force field of SO3LR's parameter file.

    Args:
      path: params.pkl of the SO3LR release, a pickle of NumPy arrays. It is read by an unpickler that admits nothing
        else. Or the same weights as .npz or .safetensors.
      long_range_cutoff: Å, of electrostatics and dispersion; None: all pairs, which needs open boundaries.
      hyperparameters: hyperparameters.yaml that belongs to the file; None: those of the release.

    Raises:
      FileNotFoundError: No such file.
      ValueError: It holds no weights, asks for more than arrays, or holds other parameters than SO3LR's.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected params.pkl of the SO3LR release "
            "(https://github.com/general-molecular-simulations/so3lr, so3lr/params/params.pkl)")
    settings = HYPERPARAMETERS if hyperparameters is None else mlff.read_hyperparameters(hyperparameters)
    return mlff.potential(
        mlff.read(path), settings, ELEMENTS, long_range_cutoff, DISPERSION_SWITCH_WIDTH, metadata={
            "source": "SO3LR", "file": path.name,
            "statistics": {"elements": list(ELEMENTS), "charges": None, "spins": [0.0]}})

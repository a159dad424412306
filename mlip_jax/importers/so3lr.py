"""SO3LR, a pretrained force field for molecules.

SO3LR (Kabylda et al., J. Am. Chem. Soc. 147, 33723, 2025) consists of So3krates with embeddings of
charge and spin, trainable repulsion, electrostatics of predicted charges and dispersion of
predicted Hirshfeld ratios. It was trained on forces, dipoles and Hirshfeld ratios: only energy
differences between structures of the same atoms are meaningful. The training structures include
ions of both signs but none with unpaired electrons, so the embedding of spin has its initial
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_jax.importers import mlff
from mlip_jax.importers.formats import torch_file
from mlip_jax.importers.formats.so3krates_torch import is_so3lr, read_model
from mlip_jax.potential import Potential

# ELEMENTS: atomic numbers in the training set, inferred from the rows of its parameter tables that
# differ from their initial values.
ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17)
LONG_RANGE_CUTOFF = 12.0  # Å
DISPERSION_SWITCH_WIDTH = 2.0  # Å
HYPERPARAMETERS: Mapping[str, Any] = {
    "num_layers": 3,
    "num_features": 128,
    "num_heads": 4,
    "degrees": (1, 2, 3, 4),
    "cutoff": 4.5,
    "cutoff_fn": "phys",
    "radial_basis_fn": "bernstein",
    "num_radial_basis_fn": 32,
    "activation_fn": "silu",
    "qk_non_linearity": "identity",
    "message_normalization": "avg_num_neighbors",
    "avg_num_neighbors": 13.168995780096482,
    "layer_normalization_1": True,
    "layer_normalization_2": True,
    "residual_mlp_1": True,
    "residual_mlp_2": False,
    "energy_regression_dim": 128,
    "energy_activation_fn": "silu",
    "energy_learn_atomic_type_scales": True,
    "energy_learn_atomic_type_shifts": True,
    "use_charge_embed": True,
    "use_spin_embed": True,
    "zbl_repulsion_bool": True,
    "electrostatic_energy_bool": True,
    "electrostatic_energy_scale": 4.0,
    "dispersion_energy_bool": True,
    "dispersion_energy_scale": 1.2,
}


def accepts(content: Any) -> bool:
    """Return whether the content of a file of torch.save is SO3LR of so3krates-torch."""
    return is_so3lr(content)


def load(
    path: str | Path = "params.pkl",
    long_range_cutoff: float | None = LONG_RANGE_CUTOFF,
    hyperparameters: str | Path | None = None,
) -> Potential:
    """Load SO3LR from its parameter file.

    Args:
      path: params.pkl of the SO3LR release, a pickle of NumPy arrays; so3lr.model of so3krates-torch;
        or the same weights as .npz or .safetensors. No code in the files is run.
      long_range_cutoff: Cutoff of electrostatics and dispersion (Å); None for all pairs, which
        requires open boundaries.
      hyperparameters: Path of the hyperparameters.yaml that belongs to the file; None for those of
        the release.

    Raises:
      FileNotFoundError: No such file.
      ValueError: The file contains no weights, objects other than arrays, or parameters other than
        those of SO3LR.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected params.pkl of the SO3LR release "
            "(https://github.com/general-molecular-simulations/so3lr, so3lr/params/params.pkl)"
        )
    settings = (
        HYPERPARAMETERS if hyperparameters is None else mlff.read_hyperparameters(hyperparameters)
    )
    if torch_file.is_torch_file(path):
        weights = read_model(torch_file.read(path), settings)
    else:
        weights = mlff.read(path)
    return mlff.potential(
        weights,
        settings,
        ELEMENTS,
        long_range_cutoff=long_range_cutoff,
        dispersion_switch_width=DISPERSION_SWITCH_WIDTH,
        metadata={
            "source": "SO3LR",
            "file": path.name,
            "statistics": {"elements": list(ELEMENTS), "charges": None, "spins": [0.0]},
        },
    )

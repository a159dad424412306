"""A data set that the package makes itself, for whoever has no file of SPICE at hand.

`generate_embedded(path)` samples a few hundred small molecules and labels them with GFN2-xTB, in the layout of SPICE.
It needs RDKit and tblite: `pip install 'mlip-flax[data]'`.
"""

from mlip_jax.datasets.builtin.generate import generate_embedded
from mlip_jax.datasets.builtin.molecules import Molecule, embedded_molecules, read_smiles_file
from mlip_jax.datasets.builtin.storage import summarize

__all__ = ["Molecule", "embedded_molecules", "generate_embedded", "read_smiles_file", "summarize"]

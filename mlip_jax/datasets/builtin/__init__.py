"""Built-in data set for users without a SPICE file.

`generate_embedded(path)` samples conformations of a few hundred small molecules and labels them
with GFN2-xTB, in the layout of SPICE. It requires RDKit and tblite:
`pip install 'mlip-flax[data]'`.
"""

from mlip_jax.datasets.builtin.generate import generate_embedded
from mlip_jax.datasets.builtin.molecules import Molecule, embedded_molecules, read_smiles_file
from mlip_jax.datasets.builtin.storage import summarize

__all__ = ["Molecule", "embedded_molecules", "generate_embedded", "read_smiles_file", "summarize"]

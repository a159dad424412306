"""Molecules as graphs: SMILES and their embedding, connectivity, symmetry, RMSD, molecule files."""

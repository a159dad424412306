"""Molecules: SMILES and their embedding, connectivity, symmetry, RMSD and molecule files."""

"""Molecules given as SMILES or mol blocks: text files that list them, and their embedding."""

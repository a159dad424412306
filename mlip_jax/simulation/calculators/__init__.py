"""ASE calculators of force fields and ensembles, and the static shapes they compile for."""

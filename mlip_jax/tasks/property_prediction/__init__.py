"""Parts of the task `predict`: ensembles, conformers, attributions of atoms."""

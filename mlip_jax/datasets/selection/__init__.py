"""Selection of structures: splits, nested subsets, diverse molecules and held-out molecules."""

"""Which structures a run uses: splits, nested subsets, diverse molecules, held-out molecules."""

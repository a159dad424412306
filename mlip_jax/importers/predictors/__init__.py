"""Property predictors trained with other programs: one importer per file, with `def load`."""

"""Parts of the task `predict`: ensembles of predictors."""

"""Stages of the task `train`: preparation of model and data, the training loop, and the report."""

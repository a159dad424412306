"""Stages of the task `property`: data, the training loop, and the report."""

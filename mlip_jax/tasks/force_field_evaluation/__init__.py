"""Stages of the task `evaluate`: structures, predictions in resumable parts, and output files."""

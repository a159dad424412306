"""Stages of the task `force2geo_eval`: choice of the molecules, relaxation and evaluation."""

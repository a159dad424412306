"""Structures to graphs to padded batches."""

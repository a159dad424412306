"""Graphs of structures: neighbor lists, padding budgets, packing plans and padded batches."""

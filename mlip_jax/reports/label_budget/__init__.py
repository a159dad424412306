"""Report of active learning: how the labels were spent, and what the force field does not know."""

"""Parts of active learning: candidates, their scores, the choice of a batch, and its labels."""

"""Training that suits its device: packed state, grouped updates, batch size."""

"""Training: losses, metrics, optimizers, the training step and the training loop."""

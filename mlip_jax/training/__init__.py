"""Training: losses, metrics, optimizers, the step, the loop."""

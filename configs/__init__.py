"""Shipped configs: one file per experiment with get_config(), imported as `mlip_jax.configs`."""

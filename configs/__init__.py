"""The shipped configs: one file per experiment, each with get_config(). Import them as `mlip_jax.configs`."""

"""Tasks of main.py: one module per value of config.task, each with `run(config, workdir)`."""

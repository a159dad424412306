"""What main.py can run: one module for each value of config.task, with `run(config, workdir)`."""

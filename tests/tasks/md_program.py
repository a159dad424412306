"""Program that runs the task `md` with an analytic force field.

python md_program.py INPUT WORKDIR STEPS FORMAT
"""

import sys

from mlip_jax.defaults import md_defaults
from mlip_jax.simulation.dynamics import batch as dynamics
from mlip_jax.tasks import md
from tests.simulation.analytic import pairwise


def options(input, **changes):
    """Return a config for hot argon clusters with little output."""
    config = md_defaults()
    config.input, config.force_field, config.replicas, config.num_steps = (
        str(input),
        "argon",
        2,
        120,
    )
    config.timestep, config.record_every, config.frame_every, config.restart_seconds = (
        4.0,
        2,
        10,
        0.0,
    )
    config.temperature, config.stop_on_bond_break = 60.0, False
    for name, value in changes.items():
        config[name] = value
    return config


if __name__ == "__main__":
    md.load_mean_force_field = lambda text: pairwise()
    dynamics.DISPATCH_SECONDS = 0.01
    md.run(
        options(sys.argv[1], num_steps=int(sys.argv[3]), trajectory_format=sys.argv[4]), sys.argv[2]
    )

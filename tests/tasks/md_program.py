"""Task `md` with a force field that is written down: python md_program.py INPUT WORKDIR STEPS FORM."""

import sys

from mlip_jax.defaults import md_defaults
from mlip_jax.simulation.dynamics import md as dynamics
from mlip_jax.tasks import md
from tests.simulation.analytic import pairwise


def options(input, **changes):
    """Hot clusters of argon, of which little is written."""
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
    config.temperature, config.watch_bonds = 60.0, False
    for name, value in changes.items():
        config[name] = value
    return config


if __name__ == "__main__":
    md.load_force_field = lambda text: pairwise()
    dynamics._TURN = 0.01
    md.run(
        options(sys.argv[1], num_steps=int(sys.argv[3]), trajectory_format=sys.argv[4]), sys.argv[2]
    )

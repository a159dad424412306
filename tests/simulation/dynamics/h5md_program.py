"""Append frames to a file, which is the argument, until killed."""

import itertools
import sys
from pathlib import Path

from mlip_jax.simulation.dynamics import h5md
from tests.simulation.dynamics.test_trajectories import frame


def main():
    path = Path(sys.argv[1])
    for step in itertools.count(h5md.size(path)):
        h5md.append(path, [frame(step)])
        print(step, flush=True)

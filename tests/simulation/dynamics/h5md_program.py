"""Append frames to a file until killed: python -m tests.simulation.dynamics.h5md_program FILE."""

import itertools
import sys
from pathlib import Path

from mlip_jax.simulation.dynamics import h5md
from tests.simulation.dynamics.test_trajectories import frame

if __name__ == "__main__":
    path = Path(sys.argv[1])
    for step in itertools.count(h5md.size(path)):
        h5md.append(path, [frame(step)])
        print(step, flush=True)

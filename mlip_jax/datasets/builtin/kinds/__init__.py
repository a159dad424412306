"""Kinds of geometries that the generator can sample: dimers, turned bonds and small molecules.

`jobs` combines a list of molecules with the kinds, and `FRAMES` has the function that samples the
geometries of each kind, except for thermal conformations.
"""

from mlip_jax.datasets.builtin.kinds.dimers import dimer_frames
from mlip_jax.datasets.builtin.kinds.jobs import CONFORMATIONS, KINDS, jobs
from mlip_jax.datasets.builtin.kinds.stretches import stretched_frames
from mlip_jax.datasets.builtin.kinds.torsions import turned_frames

FRAMES = {"torsions": turned_frames, "dimers": dimer_frames, "stretches": stretched_frames}

__all__ = ["CONFORMATIONS", "FRAMES", "KINDS", "jobs"]

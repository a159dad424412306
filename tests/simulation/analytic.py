"""Force fields with known energy functions, for dynamics whose outcome is known."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.basic import phys_cutoff
from mlip_jax.models.layers.heads import AtomOutputs
from mlip_jax.potential import Potential


class Pairwise(nn.Module):
    """Sum over pairs: "lennard_jones" (switched off at the cutoff), "harmonic", or "none"."""

    form: str = "lennard_jones"
    depth: float = 0.0104
    length: float = 3.4
    stiffness: float = 20.0
    cutoff: float = 8.0

    @nn.compact
    def __call__(self, graph):
        edge = pairs(graph)
        real = graph.nodes["numbers"][edge.receivers] > 0
        squared = (edge.displacements**2).sum(-1)
        distances = jnp.sqrt(jnp.where(real, squared, 1.0))
        if self.form == "lennard_jones":
            six = (self.length / distances) ** 6
            energies = 4 * self.depth * (six * six - six) * phys_cutoff(distances, self.cutoff)
        elif self.form == "harmonic":
            energies = 0.5 * self.stiffness * (distances - self.length) ** 2
        else:
            energies = 0.0 * distances
        energies = jnp.where(real, energies, 0.0) * (0.5 if edge.undirected else 0.25)
        num = graph.nodes["numbers"].shape[0]
        atomic = sum(jax.ops.segment_sum(energies, i, num) for i in (edge.receivers, edge.senders))
        return AtomOutputs(atomic, jnp.zeros((num, 1, 1, 1), atomic.dtype))


def pairwise(form="lennard_jones", elements=(1, 18), **options) -> Potential:
    """Return the force field, with a large reference energy per atom."""
    model = Pairwise(form, **options)
    reference = np.zeros(119)
    reference[list(elements)] = -1234.5678
    return Potential(model, {}, model.cutoff, reference, 1.0, tuple(elements))


class Springs(nn.Module):
    """Springs between all pairs: energies of springs of one length, direct forces of another one."""

    length: float = 1.0
    length_of_forces: float = 1.2
    stiffness: float = 2.0
    cutoff: float = 8.0
    direct_forces: bool = True

    @nn.compact
    def __call__(self, graph):
        edge, numbers = pairs(graph, False), graph.nodes["numbers"]
        real = numbers[edge.receivers] > 0
        vectors = jnp.where(
            real[:, None], edge.displacements, jnp.asarray([1.0, 0, 0], edge.displacements.dtype)
        )
        distances = jnp.sqrt((vectors**2).sum(-1))
        energies = jnp.where(real, 0.25 * self.stiffness * (distances - self.length) ** 2, 0.0)
        pull = (
            jnp.where(real, self.stiffness * (1 - self.length_of_forces / distances), 0.0)[:, None]
            * vectors
        )
        atomic, forces = (
            jax.ops.segment_sum(x, edge.receivers, len(numbers)) for x in (energies, pull)
        )
        return AtomOutputs(
            atomic,
            jnp.zeros((len(numbers), 1, 1, 1), atomic.dtype),
            forces=forces if self.direct_forces else None,
        )


class PartOfTheGradient(Springs):
    """A model that declares that its energy is differentiated only in part, as FAENet."""

    direct_forces: bool = False
    conservative = False


def springs(**options) -> Potential:
    """A force field of H and Ar whose forces are not the gradient of its energy."""
    model = Springs(**options)
    reference = np.zeros(119)
    reference[[1, 18]] = -1234.5678
    return Potential(model, {}, model.cutoff, reference, 1.5, (1, 18))

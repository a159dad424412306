"""PaiNN as the Open Catalyst Project and Force2Geo train it, with optional direct forces.

It differs from painn.py: a layer norm precedes the messages, sums are scaled, each layer has
filters of its own, and a head of gated vectors can predict forces. With the options of
importers/fairchem.py and importers/force2geo.py it agrees with the PaiNN of fairchem-core 1.10.0
and with the published PaiNN of Force2Geo.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import jraph

from mlip_jax.graphs.graph import pairs
from mlip_jax.models.layers.basic import (
    STEP,
    Dense,
    activation,
    cutoff_function,
    gaussian_basis,
    polynomial_cutoff,
    safe_norm,
    unit_vectors,
)
from mlip_jax.models.layers.gated_energy import packed_xavier, xavier
from mlip_jax.models.layers.heads import AtomicEnergy, AtomOutputs, embed_elements
from mlip_jax.models.painn import FilterTables, append_one, messages

_ROOT_2, _ROOT_3 = 2.0**0.5, 3.0**0.5


class Model(nn.Module):
    """PaiNN of the Open Catalyst Project; the sizes are the published ones.

    In the published forms, messages do not vanish at the cutoff, because the filters have a bias.
    The default multiplies them by a cutoff function.

    Attributes:
      num_features: Number of features F.
      num_layers: Number of message and update blocks.
      cutoff: Cutoff radius (Å).
      num_radial: Number of radial basis functions, Gaussians from 0 to the cutoff.
      envelope_exponent: Exponent of the polynomial envelope of the basis
        (layers.polynomial_cutoff); None: no envelope.
      cutoff_fn: Factor of the filters (layers.CUTOFFS); "step" as published.
      activation: Activation of all layers (layers.ACTIVATIONS).
      unit_directions: Whether messages to vectors are along unit vectors; False: along
        displacements (Å), as in Force2Geo.
      epsilon: Constant added under the square root of the vectors' norms in the updates. New runs
        use 1e-4, because forces nearly jump with the published value.
      layer_scales: Factor of the scalars after each layer, num_layers of them; None: 1.
      direct_forces: Whether a head predicts the forces. They are not the gradient of the energy.
      zero_init: Whether the last kernels of the heads start at zero.
      learned_shift: Whether the energy head learns a shift per element.
      undirected: False computes filters for both directions of each pair; this plain form is for
        tests.
    """

    NEW_RUN_OPTIONS = {"epsilon": 1e-4}
    neighbor_slots = True  # see graphs/neighbor_slots.py

    num_features: int = 512
    num_layers: int = 6
    cutoff: float = 12.0
    num_radial: int = 128
    envelope_exponent: int | None = 5
    cutoff_fn: str = "cosine"
    activation: str = "scaled_silu"
    unit_directions: bool = True
    epsilon: float = 1e-8
    layer_scales: Sequence[float] | None = None
    direct_forces: bool = False
    zero_init: bool = True
    learned_shift: bool = True
    undirected: bool = True

    @property
    def smooth(self) -> bool:
        """Whether energies and forces are continuous where a pair crosses the cutoff."""
        return self.cutoff_fn != STEP

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> AtomOutputs:
        width, numbers = self.num_features, graph.nodes["numbers"]
        # edge geometry: distances (P,), directions (P, 3), filters: 3 * num_layers arrays (P, F)
        edge = pairs(graph, self.undirected, slots=True)
        distances = safe_norm(edge.displacements)
        directions = (
            unit_vectors(edge.displacements, distances)
            if self.unit_directions
            else edge.displacements
        )
        filters = self._filters(distances)
        # message passing: s (N, F), v (N, 3, F), None for zero
        s, v = embed_elements(self, numbers, width, distances.dtype), None
        for n in range(self.num_layers):
            phi = nn.LayerNorm(
                epsilon=1e-5, use_fast_variance=False, dtype=s.dtype, name=f"norm_{n}"
            )(s)
            phi = _two_layers(self, f"message_{n}", phi, width, 3 * width)
            to_scalar, to_radial, to_vector = jnp.split(phi, 3, axis=-1)
            phi = jnp.concatenate(
                [to_scalar, to_radial / width**0.5, to_vector / (3.0 * width) ** 0.5], axis=-1
            )
            ds, dv = messages(phi, v, filters[3 * n : 3 * n + 3], directions, edge)
            s, v = (s + ds) / _ROOT_2, dv if v is None else v + dv
            s, v = ScaledUpdate(self.activation, self.epsilon, name=f"update_{n}")(s, v)
            if self.layer_scales is not None:
                s = s * self.layer_scales[n]
        # atomic energies (N,), forces (N, 3) and features (N, 1, 4, F), degrees 0 and 1
        energies = AtomicEnergy(
            width // 2,
            self.activation,
            self.zero_init,
            learned_shift=self.learned_shift,
            name="energy",
        )(s, numbers)
        forces = None
        if self.direct_forces:
            forces = VectorHead(self.activation, self.zero_init, name="forces")(s, v)
        return AtomOutputs(
            energies, jnp.concatenate([s[:, None, None, :], v[:, None]], axis=2), forces=forces
        )

    def _filters(self, distances):
        """Return the filters of all layers: 3 * num_layers arrays (P, F)."""
        width = self.num_features
        rbf = gaussian_basis(distances, self.num_radial, self.cutoff)
        if self.envelope_exponent is not None:
            rbf = rbf * polynomial_cutoff(distances, self.cutoff, self.envelope_exponent)[:, None]
        init = packed_xavier((3 * self.num_layers * width, 3 * width))
        tables = FilterTables(3 * self.num_layers, width, init, name="filters")
        envelope = cutoff_function(self.cutoff_fn)(distances, self.cutoff)
        enveloped = append_one(rbf) * envelope[:, None]
        return [enveloped @ table for table in tables(self.num_radial, rbf.dtype)]


class ScaledUpdate(nn.Module):
    """Mixing of scalars and vectors of one atom, with scaled sums.

    Attributes:
      act: Activation.
      epsilon: Constant added under the square root of the vectors' norms.
    """

    act: str
    epsilon: float

    @nn.compact
    def __call__(self, s, v):
        """Update s, shape (N, F), and v, shape (N, 3, F)."""
        width = s.shape[-1]
        w, u = jnp.split(
            Dense(2 * width, use_bias=False, kernel_init=xavier, name="mix")(v), 2, axis=-1
        )
        norm = jnp.sqrt(jnp.sum(u * u, axis=1) + self.epsilon)
        a = _two_layers(
            self, "gate", jnp.concatenate([s, norm], axis=-1), width, 3 * width, self.act
        )
        a_ss, a_sv, a_vv = jnp.split(a, 3, axis=-1)
        s = s + (a_ss + a_sv * jnp.sum(u * w, axis=1) / width**0.5) / _ROOT_2
        return s, v + a_vv[:, None, :] * w


class VectorHead(nn.Module):
    """One vector per atom from two gated equivariant blocks (Schütt et al. 2021, fig. 3).

    It maps scalars (N, F) and vectors (N, 3, F) to (N, 3).

    Attributes:
      act: Activation.
      zero_init: Whether the last kernel starts at zero.
    """

    act: str
    zero_init: bool

    @nn.compact
    def __call__(self, s, v):
        act, width = activation(self.act), s.shape[-1]
        for n, out in enumerate((width // 2, 1)):
            init = nn.initializers.zeros if self.zero_init and out == 1 else xavier
            norm = Dense(v.shape[-1], use_bias=False, kernel_init=xavier, name=f"norm_{n}")(v)
            kept = Dense(out, use_bias=False, kernel_init=init, name=f"vectors_{n}")(v)
            norm = safe_norm(norm.swapaxes(1, 2))
            mixed = _two_layers(
                self,
                f"gate_{n}",
                jnp.concatenate([s, norm], axis=-1),
                v.shape[-1],
                2 * out,
                self.act,
            )
            s, v = act(mixed[:, :out]), mixed[:, None, out:] * kept
        return v[..., 0]


def _two_layers(module, name, x, hidden, out, act=None):
    """Apply Dense -> activation -> Dense with the published initialization."""
    x = Dense(hidden, kernel_init=xavier, name=f"{name}_layer_1")(x)
    return Dense(out, kernel_init=xavier, name=f"{name}_layer_2")(
        activation(act or module.activation)(x)
    )

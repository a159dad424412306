"""Radial basis and distance-dependent filters of the equivariant transformer."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.basic import SplitDense, activation, cosine_cutoff, cutoff_function
from mlip_jax.models.layers.gated_energy import packed_xavier


def value_names(has_vectors: bool) -> tuple[str, ...]:
    """Return the names of the values of a layer.

    They are sent to the scalars, to the vectors along the sender's vectors (except in the first
    layer, where these are zero), and to the vectors along the direction of the pair.
    """
    return (
        ("to_scalars", "along_vectors", "along_pairs")
        if has_vectors
        else ("to_scalars", "along_pairs")
    )


def filter_names(distance_influence: str, has_vectors: bool) -> tuple[str, ...]:
    """Return the names of the filters of a layer."""
    keys = ("key",) if distance_influence in ("both", "keys") else ()
    return keys + (value_names(has_vectors) if distance_influence in ("both", "values") else ())


def cutoff_envelope(d, name: str, lower: float, upper: float):
    """Compute the envelope of the messages, 1 at distance 0 and 0 at `upper`.

    With a `lower` cutoff it is a cosine that goes from 0 there to 1 midway and back to 0.
    """
    if lower == 0:
        return cutoff_function(name)(d, upper)
    return 0.5 * (
        1.0 - jnp.cos(2.0 * jnp.pi * (jnp.clip(d, lower, upper) - lower) / (upper - lower))
    )


def with_cut(filters: dict, vector_cut) -> dict:
    """Multiply the filter "along_vectors" by the cutoff of the vectors, shape (P, 1)."""
    return {part: x * vector_cut if part == "along_vectors" else x for part, x in filters.items()}


class RadialBasis(nn.Module):
    """Radial functions of distances: (P,) -> (P, num).

    Attributes:
      kind: Option `radial_basis` of `Model`.
      num: Option `num_radial` of `Model`.
      lower: Option `cutoff_lower` of `Model` (Å).
      upper: Option `cutoff` of `Model` (Å).
      trainable: Option `trainable_rbf` of `Model`.
      centers: Option `radial_centers` of `Model`.
      widths: Option `radial_widths` of `Model`.
    """

    kind: str
    num: int
    lower: float
    upper: float
    trainable: bool
    centers: Sequence[float] | None
    widths: Sequence[float] | None

    @nn.compact
    def __call__(self, d):
        centers, widths = self._constants()
        if self.trainable:
            centers = self.param("centers", lambda _: jnp.asarray(centers, jnp.float32))
            widths = self.param("widths", lambda _: jnp.asarray(widths, jnp.float32))
        centers, widths = jnp.asarray(centers, d.dtype), jnp.asarray(widths, d.dtype)
        if self.kind == "gaussian":
            return jnp.exp(-0.5 / (widths * widths) * (d[:, None] - centers) ** 2)
        alpha = 5.0 / (self.upper - self.lower)
        shifted = jnp.exp(alpha * (self.lower - d))[:, None] - centers
        return cosine_cutoff(d, self.upper)[:, None] * jnp.exp(-widths * shifted * shifted)

    def _constants(self):
        """Return centers and widths: the given ones or the published ones.

        Raises:
          ValueError: If there are too many or too few of them.
        """
        if self.kind == "gaussian":
            centers = np.linspace(self.lower, self.upper, self.num)
            widths = np.array([(self.upper - self.lower) / (self.num - 1)])
        else:
            start = np.exp(self.lower - self.upper)
            centers = np.linspace(start, 1.0, self.num)
            widths = np.full(self.num, (2.0 / self.num * (1.0 - start)) ** -2)
        given = [
            x if y is None else np.asarray(y)
            for x, y in ((centers, self.centers), (widths, self.widths))
        ]
        for name, x, y in (
            ("radial_centers", given[0], centers),
            ("radial_widths", given[1], widths),
        ):
            if x.shape != y.shape:
                raise ValueError(
                    f"{name} contains {x.size} numbers, expected {y.size} for "
                    f"num_radial={self.num} {self.kind} functions"
                )
        return given


class FilterNetwork(nn.Module):
    """Filters `parts` of a layer, each Dense -> activation: (P, num_radial) -> {part: (P, F)}.

    Attributes:
      parts: Names of the filters.
      width: Number of features F.
      act: Activation.
    """

    parts: tuple[str, ...]
    width: int
    act: str

    @nn.compact
    def __call__(self, rbf):
        init = packed_xavier(
            *((self.width, (1 if part == "key" else 3) * self.width) for part in self.parts)
        )
        values = SplitDense(len(self.parts), self.width, init, name="dense")(rbf)
        return {part: activation(self.act)(x) for part, x in zip(self.parts, values)}

"""Uni-Mol+: properties from a cheap geometry, which the model refines (Lu et al., 2024).

The paper is arXiv:2303.16982. The input is a molecular graph and a geometry of the heavy atoms from
RDKit. Tokens are a virtual atom and the heavy atoms; pairs have features of the bond, the shortest
path and the distance. In each iteration, the transformer updates tokens and pairs, and moves the
atoms. The property is read from the virtual atom.

As published,

- atoms are moved along x, y and z by three different layers, so the result depends on the
  orientation of the molecule;
- products are normalized with the number of tokens including padding, so the result depends on it.
  Here it is the option `num_tokens`, not the size of the largest molecule of a batch.

The model agrees with the reference (unimol_plus, PCQM4Mv2) for the same weights and the same number
of tokens.
"""

from __future__ import annotations

from math import sqrt

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np

from mlip_jax.models.bond_graphs.layers.dense_pairs import (
    TokenIndex,
    dense_bonds,
    shortest_paths,
    token_index,
)
from mlip_jax.models.bond_graphs.layers.pair_transformer import (
    PairAttention,
    PairTransformerLayer,
    gelu,
    layer_norm,
)
from mlip_jax.models.layers.basic import Dense
from mlip_jax.models.layers.heads import BondOutputs

# First rows of the features in the tables of atoms and bonds, as in the reference.
_ATOM_ROWS = 1 + np.cumsum([0, 128] + [16] * 7)
_BOND_ROWS = np.array([1, 17, 33])
_PI = 3.14159  # as in the reference
_LARGEST = 9.0  # largest center of the Gaussians (Å)


class BondModel(nn.Module):
    """Uni-Mol+ with the published defaults of the base model.

    Attributes:
      num_features: Number of features of a token, F.
      pair_features: Number of features of a pair, C.
      pair_width: Width of the outer and triangle products.
      num_layers: Number of layers.
      num_heads: Number of attention heads.
      hidden_width: Width of the feed-forward layers of tokens.
      num_radial: Number of Gaussians of the distance.
      num_iterations: Number of times that the geometry is refined.
      num_tokens: Number of tokens T; molecules have at most T - 1 heavy atoms.
    """

    num_features: int = 768
    pair_features: int = 256
    pair_width: int = 32
    num_layers: int = 12
    num_heads: int = 48
    hidden_width: int = 768
    num_radial: int = 128
    num_iterations: int = 2
    num_tokens: int = 32

    bonds_only = True
    needs_positions = True
    cutoff = 0.0  # there are no neighbor lists

    @property
    def max_atoms(self) -> int:
        """Largest number of heavy atoms."""
        return self.num_tokens - 1

    @nn.compact
    def __call__(self, graph: jraph.GraphsTuple) -> BondOutputs:
        dtype = graph.globals["charge"].dtype
        index = token_index(graph, self.max_atoms)
        mask = jnp.pad(index.mask, ((0, 0), (1, 0)), constant_values=True)  # (G, T)
        atoms = index.scatter(graph.nodes["atom_features"])  # (G, M, 9)
        x, pairs = self._embed(graph, index, atoms, dtype)
        positions = _center(index.scatter(graph.nodes["positions"]), index.mask)
        slopes = self._pair_table("slope", atoms, jnp.abs, dtype)
        offsets = self._pair_table("offset", atoms, lambda rows: rows, dtype)
        basis = _GaussianBasis(self.num_radial, self.pair_features, name="distances")
        norms = layer_norm("token_norm"), layer_norm("pair_norm")
        layers = [
            PairTransformerLayer(
                self.num_heads,
                self.hidden_width,
                self.pair_width,
                self.num_tokens,
                name=f"layer_{n}",
            )
            for n in range(self.num_layers)
        ]
        movement = _Movement(self.num_heads, name="movement")
        for _ in range(self.num_iterations):
            fixed = jax.lax.stop_gradient(positions)
            apart = fixed[:, None] - fixed[:, :, None]  # from atom i to atom j, (G, M, M, 3)
            scaled = slopes * jnp.sqrt((apart * apart).sum(-1)) + offsets
            pairs = pairs.at[:, 1:, 1:].add(basis(scaled))
            x, pairs = norms[0](x), norms[1](pairs)
            for layer in layers:
                x, pairs = layer(x, pairs, mask)
            moved = movement(x[:, 1:], pairs[:, 1:, 1:], index.mask, apart)
            positions = positions + jnp.where(index.mask[..., None], moved, 0.0)
        hidden = Dense(self.num_features, name="head")(x[:, 0])
        features = gelu(layer_norm("head_norm")(hidden))[index.graph]  # of the virtual atom
        return BondOutputs(features[:, None, None, :], index.gather(positions))

    def _table(self, name, rows, width, dtype):
        return self.param(name, nn.initializers.normal(0.02), (rows, width)).astype(dtype)

    def _embed(self, graph: jraph.GraphsTuple, index: TokenIndex, atoms: jax.Array, dtype):
        """Return the initial features of tokens, (G, T, F), and of pairs, (G, T, T, C)."""
        bonds = dense_bonds(graph, index)  # (G, M, M, 3)
        bonded = (bonds > 0).all(-1)
        features = self._table("atom", 512, self.num_features, dtype)[atoms + _ATOM_ROWS].sum(2)
        degree = self._table("degree", 128, self.num_features, dtype)[bonded.sum(-1) + 1]
        virtual = self._table("virtual_atom", 1, self.num_features, dtype)
        num_graphs = atoms.shape[0]
        first = jnp.broadcast_to(virtual, (num_graphs, 1, self.num_features))
        path = self._table("path", 512, self.pair_features, dtype)[shortest_paths(bonded) + 1]
        rows = jnp.where(bonds > 0, bonds + _BOND_ROWS, 0) + 1
        edge = self._table("bond", 64, self.pair_features, dtype)[rows].mean(3)
        pairs = jnp.broadcast_to(
            self._table("virtual_pair", 1, self.pair_features, dtype),
            (num_graphs, self.num_tokens, self.num_tokens, self.pair_features),
        )
        pairs = pairs.at[:, 1:, 1:].set(path + edge)
        return jnp.concatenate([first, features + degree], axis=1), pairs

    def _pair_table(self, name: str, atoms: jax.Array, transform, dtype) -> jax.Array:
        """Return the sum of a number of each of two elements, (G, M, M)."""
        fill = nn.initializers.ones if name == "slope" else nn.initializers.zeros
        table = transform(self.param(name, fill, (512, 1)).astype(dtype)[:, 0])
        numbers = atoms[..., 0] + 1
        return table[numbers + 1][:, :, None] + table[numbers + 129][:, None, :]


class _GaussianBasis(nn.Module):
    """Features of pairs from scaled distances.

    Attributes:
      num_radial: Number of Gaussians.
      width: Number of features of a pair.
    """

    num_radial: int
    width: int

    @nn.compact
    def __call__(self, scaled: jax.Array) -> jax.Array:
        """Compute features of pairs: (G, M, M) -> (G, M, M, C)."""
        step = _LARGEST / (self.num_radial - 1)
        mean = self.param("mean", lambda key, n: jnp.linspace(0.0, _LARGEST, n), self.num_radial)
        deviation = self.param("deviation", nn.initializers.constant(step), ())
        mean, deviation = mean.astype(scaled.dtype), deviation.astype(scaled.dtype)
        gaussians = jnp.exp(-0.5 * ((scaled[..., None] - mean) / deviation) ** 2)
        gaussians = gaussians / (sqrt(2 * _PI) * deviation)
        hidden = gelu(Dense(self.num_radial, name="layer_1")(gaussians))
        return Dense(self.width, name="layer_2")(hidden)


class _Movement(nn.Module):
    """Displacements of the atoms, by attention over the directions to other atoms.

    Attributes:
      num_heads: Number of heads.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x, pairs, mask, apart) -> jax.Array:
        """Compute displacements (Å), (G, M, 3); `apart` are the vectors between atoms."""
        x = layer_norm("norm")(x)
        weights, values = PairAttention(self.num_heads, name="attention")(x, pairs, mask)
        forces = jnp.einsum("ghij,gijc,ghjd->gichd", weights, apart, values)
        forces = forces.reshape(*forces.shape[:3], -1)
        parts = [
            Dense(1, kernel_init=nn.initializers.zeros, name=f"axis_{k}")(forces[:, :, k])
            for k in range(3)
        ]
        return jnp.concatenate(parts, axis=-1)


def _center(positions: jax.Array, mask: jax.Array) -> jax.Array:
    """Return positions with their mean at the origin, zero where there is no atom."""
    count = jnp.maximum(mask.sum(1), 1).astype(positions.dtype)
    mean = jnp.where(mask[..., None], positions, 0.0).sum(1) / count[:, None]
    return jnp.where(mask[..., None], positions - mean[:, None], 0.0)

"""Energy head of gated equivariant blocks, as in PaiNN and TorchMD-Net."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mlip_jax.models.layers.basic import Dense, activation, safe_norm

xavier = nn.initializers.xavier_uniform()


class GatedEnergy(nn.Module):
    """Two gated equivariant blocks (Schütt et al. 2021, fig. 3): (N, F), (N, 3, F) -> (N,).

    Attributes:
      act: Activation.
      epsilon: Constant added under the square root of the vectors' norms.
      zero_init: Whether the last kernel starts at zero.
    """

    act: str
    epsilon: float
    zero_init: bool

    @nn.compact
    def __call__(self, s, v):
        act, width = activation(self.act), s.shape[-1]
        init = packed_xavier((width, width), (width // 2, width // 2))
        norms, v = jnp.split(
            Dense(width + width // 2, use_bias=False, kernel_init=init, name="vectors_1")(v),
            [width],
            axis=-1,
        )
        hidden = act(
            Dense(width, kernel_init=xavier, name="hidden_1")(
                jnp.concatenate([s, self._norms(norms)], axis=-1)
            )
        )
        s, gate = jnp.split(
            Dense(2 * (width // 2), kernel_init=xavier, name="gate")(hidden), 2, axis=-1
        )
        s, v = act(s), gate[:, None, :] * v
        norms = Dense(width // 2, use_bias=False, kernel_init=xavier, name="vectors_2")(v)
        hidden = act(
            Dense(width // 2, kernel_init=xavier, name="hidden_2")(
                jnp.concatenate([s, self._norms(norms)], axis=-1)
            )
        )
        kernel_init = nn.initializers.zeros if self.zero_init else xavier
        return Dense(1, kernel_init=kernel_init, name="final")(hidden)[:, 0]

    def _norms(self, v):
        """Return the lengths of vectors: (N, 3, F) -> (N, F)."""
        if self.epsilon == 0:
            return safe_norm(v.swapaxes(1, 2))
        return jnp.sqrt(jnp.sum(v * v, axis=1) + self.epsilon)


def packed_xavier(*blocks: tuple[int, int]):
    """Create the kernel initializer of several linear layers that share one kernel.

    Args:
      *blocks: (number of columns, fan-out for the limit) of each layer.
    """

    def init(key, shape, dtype=jnp.float32):
        limits = np.concatenate(
            [np.full(columns, np.sqrt(6.0 / (shape[0] + fan_out))) for columns, fan_out in blocks]
        )
        return jnp.asarray(limits, dtype) * jax.random.uniform(key, shape, dtype, -1.0, 1.0)

    return init

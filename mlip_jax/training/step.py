"""The training step and the evaluation step: the only pmap. State is replicated in here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax

from mlip_jax.potential import Evaluation, evaluate, gradient
from mlip_jax.training import losses

_AXIS = "devices"


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: Updates done. params, ema: Parameters and their exponential moving average.
      optimizer: State of the optimizer.
    """

    step: Any
    params: Any
    ema: Any
    optimizer: Any


class Trainer:
    """Compiled steps over the local devices.

    Attributes:
      num_devices: Batches that one step takes, stacked on the leading axis.
    """

    def __init__(self, model: nn.Module, energy_scale: float, optimizer: optax.GradientTransformation,
                 beta: Callable, ema_decay: float, loss_options: dict[str, Any]):
        self.num_devices = jax.local_device_count()
        self._optimizer = optimizer
        self._traces = 0

        def train(state: TrainState, graph: jraph.GraphsTuple):
            self._traces += 1
            return _train_step(model, energy_scale, optimizer, beta, ema_decay, loss_options, state, graph)

        def evaluate_batch(params, graph):
            evaluation = evaluate(model, params, graph, energy_scale)
            return evaluation, jax.lax.psum(losses.sums(evaluation, graph, **loss_options), _AXIS)

        self._train = jax.pmap(train, _AXIS, donate_argnums=0)
        self._evaluate = jax.pmap(evaluate_batch, _AXIS)

    @property
    def num_compiles(self) -> int:
        """How often the training step was traced."""
        return self._traces

    def init(self, params: Any) -> TrainState:
        """The first state, replicated."""
        state = TrainState(np.zeros((), np.int32), params, params, self._optimizer.init(params))
        return self.replicate(state)

    def replicate(self, tree: Any) -> Any:
        """A copy on every device, laid out as pmap gives its outputs back: another layout would compile it twice."""
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (_AXIS,))
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))
        return jax.tree.map(lambda x: jax.device_put(np.stack([np.asarray(x)] * self.num_devices), layout), tree)

    @staticmethod
    def single(tree: Any) -> Any:
        """The copy of the first device, on the host."""
        return jax.device_get(jax.tree.map(lambda x: x[0], tree))

    def train(self, state: TrainState, graphs: jraph.GraphsTuple) -> tuple[TrainState, losses.Sums]:
        """One update from one batch for each device; the sums are those of all devices, on the devices."""
        return self._train(state, graphs)

    def evaluate(self, params: Any, graphs: jraph.GraphsTuple) -> tuple[Evaluation, losses.Sums]:
        """Evaluation of one batch for each device (stacked) and the sums of all."""
        return self._evaluate(params, graphs)


def _train_step(model, energy_scale, optimizer, beta, ema_decay, loss_options, state, graph):
    def loss(params):
        local = losses.sums(evaluate(model, params, graph, energy_scale), graph, **loss_options)
        total = jax.lax.psum(jax.lax.stop_gradient(local), _AXIS)
        return losses.combine(local, total, beta(state.step)), total

    _, total, grads = gradient(loss, state.params)
    grads = jax.lax.psum(grads, _AXIS)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # the average of the first steps must not be that of the initial values
    decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.ema, params)
    return TrainState(state.step + 1, params, ema, optimizer_state), total

"""The training step and the evaluation step: the only pmap. State is replicated in here and nowhere else.

An update is made of micro-batches of one static shape, dealt out over the devices of all processes; a device that has
several adds their gradients up. Sums and counts are added over all of them, so that an update is that of one device
with the union of the batches. One call to the devices may do many updates.

    D   local devices      S   updates of a call, at most      K   micro-batches of a device in an update
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax

from mlip_jax.potential import gradient
from mlip_jax.training.objectives import Objective

_AXIS = "devices"


class TrainState(NamedTuple):
    """All that training changes.

    Attributes:
      step: Updates done. params, ema: Parameters and their exponential moving average.
      optimizer: State of the optimizer.
      rate_scale: Factor to the learning rate that validation sets (reduce on plateau).
    """

    step: Any
    params: Any
    ema: Any
    optimizer: Any
    rate_scale: Any


class DispatchResult(NamedTuple):
    """What came of the updates of a call, on the device; leading axes (D, S), alike on all devices.

    Attributes:
      sums: Of the losses. finite: Whether loss and gradient were; if not, the update changed nothing but the count.
      stop: How many processes want to stop.
    """

    sums: Any
    finite: Any
    stop: Any


class Trainer:
    """Compiled steps over the local devices, in step with those of the other processes.

    Attributes:
      objective: What is trained.

    Args:
      objective: See objectives.py. ema_decay: Of the average of the parameters.
      build: (data, input, bucket) -> graph, inside the step; by default the input is the graph.
      data: What `build` takes, a tree of arrays that stay on every device.
    """

    def __init__(self, objective: Objective, optimizer: optax.GradientTransformation, ema_decay: float, *,
                 build: Callable[[Any, Any, int], jraph.GraphsTuple] | None = None, data: Any = ()):
        self.objective = objective
        self.num_devices = jax.local_device_count()
        self._optimizer = optimizer
        self._traces = 0
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (_AXIS,))
        self.layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))
        self._data = self.replicate(data)
        build = build or (lambda data, graph, bucket: graph)

        def train(state, data, inputs, count, stop, bucket):
            self._traces += 1
            update = _update(objective, optimizer, ema_decay)
            stop = jax.lax.psum(stop, _AXIS)
            return _updates(lambda state, micro: update(state, lambda k: build(data, _at(micro, k), bucket),
                                                        jax.tree.leaves(micro)[0].shape[0]),
                            state, inputs, count, stop)

        def evaluate_batch(params, graph):
            predicted, sums = objective.evaluate(params, graph)
            return predicted, jax.lax.psum(sums, _AXIS)

        def of_a_batch(params, graph):
            return gradient(lambda p: (objective.combine(local := objective.sums(p, graph), local, 0), None), params)[2]

        self._of_a_batch = jax.jit(of_a_batch)
        self._train = jax.pmap(train, _AXIS, donate_argnums=0, static_broadcasted_argnums=5)
        self._evaluate = jax.pmap(evaluate_batch, _AXIS)
        self._copy = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree))

    @property
    def crowded(self) -> bool:
        """There are more CPU devices than cores: an all-reduce of one step can then starve that of another, so that no
        step may begin before the one before it is done."""
        return jax.default_backend() == "cpu" and jax.device_count() > (os.cpu_count() or 1)

    @property
    def num_compiles(self) -> int:
        """How often the training step was traced: once for each bucket."""
        return self._traces

    def init(self, params: Any) -> TrainState:
        """The first state, replicated."""
        one = np.ones((), np.float32)
        return self.replicate(TrainState(np.zeros((), np.int32), params, params, self._optimizer.init(params), one))

    def replicate(self, tree: Any) -> Any:
        """A copy on every device, laid out as pmap gives its outputs back: another layout would compile it twice."""
        return jax.tree.map(lambda x: jax.device_put(np.stack([np.asarray(x)] * self.num_devices), self.layout), tree)

    def put(self, inputs: Any) -> Any:
        """Arrays with a leading axis of devices, on them."""
        return jax.tree.map(lambda x: jax.device_put(x, self.layout), inputs)

    @staticmethod
    def single(tree: Any) -> Any:
        """What the first device has, on the host: of trees that are alike on all devices. Waits for it."""
        return jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree)

    @staticmethod
    def local(tree: Any) -> Any:
        """What this process's devices have, on the host: leading axis (D,)."""
        return jax.tree.map(lambda x: np.concatenate([np.asarray(s.data) for s in x.addressable_shards]), tree)

    def snapshot(self, tree: Any) -> Any:
        """A copy on the first device, which later steps do not touch. It is ordered here; who reads it waits for it."""
        return self._copy(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))

    def scale_rate(self, state: TrainState, scale: float) -> TrainState:
        """The state with another factor to the learning rate."""
        return state._replace(rate_scale=self.replicate(np.asarray(scale, np.float32)))

    def train(self, state: TrainState, inputs: Any, count: int = 1, *, bucket: int = 0, stop: bool = False
              ) -> tuple[TrainState, DispatchResult]:
        """`count` updates; `state` is given away.

        Args:
          inputs: Of `build`, leading axes (D, S, K).
          count: How many of the S are to be done.
          bucket: Which static shape the micro-batches have.
          stop: Whether this process wants to stop; all processes learn it from the result.
        """
        return self._train(*self._arguments(state, inputs, count, bucket, stop))

    def lower(self, state: TrainState, inputs: Any, bucket: int = 0) -> jax.stages.Lowered:
        """The program of `train`, to be looked at."""
        return self._train.lower(*self._arguments(state, inputs, 1, bucket, False))

    def flops(self, params: Any, graph: jraph.GraphsTuple) -> float:
        """Operations that the gradient of one micro-batch takes, as XLA counts them before it optimises."""
        return float(self._of_a_batch.lower(params, graph).cost_analysis()["flops"])

    def _arguments(self, state, inputs, count, bucket, stop):
        wanted = np.zeros(self.num_devices, np.int32)
        wanted[0] = stop  # one device speaks for its process
        return state, self._data, inputs, np.full(self.num_devices, count, np.int32), wanted, bucket

    def evaluate(self, params: Any, graphs: jraph.GraphsTuple) -> tuple[Any, Any]:
        """What the objective predicts of one batch for each device (stacked), and the sums of all."""
        made = self._evaluate(params, graphs)
        return jax.block_until_ready(made) if self.crowded else made


def _at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def _updates(update, state, inputs, count, stop):
    """`count` updates one after the other, and what came of each: leading axis (S,)."""
    most = jax.tree.leaves(inputs)[0].shape[0]
    if most == 1:
        state, (sums, finite) = update(state, _at(inputs, 0))
        return state, jax.tree.map(lambda x: x[None], DispatchResult(sums, finite, stop))

    def body(i, carry):
        state, results = carry
        state, result = update(state, _at(inputs, i))
        return state, jax.tree.map(lambda all_of_them, x: all_of_them.at[i].set(x), results, result)

    shapes = jax.eval_shape(lambda: update(state, _at(inputs, 0))[1])
    empty = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)
    # its length is not static, so that what is left before a checkpoint needs no other program
    state, (sums, finite) = jax.lax.fori_loop(0, count, body, (state, empty))
    return state, DispatchResult(sums, finite, jnp.full(most, stop))


def _update(objective, optimizer, ema_decay):
    """(state, graph of micro-batch k, their number) -> (state, (sums, finite)).

    optax.apply_if_finite does not serve here: it ignores the loss, applies a non-finite update after several in a row,
    leaves the moving average of the parameters out, and would change the layout of old checkpoints.
    """

    def update(state, micro_batch, number):
        total, grads = _gradient(objective, state.params, state.step, micro_batch, number)
        loss = objective.combine(total, total, state.step)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: u * state.rate_scale, updates))
        # the average of the first steps must not be that of the initial values
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        # in this form the average of what does not change, as of frozen parameters, is exactly that
        ema = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.ema, params)
        new = state._replace(params=params, ema=ema, optimizer=optimizer_state)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new._replace(step=state.step + 1), (total, finite)

    return update


def _gradient(objective, params, step, micro_batch, number):
    """Sums over all micro-batches of all devices, and the gradient of the loss that they make."""
    if number == 1:
        graph = micro_batch(0)

        def loss(params):
            local = objective.sums(params, graph)
            total = jax.lax.psum(jax.lax.stop_gradient(local), _AXIS)
            return objective.combine(local, total, step), total

        _, total, grads = gradient(loss, params)
        return total, jax.lax.psum(grads, _AXIS)

    def add(tree, other):
        return jax.tree.map(jnp.add, tree, other)

    # the loss divides by the counts of all, which must be known before the first gradient
    parts = jax.lax.map(lambda k: objective.counts(micro_batch(k)), jnp.arange(number))
    known = jax.lax.psum(jax.tree.map(lambda x: x.sum(0), parts), _AXIS)

    def body(carry, k):
        graph = micro_batch(k)

        def loss(params):
            local = objective.sums(params, graph)
            return objective.combine(local, known, step), local

        _, local, grads = gradient(loss, params)
        return add(carry, (local, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, (jax.eval_shape(objective.sums, params, micro_batch(0)), params))
    (local, grads), _ = jax.lax.scan(body, zeros, jnp.arange(number))
    return jax.lax.psum((local, grads), _AXIS)

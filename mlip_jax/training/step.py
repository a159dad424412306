"""The compiled training and evaluation steps. Only this module uses pmap and replicates the state.

A training step works on micro-batches of one static shape, distributed over the devices of all
processes. Sums and counts are added up over all of them, so a step equals that of a single device
with the union of the micro-batches.

One training step, on every device:

1. Build the graph of each micro-batch (`build`).
2. Count the labels, and add up the counts over micro-batches and devices. These are the
   denominators of the loss.
3. Compute the gradient of this device's share of the loss, one micro-batch at a time, and add it up
   (`_gradient`).
4. Add up the gradients and sums over all devices (psum).
5. Compute the new parameters with the optimizer, and their moving average (`_make_update`).
6. Discard the new state if the loss or the gradient is not finite. Increment the step in any case.

A dispatch performs up to S training steps (`_perform_steps`).

On GPUs and TPUs, parameters, averages and optimizer state are `Packed`: a call passes few arrays,
and the operations on them are few. `Trainer.single` and `Trainer.snapshot` return trees.

All calls use pmap, with one process or several. With several, JAX prepares each array of a call on
the host, which is another reason for few arrays.

    D   local devices      S   maximum number of steps of a dispatch
    K   micro-batches per device and step
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import optax

from mlip_jax.matmul_precision import training_precision
from mlip_jax.potential import gradient
from mlip_jax.training.device.packing import Packed, pack, unpack
from mlip_jax.training.device.rules import norm
from mlip_jax.training.objectives import Objective
from mlip_jax.workers import available_cores

log = logging.getLogger(__name__)

_AXIS = "devices"


class TrainState(NamedTuple):
    """State of a training run.

    Attributes:
      step: Number of steps so far, including non-finite ones.
      params: Parameters of the model, `Packed` on GPUs and TPUs.
      ema: Exponential moving average of the parameters, likewise.
      optimizer: State of the optimizer, likewise.
      rate_scale: Factor of the learning rate that validation sets (reduce on plateau).
    """

    step: Any
    params: Any
    ema: Any
    optimizer: Any
    rate_scale: Any


def initial_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state of a run before its first step."""
    one = np.ones((), np.float32)
    return pack_state(
        TrainState(np.zeros((), np.int32), params, params, optimizer.init(params), one)
    )


def pack_state(state: TrainState) -> TrainState:
    """Return a state whose trees are packed."""
    packed = {k: pack(getattr(state, k)) for k in ("params", "ema", "optimizer")}
    return state._replace(**packed)


class DispatchResult(NamedTuple):
    """Result of the steps of a dispatch, with leading axes (D, S), identical on all devices.

    Attributes:
      sums: Loss sums.
      finite: Whether loss and gradient were finite. If not, only the step counter was advanced.
      stop: Number of processes that have received a request to stop.
    """

    sums: Any
    finite: Any
    stop: Any


class Trainer:
    """Compiled training and evaluation steps on the local devices.

    They communicate with the devices of the other processes, which must make the same calls.

    Args:
      objective: Model and loss; see `Objective`.
      optimizer: Optimizer.
      ema_decay: Decay of the moving average of the parameters.
      build: Function (data, input, bucket) -> graph, compiled into the step. By default, the input
        is the graph.
      data: Pytree of arrays for `build`, which stays on every device.
      matmul_precision: Precision of matrix products in training steps, see `training_precision`.
        Evaluations have full precision.

    Attributes:
      objective: Model and loss.
      num_devices: Number of local devices, D.
      layout: Sharding of arrays with a leading axis (D,).
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        ema_decay: float,
        *,
        build: Callable[[Any, Any, int], jraph.GraphsTuple] | None = None,
        data: Any = (),
        matmul_precision: str | None = None,
    ):
        self.objective = objective
        self.num_devices = jax.local_device_count()
        self._optimizer = optimizer
        self._traces = 0
        mesh = jax.sharding.Mesh(np.array(jax.local_devices()), (_AXIS,))
        self.layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))
        self._data = self.replicate(data)
        build = build or (lambda data, graph, bucket: graph)

        def train(state, data, inputs, count, stop, bucket):
            self._traces += 1  # this function runs only when pmap traces it
            log.info("compiling the training step%s", f" of bucket {bucket}" if bucket else "")
            update = _make_update(objective, optimizer, ema_decay)

            def perform_step(state, step_inputs):  # of K micro-batches
                num_micro_batches = jax.tree.leaves(step_inputs)[0].shape[0]

                def micro_batch(k):
                    return build(data, _select(step_inputs, k), bucket)

                return update(state, micro_batch, num_micro_batches)

            stop = jax.lax.psum(stop, _AXIS)
            with training_precision(matmul_precision):
                return _perform_steps(perform_step, state, inputs, count, stop)

        def evaluate_batch(params, graph):
            log.info("compiling the validation and evaluation step")
            predicted, sums = objective.evaluate(unpack(params), graph)
            return predicted, jax.lax.psum(sums, _AXIS)

        def compute_gradient(params, graph):
            """Compute the gradient of one micro-batch, for `flops`."""
            return gradient(
                lambda p: (objective.combine(local := objective.sums(p, graph), local, 0), None),
                params,
            )[2]

        self._compute_gradient = jax.jit(compute_gradient)
        self._train = jax.pmap(train, _AXIS, donate_argnums=0, static_broadcasted_argnums=5)
        self._evaluate = jax.pmap(evaluate_batch, _AXIS)
        self._copy = jax.jit(lambda tree: unpack(jax.tree.map(lambda x: x[0], tree)))

    @property
    def oversubscribed(self) -> bool:
        """Return whether there are more CPU devices than cores that this process may use.

        An all-reduce of one step can then starve that of another. A step must therefore finish
        before the next one is dispatched.
        """
        return jax.default_backend() == "cpu" and jax.device_count() > available_cores()

    @property
    def num_compiles(self) -> int:
        """Number of traces of the training step: one per size bucket."""
        return self._traces

    def init(self, params: Any) -> TrainState:
        """Return the initial state, replicated over the devices."""
        return self.replicate(initial_state(params, self._optimizer))

    def put_state(self, state: TrainState) -> TrainState:
        """Copy a state whose fields are trees, as `single` returns it, to every device."""
        return self.replicate(pack_state(state))

    def replicate(self, tree: Any) -> Any:
        """Copy a tree to every device, in the layout of the outputs of pmap.

        With another layout, pmap would compile a second time.
        """

        def copy(x):
            one = np.asarray(x)[None]  # a view, which all devices read
            shape = (self.num_devices, *one.shape[1:])
            return jax.make_array_from_callback(shape, self.layout, lambda index: one)

        return jax.tree.map(copy, tree)

    def put(self, inputs: Any) -> Any:
        """Transfer arrays with a leading axis (D,) to the devices."""
        return jax.tree.map(lambda x: jax.device_put(x, self.layout), inputs)

    @staticmethod
    def single(tree: Any) -> Any:
        """Fetch the arrays of the first device, of a tree that is identical on all. Blocks."""
        return unpack(jax.tree.map(lambda x: np.array(x.addressable_shards[0].data)[0], tree))

    @staticmethod
    def local(tree: Any) -> Any:
        """Fetch the arrays of all local devices, with a leading axis (D,). Blocks."""
        return jax.tree.map(
            lambda x: np.concatenate([np.asarray(s.data) for s in x.addressable_shards]), tree
        )

    def snapshot(self, tree: Any) -> Any:
        """Copy a tree on the first device, so that later steps do not overwrite it.

        The copy is only dispatched here. Reading it blocks.
        """
        return self._copy(jax.tree.map(lambda x: x.addressable_shards[0].data, tree))

    def scale_rate(self, state: TrainState, scale: float) -> TrainState:
        """Return the state with the learning-rate factor `scale`."""
        return state._replace(rate_scale=self.replicate(np.asarray(scale, np.float32)))

    def train(
        self, state: TrainState, inputs: Any, count: int = 1, *, bucket: int = 0, stop: bool = False
    ) -> tuple[TrainState, DispatchResult]:
        """Dispatch `count` training steps. The buffers of `state` are donated.

        Args:
          state: State of the run, replicated.
          inputs: Inputs of `build`, with leading axes (D, S, K).
          count: Number of steps to perform, at most S.
          bucket: Size bucket of the micro-batches. Each one is compiled separately.
          stop: Whether this process was asked to stop. The result passes it on to all processes.

        Returns:
          The new state and the result of the steps, which the devices may still be computing.
        """
        return self._train(*self._arguments(state, inputs, count, bucket, stop))

    def lower(self, state: TrainState, inputs: Any, bucket: int = 0) -> jax.stages.Lowered:
        """Lower `train` for inspection."""
        return self._train.lower(*self._arguments(state, inputs, 1, bucket, False))

    def flops(self, params: Any, graph: jraph.GraphsTuple) -> float:
        """Return the FLOPs of the gradient of a micro-batch, counted by XLA before optimization."""
        return float(self._compute_gradient.lower(params, graph).cost_analysis()["flops"])

    def _arguments(self, state, inputs, count, bucket, stop):
        stop_flags = np.zeros(self.num_devices, np.int32)
        stop_flags[0] = stop  # on one device only, so that the sum counts processes
        counts = np.full(self.num_devices, count, np.int32)
        return state, self._data, inputs, counts, stop_flags, bucket

    def evaluate(self, params: Any, graphs: jraph.GraphsTuple) -> tuple[Any, Any]:
        """Evaluate the objective on one batch per device.

        Args:
          params: Parameters, replicated.
          graphs: Batches, with a leading axis (D,).

        Returns:
          The predictions per device, and the sums over the devices of all processes. Leading axis
          (D,).
        """
        results = self._evaluate(params, graphs)
        return jax.block_until_ready(results) if self.oversubscribed else results


def _select(tree, index):
    """Return a tree with the element `index` of the leading axis of each leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def _perform_steps(perform_step, state, inputs, count, stop):
    """Perform `count` steps in sequence. The results have a leading axis (S,)."""
    max_steps = jax.tree.leaves(inputs)[0].shape[0]  # S
    if max_steps == 1:
        state, (sums, finite) = perform_step(state, _select(inputs, 0))
        return state, jax.tree.map(lambda x: x[None], DispatchResult(sums, finite, stop))

    def body(i, carry):
        state, results = carry
        state, result = perform_step(state, _select(inputs, i))
        return state, jax.tree.map(lambda stacked, x: stacked.at[i].set(x), results, result)

    shapes = jax.eval_shape(lambda: perform_step(state, _select(inputs, 0))[1])
    empty = jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), shapes)
    # a dynamic length, so that fewer steps before a checkpoint need no other program
    state, (sums, finite) = jax.lax.fori_loop(0, count, body, (state, empty))
    return state, DispatchResult(sums, finite, jnp.full(max_steps, stop))


def _make_update(objective, optimizer, ema_decay):
    """Return the function of a training step.

    Its arguments are the state, a function that returns the graph of micro-batch k, and the number
    of micro-batches. It returns (state, (sums, finite)).

    optax.apply_if_finite is unsuitable: it ignores the loss, applies a non-finite update after
    several in a row, does not handle the moving average of the parameters, and would change the
    layout of existing checkpoints.
    """

    def update(state, micro_batch, num_micro_batches):
        like_state = Packed.of if isinstance(state.params, Packed) else lambda tree: tree
        params = unpack(state.params)
        total, grads = _gradient(objective, params, state.step, micro_batch, num_micro_batches)
        loss = objective.combine(total, total, state.step)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm(grads))
        updates, optimizer_state = optimizer.update(grads, unpack(state.optimizer), params)
        updates = jax.tree.map(lambda u: u * state.rate_scale, like_state(updates))
        params = optax.apply_updates(state.params, updates)
        if hasattr(objective, "absorb"):
            tree, total = objective.absorb(unpack(params), unpack(state.params), total)
            params = like_state(tree)
        # the average of the first steps must not be that of the initial values
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        # in this form, the average of frozen parameters is exactly their value
        ema = jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), state.ema, params)
        new = state._replace(params=params, ema=ema, optimizer=like_state(optimizer_state))
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return new._replace(step=state.step + 1), (total, finite)

    return update


def _gradient(objective, params, step, micro_batch, num_micro_batches):
    """Return the sums over all micro-batches of all devices, and the gradient of their loss."""
    # the sums contain the counts, so one evaluation of the model is enough
    if num_micro_batches == 1:
        graph = micro_batch(0)

        def loss(params):
            local = objective.sums(params, graph)
            total = jax.lax.psum(jax.lax.stop_gradient(local), _AXIS)
            return objective.combine(local, total, step), total

        _, total, grads = gradient(loss, params)
        return total, unpack(jax.lax.psum(pack(grads), _AXIS))

    def add(tree, other):
        return jax.tree.map(jnp.add, tree, other)

    # the counts of all micro-batches are the denominators of the loss, so the gradients need them
    # with a leading axis (K,)
    counts = jax.lax.map(lambda k: objective.counts(micro_batch(k)), jnp.arange(num_micro_batches))
    total_counts = jax.lax.psum(jax.tree.map(lambda x: x.sum(0), counts), _AXIS)

    # scan, so that only the activations of one micro-batch are in memory at a time
    def body(carry, k):
        graph = micro_batch(k)

        def loss(params):
            local = objective.sums(params, graph)
            return objective.combine(local, total_counts, step), local

        _, local, grads = gradient(loss, params)
        return add(carry, (local, pack(grads))), None

    zeros = jax.tree.map(
        jnp.zeros_like, (jax.eval_shape(objective.sums, params, micro_batch(0)), pack(params))
    )
    (local, grads), _ = jax.lax.scan(body, zeros, jnp.arange(num_micro_batches))
    return unpack(jax.lax.psum((local, grads), _AXIS))

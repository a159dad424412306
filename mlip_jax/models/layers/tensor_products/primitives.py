"""Differentiation rules of the convolution: JAX primitives around the functions of chunks.py.

For edges in neighbor slots, those of slot_products.py replace them.

Automatic differentiation of a loop over blocks would store the intermediate values of all blocks.
The primitives define derivatives in terms of each other instead:

    _CONVOLVE             chunks.forward
    _CONVOLVE_TANGENT     its tangent; the transpose is _BACKWARD
    _BACKWARD             chunks.backward
    _BACKWARD_TANGENT     its tangent; the transpose is _SECOND
    _SECOND               chunks.second

Training on forces needs the first derivatives and their transposes. Tangents are evaluated only in
forward mode, as for Hessians, by differentiating the loops. Higher derivatives and batching
(jax.vmap) do the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mlip_jax.graphs.slot_sums import SlotIndex
from mlip_jax.models.layers.tensor_products import chunks, slot_products
from mlip_jax.models.layers.tensor_products.chunks import Spec


class _Call(NamedTuple):
    """Static parameters of a primitive: structure of its arguments, and how to compute it."""

    spec: Spec
    tree: Any
    wanted: tuple[bool, ...]


def convolve_blocks(spec: Spec, x, y, w, senders, receivers):
    """Compute chunks.forward, with efficient first and second derivatives.

    If all edges are in slots, `senders` is their `SlotIndex` and `receivers` is None.
    """
    return _bind(_CONVOLVE, spec, (), x, y, w, senders, receivers)


def _bind(primitive, spec, wanted, *args):
    """Call a primitive with pytrees. None marks arguments and results that are absent."""
    leaves, tree = jax.tree.flatten(args)
    call = _Call(spec, tree, wanted)
    outputs = jax.tree.structure(_output_shapes(primitive, call, args))
    return jax.tree.unflatten(outputs, primitive.bind(*leaves, call=call))


def _output_shapes(primitive, call, args):
    """Return the results of a primitive as shapes; tracing the function would take seconds."""
    *_, g, x, y, w, _, _ = (None, *args)
    if primitive in (_CONVOLVE, _CONVOLVE_TANGENT):
        return [
            [_shape((a.shape[0], 2 * c + 1, a.shape[-1]), a.dtype) for _, c in group.paths]
            for a, group in zip(x, call.spec.groups)
        ]
    arguments = (g, x, y, w) if primitive is _SECOND else (x, y, w)
    return tuple(
        jax.tree.map(lambda a: _shape(a.shape, a.dtype), argument) if wanted else None
        for argument, wanted in zip(arguments, call.wanted)
    )


def _shape(shape, dtype):
    return jax.core.ShapedArray(shape, dtype)


def _product(name, *static):
    """Return a function of chunks.py or, for edges in slots, the same one of slot_products.py."""

    def function(*arguments):
        *arrays, senders, receivers = arguments
        if isinstance(senders, SlotIndex):
            return getattr(slot_products, name)(*static, *arrays, senders)
        return getattr(chunks, name)(*static, *arrays, senders, receivers)

    return function


def _convolve(call, *leaves):
    return _product("forward", call.spec)(*jax.tree.unflatten(call.tree, leaves))


def _convolve_tangent(call, *leaves):
    """Arguments: tangents of x, y and w, then x, y, w, senders, receivers."""
    tangents, arguments = _two(call, leaves)
    return _tangent(_product("forward", call.spec), tangents, arguments)


def _backward(call, *leaves):
    return _product("backward", call.spec, call.wanted)(*jax.tree.unflatten(call.tree, leaves))


def _backward_tangent(call, *leaves):
    """Arguments: tangents of g, x, y and w, then g, x, y, w, senders, receivers."""
    tangents, arguments = _two(call, leaves)
    return _tangent(_product("backward", call.spec, call.wanted), tangents, arguments)


def _second(call, *leaves):
    return _product("second", call.spec, call.wanted)(*jax.tree.unflatten(call.tree, leaves))


def _two(call, leaves):
    tangents, *arguments = jax.tree.unflatten(call.tree, leaves)
    return tangents, arguments


def _tangent(function: Callable, tangents, arguments):
    """Differentiate along tangents of the first arguments; None is a tangent of zero."""
    filled = [
        jax.tree.map(jnp.zeros_like, a) if t is None else t for t, a in zip(tangents, arguments)
    ]
    indices = arguments[len(filled) :]
    return jax.jvp(
        lambda *a: function(*a, *indices), tuple(arguments[: len(filled)]), tuple(filled)
    )[1]


_CONVOLVE, _CONVOLVE_TANGENT = Primitive("convolve"), Primitive("convolve_tangent")
_BACKWARD, _BACKWARD_TANGENT = (
    Primitive("convolve_backward"),
    Primitive("convolve_backward_tangent"),
)
_SECOND = Primitive("convolve_second")
_FUNCTIONS = {
    _CONVOLVE: _convolve,
    _CONVOLVE_TANGENT: _convolve_tangent,
    _BACKWARD: _backward,
    _BACKWARD_TANGENT: _backward_tangent,
    _SECOND: _second,
}


def _define(primitive, function):
    """Register how to evaluate, compile, batch and, by default, differentiate a primitive."""

    def flat(*leaves, call):
        return jax.tree.leaves(function(call, *leaves))

    def batch(leaves, dims, call):
        out = jax.vmap(functools.partial(flat, call=call), in_axes=tuple(dims))(*leaves)
        return out, [0] * len(out)

    def jvp(primals, tangents, call):
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        return jax.jvp(functools.partial(flat, call=call), primals, tangents)

    primitive.multiple_results = True
    primitive.def_impl(jax.jit(flat, static_argnames="call"))
    primitive.def_abstract_eval(
        lambda *avals, call: jax.tree.leaves(
            _output_shapes(primitive, call, jax.tree.unflatten(call.tree, avals))
        )
    )
    mlir.register_lowering(primitive, mlir.lower_fun(flat, multiple_results=True))
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp


for _primitive, _function in _FUNCTIONS.items():
    _define(_primitive, _function)


def _slots(call, leaves, tangents, num):
    """Group leaves by argument; a tangent is None if it is zero for the whole argument."""
    arguments = jax.tree.unflatten(call.tree, leaves)
    flat = jax.tree.unflatten(call.tree, tangents)
    grouped = [
        None
        if all(map(_is_zero, jax.tree.leaves(t, is_leaf=_is_zero)))
        else jax.tree.map(ad.instantiate_zeros, t, is_leaf=_is_zero)
        for t in flat[:num]
    ]
    return arguments, tuple(grouped)


def _is_zero(tangent):
    return type(tangent) is ad.Zero


def _jvp_with(tangent_primitive, primitive, num):
    """Return the rule of a primitive whose tangent is another primitive, linear in `num` arguments."""

    def rule(primals, tangents, call):
        arguments, grouped = _slots(call, primals, tangents, num)
        out = primitive.bind(*primals, call=call)
        if all(t is None for t in grouped):
            return out, [ad.Zero.from_primal_value(o) for o in out]
        return out, jax.tree.leaves(
            _bind(tangent_primitive, call.spec, call.wanted, grouped, *arguments)
        )

    return rule


ad.primitive_jvps[_CONVOLVE] = _jvp_with(_CONVOLVE_TANGENT, _CONVOLVE, 3)
ad.primitive_jvps[_BACKWARD] = _jvp_with(_BACKWARD_TANGENT, _BACKWARD, 4)


def _transpose_with(primitive, cotangent_tree):
    """Return the transpose rule of a tangent, the cotangents of its first argument."""

    def rule(cotangents, *leaves, call):
        slots, *arguments = jax.tree.unflatten(call.tree, leaves)
        cotangents = cotangent_tree(call, [ad.instantiate_zeros(c) for c in cotangents], arguments)
        found = _bind(
            primitive, call.spec, tuple(slot is not None for slot in slots), cotangents, *arguments
        )
        results = [None if slot is None else value for slot, value in zip(slots, found)]
        return [*jax.tree.leaves(results), *[None] * (len(leaves) - len(jax.tree.leaves(results)))]

    return rule


def _like_convolution(call, cotangents, arguments):
    """Structure cotangents of the convolution as its output, per group and path."""
    return jax.tree.unflatten(jax.tree.structure(arguments[2]), cotangents)  # as w


def _like_backward(call, cotangents, arguments):
    """Structure cotangents of the derivatives with respect to x, y and w."""
    cotangents = iter(cotangents)
    return tuple(
        jax.tree.map(lambda _: next(cotangents), a) if wanted else None
        for a, wanted in zip(arguments[1:4], call.wanted)
    )


ad.primitive_transposes[_CONVOLVE_TANGENT] = _transpose_with(_BACKWARD, _like_convolution)
ad.primitive_transposes[_BACKWARD_TANGENT] = _transpose_with(_SECOND, _like_backward)

"""PaiNN's messages on neighbor slots by the kernels of fused_kernels.py, with all derivatives.

The four derivatives of the form in fused_kernels.py are one primitive with a parameter `face`. The
derivatives of a face are other faces, so no further kernel is needed, in forward and reverse mode. A
derivative with respect to the distance replaces the basis by its derivative. The first two
derivatives of the basis are available.

Distances of both directions of a pair are equal and their directions opposite. As in
graphs/slot_sums.py, derivatives by coefficients are correct for the sum over both directions.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.interpreters import ad

from mlip_jax.graphs.graph import SlotGeometry
from mlip_jax.graphs.slot_sums import define_primitive, is_zero
from mlip_jax.matmul_precision import products_are_exact
from mlip_jax.models.layers.fused_kernels import FormSizes, evaluate
from mlip_jax.target_device import target_platform, uses_fused_kernels

# _ORDER: highest derivative of the basis.
_ORDER = 2
# arguments of the faces; the coefficients are last, since there are several
_ARGUMENTS = {
    "send": ("x", "tables", "coefficients"),
    "back": ("y", "tables", "coefficients"),
    "edge": ("x", "y", "tables"),
    "table": ("x", "y", "coefficients"),
}
# face of the derivative by each argument, by the name of that argument
_FACE_BY = {"y": "send", "x": "back", "coefficients": "edge", "tables": "table"}
_RESULT = {face: name for name, face in _FACE_BY.items()}


def wants_fused(num_features: int, dtype) -> bool:
    """Return whether messages are to be computed by fused kernels.

    Args:
      num_features: Number of features F; the kernels need a power of two.
      dtype: Type of the features.
    """
    fits = num_features >= 16 and num_features & (num_features - 1) == 0
    known = dtype == jnp.float32 or target_platform() == "cpu"  # interpreted
    return uses_fused_kernels() and fits and known


def fused_messages(phi, v, tables, bases, distances, geometry: SlotGeometry):
    """Sum the messages of the neighbors, as `slot_messages.slot_messages` does.

    Args:
      phi: Features for messages, shape (N, 3F).
      v: Vectors, shape (N, 3, F), or None for zero.
      tables: Tables of the filters of scalars, radial vectors and neighbors' vectors, (B, F) each.
      bases: Basis functions of the distances and their derivatives, shape (N, K, B) each.
      distances: Distances of the slots (Å), shape (N, K).
      geometry: Slots.

    Returns:
      Changes of s, shape (N, F), and of v, shape (N, 3, F).
    """
    width, one = phi.shape[-1] // 3, jnp.ones_like(distances)
    directions = [geometry.directions[..., d] for d in range(3)]
    coefficients = jnp.stack([one, *directions, one])
    if v is None:
        x, tables = phi[:, : 2 * width], tables[:2]
    else:
        vectors = [phi[:, 2 * width :] * v[:, d] for d in range(3)]
        x = jnp.concatenate([phi[:, : 2 * width], *vectors], axis=-1)
    sizes = FormSizes(
        *distances.shape,
        bases[0].shape[-1],
        width,
        v is not None,
        products_are_exact(),
        target_platform() == "cpu",
    )
    arrays = {"x": x, "tables": jnp.concatenate(tables, -1), "coefficients": [coefficients]}
    y = _bind("send", sizes, (0,), arrays, (distances, *bases, geometry.senders))[0]
    return y[:, :width], y[:, width:].reshape(-1, 3, width)


def _bind(face, sizes, orders, arrays, geometry):
    """Evaluate a face.

    Args:
      face: Name of the face.
      sizes: FormSizes.
      orders: Orders of the derivatives of the basis, one for each of the coefficients.
      arrays: Arguments of the face by name.
      geometry: Distances, bases and senders.
    """
    flat = []
    for name in _ARGUMENTS[face]:
        flat += arrays[name] if name == "coefficients" else [arrays[name]]
    return _FORM.bind(*flat, *geometry, face=face, sizes=sizes, orders=orders)


def _unpack(args, face):
    """Return the arguments of a face by name, and the geometry."""
    split = len(args) - _ORDER - 3
    flat, geometry = list(args[:split]), args[split:]
    arrays = {}
    for name in _ARGUMENTS[face]:
        if name == "coefficients":
            arrays[name], flat = flat, []
        else:
            arrays[name] = flat.pop(0)
    return arrays, geometry


def _form(*args, face, sizes, orders):
    arrays, (_, *bases, senders) = _unpack(args, face)
    return evaluate(face, sizes, arrays, [bases[order] for order in orders], senders)


def _jvp(primals, tangents, *, face, sizes, orders):
    arrays, geometry = _unpack(primals, face)
    changes, (by_distance, *_) = _unpack(tangents, face)
    out, parts = _FORM.bind(*primals, face=face, sizes=sizes, orders=orders), []
    for name in ("x", "y", "tables"):
        if name in arrays and not is_zero(changes[name]):
            parts.append(_bind(face, sizes, orders, {**arrays, name: changes[name]}, geometry))
    if "coefficients" in arrays:
        terms = {
            order: change
            for order, change in zip(orders, changes["coefficients"])
            if not is_zero(change)
        }
        if not is_zero(by_distance):
            for order, c in zip(_next(orders), arrays["coefficients"]):
                term = c * by_distance
                terms[order] = terms[order] + term if order in terms else term
        if terms:
            found = tuple(sorted(terms))
            turned = {**arrays, "coefficients": [terms[order] for order in found]}
            parts.append(_bind(face, sizes, found, turned, geometry))
    elif not is_zero(by_distance):
        slopes = _bind(face, sizes, _next(orders), arrays, geometry)
        parts.append([slope * by_distance for slope in slopes])
    if not parts:
        return out, [ad.Zero.from_primal_value(o) for o in out]
    return out, [functools.reduce(jnp.add, values) for values in zip(*parts)]


def _next(orders):
    if max(orders) == _ORDER:
        raise NotImplementedError(
            f"fused messages have {_ORDER} derivatives by the distance. Set "
            "MLIP_JAX_FUSED_KERNELS=0 for higher ones."
        )
    return tuple(order + 1 for order in orders)


def _transpose(cotangents, *args, face, sizes, orders):
    arrays, geometry = _unpack(args, face)
    if all(map(is_zero, cotangents)):
        return [None] * len(args)
    if face == "edge":
        kept = [(o, c) for o, c in zip(orders, cotangents) if not is_zero(c)]
        orders, arrays["coefficients"] = tuple(o for o, _ in kept), [c for _, c in kept]
    else:
        arrays[_RESULT[face]] = cotangents[0]
    out = []
    for name in _ARGUMENTS[face]:
        values = arrays[name] if name == "coefficients" else [arrays[name]]
        linear = [ad.is_undefined_primal(value) for value in values]
        if not any(linear):
            out += [None] * len(values)
            continue
        found = _bind(_FACE_BY[name], sizes, orders, arrays, geometry)
        out += [x if is_linear else None for x, is_linear in zip(found, linear, strict=True)]
    return [*out, *[None] * len(geometry)]


_FORM = define_primitive("slot_form", _form, several=True)
ad.primitive_jvps[_FORM] = _jvp
ad.primitive_transposes[_FORM] = _transpose

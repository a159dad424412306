"""Access to the client of JAX's coordination service, which is not part of JAX's public API."""

from __future__ import annotations

from typing import Any


def coordination() -> Any:
    """Return JAX's state of a distributed run, with `client`, `process_id` and `num_processes`."""
    from jax._src import distributed

    return distributed.global_state


def client_type() -> type:
    """Return the type of the client. `Coordination` calls its methods."""
    from jax._src.lib import _jax

    return _jax.DistributedRuntimeClient

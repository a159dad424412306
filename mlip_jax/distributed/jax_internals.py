"""The client of JAX's coordination service, which JAX uses for itself and gives no public access to."""

from __future__ import annotations

from typing import Any


def coordination() -> Any:
    """Return JAX's state of a run of several processes: its `client`, `process_id` and `num_processes`."""
    from jax._src import distributed
    return distributed.global_state


def client_type() -> type:
    """Return the type of that client. `Coordination` calls its methods."""
    from jax._src.lib import _jax
    return _jax.DistributedRuntimeClient

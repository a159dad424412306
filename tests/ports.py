"""Ports for the processes of a test."""

import random
import socket

# Below the ports that Linux takes for outgoing connections and for servers without a port of their
# own, which another test could get before this one uses it.
_PORTS = range(20_000, 32_000)


def free_port() -> int:
    """Return a port of this computer that no process uses."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise AssertionError("100 ports are in use")

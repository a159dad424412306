"""Program of several processes for tests of mlip_jax.distributed and of the launchers."""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from mlip_jax import distributed

# larger than one entry of the key-value store, and not a multiple of a word
LARGE = np.random.default_rng(0).bytes(3_000_001)


def steps(folder, config):
    """Run steps on all devices until a process has received a signal."""

    def step(stop):
        return jax.lax.psum((stop, 1), "devices")

    step = jax.pmap(step, "devices")
    with distributed.StopSignal() as signal:
        for i in range(100_000):
            stop, devices = step(
                np.full(jax.local_device_count(), signal.received is not None, np.int32)
            )
            if int(stop[0]):
                sys.exit(distributed.EXIT_REQUEUE)
            if i == 0:
                (folder / f"steps_{distributed.index()}").write_text(str(int(devices[0])))
            if i == 2 and config == f"raise_{distributed.index()}":
                raise ValueError("the third step failed")
            if i == 2 and config == f"exit_{distributed.index()}":
                sys.exit(3)
            time.sleep(0.01)


def communicate(folder, config):
    """Test all kinds of communication, and write the results to communicate_RANK.json."""
    rank = distributed.index()
    value = (
        {"name": "Ångström", "sizes": np.arange(5, dtype=np.int16), "pair": (1, None)}
        if rank == 0
        else rank
    )
    received = distributed.broadcast(value)
    large = distributed.broadcast(np.frombuffer(LARGE, np.uint8) if distributed.leader() else None)
    if rank:
        time.sleep(0.5)
    arrival = time.monotonic()  # the same clock for all processes of a computer
    distributed.barrier("all processes")
    after_barrier = time.monotonic()
    with distributed.leader_first("write"):
        if distributed.leader():
            time.sleep(0.5)
            (folder / "written").write_text("by the leader")
        text = (folder / "written").read_text()
    devices = jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(
        np.ones(jax.local_device_count(), np.int32)
    )
    (folder / f"communicate_{rank}.json").write_text(
        json.dumps(
            {
                "name": received["name"],
                "sizes": received["sizes"].tolist(),
                "dtype": str(received["sizes"].dtype),
                "pair": received["pair"],
                "large": hashlib.sha256(large).hexdigest(),
                "arrival": arrival,
                "after_barrier": after_barrier,
                "text": text,
                "count": distributed.count(),
                "devices": int(devices[0]),
                "jax": [jax.process_index(), jax.process_count()],
            }
        )
    )


def leader_fails(folder, config):
    """Fail or stop in the leader while the other process waits."""
    with distributed.leader_first("write"):
        if distributed.leader() and config == "stop":
            sys.exit(distributed.EXIT_REQUEUE)
        if distributed.leader():
            raise ValueError("no such file")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--task", default="steps")
    parser.add_argument("--timeout", type=float, default=60)
    options, _ = parser.parse_known_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        with distributed.session(distributed.from_environment(), options.timeout):
            {f.__name__: f for f in (steps, communicate, leader_fails)}[options.task](
                options.workdir, options.config
            )
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

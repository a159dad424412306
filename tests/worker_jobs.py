"""Jobs for worker processes, in a module with few imports, so that the workers start quickly."""

import itertools
import os
import select
import signal
import time

from mlip_jax import workers


class JobError(Exception):
    pass


def square(x):
    return x * x, os.getpid()


def wait_if_first(x):
    time.sleep(0.4 if x == 0 else 0)
    return x


def wait_for(pipe):
    """Return the text written to a pipe within half a minute; return "" at once for pipe ""."""
    if not pipe:
        return ""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    select.select([reader], [], [], 30)
    return os.read(reader, 100).decode()


def fail_at_three(x):
    if x == 3:
        raise JobError(f"job {x} failed")
    return x


def die_at_negative(x):
    """Die at negative numbers: by a time limit at -2, by a deadline in native code at -3, or by a signal."""
    if x == -3:
        with workers.deadline(0.1):
            sum(itertools.repeat(0))  # never ends, and runs no Python code that a signal stops
    if x == -2:
        with workers.time_limit(0.1):
            time.sleep(60)
    if x < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return x * x


def settings(names):
    """Return environment variables by name, and whether the process ignores Ctrl-C."""
    return {name: os.environ.get(name) for name in names}, signal.getsignal(
        signal.SIGINT
    ) is signal.SIG_IGN


def mark():
    os.environ["MARK"] = f"of {os.getpid()}"


def crash_at_second_shard(job, source=None):
    """Convert a shard, unless it is the second one."""
    from mlip_jax.datasets.store.shard_conversion import convert_shard

    if job.number == 1:
        os.abort()
    convert_shard(job, source)

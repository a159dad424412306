"""Which process of which run this one is, as the launcher or the scheduler tells it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

# Above the range from which Linux gives out ports of its own accord.
_FIRST_PORT, _NUM_PORTS = 61_440, 4_096
_OWN = ("MLIP_JAX_COORDINATOR", "MLIP_JAX_NUM_PROCESSES", "MLIP_JAX_PROCESS_ID")


class Environment(NamedTuple):
    """The place of this process in a run of several.

    Attributes:
      coordinator: "host:port" on which process 0 listens. None: JAX finds it and the rest out by itself (TPU pods).
      num_processes, process_id: How many there are, and which one this is, from 0.
      local_device_ids: GPUs for this process out of those that it sees; None for all.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def from_environment(env: Mapping[str, str] = os.environ) -> Environment | None:
    """The place of this process, or None where it is the only one.

    Looked at in this order:

    * MLIP_JAX_COORDINATOR ("host:port"), MLIP_JAX_NUM_PROCESSES and MLIP_JAX_PROCESS_ID, which launch/local.sh sets.
      MLIP_JAX_NUM_PROCESSES=1 alone means one process, whatever the scheduler says; MLIP_JAX_COORDINATOR=auto alone
      leaves it to JAX (launch/tpu_pod.sh).
    * SLURM, in a job step of several tasks: SLURM_STEP_NUM_TASKS, which srun sets for the processes that it starts.
      SLURM_NTASKS does not tell: it stands in a batch script and in the shell of `salloc` as well, which are one
      process.
    * A TPU pod that tells its hosts: TPU_WORKER_HOSTNAMES, or MEGASCALE_NUM_SLICES.

    Raises:
      ValueError: Some of the variables are missing or make no sense.
    """
    own = {name: env[name] for name in _OWN if env.get(name)}
    if own:
        return _own(own)
    if env.get("SLURM_JOB_ID") and env.get("SLURM_STEP_ID") and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _slurm(env)
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or _number(env, "MEGASCALE_NUM_SLICES", 1) > 1:
        return Environment()
    return None


def _own(env: Mapping[str, str]) -> Environment | None:
    if env == {"MLIP_JAX_COORDINATOR": "auto"}:
        return Environment()
    if list(env) == ["MLIP_JAX_NUM_PROCESSES"] and _number(env, "MLIP_JAX_NUM_PROCESSES") == 1:
        return None
    missing = [name for name in _OWN if name not in env]
    if missing:
        raise ValueError(f"{', '.join(env)} set but not {', '.join(missing)}: a run of several processes needs all of "
                         f"{', '.join(_OWN)} (launch/local.sh sets them); for a single process unset them")
    coordinator = env["MLIP_JAX_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(f"MLIP_JAX_COORDINATOR={coordinator}: expected host:port, the port from 1 to 65535")
    count, index = _number(env, "MLIP_JAX_NUM_PROCESSES"), _number(env, "MLIP_JAX_PROCESS_ID")
    _check_index(count, index, "MLIP_JAX_NUM_PROCESSES", "MLIP_JAX_PROCESS_ID")
    return None if count == 1 else Environment(coordinator, count, index)


def _slurm(env: Mapping[str, str]) -> Environment:
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if not env.get(name)]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if missing or not nodes:
        raise ValueError(f"a SLURM step of {env['SLURM_STEP_NUM_TASKS']} tasks without "
                         f"{', '.join(missing) or 'SLURM_STEP_NODELIST'}: start with `srun python -m mlip_jax.main`, "
                         "or set MLIP_JAX_NUM_PROCESSES=1 for a single process")
    count, index = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
    _check_index(count, index, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    # the interactive step of salloc and others have numbers near 2^32; steps of one job must not share a port
    port = _FIRST_PORT + (_number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID")) % _NUM_PORTS
    return Environment(f"{expand_hostlist(nodes)[0]}:{port}", count, index, _slurm_devices(env))


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """The share of a task in the GPUs of its node; None for all that it sees: its own, or a node has one task."""
    tasks = _tasks_on_node(env)
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    bound = len(visible) < _number(env, "SLURM_GPUS_ON_NODE", len(visible)) or env.get("SLURM_GPUS_PER_TASK")
    if tasks == 1 or len(visible) < 2 or bound:
        return None
    if len(visible) % tasks:
        raise ValueError(f"{len(visible)} GPUs (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']}) cannot be dealt "
                         f"out evenly to the {tasks} tasks of a node: choose --ntasks-per-node so that they can")
    share, local = len(visible) // tasks, _number(env, "SLURM_LOCALID")
    return tuple(range(local * share, (local + 1) * share))


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, such as "4(x2),3": the tasks of each node, runs of equal ones put together."""
    counts = []
    for part in (env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: expected the like of 4(x2),3, received {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[0]


def expand_hostlist(text: str) -> list[str]:
    """The hosts of SLURM's short form, in order.

    >>> expand_hostlist("gpu[08-10,7]-ib,login")
    ['gpu08-ib', 'gpu09-ib', 'gpu10-ib', 'gpu7-ib', 'login']

    Raises:
      ValueError: The text is not of that form.
    """
    hosts = []
    for item in re.split(r",(?![^\[]*\])", text.strip()):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # plain, range, plain, range, ..., plain
        if not item or re.search(r"[\[\]\s]", "".join(parts)):
            raise ValueError(f"not a list of hosts: {text!r}; expected the like of node[01-03,7],login")
        found = [parts[0]]
        for ranges, plain in zip(parts[1::2], parts[2::2]):
            found = [host + number + plain for host in found for number in _numbers(ranges, text)]
        hosts += found
    return hosts


def _numbers(ranges: str, text: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(f"not a range of hosts: [{ranges}] in {text!r}; expected the like of [01-03,7]")
        numbers += [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return numbers


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if not text and default is not None:
        return default
    if not text or not text.strip().isdecimal():
        raise ValueError(f"{name}={text}: expected a whole number, 0 or more")
    return int(text)


def _check_index(count: int, index: int, count_name: str, index_name: str) -> None:
    if not 0 <= index < count:
        raise ValueError(f"{index_name}={index} of {count_name}={count}: processes are numbered from 0 to "
                         f"{count_name} - 1")

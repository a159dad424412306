"""Detection of the run that this process belongs to, from variables of launcher or scheduler."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

# Ports above the range that Linux assigns automatically.
_FIRST_PORT, _NUM_PORTS = 61_440, 4_096
_VARIABLES = ("MLIP_JAX_COORDINATOR", "MLIP_JAX_NUM_PROCESSES", "MLIP_JAX_PROCESS_ID")


class Environment(NamedTuple):
    """Place of this process in a run of several processes.

    Attributes:
      coordinator: "host:port" at which process 0 listens. None: JAX detects it and the other fields
        (TPU pods).
      num_processes: Number of processes.
      process_id: Index of this process, from 0.
      local_device_ids: Indices of the visible GPUs that this process uses. None: all.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None


def from_environment(env: Mapping[str, str] = os.environ) -> Environment | None:
    """Return the place of this process in its run, or None if it is the only process.

    The first of these sources that is present applies:

    * MLIP_JAX_COORDINATOR ("host:port"), MLIP_JAX_NUM_PROCESSES and MLIP_JAX_PROCESS_ID, as set by
      launch/local.sh. Only MLIP_JAX_NUM_PROCESSES=1 means a single process, regardless of the
      scheduler. Only MLIP_JAX_COORDINATOR=auto leaves the detection to JAX (launch/tpu_pod.sh).
    * SLURM, in a job step of several tasks: SLURM_STEP_NUM_TASKS, which srun sets for the processes
      that it starts. SLURM_NTASKS is not used, because it is also set in batch scripts and in the
      shell of `salloc`, which are single processes.
    * A TPU pod with TPU_WORKER_HOSTNAMES or MEGASCALE_NUM_SLICES.

    Raises:
      ValueError: Some of the variables are missing or invalid.
    """
    variables = {name: env[name] for name in _VARIABLES if env.get(name)}
    if variables:
        return _from_variables(variables)
    if (
        env.get("SLURM_JOB_ID")
        and env.get("SLURM_STEP_ID")
        and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1
    ):
        return _slurm(env)
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or _number(env, "MEGASCALE_NUM_SLICES", 1) > 1:
        return Environment()
    return None


def _from_variables(env: Mapping[str, str]) -> Environment | None:
    """Return the place of this process according to the variables of this package."""
    if env == {"MLIP_JAX_COORDINATOR": "auto"}:
        return Environment()
    if list(env) == ["MLIP_JAX_NUM_PROCESSES"] and _number(env, "MLIP_JAX_NUM_PROCESSES") == 1:
        return None
    missing = [name for name in _VARIABLES if name not in env]
    if missing:
        raise ValueError(
            f"{', '.join(env)} set, but not {', '.join(missing)}: a run of several processes "
            f"requires all of {', '.join(_VARIABLES)} (launch/local.sh sets them). For a single "
            "process, unset them."
        )
    coordinator = env["MLIP_JAX_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ValueError(
            f"MLIP_JAX_COORDINATOR={coordinator}: expected host:port with a port from 1 to 65535"
        )
    count, index = _number(env, "MLIP_JAX_NUM_PROCESSES"), _number(env, "MLIP_JAX_PROCESS_ID")
    _check_index(count, index, "MLIP_JAX_NUM_PROCESSES", "MLIP_JAX_PROCESS_ID")
    return None if count == 1 else Environment(coordinator, count, index)


def _slurm(env: Mapping[str, str]) -> Environment:
    """Return the place of this process in its SLURM job step."""
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if not env.get(name)]
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if missing or not nodes:
        raise ValueError(
            f"a SLURM step of {env['SLURM_STEP_NUM_TASKS']} tasks without "
            f"{', '.join(missing) or 'SLURM_STEP_NODELIST'}. Start with `srun python -m "
            "mlip_jax.main`, or set MLIP_JAX_NUM_PROCESSES=1 for a single process."
        )
    count, index = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
    _check_index(count, index, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    # The sum gives each step of a job another port. Some steps, such as the interactive one of
    # salloc, have numbers near 2^32, so take the remainder.
    port = _FIRST_PORT + (_number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID")) % _NUM_PORTS
    hosts = expand_hostlist(nodes)
    host = hosts[0] if len(hosts) > 1 else "localhost"  # accepts only connections of this machine
    return Environment(f"{host}:{port}", count, index, _slurm_devices(env))


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the GPUs of this task, its share of the visible GPUs of the node.

    Returns None, which means all visible GPUs, if SLURM has assigned GPUs to the task or if the
    node has only one task.
    """
    tasks = _tasks_on_node(env)
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    bound = len(visible) < _number(env, "SLURM_GPUS_ON_NODE", len(visible)) or env.get(
        "SLURM_GPUS_PER_TASK"
    )
    if tasks == 1 or len(visible) < 2 or bound:
        return None
    if len(visible) % tasks:
        raise ValueError(
            f"{len(visible)} GPUs (CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']}) cannot be "
            f"distributed evenly to the {tasks} tasks of a node. Change --ntasks-per-node."
        )
    share, local = len(visible) // tasks, _number(env, "SLURM_LOCALID")
    return tuple(range(local * share, (local + 1) * share))


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """Return the number of tasks on this node, from SLURM_STEP_TASKS_PER_NODE such as "4(x2),3".

    The variable lists the tasks of each node and abbreviates equal ones: here 4, 4 and 3.
    """
    counts = []
    for part in (
        env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or "1"
    ).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: expected e.g. 4(x2),3, received {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(env, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else counts[0]


def expand_hostlist(text: str) -> list[str]:
    """Expand a list of hosts in SLURM's short form.

    >>> expand_hostlist("gpu[08-10,7]-ib,login")
    ['gpu08-ib', 'gpu09-ib', 'gpu10-ib', 'gpu7-ib', 'login']

    Raises:
      ValueError: The text does not have that form.
    """
    hosts = []
    for item in re.split(r",(?![^\[]*\])", text.strip()):
        parts = re.split(r"\[([^\[\]]*)\]", item)  # plain, range, plain, range, ..., plain
        if not item or re.search(r"[\[\]\s]", "".join(parts)):
            raise ValueError(f"not a list of hosts: {text!r}; expected e.g. node[01-03,7],login")
        expanded = [parts[0]]
        for ranges, plain in zip(parts[1::2], parts[2::2]):
            expanded = [
                host + number + plain for host in expanded for number in _numbers(ranges, text)
            ]
        hosts += expanded
    return hosts


def _numbers(ranges: str, text: str) -> list[str]:
    """Expand the ranges in a pair of brackets, keeping leading zeros. `text` is for the message."""
    numbers = []
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"not a range of hosts: [{ranges}] in {text!r}; expected e.g. [01-03,7]"
            )
        numbers += [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
    return numbers


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return the variable `name` as an integer, or `default` if it is unset or empty.

    Raises:
      ValueError: It is not a non-negative integer, or it is unset and has no default.
    """
    text = env.get(name)
    if not text and default is not None:
        return default
    if not text or not text.strip().isdecimal():
        raise ValueError(f"{name}={text}: expected an integer of at least 0")
    return int(text)


def _check_index(count: int, index: int, count_name: str, index_name: str) -> None:
    """Raise ValueError if the index of a process is not below the number of processes."""
    if not 0 <= index < count:
        raise ValueError(
            f"{index_name}={index} of {count_name}={count}: processes are numbered from 0 to "
            f"{count_name} - 1"
        )

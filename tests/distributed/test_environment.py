"""Tests for the detection of the run from the variables of launchers and schedulers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlip_jax.distributed import Environment, expand_hostlist, from_environment

OWN = {
    "MLIP_JAX_COORDINATOR": "node1:1234",
    "MLIP_JAX_NUM_PROCESSES": "4",
    "MLIP_JAX_PROCESS_ID": "3",
}
STEP = {
    "SLURM_JOB_ID": "8200",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
}


def test_single_process():
    assert from_environment({}) is None
    assert from_environment({"MLIP_JAX_NUM_PROCESSES": "1"} | STEP) is None
    assert (
        from_environment(OWN | {"MLIP_JAX_NUM_PROCESSES": "1", "MLIP_JAX_PROCESS_ID": "0"}) is None
    )
    assert from_environment({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_own_variables_come_first():
    assert from_environment(OWN | STEP) == Environment("node1:1234", 4, 3, None)
    assert from_environment({"MLIP_JAX_COORDINATOR": "auto"}) == Environment()
    assert from_environment(OWN | {"MLIP_JAX_COORDINATOR": "[::1]:80"}).coordinator == "[::1]:80"


@pytest.mark.parametrize("name", OWN)
def test_incomplete_variables_are_an_error(name):
    with pytest.raises(ValueError, match=f"not {name}.*local.sh"):
        from_environment({k: v for k, v in OWN.items() if k != name})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"MLIP_JAX_COORDINATOR": "node1"}, "host:port"),
        ({"MLIP_JAX_COORDINATOR": "node1:99999"}, "65535"),
        ({"MLIP_JAX_NUM_PROCESSES": "four"}, "=four: expected an integer"),
        ({"MLIP_JAX_PROCESS_ID": "4"}, "numbered from 0"),
        ({"MLIP_JAX_PROCESS_ID": "-1"}, "integer of at least 0"),
    ],
)
def test_invalid_variables_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        from_environment(OWN | wrong)


def test_slurm_step():
    found = from_environment(STEP)
    host, port = found.coordinator.split(":")
    assert (host, found.num_processes, found.process_id, found.local_device_ids) == (
        "gpu08",
        4,
        3,
        None,
    )
    assert 61_440 <= int(port) < 65_536
    # another job, and another step of the job, have other ports
    others = [
        from_environment(STEP | {k: "8201"}).coordinator for k in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    ]
    assert found.coordinator not in others


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"])
def test_batch_script_and_interactive_shell_are_one_process(missing):
    assert from_environment({k: v for k, v in STEP.items() if k != missing}) is None
    # the shell of salloc, with use_interactive_step
    assert (
        from_environment(STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"})
        is None
    )


def test_incomplete_step_is_an_error():
    with pytest.raises(ValueError, match="without SLURM_PROCID"):
        from_environment({k: v for k, v in STEP.items() if k != "SLURM_PROCID"})


# one task on the second node
@pytest.mark.parametrize(
    "more, devices",
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),  # a node's, shared by its tasks
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "2"}, None),  # bound to the task
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_STEP_TASKS_PER_NODE": "3,1"}, None),
    ],
)
def test_slurm_gpus(more, devices):
    assert from_environment(STEP | more).local_device_ids == devices


def test_slurm_gpus_that_cannot_be_distributed_are_an_error():
    with pytest.raises(ValueError, match="3 GPUs.*2 tasks"):
        from_environment(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_tpu_pod():
    assert from_environment({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}) == Environment()
    assert from_environment({"MEGASCALE_NUM_SLICES": "2"}) == Environment()


names = st.from_regex(r"[a-z][a-z-]{0,4}", fullmatch=True)
# first, length - 1, width
ranges = st.tuples(st.integers(0, 120), st.integers(0, 6), st.integers(1, 4))
hosts = st.tuples(names, st.lists(ranges, max_size=3), st.sampled_from(["", "-ib", ".local"]))


@given(st.lists(hosts, min_size=1, max_size=4))
def test_hostlist(items):
    texts, expected = [], []
    for name, parts, suffix in items:
        inner = ",".join(
            f"{first:0{width}d}" + (f"-{first + more:0{width}d}" if more else "")
            for first, more, width in parts
        )
        texts.append(f"{name}[{inner}]{suffix}" if parts else name + suffix)
        expected += (
            [
                f"{name}{n:0{width}d}{suffix}"
                for first, more, width in parts
                for n in range(first, first + more + 1)
            ]
            if parts
            else [name + suffix]
        )
    assert expand_hostlist(",".join(texts)) == expected


def test_hostlist_of_racks():
    assert expand_hostlist("r[1-2]n[08-09]") == ["r1n08", "r1n09", "r2n08", "r2n09"]


@pytest.mark.parametrize("text", ["", "a,,b", "a[1", "a]1", "a[]", "a[3-1]", "a[x]", "a b"])
def test_invalid_hostlists_are_errors(text):
    with pytest.raises(ValueError, match=r"expected e.g."):
        expand_hostlist(text)

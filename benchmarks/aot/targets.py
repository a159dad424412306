"""Devices that are described instead of present: GPUs by their data sheets, TPUs by their names.

A GPU needs the CUDA plugin of JAX with its libraries (`pip install "jax[cuda13]"`), a TPU `libtpu`
(`pip install "jax[tpu]"`).
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple


class Rates(NamedTuple):
    """Peak rates of a device.

    Attributes:
      bandwidth: Bandwidth of its memory (B/s).
      exact: Operations in float32 outside of matrix units (FLOP/s).
      matrix: Operations of its matrix units in TF32, or bfloat16 on a TPU (FLOP/s, dense).
      cache: Size of the last cache (B); 0 on a TPU.
    """

    bandwidth: float
    exact: float
    matrix: float
    cache: float


# Data sheets of the manufacturers. Exact products of a TPU take six passes in bfloat16.
RATES = {
    "a100": Rates(2.04e12, 19.5e12, 156e12, 40e6),
    "h100": Rates(3.35e12, 67e12, 495e12, 50e6),
    "h200": Rates(4.8e12, 67e12, 495e12, 50e6),
    "v5e": Rates(0.82e12, 197e12 / 6, 197e12, 0),
    "v5p": Rates(2.765e12, 459e12 / 6, 459e12, 0),
    "v6e": Rates(1.64e12, 918e12 / 6, 918e12, 0),
}


class GPU(NamedTuple):
    """Entries of XLA's description of a GPU."""

    title: str
    cores: int
    units_per_core: int
    shared_per_core: int
    shared_per_block: int
    cache: int
    gigahertz: float
    bandwidth: int
    memory: int
    capability: tuple[int, int]
    extension: str


GPUS = {
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB",
        108, 64, 167936, 166912, 41943040, 1.41, 2039040000000, 85100068864, (8, 0), "NONE",
    ),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3",
        132, 128, 233472, 232448, 52428800, 1.98, 3352320000000, 84942979072, (9, 0),
        "ACCELERATED_FEATURES",
    ),
    "h200": GPU(
        "NVIDIA H200 141GB HBM3e",
        132, 128, 233472, 232448, 52428800, 1.98, 4800000000000, 151397597184, (9, 0),
        "ACCELERATED_FEATURES",
    ),
}  # fmt: skip
# name of the topology and type of the machine of each TPU
TPUS = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
}


def platform(target: str) -> str:
    """Return JAX's name of the platform of a target."""
    return "gpu" if target in GPUS else "tpu"


def missing(target: str) -> str | None:
    """Return why a target cannot be compiled for, or None."""
    if target in TPUS:
        found = importlib.util.find_spec("libtpu") is not None
        return None if found else 'libtpu is not installed: pip install "jax[tpu]"'
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if any(importlib.util.find_spec(name) for name in plugins):
        return None
    return 'the CUDA plugin of JAX is not installed: pip install "jax[cuda13]"'


def devices(target: str, count: int = 1) -> list:
    """Return `count` devices of one machine that programs can be compiled for, but not run on."""
    if target in TPUS:
        name, machine = TPUS[target]
        os.environ.update(
            TPU_SKIP_MDS_QUERY="1",
            TPU_ACCELERATOR_TYPE=machine,
            TPU_WORKER_HOSTNAMES="localhost",
            TPU_WORKER_ID="0",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        )
        from jax.experimental import topologies

        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]
    flags = os.environ.get("XLA_FLAGS", "")
    if "autotune" not in flags:  # trying out algorithms needs the device
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0".strip()
    from jax.experimental import topologies

    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=describe(GPUS[target]),
        topology=f"1x1x{count}",
    ).devices


def describe(gpu: GPU) -> str:
    """Return the text of XLA's message GpuTargetConfigProto for a GPU."""
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_per_core}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  core_count: {gpu.cores} fpus_per_core: {gpu.units_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.gigahertz} device_memory_size: {gpu.memory}
  cuda_compute_capability {{
    major: {major} minor: {minor} feature_extension: {gpu.extension}
  }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_address_bits: 64 name: "{gpu.title}"
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.title}"
"""

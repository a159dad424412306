"""Compile programs for a device that is absent, and count what they would do there.

    JAX_PLATFORMS=cpu python -m benchmarks.aot.compile h200 train:painn:256 forces:painn:256 md:painn:60

See README.md for the columns.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.aot import targets
from benchmarks.aot.kernels import Kernel, Module

_LAUNCH = 2.5e-6  # seconds from one kernel of a stream to the next
COLUMNS = (
    "program", "kernels", "GB", "GB_memory", "GFLOP", "ms_memory", "ms_launch", "atomics", "copies",
    "conditionals", "callbacks", "f64", "temporary_MB", "seconds",
)  # fmt: skip


def compile_for(target: str, spec: str):
    """Compile a program for a target.

    Args:
      target: Key of `targets.RATES`.
      spec: See `programs.build`.

    Returns:
      The compiled program.
    """
    import jax

    from benchmarks.aot import programs
    from mlip_jax.target_device import compiling_for

    mesh = jax.sharding.Mesh(targets.devices(target), ("devices",))
    plain = "slots=0" in spec.split(":")
    with compiling_for("cpu" if plain else targets.platform(target)):
        program = programs.build(spec)
        axes = ("devices",) if program.per_device else ()
        layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        function = _per_device(program.function, mesh) if program.per_device else program.function
        args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), program.args
        )
        jitted = jax.jit(function, donate_argnums=program.donated, out_shardings=layout)
        return jitted.lower(*args).compile()


def _per_device(function, mesh):
    """Map a function over devices like pmap: each gets a slice of length one."""
    import jax

    spec = jax.sharding.PartitionSpec("devices")

    def one(*args):
        out = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], out)

    return jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)


def analyze(target: str, text: str) -> tuple[Module, list[Kernel]]:
    """Return the module of a compiled program and the kernels that count.

    Of a program with loops these are the kernels of the innermost loop that moves most of the bytes:
    an iteration of a relaxation or a step of dynamics. Loops within it count with all their
    iterations, if their number is known.
    """
    module = Module(text, targets.RATES[target].cache)
    total = sum(k.bytes for k in module.kernels)
    bodies = {body: module.within(body) for _, body in module.loops}
    bodies = {b: k for b, k in bodies.items() if 2 * sum(x.bytes for x in k) > total}
    return module, module.repeated(min(bodies, key=lambda b: len(bodies[b]), default=None))


def row(target: str, spec: str, compiled, seconds: float) -> tuple[dict, list[Kernel]]:
    """Return the row of a table for a compiled program, and its kernels."""
    rates = targets.RATES[target]
    module, kernels = analyze(target, compiled.as_text())
    memory = compiled.memory_analysis()
    moved = sum(k.from_memory for k in kernels)
    # each kernel is bound by what it needs most of
    bound = sum(
        max(k.from_memory / rates.bandwidth, k.matrix / rates.matrix, k.vector / rates.exact)
        for k in kernels
    )
    return {
        "program": spec,
        "kernels": sum(k.repeats for k in kernels),
        "GB": round(sum(k.bytes for k in kernels) / 1e9, 3),
        "GB_memory": round(moved / 1e9, 3),
        "GFLOP": round(sum(k.matrix + k.vector for k in kernels) / 1e9, 2),
        "ms_memory": round(1e3 * bound, 3),
        "ms_launch": round(1e3 * _LAUNCH * sum(k.repeats for k in kernels), 2),
        "atomics": sum(k.atomics for k in kernels),
        "copies": sum(k.repeats for k in kernels if "copy" in k.kind or "copy" in k.name),
        "conditionals": module.conditionals,
        "callbacks": module.count(r'custom_call_target="[^"]*callback'),
        "f64": module.count(r"\bf64\["),
        "temporary_MB": round(memory.temp_size_in_bytes / 1e6, 1),
        "seconds": round(seconds, 1),
    }, kernels


def by_line(kernels: list[Kernel], count: int) -> list[str]:
    """Return lines of a table: the bytes of the kernels of each line of code, largest first."""
    groups: dict[str, list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.source or kernel.kind].append(kernel)
    ordered = sorted(groups.items(), key=lambda item: -sum(k.bytes for k in item[1]))
    return [
        f"| {source} | {sum(k.repeats for k in group)} | {sum(k.bytes for k in group) / 1e6:.1f} "
        f"| {sum(k.from_memory for k in group) / 1e6:.1f} | {sum(k.atomics for k in group)} |"
        for source, group in ordered[:count]
    ]


def main(argv: list[str] | None = None) -> int:
    """Compile programs and print a table, and the lines that move the most bytes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=sorted(targets.RATES), help="device to compile for")
    parser.add_argument("programs", nargs="+", help="KIND:MODEL[:SIZE][:slots=K]")
    parser.add_argument("--lines", type=int, default=0, help="lines of code to list per program")
    parser.add_argument("--hlo", type=Path, help="folder for the optimized modules")
    options = parser.parse_args(argv)
    if reason := targets.missing(options.target):
        parser.error(f"{options.target}: {reason}")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for spec in options.programs:
        begin = time.process_time()
        compiled = compile_for(options.target, spec)
        values, kernels = row(options.target, spec, compiled, time.process_time() - begin)
        print(f"| {' | '.join(str(values[name]) for name in COLUMNS)} |", flush=True)
        if options.hlo:
            options.hlo.mkdir(parents=True, exist_ok=True)
            name = f"{options.target}-{spec.replace(':', '_').replace('=', '')}.txt"
            (options.hlo / name).write_text(compiled.as_text())
        if options.lines:
            print("\n| line | kernels | MB | MB from memory | atomics |\n|---|---|---|---|---|")
            print("\n".join(by_line(kernels, options.lines)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Table of the programs of every model that compile for a device that is absent.

    python -m benchmarks.aot.coverage v5e v6e --kinds train relax md

A cell is the processor time of the compiler, or the beginning of its error message.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.aot import targets

# small batches and two layers: the operations are those of large ones
_SIZES = {"train": 4, "forces": 4, "relax": 4, "md": 20, "calc": 20}


def main(argv: list[str] | None = None) -> int:
    """Compile programs and print the table; return 1 if one does not compile."""
    from benchmarks.aot import programs
    from mlip_jax import models

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=sorted(targets.RATES))
    parser.add_argument("--kinds", nargs="+", choices=sorted(_SIZES), default=list(_SIZES))
    parser.add_argument("--models", nargs="+", default=models.names())
    options = parser.parse_args(argv)
    for model in options.models:
        if hasattr(models.find(model), "num_layers"):
            programs.OPTIONS[model] = {**programs.OPTIONS.get(model, {}), "num_layers": 2}
    failures = 0
    columns = [f"{t} {k}" for t in options.targets for k in options.kinds]
    print(f"| model | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)
    for model in options.models:
        cells = [
            attempt(target, f"{kind}:{model}:{_SIZES[kind]}")
            for target in options.targets
            for kind in options.kinds
        ]
        failures += sum(not cell.endswith(" s") for cell in cells)
        print(f"| {model} | {' | '.join(cells)} |", flush=True)
    return 1 if failures else 0


def attempt(target: str, spec: str) -> str:
    """Return the processor time of compiling a program, or the reason why it fails."""
    from benchmarks.aot.compile import compile_for

    begin = time.process_time()
    try:
        compile_for(target, spec)
    except Exception as error:  # noqa: BLE001 any error of a model or of the compiler is a result
        reason = str(error).strip().partition("\n")[0]
        return f"fails: {type(error).__name__}: {reason[:160]}".replace("|", "/")
    return f"{time.process_time() - begin:.0f} s"


if __name__ == "__main__":
    sys.exit(main())

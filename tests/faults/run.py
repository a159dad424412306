"""Prove that the tests still catch known faults: apply each patch of this folder to a copy, and see a test fail.

    python tests/faults/run.py                                   all faults
    python tests/faults/run.py models_painn_vector_sign          one of them
    python tests/faults/run.py --whole-suite reports_sweep_std   by all quick tests, not only by those that it names

A fault is a file NAME.patch: two lines of text, then a unified diff that `git apply` and `patch -p1` take as well.

    Fault: What is wrong, in one sentence.
    Caught by: tests/test_x.py::test_y tests/test_z.py::test_w[case]

`Caught by` holds arguments of pytest: the cheapest tests that fail with the fault. A fault counts as caught if pytest
ends with code 1 and at least one failed test. Tests that pass, or that cannot even be collected, catch nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
MAY_CHANGE = ("mlip_jax/", "launch/", "configs/")
_PYTEST = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider")
_SECONDS = {False: 1800, True: 7200}  # of one run of pytest, by --whole-suite
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")


class FaultError(Exception):
    """A patch cannot be read, or no longer applies."""


@dataclasses.dataclass(frozen=True)
class Hunk:
    """A change of one place of a file: `old` lines, the first of them about at line `start`, become `new`."""

    path: str
    start: int
    old: tuple[str, ...]
    new: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
      name: Of the file, without its suffix. sentence: What is wrong.
      caught_by: Arguments of pytest. hunks: The change.
    """

    name: str
    sentence: str
    caught_by: tuple[str, ...]
    hunks: tuple[Hunk, ...]

    @property
    def paths(self) -> list[str]:
        """Files that it changes, relative to the root of the repository."""
        return sorted({hunk.path for hunk in self.hunks})

    def changed(self, root: Path) -> dict[str, str]:
        """Return the files with the fault in them, by path.

        Raises:
          FaultError: A file is missing, or the lines that the patch expects are not in it.
        """
        files = {}
        for hunk in self.hunks:
            if hunk.path not in files:
                if not (root / hunk.path).is_file():
                    raise FaultError(
                        f"{self.name}: {hunk.path} does not exist; rewrite the patch: the code has moved"
                    )
                files[hunk.path] = (root / hunk.path).read_text(encoding="utf-8").split("\n")
            files[hunk.path] = self._replaced(files[hunk.path], hunk)
        return {path: "\n".join(lines) for path, lines in files.items()}

    def _replaced(self, lines: list[str], hunk: Hunk) -> list[str]:
        old, size = list(hunk.old), len(hunk.old)
        places = [n for n in range(len(lines) - size + 1) if lines[n : n + size] == old]
        if not places:
            raise FaultError(
                f"{self.name}: {hunk.path} has no longer the lines that the patch changes; rewrite the "
                "patch: the code has moved"
            )
        place = min(places, key=lambda n: abs(n + 1 - hunk.start))
        return lines[:place] + list(hunk.new) + lines[place + size :]


def read(path: Path) -> Fault:
    """Read a patch.

    Raises:
      FaultError: It is not of the form that the top of this file describes.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    about = {
        key: value.strip()
        for key, colon, value in (line.partition(":") for line in lines[:2])
        if colon
    }
    if set(about) != {"Fault", "Caught by"} or not all(about.values()):
        raise FaultError(
            f'{path.name}: the first two lines must be "Fault: ..." and "Caught by: ..."'
        )
    return Fault(
        path.stem,
        about["Fault"],
        tuple(shlex.split(about["Caught by"])),
        tuple(_hunks(path.name, lines[2:])),
    )


def _hunks(name: str, lines: Sequence[str]) -> Iterator[Hunk]:
    target, n = "", 0
    while n < len(lines):
        match = _HUNK.match(lines[n])
        n += 1
        if lines[n - 1].startswith("+++ b/"):
            target = lines[n - 1].removeprefix("+++ b/").strip()
        if not match:
            continue
        num_old, num_new = (int(count or 1) for count in match.group(2, 3))
        old, new = [], []
        while len(old) < num_old or len(new) < num_new:
            if n == len(lines) or lines[n][:1] not in (" ", "-", "+"):
                raise FaultError(f"{name}: a hunk has fewer lines than its head says")
            kind, text = lines[n][:1], lines[n][1:]
            old += [text] * (kind != "+")
            new += [text] * (kind != "-")
            n += 1
        yield Hunk(target, int(match[1]), tuple(old), tuple(new))


def faults(names: Sequence[str] = ()) -> list[Fault]:
    """Return the faults of these names, all if there are none.

    Raises:
      FaultError: No such fault, or one that cannot be read.
    """
    known = {path.stem: path for path in sorted(FOLDER.glob("*.patch"))}
    names = [name.removesuffix(".patch").rpartition("/")[2] for name in names]
    for name in names:
        if name not in known:
            raise FaultError(f"there is no fault {name!r} in {FOLDER}")
    return [read(known[name]) for name in names or known]


class Copy:
    """The tracked files of the repository in a temporary folder, where faults come and go."""

    def __init__(self, folder: Path, cache: Path, whole_suite: bool):
        self._root, self._whole_suite = folder, whole_suite
        self._environment = os.environ | {
            "PYTHONPATH": str(folder),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # one that was deleted is listed until that is committed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def check_import(self) -> None:
        """Raise FaultError unless Python imports mlip_jax from this copy."""
        done = self._python("-c", "import mlip_jax; print(mlip_jax.__file__)")
        found = done.stdout.strip()
        if not Path(found).is_relative_to(self._root):
            raise FaultError(
                f"tests would import {found or done.stderr}, and not the copy in {self._root}"
            )
        print(f"mlip_jax is imported from {found}", flush=True)

    def test(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Run tests; return the exit code of pytest, 124 if it takes too long, and what it wrote."""
        try:
            done = self._python(*_PYTEST, *arguments)
        except subprocess.TimeoutExpired:
            return 124, "pytest took too long"
        return done.returncode, done.stdout + done.stderr

    def caught(self, fault: Fault) -> tuple[bool, str]:
        """Return whether a test fails with the fault, and which one or what else happened."""
        sound = {path: (self._root / path).read_bytes() for path in fault.paths}
        try:
            for path, text in fault.changed(self._root).items():
                self._write(path, text.encode())
            code, output = self.test(("-x", *(() if self._whole_suite else fault.caught_by)))
        finally:
            for path, content in sound.items():
                self._write(path, content)
        failed = re.findall(r"^FAILED (\S+)", output, re.MULTILINE)
        if code == 1 and failed:
            return True, failed[0]
        told = "the tests pass" if code == 0 else f"pytest ended with code {code}: {_tail(output)}"
        return False, told

    def _write(self, path: str, content: bytes) -> None:
        target = self._root / path
        target.write_bytes(content)
        # Python takes compiled code for new if only bytes have changed, and neither the second nor the size.
        for compiled in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
            compiled.unlink()

    def _python(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self._root,
            env=self._environment,
            text=True,
            capture_output=True,
            timeout=_SECONDS[self._whole_suite],
        )


def _tail(output: str) -> str:
    return " ".join(output.split())[-400:]


def run(chosen: Sequence[Fault], jobs: int, whole_suite: bool) -> int:
    """Try the faults, print a line for each, and return how many are caught.

    Raises:
      FaultError: The tests do not pass without any fault, or would not be those of the copy.
    """
    for fault in chosen:
        fault.changed(ROOT)  # raises now, not in an hour
    with tempfile.TemporaryDirectory(prefix="faults_") as place:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(jobs):
            (folder := Path(place, f"copy_{number}")).mkdir()
            copies.put(Copy(folder, Path(place, "compiled"), whole_suite))
        first = copies.queue[0]
        first.check_import()
        print("without a fault: ", end="", flush=True)
        named = sorted({argument for fault in chosen for argument in fault.caught_by})
        code, output = first.test(() if whole_suite else named)
        if code:
            raise FaultError(
                f"the tests must pass without a fault; pytest ended with code {code}:\n{output[-4000:]}"
            )
        print(output.strip().splitlines()[-1], flush=True)
        return _try_all(chosen, copies, jobs)


def _try_all(chosen: Sequence[Fault], copies: queue.Queue[Copy], jobs: int) -> int:
    waiting, results, errors = iter(chosen), [], []
    lock = threading.Lock()

    def work() -> None:
        copy = copies.get()
        try:
            while not errors:
                with lock:
                    fault = next(waiting, None)
                if fault is None:
                    return
                begin = time.monotonic()
                is_caught, about = copy.caught(fault)
                with lock:
                    results.append(is_caught)
                    print(
                        f"{'caught    ' if is_caught else 'NOT CAUGHT'} {time.monotonic() - begin:5.1f} s  "
                        f"{fault.name}  {about}",
                        flush=True,
                    )
        except BaseException as error:  # to be raised by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(results)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="faults to try; all if none is given"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="faults that are tried at a time (default 1)",
    )
    parser.add_argument(
        "--whole-suite",
        action="store_true",
        help="run all quick tests for each fault until one fails, not only the tests that it names",
    )
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more, received {options.jobs}")
    try:
        chosen = faults(options.names)
        num_caught = run(chosen, min(options.jobs, len(chosen)), options.whole_suite)
    except FaultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{num_caught} of {len(chosen)} faults caught")
    return int(num_caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())

"""Program that opens many corrupted files in one process and reports unexpected errors.

    python tests/hostile/mutation.py FOLDER NAME COUNT SEED

It corrupts the sample of the reader NAME (tests/datasets/readers/samples), or of the target NAME
(targets.py), COUNT times, and opens each copy under limits of memory and time. It prints a line of
JSON per copy that ends in anything but content or an error of its kind, such as DatasetError. An
audit hook forbids the program to write to, or to connect to, anything outside of FOLDER. The last
line is "done".
"""

import contextlib
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from mlip_jax.datasets.isolation import files as isolated_files
from tests.hostile.targets import TARGETS

SAMPLES = ROOT / "tests/datasets/readers/samples"
SECONDS, MEMORY = 60, 4 * 2**30  # limits of one file
NATIVE_SECONDS = 5.0  # limit of HDF5 and SQLite, which a corrupted file can keep busy without end
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Events that no reader causes.
_FORBIDDEN = ("socket.connect", "socket.bind", "os.system", "os.exec", "os.posix_spawn")


class ForbiddenAction(BaseException):
    """An action outside of the folder; not an Exception, which a reader might handle."""


def forbid_outside(folder: Path) -> None:
    """Raise ForbiddenAction for writes outside of a folder, connections and new programs."""
    allowed = (str(folder), "/dev/null")

    def hook(event: str, arguments: tuple) -> None:
        if event in _FORBIDDEN:
            raise ForbiddenAction(f"{event} {arguments!r:.200}")
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITING
            if writes and isinstance(path, str | bytes):
                text = os.path.realpath(os.fsdecode(path))
                if not text.startswith(allowed):
                    raise ForbiddenAction(f"writes {text}")

    sys.addaudithook(hook)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Return data with some bytes changed, removed, repeated, or cut off at the end."""
    values = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place = int(rng.integers(0, max(len(values), 1)))
        kind = rng.integers(0, 6)
        if kind < 3:
            values[place : place + 1] = bytes([int(rng.integers(0, 256))])
        elif kind == 3:
            values[place : place + 4] = rng.choice(
                [b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\xff\xff\xff\x7f", b"\0\0\0\0"]
            )
        elif kind == 4:
            del values[place : place + int(rng.integers(1, 9))]
        else:
            values[place:place] = values[place : place + int(rng.integers(1, 33))]
    if rng.random() < 0.1:
        del values[int(rng.integers(0, max(len(values), 1))) :]
    return bytes(values)


def sample(name: str, folder: Path):
    """Return path and options of the sample of a reader or target."""
    if name in TARGETS:
        (folder / "sample").mkdir()
        return TARGETS[name].make(folder / "sample"), {}
    spec = importlib.util.spec_from_file_location(f"sample_{name}", SAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "sample").mkdir()
    return module.make(folder / "sample")


def copy_damaged(source: Path, target: Path, rng: np.random.Generator) -> Path:
    """Copy a file or a folder, with one corrupted file."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    path = target / source.name
    if source.is_dir():
        shutil.copytree(source, path)
        chosen = rng.choice(sorted(str(p) for p in path.rglob("*") if p.is_file()))
    else:
        shutil.copy(source, path)
        chosen = str(path)
    content = Path(chosen).read_bytes()
    if zipfile.is_zipfile(chosen) and rng.random() < 0.7:
        Path(chosen).write_bytes(_damaged_member(content, rng))
    else:
        Path(chosen).write_bytes(damaged(content, rng))
    return path


def _damaged_member(content: bytes, rng: np.random.Generator) -> bytes:
    """Return an archive with one corrupted member, whose checksum is that of its new content."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    programs = [
        k for k, (info, _) in enumerate(members) if info.filename.endswith((".pkl", ".yaml"))
    ]
    chosen = int(rng.choice(programs if programs and rng.random() < 0.7 else len(members)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k, (info, data) in enumerate(members):
            data = damaged(data, rng) if k == chosen else data
            archive.writestr(info.filename, data, info.compress_type)
    return buffer.getvalue()


def read(path: Path, name: str, options: dict) -> None:
    """Detect the format of a file and read it completely."""
    if name in TARGETS:
        with contextlib.suppress(*TARGETS[name].errors()):
            TARGETS[name].read(path)
        return
    from mlip_jax.datasets import readers
    from mlip_jax.datasets.reader import DatasetError

    try:
        readers.get(name).matches(path)
        with readers.open_data(path, name, **options) as source:
            for _ in source:
                pass
    except DatasetError:
        pass


def main() -> None:
    """Corrupt and read the sample COUNT times."""
    folder, name, count, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # a folder outside of FOLDER
    path, options = sample(name, folder)
    read(path, name, options)  # imports everything
    isolated_files.SECONDS = NATIVE_SECONDS
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # also ends a loop in C
    forbid_outside(folder)
    for k in range(seed, seed + count):
        print(json.dumps({"seed": k}), flush=True)
        copy = copy_damaged(path, folder / "copy", np.random.default_rng(k))
        signal.alarm(SECONDS)
        try:
            read(copy, name, options)
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{f.filename}:{f.lineno}" for f in frames if "mlip_jax" in f.filename]
            problem = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps({"seed": k, "problem": problem, "place": ours[-1:]}), flush=True)
        signal.alarm(0)
    print("done", flush=True)


if __name__ == "__main__":
    main()

"""Tests for the launchers, with fake schedulers on PATH that record their arguments."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlip_jax import distributed

REPOSITORY = Path(__file__).parents[1]
LAUNCH = REPOSITORY / "launch"
# Program that records its arguments and environment, and ends with the exit code of its process,
# given as "0,3" or, for several starts, as "75,75;0,0".
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
if sys.argv[-1] == "--show_workdir":
    print(f"a message\\nruns/{sys.argv[1]}")
    sys.exit("unknown" in sys.argv)
rank = int(os.environ["MLIP_JAX_PROCESS_ID"])
folder = Path(os.environ["NOTES"])
start = len(list(folder.glob(f"note_{rank}_*")))
def stop(number, frame):
    (folder / f"signal_{rank}_{time.time()}").write_text(signal.Signals(number).name)
    stopped.append(number)
stopped = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, stop)
print(f"output of process {rank}", flush=True)
path = folder / f"note_{rank}_{start}"
new = folder / f"new_{rank}"
new.write_text(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
new.rename(path)
codes = os.environ["CODES"].split(";")
code = codes[min(start, len(codes) - 1)].split(",")[rank]
for _ in range(600 if code == "wait" else 0):
    time.sleep(0.1)
    if stopped:
        time.sleep(0.7)  # a second signal would arrive during this time
        sys.exit(75)
sys.exit(int(code))
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Return a folder with the module `program`, and clean the environment."""
    for name in [n for n in os.environ if n.startswith(("SLURM", "MLIP_JAX", "CUDA_VIS"))]:
        monkeypatch.delenv(name)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "bin").mkdir()
    for name, value in {
        "PYTHONPATH": str(tmp_path),
        "NOTES": str(tmp_path),
        "CODES": "0,0,0,0",
        "JAX_PLATFORMS": "cpu",
        "PYTHON": sys.executable,
        "XLA_FLAGS": "",
        "HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake(workplace, name, body):
    path = workplace / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def local(*arguments, **kwargs):
    return subprocess.run(
        [LAUNCH / "local.sh", *arguments], capture_output=True, text=True, timeout=60, **kwargs
    )


def test_the_launcher_imports_nothing_from_the_current_folder(workplace, monkeypatch):
    """A folder of other people can contain a file socket.py, which `python -c` would import."""
    monkeypatch.delenv("PYTHONPATH")
    (workplace / "socket.py").write_text("open('ran', 'w').close()\n")
    done = local("-n", "1", "-m", "program", "--", "--workdir=out")
    assert done.returncode == 0, done.stderr
    assert not (workplace / "ran").exists()
    python = workplace / "bin/python"
    fake(workplace, "python", f'echo "$@" >> {workplace}/commands; exit 2')
    monkeypatch.setenv("PYTHON", str(python))
    local("-n", "1", "--", "relax")
    assert (workplace / "commands").read_text() == "-P -m mlip_jax.main relax --show_workdir\n"


def notes(workplace, rank, start=0):
    return json.loads((workplace / f"note_{rank}_{start}").read_text())


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", "tpu_pod.sh"])
def test_syntax(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name]).returncode == 0
    assert name.endswith(".sbatch") or os.access(LAUNCH / name, os.X_OK)


def test_local_starts_all_with_the_same_flags(workplace):
    flags = ["--config=a b.py", "--workdir=out", "--config.x=$HOME 'quoted'"]
    done = local("-n", "3", "--devices-per-process", "2", "-m", "program", "--", *flags)
    assert done.returncode == 0, done.stderr
    records = [notes(workplace, k) for k in range(3)]
    assert all(n["arguments"] == flags for n in records)
    environments = [n["environment"] for n in records]
    assert [e["MLIP_JAX_PROCESS_ID"] for e in environments] == ["0", "1", "2"]
    assert {e["MLIP_JAX_NUM_PROCESSES"] for e in environments} == {"3"}
    (coordinator,) = {e["MLIP_JAX_COORDINATOR"] for e in environments}
    assert coordinator.startswith("localhost:") and 0 < int(coordinator.split(":")[1]) < 65_536
    assert {e["XLA_FLAGS"] for e in environments} == {"--xla_force_host_platform_device_count=2"}
    assert done.stdout == "output of process 0\n"
    assert "output of process 2" in (workplace / "out" / "process_2.log").read_text()


@pytest.mark.parametrize(
    "gpus, options, expected",
    [
        ("0,1,2,3", [], ["0,1", "2,3"]),
        ("4,7", [], ["4", "7"]),
        ("GPU-a,GPU-b", [], ["GPU-a", "GPU-b"]),
        ("0,1,2", ["--devices-per-process", "1"], ["0", "1"]),
    ],
)
def test_local_distributes_gpus(workplace, monkeypatch, gpus, options, expected):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert local("-n", "2", *options, "-m", "program", "--", "--workdir=out").returncode == 0
    assert [
        notes(workplace, k)["environment"]["CUDA_VISIBLE_DEVICES"] for k in range(2)
    ] == expected


def test_local_detects_gpus(workplace, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    fake(workplace, "nvidia-smi", 'printf "0\\n1\\n"')
    assert local("-n", "2", "-m", "program", "--", "--workdir=out").returncode == 0
    assert [notes(workplace, k)["environment"]["CUDA_VISIBLE_DEVICES"] for k in range(2)] == [
        "0",
        "1",
    ]
    done = local("-n", "4", "-m", "program", "--", "--workdir=out")
    assert done.returncode == 2 and "2 GPU(s) for 4 processes" in done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--", "--workdir=out"], "-n N"),
        (["-n", "0", "--", "--workdir=out"], "-n 0"),
        (["-n", "2"], "no flags"),
        (["-n", "2", "-m", "program", "--", "relax", "unknown"], ""),
        (["-n"], "needs a value"),
        (["--sweep"], "unknown option --sweep"),
        (["-n", "2", "--restarts", "x", "--", "--workdir=out"], "--restarts x"),
    ],
)
def test_local_reports_invalid_arguments(workplace, arguments, message):
    done = local(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert not list(workplace.glob("note_*"))


def test_local_lets_the_program_choose_the_workdir(workplace):
    """Detects processes that choose for themselves, between which another run may start."""
    assert local("-n", "2", "-m", "program", "--", "relax", "m.smi").returncode == 0
    for rank in range(2):
        assert notes(workplace, rank)["arguments"] == ["relax", "m.smi", "--workdir=runs/relax"]
    assert "output of process 1" in (workplace / "runs/relax/process_1.log").read_text()


def test_local_help():
    done = local("--help")
    assert done.returncode == 0 and "--devices-per-process" in done.stdout


def test_local_reports_the_failed_process_and_ends_the_others(workplace, monkeypatch):
    monkeypatch.setenv("CODES", "wait,3")
    script, text = workplace / "local.sh", (LAUNCH / "local.sh").read_text()
    grace = re.search(r"GRACE_FAILED=(\d+)", text)
    # otherwise the other processes end before they report which process has died
    assert int(grace[1]) > distributed.CAUSE_SECONDS
    script.write_text(text.replace(grace[0], "GRACE_FAILED=1"))
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", script, "-n", "2", "-m", "program", "--", "--workdir", "out"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    # the other process would sleep for a minute
    assert done.returncode == 3 and time.monotonic() - begin < 15
    assert "process 1 ended with exit code 3" in done.stderr
    assert "output of process 1" in done.stderr  # the end of its log


def test_local_returns_the_code_of_the_process_that_failed_first(workplace, monkeypatch):
    monkeypatch.setenv("CODES", "76,4")
    assert local("-n", "2", "-m", "program", "--", "--workdir=out").returncode == 4


@pytest.mark.parametrize(
    "codes, restarts, starts, code",
    [
        ("75,75;0,0", 1, 2, 0),
        ("75,75", 2, 3, 75),
        ("75,75", 0, 1, 75),
        ("1,1", 3, 1, 1),
        ("75,75;3,0", 5, 2, 3),
        ("75,76;0,0", 1, 2, 0),
    ],
)
def test_local_restarts(workplace, monkeypatch, codes, restarts, starts, code):
    monkeypatch.setenv("CODES", codes)
    done = local("-n", "2", "--restarts", str(restarts), "-m", "program", "--", "--workdir=out")
    assert done.returncode == code, done.stderr
    assert len(list(workplace.glob("note_0_*"))) == starts


@contextlib.contextmanager
def started(*arguments, **kwargs):
    process = subprocess.Popen(
        arguments,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=30)


def wait_for(process, *paths):
    deadline = time.monotonic() + 30
    while not all(p.exists() for p in paths):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def check_port(port):
    """Process 0 can listen on the port, and a launcher that starts now cannot choose it."""
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("localhost", port))
    socket.create_server(("localhost", port)).close()  # as in meeting.py
    with socket.socket() as service:  # as JAX's coordination service
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        service.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        service.bind(("localhost", port))
        service.listen()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_local_passes_signals_on_once(workplace, monkeypatch, number):
    """The signal goes to the whole group, as with Ctrl-C. A stopped run is not restarted."""
    monkeypatch.setenv("CODES", "wait,wait")
    with started(
        LAUNCH / "local.sh", "-n", "2", "--restarts", "3", "-m", "program", "--", "--workdir=out"
    ) as process:
        wait_for(process, workplace / "note_0_0", workplace / "note_1_0")
        check_port(int(notes(workplace, 0)["environment"]["MLIP_JAX_COORDINATOR"].split(":")[1]))
        os.killpg(process.pid, number)
        assert process.wait(30) == 75
    for rank in range(2):
        (received,) = workplace.glob(f"signal_{rank}_*")
        assert received.read_text() == number.name
        assert not (workplace / f"note_{rank}_1").exists()


# --- SLURM

SRUN = """
printf '%s\\n' "$@" > srun_arguments
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
SLURM_PROCID=0 "$@"
"""
# replacement of Python that records its arguments
PYTHON = """
printf '%s\\n' "$@" > python_arguments
exit "$(cat code)"
"""


@pytest.fixture
def cluster(workplace, monkeypatch):
    fake(workplace, "srun", SRUN)
    fake(workplace, "python", PYTHON)
    fake(workplace, "scontrol", 'printf "%s\\n" "$@" > scontrol_arguments')
    for name, value in {
        "PYTHON": str(workplace / "bin" / "python"),
        "SLURM_JOB_ID": "77",
        "TMPDIR": str(workplace),
        "SLURM_SUBMIT_DIR": str(LAUNCH),
        "MLIP_JAX_REPOSITORY": str(REPOSITORY),
    }.items():
        monkeypatch.setenv(name, value)
    return workplace


def sbatch(*arguments):
    return subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("code", [0, 1, 75])
def test_slurm_requeues_stopped_runs(cluster, code):
    (cluster / "code").write_text(str(code))
    flags = ["--config=a b.py", "--workdir=out"]
    done = sbatch(*flags)
    assert done.returncode == (0 if code == 75 else code), done.stderr
    assert (cluster / "python_arguments").read_text().splitlines() == [
        "-P",
        "-u",
        "-m",
        "mlip_jax.main",
        *flags,
    ]
    requeued = cluster / "scontrol_arguments"
    assert requeued.exists() == (code == 75)
    assert code != 75 or requeued.read_text().split() == ["requeue", "77"]
    assert not list(cluster.glob("tmp.*"))


def test_slurm_requeues_even_if_srun_kills_other_processes(cluster):
    (cluster / "code").write_text("75")
    fake(cluster, "srun", SRUN + "exit 143")
    assert sbatch("--workdir=out").returncode == 0
    assert (cluster / "scontrol_arguments").exists()


def test_slurm_limits_the_number_of_requeues(cluster, monkeypatch):
    (cluster / "code").write_text("75")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "100")
    done = sbatch("--workdir=out")
    assert done.returncode == 75 and "MAX_REQUEUES" in done.stderr
    assert not (cluster / "scontrol_arguments").exists()


def test_slurm_reports_that_requeueing_failed(cluster):
    (cluster / "code").write_text("75")
    fake(cluster, "scontrol", "exit 1")
    done = sbatch("--workdir=out")
    assert done.returncode == 75 and "cannot requeue" in done.stderr


def test_slurm_array_is_a_sweep(cluster, monkeypatch):
    (cluster / "code").write_text("0")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    assert sbatch("--workdir=out").returncode == 0
    assert (cluster / "python_arguments").read_text().splitlines()[-2:] == [
        "--sweep",
        "--sweep_index=7",
    ]


def test_slurm_warning_reaches_only_the_program(cluster):
    """SLURM signals every process of the step; the batch script must survive and requeue."""
    fake(cluster, "srun", "trap : USR1" + SRUN)  # the real srun is not part of the step
    fake(cluster, "python", "trap 'exit 75' USR1\ntouch ready\nsleep 30 & wait")
    with started("bash", LAUNCH / "slurm.sbatch", "--workdir=out") as process:
        wait_for(process, cluster / "ready")
        os.killpg(process.pid, signal.SIGUSR1)
        assert process.wait(30) == 0
    assert (cluster / "scontrol_arguments").exists()


@pytest.mark.parametrize("folder", [None, "", "/scratch/compiled"])
def test_slurm_does_not_change_the_compilation_cache(cluster, monkeypatch, folder):
    """The program has a folder per type of processor; an empty value disables the cache."""
    fake(cluster, "python", 'printf %s "${JAX_COMPILATION_CACHE_DIR-unset}" > folder')
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if folder is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    assert sbatch("--workdir=out").returncode == 0
    assert (cluster / "folder").read_text() == ("unset" if folder is None else folder)


def test_slurm_outside_of_a_job(cluster, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    done = sbatch("--workdir=out")
    assert done.returncode == 2 and "sbatch launch/slurm.sbatch" in done.stderr


# --- TPU

GCLOUD = """
printf '%s\\n' "$@" '' >> gcloud_arguments
for a in "$@"; do case $a in *mlip_jax.main*) echo start >> starts ;; esac; done
case "$*" in
  *pkill*) ;;
  *'scp '*) cp "$5" copied.tar.gz ;;
  *mlip_jax.main*)
    code=$(sed -n "$(wc -l < starts)p" codes)
    printf 'worker 0: mlip_jax exit code %s\\nworker 1: mlip_jax exit code %s\\n' $code
    case $code in '0 0') exit 0 ;; *) exit 1 ;; esac ;;
esac
"""


@pytest.fixture
def pod(workplace):
    fake(workplace, "gcloud", GCLOUD)
    return workplace


def tpu_pod(*arguments):
    return subprocess.run(
        [LAUNCH / "tpu_pod.sh", "--tpu", "pod", "--zone", "us-1", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "codes, restarts, starts, code",
    [
        ("0 0", 0, 1, 0),
        ("75 75\n0 0", 2, 2, 0),
        ("75 75\n75 75", 1, 2, 75),
        ("1 76", 2, 1, 1),
        ("75 1", 2, 1, 1),
    ],
)
def test_tpu_restarts_if_all_hosts_request_it(pod, codes, restarts, starts, code):
    (pod / "codes").write_text(codes + "\n")
    done = tpu_pod("--no-setup", "--restarts", str(restarts), "--", "--workdir=/mnt/out")
    assert done.returncode == code, done.stderr
    assert len((pod / "starts").read_text().splitlines()) == starts


def test_tpu_copies_and_starts_on_all_hosts(pod):
    (pod / "codes").write_text("0 0\n")
    done = tpu_pod("--project", "mine", "--", "--config=a b.py", "--workdir=/mnt/out")
    assert done.returncode == 0, done.stderr
    names = subprocess.run(
        ["tar", "-tzf", pod / "copied.tar.gz"], capture_output=True, text=True
    ).stdout.split()
    assert "mlip_jax/main.py" in names and "pyproject.toml" in names
    calls = (pod / "gcloud_arguments").read_text().split("\n\n")[:-1]
    assert [c.split("\n")[2] for c in calls] == ["tpu-vm"] * 3
    assert [c.split("\n")[3] for c in calls] == ["scp", "ssh", "ssh"]
    for call in calls:
        assert call.split("\n")[-5:] == ["--zone", "us-1", "--project", "mine", "--worker=all"]
    assert "pip install" in calls[1]
    command = calls[2].split("\n")[calls[2].split("\n").index("--command") + 1]
    assert (
        "MLIP_JAX_COORDINATOR=auto" in command and r"--config=a\ b.py --workdir=/mnt/out" in command
    )


def test_tpu_stops_a_run(pod):
    assert tpu_pod("--stop").returncode == 0
    assert "pkill -TERM" in (pod / "gcloud_arguments").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tpu", ""], "--tpu NAME"),
        ([], "no flags"),
        (["--restarts", "-1", "--", "--workdir=x"], "--restarts -1"),
        (["--worker=0"], "unknown option"),
    ],
)
def test_tpu_reports_invalid_arguments(pod, arguments, message):
    done = tpu_pod(*arguments)
    assert (
        done.returncode == 2 and message in done.stderr and not (pod / "gcloud_arguments").exists()
    )

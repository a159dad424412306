"""Forks of a Python process that has imported the modules they need, to save time.

An import of JAX takes 0.8 CPU-seconds. The forks end like any Python process: first their threads,
then the functions of atexit.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SERVER = """
import gc, importlib, json, os, socket, sys

gc.set_threshold(50_000, 50, 100)  # as in conftest.py

link = socket.socket(fileno=int(sys.argv[1]))
for name in sys.argv[2:]:
    importlib.import_module(name)
while True:
    data, files, _, _ = socket.recv_fds(link, 1_000_000, 3)
    if not data:
        sys.exit()
    request = json.loads(data)
    if "wait" in request:
        pid, status = os.waitpid(request["wait"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if answer == 0:
            break
        for file in files:
            os.close(file)
    link.send(json.dumps(answer).encode())
link.close()
for number, file in enumerate(files):
    os.dup2(file, number)
    os.close(file)
os.environ.update(request["environment"])
sys.argv[1:] = request["arguments"]
exec(compile(request["script"], "script", "exec"), {"__name__": "__main__"})
"""


class Forks:
    """Process that has imported modules and can be forked.

    Args:
      *modules: Names of the modules, which may be modules of the repository.
      **environment: Environment variables that the modules read when they are imported.
    """

    def __init__(self, *modules: str, **environment: str):
        self._link, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", SERVER, str(other.fileno()), *modules],
                cwd=Path(__file__).parents[1],
                env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
                pass_fds=[other.fileno()],
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._link.close()
        self._process.wait()

    def start(
        self, script, *arguments, stdin=subprocess.DEVNULL, stdout, stderr=None, **environment
    ):
        """Start a script in a fork.

        Args:
          script: Source code of the script.
          *arguments: Command line arguments of the script.
          stdin: Open file, by default an empty one.
          stdout: Open file.
          stderr: Open file, by default that of stdout.
          **environment: Environment variables of the script.
        """
        request = {
            "script": script,
            "arguments": list(map(str, arguments)),
            "environment": environment,
        }
        with contextlib.ExitStack() as stack:
            if stdin == subprocess.DEVNULL:
                stdin = stack.enter_context(open(os.devnull))
            files = [stdin.fileno(), stdout.fileno(), (stderr or stdout).fileno()]
            socket.send_fds(self._link, [json.dumps(request).encode()], files)
        return Fork(self, json.loads(self._link.recv(100)))

    def exit_code(self, pid):
        """Return the exit code of a fork, or None if it is running. A code is returned once."""
        self._link.send(json.dumps({"wait": pid}).encode())
        return json.loads(self._link.recv(100))


class Fork:
    """Started process with the methods of subprocess.Popen that tests use."""

    def __init__(self, forks, pid):
        self._forks, self.pid, self.returncode = forks, pid, None

    def poll(self):
        """Return the exit code, or None if the process is running."""
        if self.returncode is None:
            self.returncode = self._forks.exit_code(self.pid)
        return self.returncode

    def wait(self, timeout=60):
        """Wait for the end of the process and return its exit code."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, (
                f"process {self.pid} has not ended within {timeout} s"
            )
            time.sleep(0.01)
        return self.returncode

    def kill(self):
        """Kill the process if it is running."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

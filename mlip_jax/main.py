"""python -m mlip_jax.main --config=configs/spice.py --workdir=runs/spice

Runs what a config asks for. Change fields on the command line: --config.train.batch_size=32. The same command run
again goes on where it was stopped.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import platform
import sys

# glibc hands every large buffer back to the system and asks again; half of a CPU training step is page faults then.
ALLOCATOR = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:"
             "glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1")


def tune_allocator() -> None:
    """Start this process again with glibc's allocator tuned, unless GLIBC_TUNABLES is set (empty turns it off).

    The setting is read when a process starts.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-m", "mlip_jax.main", *sys.argv[1:]])


def run(config, workdir: str) -> None:
    """Hand `config` to the task that it names."""
    from mlip_jax import tasks
    from mlip_jax.config import ConfigError, unknown_name
    names = [m.name for m in pkgutil.iter_modules(tasks.__path__)]
    if config.get("task") not in names:
        raise ConfigError(unknown_name("task", config.get("task"), names))
    importlib.import_module(f"mlip_jax.tasks.{config.task}").run(config, workdir)


def main() -> None:
    """Parse the flags and run; errors that a user can mend are one message, without a traceback."""
    from absl import app, flags
    from absl import logging as absl_logging
    from ml_collections import config_flags

    config_flag = config_flags.DEFINE_config_file("config", None, "A file of configs/, with get_config().")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics and report go there.")
    debug = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")
    flags.mark_flags_as_required(["config", "workdir"])

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {argv[1:]}")
        _log_to_console(absl_logging)
        try:
            run(config_flag.value, workdir.value)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command goes on from the last checkpoint")
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            if debug.value:
                raise
            sys.exit(f"\nerror: {error}")

    app.run(start, flags_parser=lambda args: _parse(app, flags, args))


def _parse(app, flags, args):
    """absl's parser; a config field that does not exist becomes a message in place of a traceback."""
    try:
        return flags.FLAGS(args)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # the text of a KeyError is the repr of its argument, of ml_collections' twice over
        if any(a.lstrip("-").startswith("config.data.reader_options.") for a in args):
            sys.exit("error: options of a reader are given together: "
                     '--config.data.reader_options="NAME=VALUE; NAME=VALUE"')
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        sys.exit("error: " + text.strip("'\"").replace("\\n", "\n").replace("\\'", "'"))
    except flags.Error as error:
        sys.exit(f"error: {error}\nRun with --help for the flags.")


def _log_to_console(absl_logging) -> None:
    from rich.logging import RichHandler
    absl_logging.use_absl_handler()
    root = logging.getLogger()
    root.handlers = [RichHandler(show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")]
    root.setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells every file it opens


if __name__ == "__main__":
    tune_allocator()
    main()

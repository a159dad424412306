"""python -m mlip_jax.main --config=configs/spice.py --workdir=runs/spice

Runs what a config asks for. Change fields on the command line: --config.train.batch_size=32. The same command run
again goes on where it was stopped. --config=FILE --help tells what a config does, and its fields.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import platform
import signal
import sys
from pathlib import Path

# glibc hands every large buffer back to the system and asks again; half of a CPU training step is page faults then.
ALLOCATOR = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368:"
             "glibc.malloc.top_pad=67108864:glibc.malloc.arena_max=1")


_EXIT_REQUEUE = 75  # distributed.EXIT_REQUEUE, before that is imported


def end_at_signals() -> None:
    """SIGTERM and SIGUSR1 end this process at once, to be started again: in its first seconds it has done nothing."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os._exit(_EXIT_REQUEUE))


def tune_allocator() -> None:
    """Start this process again with glibc's allocator tuned, unless GLIBC_TUNABLES is set (empty turns it off).

    The setting is read when a process starts.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-m", "mlip_jax.main", *sys.argv[1:]])


def keep_compiled_programs() -> None:
    """Programs that XLA compiled serve the next run: in JAX_COMPILATION_CACHE_DIR (empty: off), else the user's cache.

    What is compiled for a CPU holds for CPUs of its kind alone, so that each kind has a folder.
    """
    import hashlib

    import jax
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    kind = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        kind = next((line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))), kind)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{jax.__version__}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    jax.config.update("jax_compilation_cache_dir", str(cache / "mlip_jax" / name))


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

    from mlip_jax import distributed

    config_flag = config_flags.DEFINE_config_file("config", None, "A file of configs/, with get_config().")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, metrics and report go there.")
    sweep = _sweep_flags(flags)
    profile = flags.DEFINE_integer("profile", None, "Write a trace of so many steps to WORKDIR/trace.")
    debug = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")
    flags.mark_flags_as_required(["config", "workdir"])

    def start(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {argv[1:]}")
        alone = [f"--{name}" for name, flag in sweep.items() if name != "overrides" and flag.value]
        if alone and not sweep["sweep"].value and sweep["overrides"].value is None:
            raise app.UsageError(f"{', '.join(alone)} without --sweep")
        _log_to_console(absl_logging)
        try:
            config = _overridden(config_flag.value, sweep["overrides"].value)
            if sweep["sweep"].value:  # before anything that claims a device or a port, which the variants will
                from mlip_jax import sweep_runner
                sys.exit(sweep_runner.run(
                    config_flags.get_config_filename(flags.FLAGS["config"]), config, workdir.value, sys.argv[1:],
                    index=sweep["sweep_index"].value, list_only=sweep["sweep_list"].value,
                    collect_only=sweep["sweep_collect"].value))
            if profile.value is not None:
                if config.get("task") != "train":
                    raise app.UsageError(f"--profile is of training; the task of this config is {config.get('task')!r}")
                config.train.profile_steps = profile.value
            keep_compiled_programs()
            with distributed.session(distributed.from_environment()), distributed.ended_by_signals():
                _run_until_stopped(config, workdir.value)
        except distributed.InterruptedTwice:
            sys.exit("interrupted; the same command goes on from the last checkpoint")
        except KeyboardInterrupt:  # where there is no step to wait for: data are read, the report is written
            logging.getLogger(__name__).warning("interrupted; the same command goes on from what is saved")
            sys.exit(distributed.EXIT_REQUEUE)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            if debug.value:
                raise
            sys.exit(f"\nerror: {distributed.failed_peer_message(error) or error}")

    app.run(start, flags_parser=lambda args: _parse(app, flags, args))


def _run_until_stopped(config, workdir: str) -> None:
    from mlip_jax import distributed
    try:
        run(config, workdir)
    except distributed.Stopped as stopped:
        logging.getLogger(__name__).warning("%s", stopped)
        sys.exit(distributed.EXIT_REQUEUE)


def _sweep_flags(flags):
    return {flag.name: flag for flag in (
        flags.DEFINE_bool(
            "sweep", False, "Run the variants that sweep() of the config file gives, one after another, each in "
            "WORKDIR/NAME, and collect them in WORKDIR/sweep.md and sweep.csv. The same command again runs what is not "
            "complete; several at once share the work."),
        flags.DEFINE_string(
            "sweep_index", None, 'With --sweep: run the variant of this number (from 0) alone, for job arrays; "slurm" '
            "takes the number from SLURM_ARRAY_TASK_ID."),
        flags.DEFINE_bool(
            "sweep_list", False, "With --sweep: print number, name and fields of each variant in a line; run nothing."),
        flags.DEFINE_bool("sweep_collect", False, "With --sweep: make the table again; run nothing."),
        flags.DEFINE_multi_string(
            "overrides", None, "Config fields with their values as a Python dictionary, applied after those given as "
            "--config.FIELD: \"{'model.options.degrees': (1, 2), 'seed': 1}\". A sweep gives its variants theirs so."))}


def _overridden(config, overrides: list[str] | None):
    from mlip_jax.sweep import override, parse
    for text in overrides or ():
        config = override(config, parse(text))
    return config


def _parse(app, flags, args):
    """absl's parser; a config field that does not exist becomes a message in place of a traceback."""
    try:
        _show_help_of_config(args[1:])
        return flags.FLAGS(_with_found_config(args))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # the text of a KeyError is the repr of its argument, of ml_collections' twice over
        if any(a.lstrip("-").startswith("config.data.reader_options.") for a in args):
            sys.exit("error: options of a reader are given together: "
                     '--config.data.reader_options="NAME=VALUE; NAME=VALUE"')
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        sys.exit("error: " + text.strip("'\"").replace("\\n", "\n").replace("\\'", "'"))
    except flags.Error as error:
        sys.exit(f"error: {error}\nRun with --help for the flags.")


def _show_help_of_config(args: list[str]) -> None:
    """With --help beside --config: print what that config does, and leave."""
    config = [value for name, value in zip(args, args[1:]) if name in ("--config", "-config")]
    config += [a.partition("=")[2] for a in args if a.startswith(("--config=", "-config="))]
    if config and {"--help", "-h", "-help", "-?"} & set(args):
        from mlip_jax.defaults.help import help_text
        print(help_text(config[0]))
        print("\nFlags of every config: --help without --config.")
        sys.exit(0)


def _with_found_config(args: list[str]) -> list[str]:
    """The arguments with the config file at the place where it was found."""
    from mlip_jax.config import find_file
    found = list(args)
    for i, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            if equals:
                found[i] = f"{name}={find_file(value)}"
            elif i + 1 < len(args):
                found[i + 1] = find_file(args[i + 1])
    return found


def _log_to_console(absl_logging) -> None:
    from rich.logging import RichHandler
    absl_logging.use_absl_handler()
    root = logging.getLogger()
    root.handlers = [RichHandler(show_path=False, omit_repeated_times=False, log_time_format="%H:%M:%S")]
    root.setLevel(logging.INFO)
    logging.getLogger("jax").setLevel(logging.WARNING)
    # orbax tells every file it opens, and every error with its traceback, which comes to us as an exception as well
    absl_logging.set_verbosity(absl_logging.FATAL)
    _leave_out_closed_loops()


def _leave_out_closed_loops() -> None:
    """After a write has failed, the threads of orbax's others print that nobody waits for them any more."""

    def closed_loop(error):
        return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

    show, show_unraisable = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if closed_loop(error) else show(kind, error, trace)
    sys.unraisablehook = lambda about: None if closed_loop(about.exc_value) else show_unraisable(about)


if __name__ == "__main__":
    end_at_signals()
    tune_allocator()
    main()

"""mlip-jax CONFIG [--workdir FOLDER] [--FIELD VALUE ...] [INPUT]

    mlip-jax spice
    mlip-jax relax --force_field runs/spice molecules.smi

Runs the task of a config: the name of a shipped config (with an argument, as in spice:painn) or a
file. Without --workdir, the run is written to runs/NAME of the config, or to runs/NAME-2 and so on
if that has the results of another run. Rerun the same command to resume a stopped run.
`mlip-jax relax --help` describes a config and its fields. The long form of a command is
--config=relax --config.force_field=runs/spice --config.input=molecules.smi.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys

from mlip_jax.cli import process

log = logging.getLogger(__name__)


def command() -> None:
    """Entry point of the command. It may first restart the process with a tuned allocator."""
    process.exit_on_signals()
    process.tune_allocator()
    main()


def main() -> None:
    """Parse the flags and run the task.

    An error that the user can correct ends the process with a message instead of a traceback.
    """
    from absl import app

    from mlip_jax.cli import flags

    if flags.is_own_config(sys.argv):
        _import_from_current_folder()
    sys.argv[:] = flags.define(sys.argv)  # a sweep passes sys.argv to its variants
    app.run(run_command, flags_parser=lambda args: flags.parse(args, __doc__))


def _import_from_current_folder() -> None:
    """Let the user's config, or the module of a reference method, be in the current folder.

    Otherwise, this folder may be one of other people, whose modules must not run.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def run_command(arguments: list[str]) -> None:
    """Run the task and convert its errors to messages and exit codes."""
    from absl.flags import FLAGS

    from mlip_jax import distributed
    from mlip_jax.cli import console
    from mlip_jax.foreign_text import printable

    console.log_to_console()
    process.ignore_settings_of_matplotlib()
    try:
        _dispatch(arguments)
    except distributed.ForcedInterrupt:
        sys.exit("interrupted; rerun the same command to resume from the last checkpoint")
    except distributed.ReportedInterrupt:
        sys.exit(distributed.EXIT_REQUEUE)
    except KeyboardInterrupt:  # outside of the training loop, which handles interrupts itself
        log.warning("interrupted; rerun the same command to resume from the last saved state")
        sys.exit(distributed.EXIT_REQUEUE)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if FLAGS.debug:
            raise
        message = printable(str(distributed.failed_peer_message(error) or error))
        sys.exit(f"\nerror: {message}")


def _dispatch(arguments: list[str]) -> None:
    """Run the sweep or the task of the config that the flags select."""
    from absl.flags import FLAGS
    from ml_collections import config_flags

    from mlip_jax import compilation_cache, distributed, executors
    from mlip_jax.cli import flags

    flags.check(arguments[1:])
    config = flags.apply_overrides(FLAGS.config)
    if ":" in str((config.get("oracle") or {}).get("method")):
        _import_from_current_folder()
    workdir = flags.workdir(config)
    if FLAGS.show_workdir:
        print(workdir)
        return
    # the task "published" writes no files
    if FLAGS.workdir is None and not FLAGS.sweep_list and config.get("task") != "published":
        log.info("workdir: %s (--workdir=FOLDER selects another one)", workdir)
        if workdir != flags.default_workdir():
            log.info("%s contains the results of another run", flags.default_workdir())
    if FLAGS.sweep:  # first, because the variants need the devices and ports
        from mlip_jax.sweeps import runner

        sys.exit(
            runner.run(
                config_flags.get_config_filename(FLAGS["config"]),
                config,
                workdir,
                sys.argv[1:],
                index=FLAGS.sweep_index,
                list_only=FLAGS.sweep_list,
                collect_only=FLAGS.sweep_collect,
            )
        )
    flags.set_profile(config)
    compilation_cache.keep_compiled_programs()
    with distributed.session(distributed.from_environment()), distributed.ended_by_signals():
        try:
            with executors.use_executor(FLAGS.scheduler):
                run(config, workdir)
        except distributed.Stopped as stopped:
            log.warning("%s", stopped)
            sys.exit(distributed.EXIT_REQUEUE)


def run(config, workdir: str) -> None:
    """Run the task of a config in a workdir.

    Raises:
      ConfigError: The task is unknown.
    """
    from mlip_jax import tasks
    from mlip_jax.config import ConfigError, unknown_name
    from mlip_jax.defaults import TASKS

    # a task is a file, or a folder of the name of its config
    modules = pkgutil.iter_modules(tasks.__path__)
    names = [m.name for m in modules if not m.ispkg or m.name in TASKS]
    if config.get("task") not in names:
        raise ConfigError(unknown_name("task", config.get("task"), names))
    importlib.import_module(f"mlip_jax.tasks.{config.task}").run(config, workdir)


if __name__ == "__main__":
    command()

"""mlip-jax --config=spice --workdir=runs/spice

Runs what a config asks for. Change fields on the command line: --config.train.batch_size=32. The same command run
again continues where the run stopped. --config=spice --help describes a config and its fields.
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
    """Run the command in a process of its own, which may be replaced by one with a tuned allocator."""
    process.exit_on_signals()
    process.tune_allocator()
    if os.getcwd() not in sys.path:  # `python -m` has it there, for modules of the user beside a config
        sys.path.append(os.getcwd())
    main()


def main() -> None:
    """Parse the flags and run. An error that the user can correct ends the process with a message, not a traceback."""
    from absl import app

    from mlip_jax.cli import flags
    flags.define()
    app.run(_main, flags_parser=lambda args: flags.parse(args, __doc__))


def _main(arguments: list[str]) -> None:
    from absl.flags import FLAGS

    from mlip_jax import distributed
    from mlip_jax.cli import console
    console.log_to_console()
    try:
        _dispatch(arguments)
    except distributed.InterruptedTwice:
        sys.exit("interrupted; the same command continues from the last checkpoint")
    except KeyboardInterrupt:  # outside of the training steps: while data is read or the report is written
        log.warning("interrupted; the same command continues from what is saved")
        sys.exit(distributed.EXIT_REQUEUE)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if FLAGS.debug:
            raise
        sys.exit(f"\nerror: {distributed.failed_peer_message(error) or error}")


def _dispatch(arguments: list[str]) -> None:
    from absl.flags import FLAGS
    from ml_collections import config_flags

    from mlip_jax import distributed
    from mlip_jax.cli import flags
    flags.check(arguments[1:])
    config = flags.overridden(FLAGS.config)
    if FLAGS.sweep:  # before anything claims a device or a port, which the variants need
        from mlip_jax.sweeps import runner
        sys.exit(runner.run(
            config_flags.get_config_filename(FLAGS["config"]), config, FLAGS.workdir, sys.argv[1:],
            index=FLAGS.sweep_index, list_only=FLAGS.sweep_list, collect_only=FLAGS.sweep_collect))
    flags.set_profile(config)
    process.keep_compiled_programs()
    with distributed.session(distributed.from_environment()), distributed.ended_by_signals():
        try:
            run(config, FLAGS.workdir)
        except distributed.Stopped as stopped:
            log.warning("%s", stopped)
            sys.exit(distributed.EXIT_REQUEUE)


def run(config, workdir: str) -> None:
    """Pass `config` to the task that it names.

    Raises:
      ConfigError: There is no such task.
    """
    from mlip_jax import tasks
    from mlip_jax.config import ConfigError, unknown_name
    names = [m.name for m in pkgutil.iter_modules(tasks.__path__)]
    if config.get("task") not in names:
        raise ConfigError(unknown_name("task", config.get("task"), names))
    importlib.import_module(f"mlip_jax.tasks.{config.task}").run(config, workdir)


if __name__ == "__main__":
    command()

"""Warnings of a task that trains several force fields, such as a remark on their labels."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def repeated_warnings_once() -> Iterator[None]:
    """Show each warning of the package once, although several trainings of a task repeat it.

    This covers all handlers of the root logger and of the logger of the package.
    """
    package = __name__.partition(".")[0]
    loggers = (logging.getLogger(), logging.getLogger(package))
    added = [(handler, _FirstOnly(package)) for each in loggers for handler in each.handlers]
    for handler, first_only in added:
        handler.addFilter(first_only)
    try:
        yield
    finally:
        for handler, first_only in added:
            handler.removeFilter(first_only)


class _FirstOnly(logging.Filter):
    """Filter that passes the first of equal warnings of a package, and everything else."""

    def __init__(self, package: str):
        super().__init__()
        self._package = package
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or record.name.partition(".")[0] != self._package:
            return True
        text = record.getMessage()
        is_new = text not in self._seen
        self._seen.add(text)
        return is_new

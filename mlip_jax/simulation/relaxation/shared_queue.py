"""Queue of molecules that the devices of a relaxation share."""

from __future__ import annotations

import threading


class SharedQueue:
    """Thread-safe iterator over the molecules that no device has taken."""

    def __init__(self, molecules):
        self._molecules, self._lock, self.is_empty = iter(molecules), threading.Lock(), False

    def next(self):
        """Return the next molecule, or None if there is none left."""
        with self._lock:
            if self.is_empty:
                return None
            item = next(self._molecules, None)
            self.is_empty = item is None
            return item

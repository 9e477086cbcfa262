"""A gate that lets many searches or one change in.

In: threads. Out: the order in which they go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_WAIT_S = 20e-6


class Gate:
    """Many searches or one change at a time. A change waits for the searches that are on, those that come wait for it."""

    def __init__(self) -> None:
        """Opens it."""
        self._closed: threading.Lock | None = None
        self._inside = set[object]()

    @contextmanager
    def search(self) -> Iterator[None]:
        """Is inside together with other searches."""
        token = object()
        while True:
            # Single operations of sets and attributes are atomic. Who comes while a change closes the gate sees it here.
            self._inside.add(token)
            closed = self._closed
            if closed is None:
                break
            self._inside.discard(token)
            with closed:
                pass
        try:
            yield
        finally:
            self._inside.discard(token)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Is inside alone. One thread at a time may ask for it."""
        closed = threading.Lock()
        with closed:
            self._closed = closed
            try:
                while self._inside:
                    time.sleep(_WAIT_S)
                yield
            finally:
                self._closed = None

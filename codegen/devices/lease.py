"""Who has the device: one holder at a time, others in the order in which they came."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from ir.errors import TargetUnavailable


class Leases:
    """The lease of one device.

    A holder is known by a token that it made up, so that several processes of one search share a lease and one that
    lost its connection comes back to it. When the last connection of a holder was lost, the lease stays for a while.

    Args:
        grace_s: For how long.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._token: str | None = None
        self._holder = self._since = ""
        self._attached = 0
        self._left = 0.0

    def attach(self, token: str, holder: str, wait_s: float, beat: Callable[[dict[str, Any]], None]) -> None:
        """Let a connection take part in a lease, once it is the holder's turn.

        Args:
            token: The holder's token.
            holder: What others are told of it.
            wait_s: How long to wait.
            beat: Called every now and then while waiting, with who is there; may raise to end it.

        Raises:
            TargetUnavailable: Another one has the device.
        """
        deadline, ticket = time.monotonic() + wait_s, object()
        with self._changed:
            self._queue.append(ticket)
        try:
            while not self._take(token, holder, ticket, min(1.0, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise self._busy()
                beat(self.describe() or {})
        finally:
            with self._changed:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def detach(self, *, orderly: bool) -> None:
        """End the part that a connection took.

        Args:
            orderly: The holder said so. Without that the lease stays for it, for a while.
        """
        with self._changed:
            self._attached -= 1
            if self._attached == 0:
                self._left = time.monotonic() - (self._grace_s if orderly else 0.0)
                self._changed.notify_all()

    def describe(self) -> dict[str, Any] | None:
        """Return holder, since when, and how many wait; None while nobody has the device."""
        with self._changed:
            if self._is_free():
                return None
            waiting = len(self._queue)
            return {"holder": self._holder, "since": self._since, "waiting": waiting, "connected": self._attached > 0}

    def _take(self, token: str, holder: str, ticket: object, timeout_s: float) -> bool:
        with self._changed:
            mine = self._changed.wait_for(lambda: self._may(token, ticket), timeout_s)
            if not mine:
                return False
            if self._token != token or self._is_free():
                self._token, self._holder = token, holder
                self._since = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._attached += 1
            return True

    def _may(self, token: str, ticket: object) -> bool:
        if self._token == token and not self._is_free():
            return True
        return self._is_free() and self._queue[0] is ticket

    def _is_free(self) -> bool:
        return self._token is None or (self._attached == 0 and time.monotonic() - self._left >= self._grace_s)

    def _busy(self) -> TargetUnavailable:
        now = self.describe() or {}
        return TargetUnavailable(
            "the device is in use",
            expected="a device that is free",
            found=f"{now.get('holder')}, since {now.get('since')}",
            hint="wait longer with --device-wait, or ask them",
        )

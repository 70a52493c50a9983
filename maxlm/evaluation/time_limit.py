"""A limit on the time of what cannot be trusted to end: functions of others, regular expressions."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from maxlm.config import UserError

T = TypeVar("T")

LONGEST_S = 1e6
"""Eleven days: much longer limits are more than the system's clocks take."""
_AGAIN_S = 0.1
"""Seconds between reminders, as what is to end may catch the first."""


class TimeUp(Exception):
    """A call took longer than it may."""


class _Alarm(BaseException):
    """Passes through `except Exception`, up to the limit that it is of."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` gives, if it does so in time.

    SIGALRM interrupts it, which also ends a regular expression, a sleep or a wait for the network; not a function of C
    that does not look at signals. Limits may stand inside each other, and an alarm that somebody else has set rings.

    Args:
        seconds: by the clock.
        call: in this thread.

    Raises:
        TimeUp: it does not.
        UserError: this is not the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError("a time limit needs the main thread, which alone is interrupted; call this from there")
    alarm, armed, began = _Alarm(), True, time.monotonic()
    passed = lambda: time.monotonic() - began + 1e-3
    others, again = signal.getitimer(signal.ITIMER_REAL)

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal others
        if others and passed() >= others:
            others = passed() + again if again else 0.0
            if callable(before):
                before(number, frame)
        if armed and passed() >= seconds:
            raise alarm

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, others or seconds, LONGEST_S), _AGAIN_S)
    try:
        try:
            return call()
        finally:
            armed = False
    except _Alarm as found:
        if found is not alarm:
            raise
        raise TimeUp(f"took more than {seconds:g} s") from None
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
        signal.setitimer(signal.ITIMER_REAL, max(others - passed(), 1e-3) if others else 0.0, again)

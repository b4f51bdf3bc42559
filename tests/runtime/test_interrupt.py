"""A signal whose exception Python drops, in a finaliser or a weak reference's callback, comes once more."""

from __future__ import annotations

import signal
import sys
import time
import weakref

import pytest

from rlv2v.runtime.interrupt import AGAIN, Stop, raised


class Something:
    """What a weak reference can point to."""


class Finalised:
    """Be interrupted while it is thrown away."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGUSR1)
        list(range(3))


def test_a_stop_in_a_finaliser_is_raised_afterwards() -> None:
    hook = sys.unraisablehook
    with pytest.raises(Stop, match="SIGUSR1") as stopped, raised():
        Finalised()
        time.sleep(60)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert sys.unraisablehook is hook


def test_a_stop_in_the_callback_of_a_weak_reference_is_raised_afterwards() -> None:
    thing = Something()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Stop, match="SIGTERM"), raised():
        del thing
        time.sleep(60)
    assert reference() is None


def test_a_stop_that_is_dropped_twice_still_comes() -> None:
    class Slow:
        def __del__(self) -> None:
            end = time.monotonic() + 10 * AGAIN  # the signal comes again while this runs
            while time.monotonic() < end:
                pass
            ends.append("not interrupted")

    ends: list[str] = []
    with pytest.raises(Stop, match="SIGUSR1"), raised():
        Finalised()
        Slow()
        time.sleep(60)
    assert not ends


def test_a_stop_that_is_dropped_at_the_end_of_the_block_is_raised_there() -> None:
    with pytest.raises(Stop, match="SIGUSR1"), raised():
        Finalised()


def test_other_errors_that_python_drops_are_reported_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: seen.append(dropped.exc_value))

    class Broken:
        def __del__(self) -> None:
            raise ValueError("broken")

    with raised():
        Broken()
    assert [str(error) for error in seen] == ["broken"]

"""A job that hangs: where its workers are is told, and at last it ends."""

import signal
import threading
import time

import pytest

from rayjobs import watchdog
from rayjobs.config import JobFailed
from rayjobs.watchdog import GONE_S, Beat, Places, Stall, Watch


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_who_stands_longest_is_named_first_and_silence_is_told() -> None:
    clock = Clock()
    places = Places(clock)
    places.beat("rank 0", "step 7", 7)
    places.beat("rank 1", "step 7", 7)
    clock.now_s = 100
    places.beat("rank 0", "step 8", 8)
    for clock.now_s in (200, 300, 400):
        places.beat("rank 0", "step 8", 8)
    stall = places.stall()
    assert stall.seconds == 300
    assert stall.longest_s == 100
    told = "no progress for 5 min: rank 1 at step 7, not heard of for 7 min; rank 0 at step 8"
    assert stall.told() == told


def test_a_worker_that_was_replaced_is_forgotten() -> None:
    clock = Clock()
    places = Places(clock)
    clock.now_s = 10_000
    assert places.stall().seconds == 0  # nobody has begun
    places.beat("worker 1", "shard 1", 1)
    clock.now_s += GONE_S + 1
    places.beat("worker 2", "shard 1", 1)
    assert places.stall().places == ("worker 2 at shard 1",)
    places.beat("worker 2", None, 1)
    assert "no worker is at work" in places.stall().told()


def test_a_beat_says_where_a_thread_is() -> None:
    told: list[tuple[str | None, int]] = []
    beat = Beat("me", lambda who, at, progress: told.append((at, progress)))
    with beat.working(lambda: "shard 3", lambda: 4):
        while not any(at for at, _ in told):
            time.sleep(0.01)
    while told[-1][0] is not None:
        time.sleep(0.01)
    at, progress = next(each for each in told if each[0])
    assert progress == 4
    assert at is not None
    assert at.startswith("shard 3 (")
    assert "watchdog.py" in at or "test_watchdog.py" in at


def test_a_stall_is_told_now_and_then_and_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.02)
    monkeypatch.setattr(watchdog, "TELL_S", 0.1)
    began = time.monotonic()

    def read() -> Stall:
        return Stall(time.monotonic() - began, 0.0, ("worker a at shard 5", *"bcde"))

    told = r"worker a at shard 5.*and 2 more; workers\.max_stall_s"
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script
    try:
        with pytest.raises(JobFailed, match=told), Watch(read, 0.5):
            threading.Event().wait(20)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert "warning: no progress" in capsys.readouterr().err


def test_slow_steps_are_no_stall(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.01)
    looks = threading.Semaphore(0)

    def read() -> Stall:
        looks.release()
        return Stall(1000.0, 250.0, ("rank 0 at step 3",))

    with Watch(read, 3600.0):
        looks.acquire()
        looks.acquire()  # what the first look found is told by now
    assert "no progress" not in capsys.readouterr().err

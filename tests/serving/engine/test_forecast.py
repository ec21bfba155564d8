"""How long steps take, how much memory they need, and how large a batch may be."""

import pytest

from serve.engine.forecast import Forecast

KEY, LARGE = ("w", (4, 8, 8)), ("w", (4, 16, 16))


def test_a_step_s_time_is_learned() -> None:
    forecast = Forecast(16, 10.0)
    for slots in (1, 2, 4, 8, 16, 3, 5):
        forecast.observe_step(KEY, slots, 0.1 + 0.02 * slots)
    assert forecast.step_s(KEY, 12) == pytest.approx(0.34)
    bound = forecast.bound(KEY)
    assert forecast.work_s(KEY, 140, 0) == pytest.approx(140 / bound * forecast.step_s(KEY, bound))
    assert forecast.step_s(LARGE, 16) == pytest.approx(0.1 + 4 * 0.32)  # until it is seen
    forecast.observe_image(KEY, 0.5)
    assert forecast.work_s(KEY, 0, 3) == pytest.approx(1.5)


def test_rows_take_longer_per_slot_as_others_finish() -> None:
    forecast = Forecast(16, 0.2)
    for slots in (1, 2, 4, 8, 16, 3, 5):
        forecast.observe_step(KEY, slots, 0.1 + 0.02 * slots)
    assert forecast.bound(KEY) == 5
    assert forecast.drain_s(KEY, []) == 0
    assert forecast.drain_s(KEY, [(20, 2), (10, 2)]) == pytest.approx(10 * 0.18 + 10 * 0.14)
    assert forecast.drain_s(KEY, [(7, 1)] * 3) == pytest.approx(7 * 0.16)
    # Ten rows of one slot in batches of five: each is in half of the steps.
    assert forecast.drain_s(KEY, [(8, 1)] * 10) == pytest.approx(2 * 8 * 0.2)
    forecast.observe_image(KEY, 0.5)
    assert forecast.drain_s(KEY, [(7, 1)] * 3) == pytest.approx(7 * 0.16 + 1.5)


def test_a_batch_takes_no_longer_than_the_longest_step() -> None:
    forecast = Forecast(16, 0.2)
    assert forecast.bound(KEY) == 16
    for slots in (2, 4, 8):
        forecast.observe_step(KEY, slots, 0.15 + 0.005 * slots)
    assert forecast.bound(KEY) == 10


def test_a_batch_is_no_larger_than_is_efficient() -> None:
    forecast = Forecast(16, 10.0)
    for slots in (2, 4, 8):
        forecast.observe_step(KEY, slots, 0.1 * slots)
        forecast.observe_step(LARGE, slots, 0.2 + 0.05 * slots)
    assert forecast.bound(KEY) == 1  # time grows with the slots: larger batches gain nothing
    assert forecast.bound(LARGE) == 14


def test_a_batch_fits_the_memory() -> None:
    forecast = Forecast(16, 10)
    forecast.free_bytes = 1000
    for slots in (2, 8):
        forecast.observe_memory(KEY, slots, 100 * slots)
    assert forecast.bound(KEY) == 9
    forecast.observe_oom(KEY, 8)
    assert forecast.bound(KEY) == 4
    forecast.observe_oom(KEY, 2)
    assert forecast.bound(KEY) == 1
    assert forecast.bound(LARGE) == 16


def test_the_memory_of_one_unusual_step_is_forgotten() -> None:
    forecast = Forecast(16, 10)
    forecast.free_bytes = 1500
    forecast.observe_memory(KEY, 2, 2 * 190)  # something else was allocated during this step
    assert forecast.bound(KEY) == 7
    for _ in range(200):
        forecast.observe_memory(KEY, 8, 8 * 100)
    assert forecast.bound(KEY) == 13
    forecast.observe_memory(KEY, 8, 8 * 150)  # more is believed at once
    assert forecast.bound(KEY) == 9


def test_a_shape_not_seen_is_scaled_from_the_nearest_of_its_model() -> None:
    forecast = Forecast(16, 10.0)
    assert forecast.step_s(KEY, 2) == pytest.approx(2 * 64 * 2e-6)
    forecast.observe_step(("other", (4, 16, 16)), 2, 100.0)
    assert forecast.step_s(LARGE, 2) == pytest.approx(100.0)
    forecast.observe_step(KEY, 2, 0.5)
    assert forecast.step_s(LARGE, 2) == pytest.approx(4 * 0.5)


def test_recent_steps_count_more_than_old_ones() -> None:
    forecast = Forecast(16, 10.0)
    for seconds in (9.0, 1.0):
        for _ in range(100):
            forecast.observe_step(KEY, 4, seconds)
            forecast.observe_image(KEY, seconds)
    assert forecast.step_s(KEY, 4) == pytest.approx(1.0, rel=0.5)
    assert forecast.work_s(KEY, 0, 1) == pytest.approx(1.0, rel=0.01)


def test_what_a_step_takes_is_known_after_two_of_its_model() -> None:
    forecast = Forecast(16, 10.0)
    forecast.observe_step(("other", (4, 16, 16)), 2, 9.0)
    forecast.observe_step(("other", (4, 16, 16)), 2, 9.0)
    forecast.observe_step(KEY, 2, 9.0)
    assert forecast.known_step_s(KEY, 2) is None
    assert forecast.known_step_s(LARGE, 2) is None
    forecast.observe_step(KEY, 2, 1.0)
    forecast.observe_step(KEY, 2, 1.0)
    assert forecast.known_step_s(LARGE, 2) == pytest.approx(4 * forecast.step_s(KEY, 2))
    forecast.observe_step(LARGE, 2, 30.0)
    assert forecast.known_step_s(LARGE, 2) < 30  # one step may have had other reasons
    forecast.observe_step(LARGE, 2, 30.0)
    assert forecast.known_step_s(LARGE, 2) == pytest.approx(30.0)

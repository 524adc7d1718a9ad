from __future__ import annotations

from collections.abc import Iterator

from svfap_dist.telemetry.meter import Meter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_window_holds_the_steps_since_the_last_one() -> None:
    clock = Clock()
    meter = Meter(clock)

    def slow_source() -> Iterator[float]:
        for wait in (2.0, 1.0, 0.5):
            clock.now += wait
            yield wait

    for number, _ in enumerate(meter.waiting(slow_source())):
        clock.now += 1.0  # the step itself
        meter.step(4, 0.25, 0.75, bytes_fetched=100, batches_ready=3 + number)
        if number == 1:
            window = meter.window()
            assert (window.steps, window.clips) == (2, 8)
            assert (window.seconds, window.data_wait_seconds) == (5.0, 3.0)
            assert (window.fetch_seconds, window.decode_seconds) == (0.5, 1.5)
            assert (window.bytes_fetched, window.batches_ready) == (200, 3.5)
    last = meter.window()
    assert (last.steps, last.seconds, last.data_wait_seconds) == (1, 1.5, 0.5)

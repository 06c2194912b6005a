"""Termination signals between runs of several processes."""

import jax

from curvax.training.runtime import preemption


def test_termination_signal_between_two_runs_stops_the_second(monkeypatch):
    """The runtime stops all processes at the number after the last that any of them has reached."""
    asked: list[int] = []
    due = -1

    def reached(number):
        asked.append(number)
        return number == due

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", reached)
    with preemption.Notice() as first:
        assert not any(first.given() for _ in range(3))
    due = asked[-1] + 1
    with preemption.Notice() as second:
        assert second.given()
    assert asked == list(range(asked[0], asked[0] + 4))

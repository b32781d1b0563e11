"""What progress says."""

import time

import pytest

from dinov2_toolkit import console


def test_the_rate_and_the_time_left_are_those_of_the_last_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with console.progress("reading", 2_000, "images") as advance:
        for second in range(1, 301):
            now = float(second)
            advance(10 if second <= 100 else 2, note="as told")  # a neighbour comes after 100 seconds
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 30
    assert lines[9] == "reading: 1,000 of 2,000 images, 10.0 images/s, 100 s left as told"
    assert lines[15] == "reading: 1,120 of 2,000 images, 2.0 images/s, 440 s left as told"
    assert lines[29] == "reading: 1,400 of 2,000 images, 2.0 images/s, 300 s left as told"


def test_the_rate_of_steps_that_take_minutes_is_that_of_the_last_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with console.progress("parts", 10, "parts") as advance:
        for end in (100.0, 200.0, 700.0):
            now = end
            advance()
    assert capsys.readouterr().err.splitlines() == [
        "parts: 1 of 10 parts, 0.0 parts/s, 900 s left",
        "parts: 2 of 10 parts, 0.0 parts/s, 800 s left",
        "parts: 3 of 10 parts, 0.0 parts/s, 3500 s left",
    ]

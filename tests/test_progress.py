"""What a log file shows of work that takes long."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from stepladder.progress import Progress, duration


def logged(every: float) -> list[str]:
    screen = StringIO()
    progress = Progress(Console(file=screen, width=100), every)
    with progress.stage("adapter/a"):
        for step in range(1, 5):
            progress.update("steps", step, 4, "loss 0.5")
        progress.update("validation", 0, 7)
    return [line.strip() for line in screen.getvalue().splitlines()]


def test_off_a_terminal_a_line_now_and_then_says_how_far_the_work_is() -> None:
    lines = logged(every=0)
    assert lines[0] == "steps: 1 of 4  loss 0.5"
    assert lines[1].startswith("steps: 2 of 4, about ")
    assert lines[1].endswith(" left  loss 0.5")
    assert lines[3] == "steps: 4 of 4  loss 0.5"
    assert lines[4] == "validation: 0 of 7"
    assert lines[5].startswith("✓  adapter/a")


def test_work_that_is_soon_over_says_nothing() -> None:
    assert len(logged(every=60)) == 1


def test_durations() -> None:
    assert [duration(42), duration(185), duration(4800)] == ["42 s", "3 min 05 s", "1 h 20 min"]

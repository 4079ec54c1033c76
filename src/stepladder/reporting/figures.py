"""The charts of the report: each function draws one as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from markupsafe import Markup

from stepladder.progress import duration
from stepladder.reporting import words
from stepladder.reporting.content import GroupResult, Report, Result, TrainingStep
from stepladder.reporting.svg import Drawing, Scale

WIDTH = 880
"""Of every chart; all lengths are in pixels."""
ROW_HEIGHT = 30
LANE_HEIGHT = 44
QUARTERS = (0, 0.25, 0.5, 0.75, 1)
MAX_POINTS = 200
"""Of a loss curve; a longer log is averaged in as many equal stretches."""


def staircase(report: Report) -> Markup:
    """Base, tuned, quantised and ensemble as bars, with 95 % intervals and the accuracy of guessing."""
    run = report.run
    steps = words.staircase(report)
    drawing = Drawing(WIDTH, 364, f"Accuracy step by step: {words.headline(report)}")
    height, right = Scale(0, 1, 300, 30), WIDTH - 70
    for share in QUARTERS:
        drawing.line(50, height(share), right, height(share), "grid")
        drawing.text(42, height(share) + 4, words.percent(share), "tick", "end")
    wide = (right - 60) / len(steps)
    for index, row in enumerate(steps):
        left, middle = 60 + index * wide, 60 + (index + 0.42) * wide
        tip = _tip(row, run.bits)
        drawing.rect(left, height(row.accuracy), wide - 4, 300 - height(row.accuracy), f"s-{row.system}", tip=tip)
        drawing.line(middle, height(row.low), middle, height(row.high), "whisker")
        for end in (row.low, row.high):
            drawing.line(middle - 6, height(end), middle + 6, height(end), "whisker")
        drawing.text(middle + 14, height(row.accuracy) - 10, words.percent(row.accuracy), "figure")
        drawing.text(left + wide / 2 - 2, 322, words.name(row, run.bits), "strong", "middle")
        drawing.text(left + wide / 2 - 2, 341, f"{row.correct} of {row.n} right", "tick", "middle")
        if row.unparsed:
            drawing.text(left + wide / 2 - 2, 358, f"{row.unparsed} unreadable", "tick", "middle")
    chance = height(report.chance[run.split])
    drawing.line(50, chance, right, chance, "chance")
    drawing.text(right + 6, chance + 4, "guessing", "chance-label")
    return drawing.markup()


def all_systems(report: Report) -> Markup:
    """Accuracy of every system on the split of the headline: dots with 95 % intervals."""
    run = report.run
    rows = [row for row in report.results if row.split == run.split]
    bottom = 20 + ROW_HEIGHT * len(rows)
    drawing = Drawing(WIDTH, bottom + 30, "Accuracy of every system with its 95 % interval")
    x = _share_axis(drawing, bottom)
    chance = x(report.chance[run.split])
    drawing.line(chance, 10, chance, bottom, "chance")
    drawing.text(chance + 5, bottom - 4, "guessing", "chance-label")
    for index, row in enumerate(rows):
        y = 20 + ROW_HEIGHT * (index + 0.5)
        drawing.text(170, y + 4, words.name(row, run.bits), "", "end")
        drawing.line(x(row.low), y, x(row.high), y, f"range s-{row.system}")
        drawing.dot(x(row.accuracy), y, 6, f"s-{row.system}", tip=_tip(row, run.bits))
        interval = words.interval(row.low, row.high)
        drawing.text(WIDTH, y + 4, f"{words.percent(row.accuracy, 1)}  ({interval})", "tick", "end")
    return drawing.markup()


def cascade(report: Report) -> Markup:
    """The share of the training questions that each rung solved, and the rest."""
    counts = report.cascade
    bottom = 10 + ROW_HEIGHT * (len(counts.rungs) + 1)
    drawing = Drawing(WIDTH, bottom + 10, "How many questions each rung of the cascade solved")
    x = Scale(0, max(counts.questions, 1), 180, WIDTH - 200)
    solved = 0
    for index, rung in enumerate(counts.rungs):
        y = 10 + ROW_HEIGHT * index
        drawing.text(170, y + 18, rung.name, "", "end")
        drawing.rect(x(solved), y + 3, x(solved + rung.asked) - x(solved), ROW_HEIGHT - 6, "track")
        drawing.rect(
            x(solved), y + 3, x(solved + rung.solved) - x(solved), ROW_HEIGHT - 6, "s-quantised",
            tip=f"{rung.name}: {rung.solved} solved of {rung.asked} asked",
        )  # fmt: skip
        paid = f", {words.money(rung.dollars)}" if rung.dollars else ""
        drawing.text(WIDTH - 190, y + 18, f"{rung.solved} of {rung.asked} solved{paid}", "tick")
        solved += rung.solved
    y = bottom - ROW_HEIGHT
    drawing.text(170, y + 18, "unsolved", "", "end")
    drawing.rect(
        x(solved), y + 3, x(counts.questions) - x(solved), ROW_HEIGHT - 6, "bad", tip=f"{counts.unsolved} unsolved"
    )
    drawing.text(WIDTH - 190, y + 18, f"{counts.unsolved} of {counts.questions}", "tick")
    return drawing.markup()


def families(report: Report) -> Markup:
    """Accuracy by family of questions, from base to the final answer."""
    return _breakdown(report, "family", [(row.family, row) for row in report.families])


def letters(report: Report) -> Markup:
    """Accuracy by the letter of the right answer, from base to the final answer."""
    return _breakdown(report, "letter", [(row.letter, row) for row in report.letters])


def _breakdown(report: Report, key: str, rows: Sequence[tuple[str, GroupResult]]) -> Markup:
    run = report.run
    steps = [(row.split, row.system, row.member, row.weights) for row in words.staircase(report)]
    shown = [(group, row) for group, row in rows if (row.split, row.system, row.member, row.weights) in steps]
    groups = [(group, [row for _, row in pairs]) for group, pairs in groupby(shown, key=itemgetter(0))]
    bottom = 20 + LANE_HEIGHT * len(groups)
    drawing = Drawing(WIDTH, bottom + 30, f"Accuracy by {key}")
    x = _share_axis(drawing, bottom)
    for index, (name, group) in enumerate(groups):
        y = 20 + LANE_HEIGHT * (index + 0.5)
        drawing.text(170, y + 4, name if len(name) <= 24 else f"{name[:23]}…", "", "end")
        # Each system has its own height in the lane, so that dots of equal accuracy do not cover each other.
        points = [(x(row.accuracy), y + 8 * (place - (len(group) - 1) / 2)) for place, row in enumerate(group)]
        drawing.path(points, "join")
        for point, row in zip(points, group, strict=True):
            tip = f"{words.name(row, run.bits)}: {row.correct} of {row.n} right"
            drawing.dot(*point, 5, f"s-{row.system}", tip=tip)
        final = group[-1]
        label = f"{words.percent(group[0].accuracy)} → {words.percent(final.accuracy)}   n = {final.n}"
        drawing.text(WIDTH, y + 4, label, "tick", "end")
        drawing.line(190, y + LANE_HEIGHT / 2, WIDTH - 170, y + LANE_HEIGHT / 2, "grid")
    return drawing.markup()


def loss(report: Report) -> Markup:
    """The members' loss curves."""
    return loss_curves({row.member: (*row.log, *row.validation) for row in report.training})


def loss_curves(steps: Mapping[str, Sequence[TrainingStep]]) -> Markup:
    """Training loss of every member over epochs; dots are the validation loss after each epoch."""
    logs = {member: [row for row in rows if row.loss is not None] for member, rows in steps.items()}
    curves = [(member, _thinned(rows)) for member, rows in logs.items() if rows]
    held_out = {
        member: [(row.epoch, row.validation_loss) for row in rows if row.validation_loss is not None]
        for member, rows in steps.items()
    }
    drawing = Drawing(WIDTH, 280, "Training loss over epochs")
    if not curves:
        return drawing.markup()
    shown = [point for _, points in (*curves, *held_out.items()) for point in points]
    top, last = (max(point[axis] for point in shown) for axis in (1, 0))
    y, x = Scale(0, 1.05 * top, 240, 10), Scale(0, last, 60, WIDTH - 130)
    for value in _ticks(y.high):
        drawing.line(x.start, y(value), x.end, y(value), "grid")
        drawing.text(52, y(value) + 4, f"{value:g}", "tick", "end")
    for value in _ticks(x.high):
        drawing.text(x(value), 260, f"{value:g}", "tick", "middle")
    drawing.text((x.start + x.end) / 2, 277, "epoch", "tick", "middle")
    # Labels are where their curve ends, moved up where two would overlap.
    label_y = y(0) + 16
    for index, (member, points) in sorted(enumerate(curves), key=lambda item: -y(item[1][1][-1][1])):
        drawing.path(((x(epoch), y(value)) for epoch, value in points), f"curve c{index % 6}")
        for epoch, value in held_out.get(member, ()):
            drawing.dot(x(epoch), y(value), 5, f"c{index % 6}", tip=f"{member}, validation: {value:.3f}")
        label_y = min(label_y - 16, y(points[-1][1]))
        drawing.text(x.end + 8, label_y + 4, f"{member}  {points[-1][1]:.2f}", f"c{index % 6}")
    return drawing.markup()


def voting(report: Report) -> Markup:
    """Accuracy against tokens a question, with one vote, two and so on; adaptive voting is a separate dot."""
    rows = report.voting
    drawing = Drawing(WIDTH, 280, "Accuracy against tokens spent")
    shares = [row.accuracy for row in rows]
    low, high = max(0.0, min(shares) - 0.02), min(1.0, max(shares) + 0.02)
    x, y = Scale(0, 1.05 * max(row.tokens for row in rows), 60, WIDTH - 130), Scale(low, high, 240, 10)
    for step in range(5):
        share = low + (high - low) * step / 4
        drawing.line(x.start, y(share), x.end, y(share), "grid")
        drawing.text(52, y(share) + 4, words.percent(share, 1), "tick", "end")
    for value in _ticks(x.high):
        drawing.text(x(value), 260, f"{value:g}", "tick", "middle")
    drawing.text((x.start + x.end) / 2, 277, "tokens written a question", "tick", "middle")
    drawing.path(((x(row.tokens), y(row.accuracy)) for row in rows if row.way != "adaptive"), "curve c2")
    for row in rows:
        point, is_adaptive = (x(row.tokens), y(row.accuracy)), row.way == "adaptive"
        tip = f"{row.way}: {words.percent(row.accuracy, 1)}, {row.tokens:.0f} tokens, {row.votes:.2f} votes"
        drawing.dot(*point, 6 if is_adaptive else 4, "c1" if is_adaptive else "c2", tip=tip)
        drawing.text(point[0] + 9, point[1] + (14 if is_adaptive else -6), row.way, "c1" if is_adaptive else "tick")
    return drawing.markup()


def _ticks(high: float) -> list[float]:
    """Round values from 0 to ``high`` for an axis, four to eight of them."""
    magnitude = 10.0 ** math.floor(math.log10(high))
    step = next(part * magnitude for part in (0.2, 0.5, 1.0, 2.0) if high / (part * magnitude) <= 7)
    return [index * step for index in range(int(high / step + 1e-9) + 1)]


def _thinned(log: Sequence[TrainingStep]) -> list[tuple[float, float]]:
    """(epoch, loss) points, averaged in stretches where there are more than :data:`MAX_POINTS`."""
    length = -(-len(log) // MAX_POINTS)
    stretches = [log[start : start + length] for start in range(0, len(log), length)]
    return [(part[-1].epoch, sum(step.loss or 0.0 for step in part) / len(part)) for part in stretches]


def flips(report: Report) -> Markup:
    """Answers that quantisation turned wrong (to the left) and right (to the right), by member."""
    rows = report.quantisation
    drawing = Drawing(WIDTH, 30 + ROW_HEIGHT * len(rows), "Answers that quantisation turned wrong or right")
    most = max([1, *(count for row in rows for count in (row.flips.right_to_wrong, row.flips.wrong_to_right))])
    x = Scale(-most, most, 260, WIDTH - 80)
    drawing.text(x(0) - 8, 16, "turned wrong", "tick", "end")
    drawing.text(x(0) + 8, 16, "turned right", "tick")
    for index, row in enumerate(rows):
        y = 24 + ROW_HEIGHT * index
        lost, won = row.flips.right_to_wrong, row.flips.wrong_to_right
        drawing.text(170, y + 18, row.member, "", "end")
        drawing.rect(x(-lost), y + 3, x(0) - x(-lost), ROW_HEIGHT - 6, "bad")
        drawing.rect(x(0), y + 3, x(won) - x(0), ROW_HEIGHT - 6, "good")
        drawing.text(x(-lost) - 6, y + 18, str(lost), "tick", "end")
        drawing.text(x(won) + 6, y + 18, str(won), "tick")
    drawing.line(x(0), 22, x(0), 26 + ROW_HEIGHT * len(rows), "axis")
    return drawing.markup()


def sizes(report: Report) -> Markup:
    """Size of the weights before and after quantisation, by member."""
    bars = [
        (f"{words.step(kind, report.run.bits)} {row.member}", size, kind)
        for row in report.quantisation
        for kind, size in (("merged", row.bytes.merged), ("quantised", row.bytes.quantised))
    ]
    return _bars("Size of the weights", [(label, count, f"s-{kind}", words.size(count)) for label, count, kind in bars])


def stages(report: Report) -> Markup:
    """Recorded time of every artifact, and the money spent, if any."""
    bars = []
    for row in report.stages:
        label = "/".join(filter(None, (row.stage, row.part)))
        paid = f"  {words.money(row.dollars)}" if row.dollars else ""
        bars.append((label, row.seconds, "s-merged", duration(row.seconds) + paid))
    return _bars("Time of every stage", bars)


def _bars(title: str, bars: list[tuple[str, float, str, str]]) -> Markup:
    """Horizontal bars from zero; a bar is (label, length, CSS class, text after it)."""
    drawing = Drawing(WIDTH, 10 + ROW_HEIGHT * len(bars), title)
    x = Scale(0, max([1e-9, *(length for _, length, _, _ in bars)]), 180, WIDTH - 160)
    for index, (label, length, css, after) in enumerate(bars):
        y = 5 + ROW_HEIGHT * index
        drawing.text(170, y + 18, label, "", "end")
        drawing.rect(x(0), y + 5, max(x(length) - x(0), 1), ROW_HEIGHT - 10, css)
        drawing.text(max(x(length), x(0) + 1) + 8, y + 18, after, "tick")
    return drawing.markup()


def _share_axis(drawing: Drawing, bottom: float) -> Scale:
    """A horizontal axis from 0 to 100 % with room for labels on both sides."""
    x = Scale(0, 1, 190, WIDTH - 170)
    for share in QUARTERS:
        drawing.line(x(share), 10, x(share), bottom, "grid")
        drawing.text(x(share), bottom + 18, words.percent(share), "tick", "middle")
    return x


def _tip(row: Result, bits: int) -> str:
    interval = f"95 % interval {words.interval(row.low, row.high, 1)}"
    return f"{words.name(row, bits)}: {row.correct} of {row.n} right, {interval}"

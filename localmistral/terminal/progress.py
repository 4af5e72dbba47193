"""How far a download or a check is: bars on a terminal, a line now and then elsewhere.

Knows bytes and time, but neither the network nor the disk. Everything goes to stderr.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from localmistral.models.hub import OnProgress, Progress
from localmistral.terminal.render import Bar, print_note, show_bars
from localmistral.units import format_bandwidth, format_bytes

WINDOW_S = 10.0
"""The speed is the mean over this time: long enough to be calm, short enough to be of now."""
LINE_INTERVAL_S = 30.0
LINE_SHARE = 0.1
"""Off a terminal a line comes after this share of the whole, or after that time."""
REDRAW_S = 0.1
_NAME_LENGTH = 26
"""With a bar and the figures this makes 80 columns."""


class Pace:
    """Speed and time left from (time, bytes) pairs; what was there at the start doesn't count."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, done: int) -> None:
        """Note that `done` bytes were there at a time; fewer than before begins anew."""
        if self._points and done < self._points[-1][1]:
            self._points.clear()
        self._points.append((now_s, done))
        # one point from before the window stays, so that the window is always spanned
        while len(self._points) > 2 and self._points[1][0] <= now_s - WINDOW_S:
            self._points.popleft()

    @property
    def bytes_per_second(self) -> float:
        """0 while nothing can be said."""
        if len(self._points) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def seconds_left(self, total: int) -> float | None:
        """None while nothing moves."""
        speed = self.bytes_per_second
        return (total - self._points[-1][1]) / speed if speed > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What is said of a transfer: `doing` at its start, and `kept` of the bytes at Ctrl-C."""

    doing: str = "Downloading"
    kept: str = "Kept {}; the same command continues there."


CHECKING = Words(doing="Checking", kept="")


@contextlib.contextmanager
def show_transfer(name: str, words: Words = Words()) -> Iterator[OnProgress]:
    """Shows the Progress that the yielded function gets, until the block ends.

    Ctrl-C leaves a sentence saying how much is kept, and goes on as KeyboardInterrupt.
    """
    latest: list[Progress] = []
    try:
        with show_bars() as draw:
            show = _make_bars(name, draw) if draw else _make_lines(name, words)

            def on_progress(progress: Progress) -> None:
                latest[:] = [progress]
                show(progress)

            yield on_progress
    except KeyboardInterrupt:
        if latest and words.kept:
            print_note(words.kept.format(format_bytes(latest[0].done)))
        raise


def _make_bars(name: str, draw: Callable[[list[Bar]], None]) -> OnProgress:
    """A bar for the whole, one for the file that is being worked on, and what holds it up."""
    pace, drawn_s, phase = Pace(), 0.0, ""

    def show(progress: Progress) -> None:
        nonlocal drawn_s, phase
        now_s = time.monotonic()
        pace.add(now_s, progress.done)
        state = f"{progress.file} {progress.phase} {progress.note}"
        if now_s - drawn_s < REDRAW_S and state == phase and progress.done < progress.total:
            return
        drawn_s, phase = now_s, state
        draw(list(_describe_bars(name, progress, pace)))

    return show


def _describe_bars(name: str, progress: Progress, pace: Pace) -> Iterator[Bar]:
    whole = _describe_done(progress.done, progress.total)
    resumed = _in_unit_of(progress.resumed, progress.total)
    yield Bar(
        label=shorten(name),
        share=_share(progress.done, progress.total),
        text=f"{whole} ({resumed} resumed)" if progress.resumed else whole,
    )
    file = progress.file.rpartition("/")[2]
    is_only = progress.file_bytes == progress.total
    text = _describe_state(progress, pace)
    if is_only:
        yield Bar(label="", share=None, text=text)
    else:
        share = _share(progress.file_done, progress.file_bytes)
        yield Bar(label=shorten(file), share=share, text=text)
    if progress.note and progress.phase == "downloading":
        yield Bar(label="", share=None, text=progress.note)


def _describe_state(progress: Progress, pace: Pace) -> str:
    if progress.phase == "waiting":
        return "another process is downloading it"
    if progress.phase == "verifying":
        return f"verifying, {progress.note}" if progress.note else "verifying"
    if progress.phase == "done":
        return "done"
    speed = pace.bytes_per_second
    left_s = pace.seconds_left(progress.total)
    if left_s is None:
        return "waiting for bytes"
    return f"{format_bandwidth(speed)}, {describe_duration(left_s)} left"


def _make_lines(name: str, words: Words) -> OnProgress:
    """Lines for logs: the start, each tenth or half a minute, each new note, the wait."""
    pace, last, said_s, said_share, said = Pace(), "", 0.0, -1.0, ""

    def show(progress: Progress) -> None:
        nonlocal last, said_s, said_share, said
        now_s = time.monotonic()
        pace.add(now_s, progress.done)
        share = _share(progress.done, progress.total)
        remark = _describe_remark(progress)
        if remark and remark != said:
            print_note(remark)
        said = remark
        is_due = share >= said_share + LINE_SHARE or now_s >= said_s + LINE_INTERVAL_S
        if said_share < 0 or is_due or (progress.done == progress.total and share > said_share):
            line = f"{words.doing} {name}: {_describe_line(progress, pace)}"
            if line != last:
                print_note(line)
            last, said_s, said_share = line, now_s, share

    return show


def _describe_line(progress: Progress, pace: Pace) -> str:
    line = f"{_share(progress.done, progress.total):.0%}, "
    line += _describe_done(progress.done, progress.total)
    if progress.resumed and not pace.bytes_per_second:
        line += f", {format_bytes(progress.resumed)} of them were here already"
    if pace.bytes_per_second and progress.done < progress.total:
        left_s = pace.seconds_left(progress.total)
        line += f", {format_bandwidth(pace.bytes_per_second)}"
        line += f", {describe_duration(left_s)} left" if left_s is not None else ""
    return line


def _describe_remark(progress: Progress) -> str:
    if progress.phase == "waiting":
        return f"Another process is downloading {progress.file}: waiting for it."
    # how far a verification is belongs to the lines, not beside them
    has_trouble = progress.note and progress.phase == "downloading"
    return f"{progress.file}: {progress.note}" if has_trouble else ""


def _describe_done(done: int, total: int) -> str:
    """`12.3 of 42.8 GiB`: the unit once where both have the same."""
    return f"{_in_unit_of(done, total)} of {format_bytes(total)}"


def _in_unit_of(count: int, total: int) -> str:
    """`count` without its unit where that is the total's, or where it's nothing."""
    unit = format_bytes(total).rpartition(" ")[2]
    return format_bytes(count).removesuffix(f" {unit}") if count else "0"


def _share(done: int, total: int) -> float:
    return done / total if total else 1.0


def describe_duration(seconds: float) -> str:
    """`8 s`, `4 min 50 s`, `2 h 5 min`, `3 days`: two figures at most."""
    whole = max(0, round(seconds))
    minutes, rest_s = divmod(whole, 60)
    hours, rest_min = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    if hours:
        return f"{hours} h {rest_min} min"
    return f"{minutes} min {rest_s} s" if minutes else f"{whole} s"


def shorten(text: str, length: int = _NAME_LENGTH) -> str:
    """`text` cut in its middle to what fits beside a bar: both ends of a file's name matter."""
    if len(text) <= length:
        return text
    tail = (length - 1) * 2 // 3
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"

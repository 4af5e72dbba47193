"""How a transfer is shown: lines in a log, bars on a terminal, speed and time left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.models.hub import Phase, Progress
from localmistral.terminal import progress as module
from localmistral.terminal.progress import (
    CHECKING,
    WINDOW_S,
    Pace,
    describe_duration,
    shorten,
    show_transfer,
)

MIB = 1 << 20
TOTAL = 1000 * MIB


class Clock:
    """Stands in for `time` in the module."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def at(done: int, *, resumed: int = 0, phase: Phase = "downloading", note: str = "") -> Progress:
    return Progress(
        file="folder/model-Q8_0.gguf",
        file_done=done,
        file_bytes=TOTAL,
        done=done,
        total=TOTAL,
        resumed=resumed,
        phase=phase,
        note=note,
    )


# Speed.


def test_what_was_there_at_the_start_is_no_speed() -> None:
    pace = Pace()
    pace.add(0.0, 500 * MIB)
    assert pace.bytes_per_second == 0
    assert pace.seconds_left(TOTAL) is None
    pace.add(10.0, 600 * MIB)
    assert pace.bytes_per_second == 10 * MIB
    assert pace.seconds_left(TOTAL) == 40


def test_the_speed_is_of_the_last_seconds() -> None:
    pace = Pace()
    for second in range(60):
        pace.add(second, second * 100 * MIB)
    for second in range(60, 60 + int(WINDOW_S) + 2):
        pace.add(second, 59 * 100 * MIB + (second - 59) * MIB)
    assert pace.bytes_per_second == pytest.approx(MIB, rel=1e-6)


def test_a_stall_shows_as_no_speed_after_the_window() -> None:
    pace = Pace()
    pace.add(0.0, 0)
    pace.add(1.0, MIB)
    pace.add(20.0, MIB)
    pace.add(40.0, MIB)
    assert pace.bytes_per_second == 0
    assert pace.seconds_left(TOTAL) is None


def test_a_file_that_starts_over_is_no_negative_speed() -> None:
    pace = Pace()
    pace.add(0.0, 0)
    pace.add(5.0, 50 * MIB)
    pace.add(6.0, 0)
    assert pace.bytes_per_second == 0
    pace.add(8.0, 10 * MIB)
    assert pace.bytes_per_second == 5 * MIB


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(-5, 50)), max_size=60))
def test_a_speed_is_never_negative_and_few_points_are_kept(steps: list[tuple[float, int]]) -> None:
    pace, now_s, done = Pace(), 0.0, 0
    for seconds, more in steps:
        now_s, done = now_s + seconds, max(0, done + more)
        pace.add(now_s, done)
        assert pace.bytes_per_second >= 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (290, "4 min 50 s"),
        (3600, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (200_000, "2 days"),
    ],
)
def test_a_duration_has_two_figures_at_most(seconds: float, text: str) -> None:
    assert describe_duration(seconds) == text


def test_a_long_name_keeps_both_ends() -> None:
    name = "Mistral-Small-4-119B-2603-UD-Q4_K_XL-00002-of-00003.gguf"
    short = shorten(name)
    assert len(short) == 26
    assert name.startswith(short.partition("…")[0])
    assert name.endswith(short.partition("…")[2])
    assert shorten("short.gguf") == "short.gguf"


# Lines, where stderr is no terminal.


def test_a_log_gets_a_line_every_tenth(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with show_transfer("model:Q8_0") as on_progress:
        for done in range(0, TOTAL + 1, MIB):
            clock.now_s += 0.1
            on_progress(at(done))
        on_progress(at(TOTAL, phase="verifying", note="3 % verified"))
        on_progress(at(TOTAL, phase="done"))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 11
    assert lines[0] == "Downloading model:Q8_0: 0%, 0 of 1000.0 MiB"
    assert lines[1] == (
        "Downloading model:Q8_0: 10%, 100.0 of 1000.0 MiB, 10 MB/s, 1 min 30 s left"
    )
    assert lines[-1] == "Downloading model:Q8_0: 100%, 1000.0 of 1000.0 MiB"


def test_a_slow_download_gets_a_line_every_half_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_transfer("model") as on_progress:
        for step in range(121):
            on_progress(at(step * 1000))
            clock.now_s += 1
    assert len(capsys.readouterr().err.splitlines()) == 1 + 4


def test_a_continued_download_says_what_was_there(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_transfer("model") as on_progress:
        on_progress(at(570 * MIB, resumed=570 * MIB))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("57%, 570.0 of 1000.0 MiB, 570.0 MiB of them were here already")


def test_troubles_and_waits_are_said_once_each(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_transfer("model") as on_progress:
        on_progress(at(0))
        for _ in range(5):
            on_progress(at(10, note="retrying in 4 s: the connection broke"))
        on_progress(at(20))
        for _ in range(5):
            on_progress(at(20, phase="waiting", note="another process is downloading this file"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == [
        "folder/model-Q8_0.gguf: retrying in 4 s: the connection broke",
        "Another process is downloading folder/model-Q8_0.gguf: waiting for it.",
    ]


def test_ctrl_c_leaves_a_sentence_about_what_is_kept(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), show_transfer("model") as on_progress:
        on_progress(at(300 * MIB))
        raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines()[-1].startswith("Kept 300.0 MiB; the same command")


def test_a_check_that_is_interrupted_keeps_nothing(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), show_transfer("model", CHECKING) as on_progress:
        on_progress(at(300 * MIB, phase="verifying"))
        raise KeyboardInterrupt
    assert "Kept" not in capsys.readouterr().err


# Bars, where it is one.


@pytest.fixture
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.usefixtures("_terminal")
def test_a_terminal_gets_bars_within_its_width_and_they_go_away(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_transfer("mistral-small-4:UD-Q4_K_XL") as on_progress:
        for done in (570, 600, 700):
            clock.now_s += 5
            on_progress(at(done * MIB, resumed=570 * MIB))
        during = capsys.readouterr().err
    assert "700.0 of 1000.0 MiB (570.0 resumed)" in during
    assert "14 MB/s, 23 s left" in during
    assert "\x1b[" in during
    assert "\x1b[2K" in capsys.readouterr().err


@pytest.mark.usefixtures("_terminal")
@pytest.mark.parametrize(
    ("phase", "note", "words"),
    [
        ("waiting", "another process is downloading this file", "another process"),
        ("verifying", "42 % verified", "verifying, 42 %"),
        ("downloading", "retrying in 4 s: cut", "retrying in 4 s: cut"),
    ],
)
def test_bars_say_what_holds_a_file_up(
    phase: Phase, note: str, words: str, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with show_transfer("model") as on_progress:
        on_progress(at(10 * MIB, phase=phase, note=note))
        assert words in capsys.readouterr().err

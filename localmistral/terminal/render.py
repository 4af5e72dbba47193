"""What a person sees: answers, thinking, statistics, tables and errors. The only importer of rich.

Answers go to stdout, everything else to stderr; nothing is coloured or animated off a terminal.
Decides nothing and loads nothing.
"""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from localmistral.chatformat.parser import ContentDelta, ReasoningDelta, ToolCallDelta
from localmistral.errors import LocalMistralError
from localmistral.units import format_speed

if TYPE_CHECKING:  # only for names: these bring the engine along, 0.4 s
    from localmistral.answer import ChatItem, ChatResult

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_THINKING_STYLE = "dim italic"
_LOAD_DELAY_S = 0.5
"""Loads shorter than this show no bar: it would only flicker."""
_BAR_WIDTH = 16
"""Leaves 62 of 80 columns to names and figures."""


def make_printable(text: str) -> str:
    """`text` without control characters, so that a model can't send a terminal commands."""
    return _CONTROLS.sub("", text)


def error_console() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _whatever_becomes_of_stderr() -> contextlib.suppress:
    """A remark that can't be shown changes neither the answer nor the exit code."""
    return contextlib.suppress(OSError)


def print_error(error: LocalMistralError) -> None:
    """One sentence, and what to do next."""
    with _whatever_becomes_of_stderr():
        console = error_console()
        console.print(Text.assemble(("error: ", "bold red"), make_printable(error.message)))
        if error.hint:
            console.print(Text(make_printable(error.hint), style="dim"))


def print_note(text: str) -> None:
    """A remark beside the answer."""
    with _whatever_becomes_of_stderr():
        error_console().print(Text(make_printable(text), style="dim"))


class ThinkingView:
    """Thinking as it comes, dim on stderr. `folds` leaves one line of it when it has ended."""

    def __init__(self, console: Console, *, folds: bool) -> None:
        self._console = console
        self._live = Live(console=console, transient=True) if folds else None
        self._text = ""
        self._started_s: float | None = None

    def add(self, text: str) -> None:
        shown = make_printable(text)
        if self._started_s is None:
            self._started_s = time.monotonic()
            if self._live is not None:
                self._live.start()
        self._text += shown
        if self._live is None:
            self._console.print(Text(shown, style=_THINKING_STYLE), end="")
        else:
            # What fits on half a screen: a live display can't scroll.
            lines = self._text.splitlines()[-max(3, self._console.height // 2) :]
            tail = "\n".join(lines)[-self._console.width * 5 :]
            self._live.update(Text(tail, style=_THINKING_STYLE))

    def end(self) -> None:
        """Close the thinking that is open, if any."""
        if self._started_s is None:
            return
        seconds = time.monotonic() - self._started_s
        self._started_s = None
        if self._live is None:
            self._console.print("\n")
        else:
            self._live.stop()
            words = len(self._text.split())
            self._console.print(Text(f"(thought for {seconds:.1f} s, {words} words)", style="dim"))
        self._text = ""


class AnswerView:
    """Shows one answer as it comes: content on stdout, thinking on stderr.

    `show_thinking` None shows thinking if stderr is a terminal, and folds it when it has ended.
    A pipe gets the answer's bytes as they are; a terminal gets them without control characters
    and ended by a line break.
    """

    def __init__(self, *, show_thinking: bool | None = None, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        console = error_console()
        shows = console.is_terminal if show_thinking is None else show_thinking
        folds = show_thinking is None and console.is_terminal
        self._thinking = ThinkingView(console, folds=folds) if shows else None
        self._at_line_start = True

    def show(self, item: "ChatItem") -> None:
        """Show one item of a stream; calls are shown whole, by `end`."""
        if isinstance(item, ReasoningDelta):
            if self._thinking is not None:
                self._thinking.add(item.text)
        elif isinstance(item, ContentDelta):
            self._end_thinking()
            self._write(item.text)

    def end(self, result: "ChatResult | None") -> None:
        """Finish the lines that are open; calls come out as JSON, one a line."""
        self._end_thinking()
        if result is not None:
            for call in result.tool_calls:
                self._show_call(call)
        if self._is_terminal and not self._at_line_start:
            self._write("\n")

    def _end_thinking(self) -> None:
        if self._thinking is not None:
            self._thinking.end()

    def _show_call(self, call: ToolCallDelta) -> None:
        if not self._at_line_start:
            self._write("\n")
        self._write(json.dumps(describe_call(call), ensure_ascii=False) + "\n")

    def _write(self, text: str) -> None:
        if not text:
            return
        self._at_line_start = text.endswith("\n")
        self._out.write(make_printable(text) if self._is_terminal else text)
        self._out.flush()


def describe_call(call: ToolCallDelta) -> dict[str, Any]:
    """A call as JSON: its arguments as an object, or as they are where the model wrote none."""
    try:
        arguments = json.loads(call.arguments)
    except json.JSONDecodeError:
        arguments = call.arguments
    return {"name": call.name, "arguments": arguments}


def describe_result(result: "ChatResult") -> str:
    """Statistics, a line each for the prompt, the thinking if there was any, and the answer."""
    cached = f" ({result.cached_tokens} of them cached)" if result.cached_tokens else ""
    answer_tokens = result.completion_tokens - result.reasoning_tokens
    answer_s = result.decode_s - result.reasoning_s
    lines = [
        f"prompt:   {result.prompt_tokens} tokens{cached}, {format_speed(result.prefill_speed)}, "
        f"first token after {result.time_to_first_token_s:.2f} s",
        f"answer:   {answer_tokens} tokens in {answer_s:.2f} s",
        f"together: {result.completion_tokens} tokens, {format_speed(result.decode_speed)}, "
        f"ended by {result.finish_reason}, seed {result.seed}",
    ]
    if result.reasoning_tokens:
        tokens, seconds = result.reasoning_tokens, result.reasoning_s
        lines.insert(1, f"thinking: {tokens} tokens in {seconds:.2f} s")
    return "\n".join(lines)


@contextlib.contextmanager
def show_loading(name: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal's stderr while a model loads, if that takes long."""
    console = error_console()
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(f"Loading {escape(name)}", total=1.0)
    timer = threading.Timer(_LOAD_DELAY_S, progress.start)
    timer.start()
    try:
        yield lambda done: progress.update(task, completed=done)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


Styled = tuple[str, str]
"""A piece of text and its style, in rich's words (`bold`, `dim`, `blue`; empty for none)."""


def print_line(*parts: Styled) -> None:
    """One line on stdout of styled pieces, which are plain off a terminal; never wrapped."""
    pieces = [(make_printable(text), style) for text, style in parts]
    if sys.stdout.isatty():
        line = Text.assemble(*pieces)
        Console(highlight=False).print(line, soft_wrap=True)
        return
    sys.stdout.write("".join(text for text, _ in pieces) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line of a live display: a label, how much of a bar is full (None: no bar), and text."""

    label: str
    share: float | None
    text: str


@contextlib.contextmanager
def show_bars() -> Iterator[Callable[[list[Bar]], None] | None]:
    """Live bars on a terminal's stderr, gone when the block ends; None off a terminal."""
    console = error_console()
    if not console.is_terminal:
        yield None
        return
    live = Live(console=console, transient=True, auto_refresh=False)
    with live:
        yield lambda bars: live.update(_lay_out_bars(bars), refresh=True)


def _lay_out_bars(bars: Sequence[Bar]) -> Table:
    table = Table.grid(padding=(0, 1), expand=False)
    table.add_column(no_wrap=True)
    table.add_column(width=_BAR_WIDTH)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for bar in bars:
        label, text = (Text(make_printable(part)) for part in (bar.label, bar.text))
        shown = "" if bar.share is None else ProgressBar(total=1.0, completed=bar.share)
        table.add_row(label, shown, text)
    return table


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; off a terminal as plain columns that are never cut or wrapped."""
    if sys.stdout.isatty():
        table = Table(*headings, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*(escape(make_printable(cell)) for cell in row))
        Console(highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        cells = (make_printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")

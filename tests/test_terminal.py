"""Chat in a real terminal: what a person types, and what comes back."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from localmistral.answer import ChatResult
from localmistral.chatformat.parser import ContentDelta, ReasoningDelta
from localmistral.terminal.render import AnswerView, make_printable

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX's", allow_module_level=True)

import pexpect
import pyte

SYSTEM = "You are a helpful assistant."


class Terminal:
    """`localmistral chat` on a pseudo-terminal of 60 lines, read as a person would: as a screen."""

    def __init__(self, model: Path) -> None:
        arguments = ["-m", "localmistral", "chat", str(model), "--system", SYSTEM]
        arguments += ["--temperature", "0", "--max-tokens", "150"]
        self.child = pexpect.spawn(
            sys.executable, arguments, encoding="utf-8",
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            dimensions=(60, 120),
        )  # fmt: skip
        self._screen = pyte.Screen(120, 60)
        self._stream = pyte.Stream(self._screen)

    @property
    def lines(self) -> list[str]:
        """What stands on the screen, without empty lines."""
        return [line.rstrip() for line in self._screen.display if line.strip()]

    def wait(self, condition: Callable[[list[str]], bool], timeout_s: float = 120) -> list[str]:
        """Read until the screen's lines fulfil the condition."""
        end = time.monotonic() + timeout_s
        while not condition(self.lines):
            assert time.monotonic() < end, "\n".join(self.lines)
            try:
                self._stream.feed(self.child.read_nonblocking(4096, timeout=0.1))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                assert condition(self.lines), "\n".join(self.lines)
        return self.lines

    def wait_for_prompt(self) -> list[str]:
        return self.wait(lambda lines: bool(lines) and lines[-1] == ">")

    def say(self, text: str) -> str:
        """Type a line on a cleared screen; all that stands on it when the prompt is back."""
        self._screen.reset()
        self.child.send(text + "\r")
        self.wait(lambda lines: any(text[-40:] in line for line in lines))
        return "\n".join(self.wait_for_prompt())

    def leave(self, key: str) -> int | None:
        """Type `key`; the exit status."""
        self.child.send(key)
        self.child.expect(pexpect.EOF, timeout=60)
        self.child.close()
        return None if self.child.exitstatus is None else int(self.child.exitstatus)


@pytest.fixture
def terminal(smollm2_path: Path) -> Iterator[Terminal]:
    opened = Terminal(smollm2_path)
    assert any("Ctrl-D leaves" in line for line in opened.wait_for_prompt())
    yield opened
    opened.child.close(force=True)


def test_a_conversation_remembers_and_forgets(terminal: Terminal) -> None:
    assert "Paris" in terminal.say("What is the capital of France?")
    assert "shown" in terminal.say("/stats")
    assert "cached" in terminal.say("Are you sure about that?")
    assert "forgotten" in terminal.say("/clear")
    assert "helpful" in terminal.say("/system")
    assert "Be brief." in terminal.say("/system Be brief.")
    assert "(none)" in terminal.say("/system -")
    assert "/clear" in terminal.say("/help")
    assert "Did you mean /help?" in terminal.say("/hepl")
    assert "banana" in terminal.say("/effort banana")
    assert terminal.leave("/exit\r") == 0


def test_ctrl_c_stops_the_answer_and_the_model_stays_usable(terminal: Terminal) -> None:
    terminal.child.send("Write a story about a cat in a thousand words.\r")
    terminal.wait(lambda lines: sum(map(len, lines)) > 300)
    started = time.monotonic()
    terminal.child.sendintr()
    lines = terminal.wait_for_prompt()
    print(f"the prompt was back after {time.monotonic() - started:.2f} s")
    assert "(stopped)" in lines
    terminal.say("/stats")
    assert "cached" in terminal.say("Go on.")  # what was said is still there
    terminal.say("/clear")
    assert "Paris" in terminal.say("What is the capital of France?")
    terminal.child.sendintr()
    terminal.wait(lambda lines: "(Ctrl-D or /exit leaves)" in lines)
    terminal.wait_for_prompt()
    assert terminal.leave("\x04") == 0


def test_ctrl_c_before_the_first_word_gives_the_prompt_back(terminal: Terminal) -> None:
    terminal.child.send("\x1b[200~" + "many words " * 600 + "end\x1b[201~\r")
    time.sleep(2)  # long enough to be read, far too short to be computed
    terminal.child.sendintr()
    terminal.wait(lambda lines: any("stopped before the first word" in line for line in lines))
    terminal.wait_for_prompt()
    assert "Paris" in terminal.say("What is the capital of France?")


def test_a_pipe_can_hold_a_conversation(smollm2_path: Path) -> None:
    lines = "What is the capital of France?\n/stats\n\nAnd of Italy?\n"
    command = [sys.executable, "-m", "localmistral", "chat", "-m", str(smollm2_path)]
    done = subprocess.run(
        [*command, "--temperature", "0", "--system", SYSTEM, "--max-tokens", "30"],
        input=lines.encode(), capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    assert b"Paris" in done.stdout
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.stderr.count(b"tokens/s") == 2


# The view, without a model.


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


RESULT = ChatResult(
    content="", reasoning="", tool_calls=(), finish_reason="stop", stop_text=None,
    prompt_tokens=1, cached_tokens=0, completion_tokens=1, reasoning_tokens=0, reasoning_s=0,
    time_to_first_token_s=0, prefill_s=0, decode_s=0, seed=1,
)  # fmt: skip


def show(out: io.StringIO, *texts: str, show_thinking: bool | None = None) -> str:
    view = AnswerView(show_thinking=show_thinking, out=out)
    view.show(ReasoningDelta(text="hm"))
    for text in texts:
        view.show(ContentDelta(text=text))
    view.end(RESULT)
    return out.getvalue()


def test_a_pipe_gets_the_bytes_and_a_terminal_no_commands() -> None:
    evil = "a\x1b]52;c;AAAA\x07b\r\n"
    assert show(io.StringIO(), evil) == evil
    assert show(Screen(), evil) == "a]52;c;AAAAb\n"
    assert show(Screen(), "no break") == "no break\n"
    assert make_printable("tab\tand\nline") == "tab\tand\nline"


def test_thinking_goes_to_stderr_only_when_it_is_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert show(io.StringIO(), "yes", show_thinking=True) == "yes"
    assert "hm" in capsys.readouterr().err
    assert show(io.StringIO(), "yes") == "yes"
    assert capsys.readouterr().err == ""

"""`localmistral chat`: a conversation in the terminal, with its slash commands.

Ctrl-C stops an answer and keeps what was said; Ctrl-D leaves. Loads nothing, decides nothing.
"""

import difflib
import sys
from collections.abc import Callable
from typing import Any, Protocol

from localmistral.answer import ChatResult, ChatStream
from localmistral.chatformat.effort import EFFORTS, parse_effort
from localmistral.errors import ContextOverflowError, LocalMistralError, UsageError
from localmistral.session import Chat
from localmistral.terminal.oneshot import explain_length
from localmistral.terminal.render import AnswerView, describe_result, print_error, print_note

_HELP = """\
/help           this list
/clear          forget the conversation
/system [TEXT]  show or set the system prompt; /system - takes it away
/effort [LEVEL] show or set how much the model thinks: none, low, medium, high
/stats          show or hide the numbers after each answer
/exit           leave (also Ctrl-D)
Ctrl-C stops an answer. A line that starts with // is sent with one slash.
Alt-Enter (or Esc, then Enter) starts a new line."""


class LineReader(Protocol):
    """Where the person's lines come from."""

    def __call__(self) -> str:
        """The next message; EOFError at the end, KeyboardInterrupt on Ctrl-C."""


def make_line_reader() -> LineReader:
    """Line editing with history on a terminal, plain lines from a pipe."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_piped_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=bindings, enable_suspend=True)
    return lambda: session.prompt("> ", prompt_continuation="  ")


def _read_piped_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


class Conversation:
    """The state of one chat: messages so far, system prompt, effort, what is shown."""

    def __init__(
        self,
        chat: Chat,
        *,
        system: str = "",
        effort: str | None = None,
        show_thinking: bool | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._chat = chat
        self._system = system
        self._effort = effort
        self._show_thinking = show_thinking
        self._options = options or {}
        self._shows_stats = False
        self._messages: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print_note(_HELP),
            "/clear": self._clear,
            "/system": self._set_system,
            "/effort": self._set_effort,
            "/stats": self._toggle_stats,
        }

    def run(self, read_line: LineReader) -> None:
        """Read and answer until the person leaves."""
        while True:
            try:
                line = read_line()
            except KeyboardInterrupt:
                print_note("(Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                return
            if line.split()[:1] and line.split()[0].lower() in ("/exit", "/quit"):
                return
            try:
                self._take(line)
            except KeyboardInterrupt:  # before the answer had begun, or while it was ending
                print_note("(stopped)")

    def _take(self, line: str) -> None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._obey(line)
            elif line.strip():
                self._answer(line.removeprefix("/"))
        except ContextOverflowError as error:
            print_error(LocalMistralError(error.message, "/clear forgets the conversation."))
        except LocalMistralError as error:
            print_error(error)

    def _obey(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        command = self._commands.get(name.lower())
        if command is None:
            near = difflib.get_close_matches(name, [*self._commands, "/exit"], n=1)
            hint = f"Did you mean {near[0]}?" if near else "Type /help for the commands."
            raise UsageError(f"There is no command {name[:40]!r}.", hint)
        command(argument.strip())

    def _answer(self, text: str) -> None:
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self._system}] if self._system else []
        stream = self._chat.stream(
            [*system, *self._messages, question], effort=self._effort, **self._options
        )
        result = self._show(stream)
        if result.finish_reason == "cancelled" and not (result.content or result.reasoning):
            print_note("(stopped before the first word; your message was not kept)")
            return
        self._messages += [question, result.to_message()]
        if result.finish_reason == "length":
            print_note(explain_length(self._chat.engine.settings.context, result))
        if self._shows_stats:
            print_note(describe_result(result))

    def _show(self, stream: ChatStream) -> ChatResult:
        """Show the answer to its end; the first Ctrl-C cancels it, and what there is counts."""
        view = AnswerView(show_thinking=self._show_thinking)
        items = iter(stream)
        try:
            while stream.result is None:
                try:
                    for item in items:
                        view.show(item)
                except KeyboardInterrupt:
                    stream.close()
                    items = iter(stream)
        finally:
            view.end(stream.result)
        if stream.result.finish_reason == "cancelled":
            print_note("(stopped)")
        return stream.result

    def _clear(self, _: str) -> None:
        self._messages.clear()
        print_note("(the conversation is forgotten)")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = "" if text == "-" else text
        print_note(f"system prompt: {self._system or '(none)'}")

    def _set_effort(self, value: str) -> None:
        if value:
            self._effort = parse_effort(value)
            if not self._chat.has_effort_switch:
                print_note(f"({self._chat.title} has no reasoning switch: this has no effect)")
        print_note(f"effort: {self._effort or 'the default'} (of {', '.join(EFFORTS)})")

    def _toggle_stats(self, wanted: str) -> None:
        self._shows_stats = {"on": True, "off": False}.get(wanted.lower(), not self._shows_stats)
        print_note(f"statistics are {'shown' if self._shows_stats else 'hidden'}")

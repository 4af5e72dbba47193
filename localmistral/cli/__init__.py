"""The commands: parse, call, render. `main` turns errors into one sentence and an exit code.

Heavy imports stand inside the commands that need them, so that `--help` answers at once.
"""

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from localmistral import __version__
from localmistral.cli.bench import bench
from localmistral.cli.chat import chat
from localmistral.cli.doctor import doctor
from localmistral.cli.hardware import hardware
from localmistral.cli.listing import list_models, models
from localmistral.cli.options import Debug
from localmistral.cli.plan import plan
from localmistral.cli.pull import pull
from localmistral.cli.rm import rm
from localmistral.cli.run import run
from localmistral.cli.serve import serve
from localmistral.errors import LocalMistralError, PlanError, UsageError

# The parser's own base class: typer names only some of the classes below it.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="localmistral",
    help="Run Mistral models, and any other GGUF chat model, on your own machine.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command(short_help="Answer one PROMPT and exit.")(run)
app.command()(chat)
app.command()(serve)
app.command(short_help="What of MODEL suits a machine, and why.")(plan)
app.command(short_help="Measure MODEL, compare with its plan.")(bench)
app.command(short_help="What this machine has for models.")(hardware)
app.command(short_help="Look for what slows this machine down.")(doctor)
app.command()(models)
app.command(name="list", short_help="The models on this disk.")(list_models)
app.command(short_help="Download a model, or go on with it.")(pull)
app.command(short_help="Remove a model from this disk.")(rm)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
) -> None:
    if version:
        sys.stdout.write(f"localmistral {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from localmistral.terminal.welcome import welcome

        welcome()


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 ok, 1 a known error, 2 usage, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    _use_utf8()
    try:
        code = app(arguments, prog_name="localmistral", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except _CommandLineError as error:
        return _report(_translate(error), arguments)
    except (OSError, SystemExit) as error:
        return _end_output(error, arguments)
    except LocalMistralError as error:
        return _report(error, arguments)
    except Exception as error:  # noqa: BLE001  (a person gets a sentence even for our own mistakes)
        return _report(_admit(error), arguments)
    return code if isinstance(code, int) else 0


def _end_output(error: OSError | SystemExit, arguments: list[str]) -> int:
    """A reader that has left is no error (the parser exits by itself then); a full disk is."""
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(error, SystemExit) and not isinstance(cause, OSError):
        raise error
    _abandon_stdout()
    if isinstance(cause, BrokenPipeError) or getattr(cause, "errno", None) == errno.EINVAL:
        return 0
    return _report(LocalMistralError(f"The output can't be written: {cause}."), arguments)


def _translate(error: Exception) -> UsageError:
    """What the parser of the command line objects to, in our own form."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "localmistral"
    message = str(getattr(error, "format_message", error.__str__)())
    return UsageError(message, f"See {command} --help")


def _admit(error: Exception) -> LocalMistralError:
    admitted = LocalMistralError(
        f"localmistral met an unexpected {type(error).__name__}: {error}.",
        "This is a defect of the program; run the same again with --debug for the details.",
    )
    admitted.__cause__ = error
    return admitted


def _report(error: LocalMistralError, arguments: list[str]) -> int:
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in options:
        import traceback

        traceback.print_exception(error)
    else:
        from localmistral.terminal.render import print_error

        if isinstance(error, PlanError) and error.change:
            from localmistral.cli.retyping import retype

            error.hint = f"{error.hint}: {retype(arguments, error.change)}"
        print_error(error)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR


def _use_utf8() -> None:
    """Text is UTF-8 and lines end in one byte, whatever the system's habit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="replace", newline="\n")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


def _abandon_stdout() -> None:
    """Nobody reads any more: keep the interpreter's last flush from complaining."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

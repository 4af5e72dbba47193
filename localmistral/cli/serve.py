"""`localmistral serve`."""

from typing import TYPE_CHECKING, Annotated

import typer

from localmistral.cli.knobs import LoadReader, loads_model
from localmistral.cli.loading import load_served
from localmistral.cli.options import Parallel, Positional
from localmistral.errors import UsageError
from localmistral.server.settings import DRAIN_S, MAX_PORT

if TYPE_CHECKING:
    from localmistral.server.settings import ServerSettings
    from localmistral.session import Chat

DEFAULT_PARALLEL = 2
"""Streams at once: an editor's completions needn't wait for a long answer, and the context that
is reserved for each stays affordable."""
LOG_FORMS = ("off", "text", "json")
MAX_DRAIN_S = 86_400


Log = Annotated[
    str, typer.Option("--log", metavar="FORM", help="Requests on stderr: off, text or json.")
]
Drain = Annotated[
    float,
    typer.Option(
        "--drain", metavar="SECONDS", help="How long running answers may take at the end."
    ),
]


@loads_model
def serve(
    load: LoadReader,
    positional: Positional = None,  # noqa: ARG001  (read by `load`)
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="LOCALMISTRAL_API_KEY",
            help="Clients have to send it; repeatable.",
        ),
    ] = None,
    parallel: Parallel = DEFAULT_PARALLEL,  # noqa: ARG001  (read by `load`)
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A name that clients may call this machine by."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="URL", help="A web page that may use the server; * for all."
        ),
    ] = None,
    log: Log = "off",
    drain: Drain = DRAIN_S,
) -> None:
    """Serve a model over HTTP, as OpenAI and Anthropic do."""
    from localmistral.server.running import serve as run_server
    from localmistral.server.settings import ServerSettings

    if log not in LOG_FORMS:
        raise UsageError(f"--log {log[:40]!r} is not known.", f"Use {', '.join(LOG_FORMS)}.")
    if not 0 <= port <= MAX_PORT:
        raise UsageError(f"--port is {port}, it must be from 0 to {MAX_PORT}.")
    if not 0 <= drain <= MAX_DRAIN_S:
        raise UsageError(f"--drain is {drain:g}, it must be from 0 to {MAX_DRAIN_S} seconds.")
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        allow_hosts=tuple(allow_host or ()),
        allow_origins=tuple(allow_origin or ()),
        log=log,
        drain_s=drain,
    )
    wanted = load()
    code = run_server(
        lambda on_progress: load_served(wanted, on_progress),
        settings,
        on_ready=_announce,
        on_stop=_announce_end,
    )
    raise typer.Exit(code)


def _announce(chat: "Chat", settings: "ServerSettings") -> None:
    if settings.log == "json":  # the log says it, and every line of it is JSON
        return
    from localmistral.server.serving import name_model
    from localmistral.terminal.render import print_note
    from localmistral.units import format_tokens

    loaded = chat.engine.settings
    streams = "1 stream" if loaded.parallel == 1 else f"each of {loaded.parallel} streams"
    what = f"context {format_tokens(loaded.context)} for {streams}"
    if not chat.can_chat:
        what = f"embeddings of texts of up to {loaded.context:,} tokens"
    print_note(f"{settings.url}/v1 serves {name_model(chat)[0]}, {what}. Ctrl-C ends it.")


def _announce_end(answers: int, settings: "ServerSettings") -> None:
    from localmistral.terminal.render import print_note

    if answers and settings.log != "json":
        what = "1 answer" if answers == 1 else f"{answers} answers"
        print_note(
            f"Waiting up to {settings.drain_s:g} s for {what} to end; Ctrl-C again ends it at once."
        )

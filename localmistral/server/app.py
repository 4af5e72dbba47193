"""The HTTP application: the routes together, one error map, and the gate in front.

    app = create_app(chat)          # or create_app(Serving()) and fill it later

No globals: two apps in one process know nothing of each other.
"""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from localmistral import __version__
from localmistral.errors import LocalMistralError
from localmistral.server.access_log import REQUEST_ID_HEADERS, AccessLog
from localmistral.server.chat_route import make_chat_router
from localmistral.server.completions_route import make_completions_router
from localmistral.server.documentation import DocumentedApp
from localmistral.server.embeddings_route import make_embeddings_router
from localmistral.server.errors import Failure, describe, describe_status, describe_validation
from localmistral.server.events import ClientGoneError, JsonAnswer
from localmistral.server.guard import Guard, request_id_of
from localmistral.server.local_route import make_local_router
from localmistral.server.messages_route import make_messages_router
from localmistral.server.observing import Observer
from localmistral.server.page import make_page_router
from localmistral.server.plain_routes import make_plain_router
from localmistral.server.responses_route import make_responses_router
from localmistral.server.serving import Serving
from localmistral.server.settings import ServerSettings
from localmistral.session import Chat

logger = logging.getLogger("localmistral.server")

CLIENT_CLOSED = 499
"""nginx's status for a client that left: nobody reads it, but logs do."""


def create_app(chat: Chat | Serving, settings: ServerSettings | None = None) -> FastAPI:
    """An ASGI application that serves `chat`, or what a Serving will hold once it is loaded."""
    settings = settings or ServerSettings()
    serving = chat if isinstance(chat, Serving) else Serving(chat=chat)
    observer = Observer(serving)
    app = DocumentedApp(
        title="localmistral",
        version=__version__,
        description="Mistral models on this machine, behind OpenAI's and Anthropic's interfaces.",
        redoc_url=None,
        redirect_slashes=False,  # the guard has put paths in order
    )
    routers = [
        make_chat_router(serving, observer),
        make_completions_router(serving, observer),
        make_messages_router(serving, observer),
        make_responses_router(serving, observer),
        make_embeddings_router(serving),
        make_plain_router(serving, observer),
        make_page_router(serving, settings),
    ]
    if settings.local_token:
        routers.append(make_local_router(serving, observer, settings.local_token))
    for router in routers:
        app.include_router(router)
    _add_error_map(app)
    app.add_middleware(Guard, settings=settings)
    if settings.allow_origins:  # around the guard: a page has to be able to read refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=[*REQUEST_ID_HEADERS, "retry-after"],
            allow_private_network=True,
        )
    paths = frozenset(str(getattr(r, "path", "")) for router in routers for r in router.routes)
    app.add_middleware(AccessLog, observer=observer, form=settings.log, paths=paths)
    return app


def _add_error_map(app: FastAPI) -> None:
    @app.exception_handler(LocalMistralError)
    async def known(request: Request, error: LocalMistralError) -> Response:
        return _respond(request, describe(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _respond(request, describe_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = {
            400: "The body can't be read: it is no JSON, nested too deep, or has numbers too long.",
            404: f"There is no {request.method} {request.url.path[:100]} here.",
            405: f"{request.url.path[:100]} takes no {request.method}.",
        }
        message = what.get(error.status_code, str(error.detail))
        response = _respond(request, describe_status(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGoneError)
    async def gone(_request: Request, _error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        logger.error("a request met an unexpected error", exc_info=error)
        return _respond(request, describe(error))


def _respond(request: Request, failure: Failure) -> Response:
    body = failure.to_body(request.url.path, request_id_of(request.scope))
    return JsonAnswer(body, status_code=failure.status, headers=dict(failure.headers))

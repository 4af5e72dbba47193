"""The page at `/`: where the server is, what it serves, and a snippet to start from.

One static file without scripts and without anything from elsewhere; the browser is told to load
nothing else either.
"""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from string import Template

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, Response

from localmistral.server.serving import Serving, name_model
from localmistral.server.settings import ServerSettings


def make_page_router(serving: Serving, settings: ServerSettings) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    source = resources.files("localmistral.server").joinpath("page.html").read_text("utf-8")
    template, policy = Template(source), _write_policy(source)

    @router.api_route("/", methods=["GET", "HEAD"])
    def show_page(request: Request) -> Response:
        """How to use this server, for a person with a browser."""
        values = {
            "base_url": f"{request.url.scheme}://{request.url.netloc}/v1",
            "state": _describe_state(serving),
            "model": _name(serving),
            "key": "the one that --api-key says" if settings.api_keys else "none is asked for",
            "given": "YOUR KEY" if settings.api_keys else "none",
        }
        quoted = {f"{name}_code": json.dumps(text) for name, text in values.items()}
        shown = {name: html.escape(text) for name, text in {**values, **quoted}.items()}
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-store",
        }
        return HTMLResponse(template.substitute(shown), headers=headers)

    return router


def _name(serving: Serving) -> str:
    return "model" if serving.chat is None else name_model(serving.chat)[0]


def _describe_state(serving: Serving) -> str:
    if serving.failure is not None:
        return serving.failure.message
    if serving.chat is None:
        return f"The model is still loading ({serving.progress:.0%})."
    if serving.is_draining or not serving.chat.engine.is_alive:
        return "The server is about to end."
    context = serving.chat.engine.settings.context
    return f"{_name(serving)} answers, with a context of {context:,} tokens."


def _write_policy(source: str) -> str:
    """Nothing may load, run or frame; the page's own style is named by its hash."""
    styles = re.findall(r"<style>(.*?)</style>", source, re.S)
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in styles]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    return (
        f"default-src 'none'; style-src {allowed}; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )

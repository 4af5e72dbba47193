"""Runs one compiled chat template over outside text, and cuts the result into safe segments.

Ties together the sandbox (what a template may do) and the stand-ins (what outside text may become).
Knows nothing of messages: the variables a template sees are made by the caller.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from localmistral.chatformat.metering import HINT, Meter
from localmistral.chatformat.sandbox import Refusal, Sandbox
from localmistral.chatformat.segments import Disguise, Segment, SpecialTexts
from localmistral.errors import BadRequestError, TemplateError


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """What a prompt must know of a vocabulary.

    `control`: the texts and ids of CONTROL and UNKNOWN tokens; `user_defined`: the texts of
    USER_DEFINED ones; `bos` and `eos`: texts, empty where the vocabulary has none; `adds_bos`:
    whether a prompt begins with a BOS.
    """

    control: Mapping[str, int]
    user_defined: tuple[str, ...] = ()
    bos: str = ""
    eos: str = ""
    adds_bos: bool = False


class Renderer:
    """A compiled template. One may be used from several threads at once."""

    def __init__(
        self,
        source: str,
        special: SpecialTexts,
        *,
        bos_token: str,
        eos_token: str,
        add_bos: bool,
        clock: Callable[[], datetime] = datetime.now,
        refuses: bool = True,
    ) -> None:
        """Compile `source`; `refuses` false makes its `raise_exception` do nothing.

        Errors: TemplateError.
        """
        self._source = source
        self._special = special
        self._bos_token = bos_token
        self._eos_token = eos_token
        self._add_bos = add_bos and bos_token in special.control
        self._here = threading.local()
        self._sandbox = Sandbox(clock=clock, ascii_kept=self._is_stand_in, refuses=refuses)
        self._template = self._sandbox.prepare(source)

    def disguise(self, texts: Iterable[str]) -> Disguise:
        """Stand-ins for a prompt of these texts, in use for this thread's next `run`."""
        disguise = Disguise(self._special, [*texts, self._source, self._bos_token, self._eos_token])
        self._here.disguise = disguise
        return disguise

    def run(self, variables: Mapping[str, Any], meter: Meter) -> str:
        """The rendering, stand-ins included.

        Errors: BadRequestError if the template refuses, TemplateError if it fails.
        """
        tokens = {"bos_token": self._bos_token, "eos_token": self._eos_token}
        try:
            rendered = self._sandbox.run(self._template, {**variables, **tokens}, meter)
            rendered.encode()
        except Refusal as refusal:
            words = str(refusal).rstrip(".")
            message = f"The model's chat template refuses this conversation: {words}."
            raise BadRequestError(message, param="messages") from refusal
        except UnicodeEncodeError as error:
            raise TemplateError("The chat template makes text that is no Unicode.", HINT) from error
        return rendered

    def cut(self, disguise: Disguise, rendered: str) -> tuple[Segment, ...]:
        """Segments with exactly one BOS where the vocabulary wants one, never two."""
        segments = disguise.cut(rendered)
        bos = Segment(text=self._bos_token, control=True)
        if self._add_bos and segments[:1] != (bos,):
            segments = (bos, *segments)
        while segments[:2] == (bos, bos):
            segments = segments[1:]
        return segments

    def _is_stand_in(self, c: str) -> bool:
        disguise = getattr(self._here, "disguise", None)
        return disguise is not None and disguise.covers(c)

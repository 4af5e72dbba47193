"""Measure the demo model in llama.cpp at temperature 0 on held-out conversations.

    python scripts/eval_demo_model.py             # the shipped file, 100 cases of each kind
    python scripts/eval_demo_model.py --model FILE --count 20 --show 3

Held out are numbers, ranges and places that training never shows (`demo_model/conversations.py`).
An answer is right when it equals the expected one to the letter (thinking is not compared); a call
when its name and arguments do. Prompts are made by localmistral itself. Needs neither torch nor
mistral-common.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from demo_model.conversations import EFFORTS, EXAMPLES, Conversation, Maker, Turn, openai_request

from localmistral.engine import EngineSettings, Request, Sampling
from localmistral.models.gguf import read_vocabulary
from localmistral.session import Chat

ROOT = Path(__file__).resolve().parent.parent
SEED = 404
LONGEST = 400  # tokens of an answer
ANSWER = re.compile(
    r"(?:\[THINK\](?P<think>.*?)\[/THINK\])?(?P<text>(?:(?!\[/?[A-Z_]+\]).)*)"
    r"(?:\[TOOL_CALLS\](?P<name>.*?)\[ARGS\](?P<arguments>.*))?",
    re.DOTALL,
)


def heldout_maker(path: Path) -> Maker:
    """Makes the held-out conversations, with words out of the vocabulary of the model at `path`."""
    texts = read_vocabulary(path).texts[1256:]  # without control tokens and single bytes
    return Maker(SEED, [t for t in texts if t.isalpha() and t.isascii()], heldout=True)


def complete(chat: Chat, c: Conversation, upto: int) -> str:
    """What the model writes after the first `upto` messages, control tokens spelled out."""
    request = openai_request(c, upto, keep_thinking=False)
    segments = chat.render(request["messages"], tools=request.get("tools"), effort=c.effort)
    stream = chat.engine.submit(
        Request(
            prompt=chat.encode(segments),
            max_tokens=LONGEST,
            sampling=Sampling(temperature=0.0),
        )
    )
    return "".join(event.text for event in stream).removesuffix("</s>")


def judge(written: str, effort: str, wanted: Turn) -> Counter[str]:
    """One answer's marks: effort obeyed, right; for calls also valid JSON and the right place."""
    found = ANSWER.fullmatch(written)
    if found is None:
        return Counter(answers=1, calls=int(wanted.call is not None))
    marks = Counter(answers=1, effort=int((found["think"] is not None) == (effort == "high")))
    if wanted.call is None:
        marks["right"] = int(found["name"] is None and found["text"] == wanted.text)
        return marks
    marks["calls"] = 1
    arguments = parse_object(found["arguments"] or "")
    marks["json"] = int(arguments is not None)
    marks["place"] = int(list((arguments or {}).values()) == list(wanted.call[1].values()))
    marks["right"] = int((found["name"], arguments) == wanted.call)
    return marks


def parse_object(text: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(text)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def measure(
    chat: Chat, maker: Maker, kind: str, effort: str, count: int, show: int = 0
) -> dict[str, Counter[str]]:
    """The marks of one kind and effort, by part; prints the first `show` wrong answers."""
    tally: dict[str, Counter[str]] = {}
    for _ in range(count):
        c = maker.example(kind, effort)
        for at, (_, wanted) in enumerate(c.messages):
            if not isinstance(wanted, Turn) or (kind.startswith("and ") and at < 3):
                continue
            written = complete(chat, c, at)
            marks = judge(written, effort, wanted)
            part = kind + (": call" if wanted.call else ": answer" if at > 1 and c.tools else "")
            tally[part] = tally.get(part, Counter()) + marks
            if show and not (marks["right"] and marks["effort"]):
                show -= 1
                print(f"  {c.messages[at - 1][1]!r}: {written!r}, not {wanted.text or wanted.call}")
    return tally


def format_row(part: str, effort: str, marks: Counter[str]) -> str:
    return (
        f"| {part} | {effort} | {marks['answers']} | {share(marks, 'effort')} "
        f"| {share(marks, 'right')} | {share(marks, 'json', 'calls')} "
        f"| {share(marks, 'place', 'calls')} |"
    )


def share(marks: Counter[str], key: str, of: str = "answers") -> str:
    return f"{100 * marks[key] / marks[of]:.1f} %" if marks[of] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "localmistral" / "data" / "demo.gguf")
    parser.add_argument("--count", type=int, default=100, help="conversations of each kind")
    parser.add_argument("--show", type=int, default=0, help="wrong answers of each kind to print")
    parser.add_argument("--kinds", nargs="+", default=EXAMPLES, choices=EXAMPLES)
    options = parser.parse_args()
    maker = heldout_maker(options.model)
    start = time.monotonic()
    print("| kind | effort | answers | thinks as asked | right | JSON valid | right place |")
    print("|---" * 7 + "|")
    with Chat.load(str(options.model), EngineSettings(threads=1)) as chat:
        for kind in options.kinds:
            for effort in EFFORTS:
                tally = measure(chat, maker, kind, effort, options.count, options.show)
                for part, marks in tally.items():
                    print(format_row(part, effort, marks), flush=True)
    print(f"\n{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

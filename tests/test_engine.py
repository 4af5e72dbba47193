"""The engine on a real model: what one request can rely on, alone and among others."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from localmistral.engine import (
    Engine,
    EngineSettings,
    GenerationResult,
    Request,
    Sampling,
    Stream,
    TokenEvent,
)
from localmistral.engine.model import Context
from localmistral.engine.scheduler import Scheduler
from localmistral.engine.settings import Logits
from localmistral.engine.thinking import ThinkingBudget
from localmistral.errors import (
    BadRequestError,
    BusyError,
    ContextOverflowError,
    EngineError,
    ModelFileError,
)

GREEDY = Sampling(temperature=0)
CONTEXT = 2048


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[Engine]:
    with Engine.load([smollm2_path], EngineSettings(context=CONTEXT, parallel=4)) as loaded:
        yield loaded


def ask(engine: Engine, text: str) -> tuple[int, ...]:
    """The prompt of a one-question chat, in SmolLM2's format."""
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return tuple(engine.tokenize(prompt, parse_special=True))


def read(stream: Stream) -> tuple[str, GenerationResult]:
    text = "".join(event.text for event in stream)
    assert stream.result is not None
    return text, stream.result


def generate(engine: Engine, prompt: Sequence[int], **fields: object) -> str:
    fields = {"sampling": GREEDY, "max_tokens": 40, **fields}
    return read(engine.submit(Request(prompt=tuple(prompt), **fields)))[0]  # type: ignore[arg-type]


NEAR_TIE = 0.5
"""Texts may part only where the two best logprobs were nearer than this; the largest gap seen at
such a place was 0.31 (SmolLM2, Q4_1, CPU), with other rows in the batch or another place in
memory."""


def read_tokens(stream: Stream) -> list[int]:
    return [event.token for event in stream if event.token is not None]


def run_solo(engine: Engine, prompt: Sequence[int], max_tokens: int) -> list[TokenEvent]:
    """The greedy answer, computed cold, with the two best logprobs of every token."""
    request = Request(
        prompt=tuple(prompt), sampling=GREEDY, max_tokens=max_tokens, top_logprobs=2,
        cache_prompt=False,
    )  # fmt: skip
    return [event for event in engine.submit(request) if event.token is not None]


def find_divergence(solo: Sequence[TokenEvent], tokens: Sequence[int]) -> float | None:
    """The gap of the two best logprobs where `tokens` leave the solo run; None where they don't."""
    assert len(tokens) > 0
    for event, token in zip(solo, tokens, strict=False):
        if event.token != token:
            assert event.probability is not None
            (_, first), (_, second) = event.probability.alternatives
            return first - second
    return None


def assert_same(solo: Sequence[TokenEvent], tokens: Sequence[int]) -> None:
    """`tokens` are those of the solo run, up to a near-tie."""
    gap = find_divergence(solo, tokens)
    assert gap is None or gap < NEAR_TIE


def wait_until(condition: object, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def long_prompt(engine: Engine, tokens: int, seed: str = "") -> tuple[int, ...]:
    words = " ".join(f"{seed}{n} is a number." for n in range(tokens))
    return ask(engine, words)[:tokens]


# One request.


def test_it_answers_a_question(engine: Engine) -> None:
    assert "Paris" in generate(engine, ask(engine, "What is the capital of France?"))


def test_the_same_request_twice_gives_the_same_text(engine: Engine) -> None:
    prompt = ask(engine, "Tell me a story about a cat.")
    cold = {"cache_prompt": False, "max_tokens": 60}
    assert generate(engine, prompt, **cold) == generate(engine, prompt, **cold)


def test_a_seed_repeats_the_choices_and_the_result_names_it(engine: Engine) -> None:
    prompt = ask(engine, "Tell me a story about a dog.")
    drawn = engine.submit(Request(prompt=prompt, max_tokens=30, cache_prompt=False))
    text, result = read(drawn)
    again = Sampling(seed=result.seed)
    other = Sampling(seed=(result.seed + 1) % (2**32 - 1))
    assert generate(engine, prompt, sampling=again, max_tokens=30, cache_prompt=False) == text
    assert generate(engine, prompt, sampling=other, max_tokens=30, cache_prompt=False) != text


def test_the_text_is_that_of_all_its_tokens(engine: Engine) -> None:
    prompt = ask(engine, "Repeat exactly: 😀 naïve 漢字 🎉🎉")
    events = list(engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=50)))
    tokens = [event.token for event in events if event.token is not None]
    text = "".join(event.text for event in events)
    assert engine.detokenize(tokens).startswith(text)
    assert "\ufffd" not in text


def test_max_tokens_ends_the_answer(engine: Engine) -> None:
    request = Request(prompt=ask(engine, "Count to a hundred."), max_tokens=5, sampling=GREEDY)
    _, result = read(engine.submit(request))
    assert (result.finish_reason, result.completion_tokens) == ("length", 5)


def test_a_full_context_ends_the_answer(smollm2_path: Path) -> None:
    with Engine.load([smollm2_path], EngineSettings(context=256)) as small:
        prompt = ask(small, "Tell me a long story.")
        request = Request(prompt=prompt, sampling=GREEDY, ignore_eos=True)
        _, result = read(small.submit(request))
        assert result.finish_reason == "length"
        assert result.prompt_tokens + result.completion_tokens == 256


def test_a_prompt_over_the_context_is_refused_with_both_counts(engine: Engine) -> None:
    with pytest.raises(ContextOverflowError, match=rf"{CONTEXT + 5} tokens.*{CONTEXT}"):
        engine.submit(Request(prompt=(5,) * (CONTEXT + 5)))
    with pytest.raises(ContextOverflowError):
        engine.submit(Request(prompt=(5,) * CONTEXT))


def test_a_token_outside_the_vocabulary_is_refused(engine: Engine) -> None:
    for token in (-1, 49152, 2**31 - 1):
        with pytest.raises(BadRequestError, match="vocabulary of 49152"):
            engine.submit(Request(prompt=(1, token)))
        with pytest.raises(BadRequestError, match="vocabulary of 49152"):
            engine.submit(Request(prompt=(1,), sampling=Sampling(logit_bias={token: 1.0})))


@pytest.mark.parametrize("start", range(2, 30, 3))
@pytest.mark.parametrize("length", [1, 4, 11])
def test_a_stop_string_is_cut_wherever_it_lies_across_tokens(
    engine: Engine, start: int, length: int
) -> None:
    prompt = ask(engine, "What is the capital of France?")
    whole = generate(engine, prompt)
    stop = whole[start : start + length]
    if not stop:
        pytest.skip("the answer is shorter than this case")
    stream = engine.submit(Request(prompt=prompt, sampling=GREEDY, stop=("\0never", stop)))
    text, result = read(stream)
    assert text == whole[: whole.index(stop)]
    assert (result.finish_reason, result.stop_text) == ("stop", stop)


def test_a_beginning_of_a_stop_string_that_does_not_go_on_is_shown(engine: Engine) -> None:
    prompt = ask(engine, "What is the capital of France?")
    whole = generate(engine, prompt)
    assert generate(engine, prompt, stop=(whole[-3:] + "!!!", whole[:4] + "?")) == whole


# Sampling.


def test_log_probabilities_are_those_of_the_model(engine: Engine) -> None:
    request = Request(
        prompt=ask(engine, "What is the capital of France?"), sampling=GREEDY, top_logprobs=5
    )
    for event in engine.submit(request):
        assert event.probability is not None
        values = [value for _, value in event.probability.alternatives]
        assert len(values) == 5
        assert values == sorted(values, reverse=True)
        assert sum(np.exp(values)) < 1.0001
        assert event.probability.alternatives[0] == (event.token, event.probability.logprob)


def test_all_log_probabilities_sum_to_one(engine: Engine) -> None:
    seen: list[float] = []

    class Watch:
        def mask(self, logits: Logits) -> None:
            shifted = logits.astype(np.float64) - logits.max()
            seen.append(float(shifted[504] - np.log(np.exp(shifted).sum())))

        def accept(self, token: int) -> None: ...

    prompt = ask(engine, "What is the capital of France?")
    request = Request(
        prompt=prompt, sampling=GREEDY, max_tokens=1, top_logprobs=20, constraint=Watch()
    )
    (event,) = engine.submit(request)
    assert event.probability is not None
    assert dict(event.probability.alternatives)[504] == pytest.approx(seen[0], abs=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1, top_k=1),
        Sampling(temperature=1, top_k=0, top_p=0.0),
        Sampling(temperature=1, top_k=0, min_p=1.0),
        Sampling(temperature=0.01, seed=1),
        Sampling(temperature=1, top_k=0, top_n_sigma=0.01),
    ],
)
def test_the_narrowest_setting_of_each_filter_is_greedy(engine: Engine, sampling: Sampling) -> None:
    prompt = ask(engine, "What is the capital of Spain?")
    greedy = generate(engine, prompt, max_tokens=8, cache_prompt=False)
    assert generate(engine, prompt, max_tokens=8, cache_prompt=False, sampling=sampling) == greedy


def test_a_logit_bias_forbids_and_forces_tokens(engine: Engine) -> None:
    prompt = ask(engine, "What is the capital of France?")
    first = next(iter(engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=1)))).token
    assert first is not None
    never = Sampling(temperature=0, logit_bias={first: float("-inf")})
    always = Sampling(temperature=0, logit_bias={1234: 1000.0})
    (other,) = engine.submit(Request(prompt=prompt, sampling=never, max_tokens=1))
    (forced,) = engine.submit(Request(prompt=prompt, sampling=always, max_tokens=1))
    assert other.token != first
    assert forced.token == 1234


@pytest.mark.parametrize(
    "penalised",
    [
        Sampling(temperature=0, repeat_penalty=1.8),
        Sampling(temperature=0, frequency_penalty=2.0),
        Sampling(temperature=0, presence_penalty=4.0),
        Sampling(temperature=0, dry_multiplier=5.0, dry_allowed_length=1),
    ],
)
def test_penalties_break_a_loop(engine: Engine, penalised: Sampling) -> None:
    prompt = tuple(engine.tokenize("one two one two one two one two one two one two one two"))

    def count_most_common(sampling: Sampling) -> int:
        words = generate(engine, prompt, max_tokens=12, sampling=sampling).split()
        return max(words.count(word) for word in words)

    assert count_most_common(penalised) < count_most_common(GREEDY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0), ("temperature", float("nan")), ("temperature", float("inf")),
        ("top_p", 5.0), ("top_p", -0.1), ("min_p", 2.0), ("top_k", -3), ("seed", 2**63),
        ("seed", -1), ("repeat_penalty", 0.0), ("presence_penalty", 1e9), ("typical_p", 1.5),
        ("xtc_probability", -1.0), ("penalty_last_n", -2), ("logit_bias", {3: float("nan")}),
        ("frequency_penalty", float("nan")), ("logit_bias", {3: 1e39}),
        ("dry_sequence_breakers", ("\ud800",)), ("dry_sequence_breakers", ("",)),
        ("dry_multiplier", float("inf")),
    ],
)  # fmt: skip
def test_a_sampling_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(BadRequestError, match=name) as refusal:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert refusal.value.param == name


def test_a_request_out_of_range_is_named() -> None:
    for fields in ({"max_tokens": 0}, {"top_logprobs": 21}, {"stop": ("",)}, {"stop": ("x",) * 99}):
        with pytest.raises(BadRequestError, match=r"max_tokens|top_logprobs|stop"):
            Request(prompt=(1,), **fields)
    with pytest.raises(BadRequestError, match="0 tokens"):
        Request(prompt=())


# Prefix reuse.


def test_a_second_turn_computes_only_what_is_new(engine: Engine) -> None:
    prompt = ask(engine, "Name three colours, please.")
    events = list(engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=30)))
    answer = [event.token for event in events if event.token is not None]
    turn = "<|im_end|>\n<|im_start|>user\nAnd three more?<|im_end|>\n<|im_start|>assistant\n"
    new = engine.tokenize(turn, parse_special=True)
    second = (*prompt, *answer[:-1], *new)
    _, result = read(engine.submit(Request(prompt=second, sampling=GREEDY, max_tokens=5)))
    assert result.cached_tokens >= len(prompt) + len(answer) - 1
    assert result.prompt_tokens - result.cached_tokens <= len(new)


def test_the_prefix_of_a_running_request_is_shared_and_changes_nothing(engine: Engine) -> None:
    story = "Once upon a time there was a cat who lived in a small house by the sea. " * 12
    shared = ask(engine, story)[:-5]
    turn = " Who lived there?<|im_end|>\n<|im_start|>assistant\n"
    end = tuple(engine.tokenize(turn, parse_special=True))
    solo = run_solo(engine, shared + end, 12)
    first = engine.submit(Request(prompt=(*shared, 28, 198), sampling=GREEDY, ignore_eos=True))
    next(iter(first))
    stream = engine.submit(Request(prompt=shared + end, sampling=GREEDY, max_tokens=12))
    tokens = read_tokens(stream)
    assert not first.wait(0)
    first.close()
    assert stream.result is not None
    assert stream.result.cached_tokens >= len(shared)
    assert_same(solo, tokens)


def test_cache_prompt_false_computes_everything(engine: Engine) -> None:
    prompt = long_prompt(engine, 50, "cold ")
    for _ in range(2):
        request = Request(prompt=prompt, sampling=GREEDY, max_tokens=2, cache_prompt=False)
        assert read(engine.submit(request))[1].cached_tokens == 0


def count_cached(engine: Engine, prompt: tuple[int, ...]) -> int:
    return read(engine.submit(Request(prompt=prompt, max_tokens=1)))[1].cached_tokens


def test_conversations_that_take_turns_are_computed_once(smollm2_path: Path) -> None:
    with Engine.load([smollm2_path], EngineSettings(context=512)) as small:
        prompts = [long_prompt(small, 40, name) for name in ("a", "b", "c")]
        assert all(count_cached(small, prompt) < 10 for prompt in prompts)
        assert [count_cached(small, prompt) for prompt in prompts * 2] == [39] * 6
        assert small.metrics().failed == 0


def test_stored_prefixes_give_way_when_their_room_is_full(smollm2_path: Path) -> None:
    one = 1_000_000  # a token takes 23,040 bytes
    with Engine.load([smollm2_path], EngineSettings(context=512, stored_bytes=one)) as small:
        a, b, c = (long_prompt(small, 40, name) for name in ("a", "b", "c"))
        counts = [count_cached(small, prompt) for prompt in (a, b, a, c, b)]
        assert counts[2] == 39
        assert all(count < 10 for count in (*counts[:2], *counts[3:]))


def test_a_restored_prefix_answers_as_a_computed_one(smollm2_path: Path) -> None:
    with Engine.load([smollm2_path], EngineSettings(context=512)) as small:
        prompt = ask(small, "Tell me a story about a cat and a dog who went to the sea.")
        solo = run_solo(small, prompt, 40)
        other = long_prompt(small, 60, "other")
        for _ in range(2):
            count_cached(small, other)
            stream = small.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=40))
            assert_same(solo, read_tokens(stream))
            assert stream.result is not None
            assert stream.result.cached_tokens == len(prompt) - 1


def test_an_idle_sequence_between_two_that_compute_is_not_harmed(smollm2_path: Path) -> None:
    """Its place is computed along, and what that leaves there is cut off again."""
    with Engine.load([smollm2_path], EngineSettings(context=512, parallel=3)) as small:
        prompts = [
            ask(small, f"Tell me a story about the {name}.") for name in ("sea", "sky", "sun")
        ]
        solos = [run_solo(small, prompt, 40) for prompt in prompts]
        streams = [
            small.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=tokens))
            for prompt, tokens in zip(prompts, (40, 3, 40), strict=True)
        ]
        for solo, stream in zip(solos, streams, strict=True):
            assert_same(solo, read_tokens(stream))
        again = small.submit(Request(prompt=prompts[1], sampling=GREEDY, max_tokens=40))
        assert_same(solos[1], read_tokens(again))
        assert again.result is not None
        assert again.result.cached_tokens == len(prompts[1]) - 1


# Ends and errors.


def test_cancelling_a_prefill_frees_the_engine_at_once(engine: Engine) -> None:
    before = engine.metrics()
    stream = engine.submit(Request(prompt=long_prompt(engine, 1900, "x"), cache_prompt=False))
    wait_until(lambda: engine.metrics().steps > before.steps)
    started = time.monotonic()
    stream.close()
    assert stream.wait(20)
    assert time.monotonic() - started < 2 * max(1.0, _slowness(engine))
    assert read(stream)[1].finish_reason == "cancelled"
    assert engine.metrics().running == 0


def _slowness(engine: Engine) -> float:
    """Seconds for 64 tokens of prompt, so that a busy machine doesn't fail a test."""
    _, result = read(
        engine.submit(
            Request(prompt=long_prompt(engine, 64, "slow"), max_tokens=1, cache_prompt=False)
        )
    )
    return result.prefill_s


def test_a_waiting_request_can_be_cancelled(smollm2_path: Path) -> None:
    with Engine.load([smollm2_path], EngineSettings(context=512)) as small:
        running = small.submit(Request(prompt=(504, 300), ignore_eos=True))
        waiting = small.submit(Request(prompt=(504, 301)))
        next(iter(running))
        waiting.close()
        assert waiting.wait(20)
        assert read(waiting)[1].completion_tokens == 0
        assert not running.wait(0)


def test_dropping_a_stream_cancels_it(engine: Engine) -> None:
    before = engine.metrics().cancelled
    stream = engine.submit(Request(prompt=ask(engine, "Talk."), ignore_eos=True))
    next(iter(stream))
    del stream
    gc.collect()
    wait_until(lambda: engine.metrics().cancelled == before + 1)


def test_neighbours_of_an_aborted_step_go_on_as_if_nothing_had_been(engine: Engine) -> None:
    prompt = ask(engine, "Tell me a story about a cat.")
    solo = run_solo(engine, prompt, 60)
    before = engine.metrics().aborted_steps
    steady = engine.submit(
        Request(prompt=prompt, sampling=GREEDY, max_tokens=60, cache_prompt=False)
    )
    events = iter(steady)
    tokens = [next(events).token]
    for n in range(40):
        other = engine.submit(Request(prompt=long_prompt(engine, 600, f"{n}"), cache_prompt=False))
        steps = engine.metrics().steps
        wait_until(lambda steps=steps: engine.metrics().steps > steps or steady.wait(0))
        other.close()
        if steady.wait(0):
            break
    tokens += [event.token for event in events]
    assert engine.metrics().aborted_steps > before
    assert_same(solo, [token for token in tokens if token is not None])


def test_a_full_queue_is_refused_and_order_is_kept(smollm2_path: Path) -> None:
    with Engine.load([smollm2_path], EngineSettings(context=512, queue=3)) as small:
        blocker = small.submit(Request(prompt=(504,), ignore_eos=True))
        next(iter(blocker))
        ended: list[int] = []
        streams = [small.submit(Request(prompt=(504, n), max_tokens=2)) for n in range(3)]
        with pytest.raises(BusyError, match="3 requests are waiting"):
            small.submit(Request(prompt=(504,)))

        def drain(number: int) -> None:
            read(streams[number])
            ended.append(number)

        readers = [threading.Thread(target=drain, args=(number,)) for number in range(3)]
        for reader in readers:
            reader.start()
        blocker.close()
        for reader in readers:
            reader.join(60)
        assert ended == [0, 1, 2]


def test_a_closed_engine_ends_its_streams_and_takes_no_more(smollm2_path: Path) -> None:
    small = Engine.load([smollm2_path], EngineSettings(context=512))
    stream = small.submit(Request(prompt=(504,), ignore_eos=True))
    next(iter(stream))
    small.close()
    small.close()
    assert read(stream)[1].finish_reason == "cancelled"
    assert not small.is_alive
    for call in (lambda: small.submit(Request(prompt=(504,))), lambda: small.tokenize("x")):
        with pytest.raises(EngineError, match="closed"):
            call()


def test_a_failed_decode_ends_its_requests_but_not_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ask(engine, "What is the capital of France?")
    real = Context.decode
    codes = iter([-3])
    monkeypatch.setattr(Context, "decode", lambda self: next(codes, None) or real(self))
    with pytest.raises(EngineError, match=r"failed \(-3\)"):
        read(engine.submit(Request(prompt=prompt, sampling=GREEDY)))
    assert "Paris" in generate(engine, prompt)


def test_a_defect_of_the_engine_ends_every_request_and_says_so(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError("no such step")

    with Engine.load([smollm2_path], EngineSettings(context=512)) as small:
        running = small.submit(Request(prompt=(504,), ignore_eos=True))
        waiting = small.submit(Request(prompt=(504,)))
        next(iter(running))
        monkeypatch.setattr(Scheduler, "_fill_batch", fail)
        for stream in (running, waiting):
            with pytest.raises(EngineError, match="ZeroDivisionError: no such step"):
                read(stream)
        wait_until(lambda: not small.is_alive)
        with pytest.raises(EngineError):
            small.submit(Request(prompt=(504,)))


def test_a_broken_file_is_an_error_with_llama_cpps_reason(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelFileError, match=r"broken\.gguf could not be loaded; llama\.cpp says"):
        Engine.load([path])


def test_a_context_over_the_models_limit_is_refused(smollm2_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"16384 tokens.*8192"):
        Engine.load([smollm2_path], EngineSettings(context=16384))


def test_loading_writes_nothing_to_the_terminal(smollm2_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from localmistral.engine import *\n"
        "with Engine.load([Path(sys.argv[1])], EngineSettings(context=256)) as engine:\n"
        "    list(engine.submit(Request(prompt=(504,), max_tokens=2)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(smollm2_path)], capture_output=True, check=True
    )
    assert done.stdout + done.stderr == b""


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_batch_smaller_than_its_sequences_is_no_trouble(smollm2_path: Path, batch: int) -> None:
    settings = EngineSettings(context=256, batch=batch, parallel=5)
    with Engine.load([smollm2_path], settings) as small:
        assert generate(small, (504, 300), max_tokens=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch", 2**33), ("threads", 2**32), ("parallel", 0), ("stored_bytes", -1), ("context", 0)],
)
def test_load_settings_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(BadRequestError, match=name):
        EngineSettings(**{name: value})  # type: ignore[arg-type]


def test_stop_strings_are_not_looked_for_in_thinking(engine: Engine) -> None:
    prompt = ask(engine, "What is the capital of France?")
    events = [e for e in engine.submit(Request(prompt=prompt, sampling=GREEDY)) if e.token]
    whole = "".join(event.text for event in events)
    opening, closing = 17, events[3].token
    assert closing is not None
    request = Request(
        prompt=prompt, sampling=GREEDY, stop=(" ",), thinking=(opening, closing), in_thinking=True
    )
    text, result = read(engine.submit(request))
    assert text == whole[: whole.index(" ", len("".join(e.text for e in events[:4])))]
    assert result.stop_text == " "


def test_when_every_token_is_forbidden_the_request_ends_with_an_error(engine: Engine) -> None:
    bias = dict.fromkeys(range(engine.tokenizer.size), float("-inf"))
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, logit_bias=bias)
        with pytest.raises(EngineError, match="No token is left"):
            read(engine.submit(Request(prompt=(504,), sampling=sampling, max_tokens=2)))


def test_the_tiniest_temperature_is_greedy(engine: Engine) -> None:
    prompt = ask(engine, "What is the capital of Spain?")
    tiny = Sampling(temperature=1e-40, top_k=0, top_p=1.0, min_p=0.0)
    solo = run_solo(engine, prompt, 40)
    request = Request(prompt=prompt, sampling=tiny, max_tokens=40, cache_prompt=False)
    assert_same(solo, read_tokens(engine.submit(request)))


def test_short_requests_leave_nothing_behind(engine: Engine) -> None:
    process = psutil.Process()
    sampling = Sampling(repeat_penalty=1.1, penalty_last_n=-1, dry_multiplier=0.8)
    for n in range(400):
        if n == 100:
            before = process.memory_info().rss
        read(engine.submit(Request(prompt=(504, n), sampling=sampling, max_tokens=1)))
    assert process.memory_info().rss - before < 30 * 2**20
    assert engine.metrics().running == 0


def test_small_batches_give_the_same_answer(smollm2_path: Path) -> None:
    settings = EngineSettings(context=1024, batch=32, ubatch=16, parallel=2)
    with Engine.load([smollm2_path], settings) as small:
        assert "Paris" in generate(small, ask(small, "What is the capital of France?"))
        assert generate(small, long_prompt(small, 700), max_tokens=3)


# Among others.


def test_several_streams_at_once_give_their_solo_texts(engine: Engine) -> None:
    prompts = [ask(engine, f"What is {n} plus {n}?") for n in range(8)]
    solos = [run_solo(engine, prompt, 16) for prompt in prompts]
    streams = [
        engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=16, cache_prompt=False))
        for prompt in prompts
    ]
    gaps = [find_divergence(s, read_tokens(t)) for s, t in zip(solos, streams, strict=True)]
    print(f"parted from the solo run at these gaps: {gaps}")
    assert all(gap is None or gap < NEAR_TIE for gap in gaps)


def test_a_long_prompt_does_not_stall_a_running_answer(engine: Engine) -> None:
    running = engine.submit(Request(prompt=ask(engine, "Talk."), ignore_eos=True))
    events = iter(running)
    next(events)
    long = engine.submit(
        Request(prompt=long_prompt(engine, 1900, "y"), max_tokens=1, cache_prompt=False)
    )
    meanwhile = 0
    while not long.wait(0):
        next(events)
        meanwhile += 1
    running.close()
    assert meanwhile >= 8, "the prompt went through in fewer steps than its size asks for"


def test_streams_can_be_read_asynchronously(engine: Engine) -> None:
    async def one(question: str) -> str:
        stream = engine.submit(
            Request(prompt=ask(engine, question), sampling=GREEDY, max_tokens=20)
        )
        return "".join([event.text async for event in stream])

    async def several() -> list[str]:
        capitals = ("France", "Italy", "Spain")
        return await asyncio.gather(*(one(f"What is the capital of {c}?") for c in capitals))

    texts = asyncio.run(several())
    assert "Paris" in texts[0]
    assert "Rome" in texts[1]
    assert "Madrid" in texts[2]


def test_an_asynchronous_reader_that_leaves_cancels(engine: Engine) -> None:
    before = engine.metrics().cancelled

    async def leave() -> None:
        with engine.submit(Request(prompt=ask(engine, "Talk."), ignore_eos=True)) as stream:
            async for _ in stream:
                return

    asyncio.run(leave())
    wait_until(lambda: engine.metrics().cancelled == before + 1)


@pytest.mark.parametrize("how", ["cancel", "break"])
def test_an_asynchronous_reader_that_is_cancelled_frees_the_engine(
    engine: Engine, how: str
) -> None:
    before = engine.metrics().cancelled
    stream = engine.submit(Request(prompt=ask(engine, "Talk."), ignore_eos=True))

    async def read_all() -> None:
        async for _ in stream:
            if how == "break":
                break

    async def leave() -> None:
        task = asyncio.create_task(read_all())
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: engine.metrics().cancelled == before + 1)


def test_a_waiting_request_is_cancelled_while_a_step_runs(smollm2_path: Path) -> None:
    with Engine.load([smollm2_path], EngineSettings(context=2048)) as small:
        running = small.submit(Request(prompt=long_prompt(small, 1900)))
        waiting = small.submit(Request(prompt=(504,)))
        wait_until(lambda: small.metrics().running == 1)
        waiting.close()
        assert waiting.wait(0)  # at once: the engine's thread need not hear of it
        running.close()


# The seams.


class OnlyTokens:
    """Allows the given tokens, and the end of the answer after `count` of them."""

    def __init__(self, tokens: Sequence[int], count: int, end: int) -> None:
        self._tokens, self._left, self._end = list(tokens), count, end

    def mask(self, logits: Logits) -> None:
        allowed = self._tokens if self._left else [self._end]
        kept = logits[allowed]
        logits[:] = -np.inf
        logits[allowed] = kept

    def accept(self, token: int) -> None:
        self._left -= 1


def test_a_constraint_decides_what_may_be_said(engine: Engine) -> None:
    digits = [engine.tokenize(str(n))[0] for n in range(10)]
    constraint = OnlyTokens(digits, 5, engine.tokenizer.eos)
    request = Request(prompt=ask(engine, "Hello"), constraint=constraint, sampling=Sampling(seed=1))
    text, result = read(engine.submit(request))
    assert len(text) == 5
    assert text.isdigit()
    assert result.finish_reason == "stop"


def test_a_constraint_without_a_way_out_ends_only_its_request(engine: Engine) -> None:
    class Nothing(OnlyTokens):
        def mask(self, logits: Logits) -> None:
            logits[:] = -np.inf

    class Broken(OnlyTokens):
        def mask(self, logits: Logits) -> None:
            raise ZeroDivisionError("no such state")

    prompt = ask(engine, "What is the capital of France?")
    running = engine.submit(Request(prompt=prompt, sampling=GREEDY))
    for kind, words in ((Nothing, "leaves no token"), (Broken, "ZeroDivisionError: no such state")):
        bad = engine.submit(Request(prompt=prompt, constraint=kind([], 0, 0)))
        with pytest.raises(EngineError, match=words):
            read(bad)
        with pytest.raises(EngineError, match=words):  # asked again, it says the same
            read(bad)
    assert "Paris" in read(running)[0]
    assert "Paris" in generate(engine, prompt)


class Fixed:
    """Guesses from a text known beforehand, or always the same wrong tokens."""

    def __init__(self, known: Sequence[int] | None) -> None:
        self.known = known

    def propose(self, tokens: Sequence[int]) -> Sequence[int]:
        return [5, 6, 7] if self.known is None else self.known[len(tokens) : len(tokens) + 4]


def test_right_guesses_save_steps_and_wrong_ones_change_nothing(engine: Engine) -> None:
    prompt = ask(engine, "What is the sun?")
    solo = run_solo(engine, prompt, 40)
    known = [*prompt, *(event.token for event in solo if event.token is not None)]
    for proposer in (Fixed(known), Fixed(None)):
        before = engine.metrics().steps
        request = Request(
            prompt=prompt, sampling=GREEDY, max_tokens=40, cache_prompt=False, proposer=proposer
        )
        tokens = read_tokens(engine.submit(request))
        steps = engine.metrics().steps - before
        assert_same(solo, tokens)
        if find_divergence(solo, tokens) is None:
            assert len(tokens) == len(solo)
            assert (steps <= len(solo) // 3) == (proposer.known is not None)


class Insert:
    """Puts `added` after every fifth token."""

    def __init__(self, added: Sequence[int]) -> None:
        self._added, self._count = added, 0

    def follow(self, token: int) -> Sequence[int]:
        self._count += 1
        return () if self._count % 5 else self._added


@pytest.mark.parametrize("proposer", [None, Fixed(None)])
def test_a_guide_writes_into_the_answer_and_the_model_goes_on(
    engine: Engine, proposer: Fixed | None
) -> None:
    added = engine.tokenize(" and then, suddenly,")
    request = Request(
        prompt=ask(engine, "Tell me a story."), sampling=GREEDY, max_tokens=40, ignore_eos=True,
        guide=Insert(added), proposer=proposer,
    )  # fmt: skip
    stream = engine.submit(request)
    tokens = read_tokens(stream)
    size = 5 + len(added)
    for start in range(0, len(tokens) - size + 1, size):
        assert tokens[start + 5 : start + size] == added
    # What follows was chosen knowing what was put in.
    known = [*request.prompt, *tokens[:size]]
    assert_same(run_solo(engine, known, 5), tokens[size : size + 5])
    assert len(tokens) == 40


@pytest.mark.parametrize("is_open", [False, True])
def test_a_spent_thinking_budget_closes_the_thinking_once(is_open: bool) -> None:
    budget = ThinkingBudget(open_token=1, close_token=2, budget=3, closing=(8, 9), is_open=is_open)
    start = [] if is_open else [1]
    answers = [tuple(budget.follow(token)) for token in [*start, 5, 5, 5, 5, 5]]
    assert answers == [()] * (2 + len(start)) + [(8, 9, 2), (), ()]
    assert [tuple(budget.follow(token)) for token in (1, 5, 2, 5, 5, 5, 5)] == [()] * 7


@pytest.mark.slow
def test_sixteen_threads_submitting_and_cancelling_for_a_minute(smollm2_path: Path) -> None:
    settings = EngineSettings(context=1024, parallel=6, queue=32)
    with Engine.load([smollm2_path], settings) as engine:
        stress = Stress(engine)
        threads = [threading.Thread(target=stress.run, args=(n,)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: engine.metrics().running == engine.metrics().waiting == 0)
        assert stress.errors == []
        assert engine.metrics().failed == 0
        stress.compare()


class Stress:
    """Random requests from many threads; the survivors' texts are compared with their solo runs."""

    SECONDS = 60

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._survivors: list[tuple[tuple[int, ...], list[int]]] = []
        self._end = time.monotonic() + self.SECONDS
        self.errors: list[BaseException] = []

    def run(self, number: int) -> None:
        random = np.random.default_rng(number)
        while time.monotonic() < self._end and not self.errors:
            try:
                self._run_one(random)
            except BusyError:
                time.sleep(0.05)
            except BaseException as error:
                self.errors.append(error)
                raise

    def _run_one(self, random: np.random.Generator) -> None:
        size = int(random.choice([10, 30, 200, 500]))
        prompt = long_prompt(self._engine, size, f"{random.integers(6)} ")
        stream = self._engine.submit(Request(prompt=prompt, sampling=GREEDY, max_tokens=12))
        leave_after = int(random.integers(1, 40))
        tokens = []
        for event in stream:
            tokens.append(event.token)
            if len(tokens) == leave_after:
                stream.close()
        assert stream.result is not None
        if stream.result.finish_reason != "cancelled":
            self._survivors.append((prompt, [t for t in tokens if t is not None]))

    def compare(self) -> None:
        solos = {p: run_solo(self._engine, p, 12) for p in {p for p, _ in self._survivors}}
        found = [find_divergence(solos[prompt], tokens) for prompt, tokens in self._survivors]
        gaps = [gap for gap in found if gap is not None]
        print(f"{len(gaps)} of {len(self._survivors)} survivors parted from their solo runs, ")
        print(f"at gaps of up to {max(gaps, default=0):.3f}")
        assert self._survivors
        assert max(gaps, default=0) < NEAR_TIE

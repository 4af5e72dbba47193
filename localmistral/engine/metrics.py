"""What an engine has done since it was loaded. Knows nothing of how it is shown."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetrics:
    """Totals since the engine was loaded, and what is under way now.

    `step_s` is the time spent in decode steps that succeeded, in seconds. `cached_tokens` of the
    `prompt_tokens` were not computed again. `stored_tokens` are in memory for any sequence, those
    that several share counted each time.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    aborted_steps: int = 0
    step_s: float = 0.0
    running: int = 0
    waiting: int = 0
    stored_tokens: int = 0


_NOW = frozenset({"running", "waiting", "stored_tokens"})
_COUNTS = tuple(f.name for f in fields(EngineMetrics) if f.name not in _NOW | {"step_s"})


class Totals:
    """The running sums; whoever uses it holds a lock."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._step_s = 0.0

    def add(self, **counts: int) -> None:
        for name, more in counts.items():
            self._counts[name] += more

    def add_step(self, seconds: float) -> None:
        self._step_s += seconds

    def snapshot(self, *, running: int, waiting: int, stored_tokens: int) -> EngineMetrics:
        return EngineMetrics(
            **self._counts,
            step_s=self._step_s,
            running=running,
            waiting=waiting,
            stored_tokens=stored_tokens,
        )

"""The options that every command which loads a model takes, declared once.

`@loads_model` gives a command these options beside its own; what was typed arrives as one
LoadOptions. Decides nothing.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from localmistral.cli.loading import LoadOptions
from localmistral.cli.options import (
    Batch,
    ChatTemplate,
    Context,
    CpuExperts,
    Debug,
    Depth,
    GpuLayers,
    KvType,
    ModelOption,
    Offline,
    PlanFile,
    Quant,
    SplitMode,
    TensorSplit,
    Threads,
    Ubatch,
    Verbose,
    Yes,
    name_load,
    read_request,
)
from localmistral.errors import UsageError


def _read(
    model: ModelOption = None,
    quant: Quant = None,
    context: Context = None,
    kv_type: KvType = None,
    gpu_layers: GpuLayers = None,
    tensor_split: TensorSplit = None,
    split_mode: SplitMode = None,
    cpu_experts: CpuExperts = None,
    threads: Threads = None,
    batch: Batch = None,
    ubatch: Ubatch = None,
    depth: Depth = None,
    plan_file: PlanFile = None,
    chat_template: ChatTemplate = None,
    offline: Offline = False,
    yes: Yes = False,
    verbose: Verbose = False,
    debug: Debug = False,  # noqa: ARG001  (read by `main`)
    *,
    positional: str | None = None,
    parallel: int | None = None,
) -> LoadOptions:
    """The options as typed; `positional` and `parallel` come from commands that have them."""
    request = read_request(
        context=context,
        kv_type=kv_type,
        gpu_layers=gpu_layers,
        tensor_split=tensor_split,
        split_mode=split_mode,
        cpu_experts=cpu_experts,
        threads=threads,
        batch=batch,
        ubatch=ubatch,
        parallel=parallel,
        depth=depth,
    )
    return LoadOptions(
        name=name_load(model, positional, quant, plan_file),
        request=request,
        plan_file=plan_file,
        chat_template=chat_template,
        offline=offline,
        yes=yes,
        verbose=verbose,
    )


_HARMLESS = ("model", "offline", "yes", "debug")
"""Options that say nothing about how a model is loaded; a server that runs serves them as well."""
_BESIDE_A_PLAN = ("plan_file", "depth", "chat_template", "offline", "yes", "verbose", "debug")
"""Options that mean something for a plan that is made; `bench` measures at the depth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReader:
    """The options as they were typed; called, it reads them. `also` are the command's own; `given`
    the names of all that stood on the command line."""

    typed: Mapping[str, Any]
    also: Mapping[str, Any]
    given: frozenset[str]

    def __call__(self) -> LoadOptions:
        if self.typed["plan_file"] is not None:
            self._refuse_beside_plan()
        return _read(**self.typed, **self.also)

    def _refuse_beside_plan(self) -> None:
        """A saved plan is run as it is: UsageError for what would be ignored beside it."""
        for name in (*self.typed, *self.also):
            if name in self.given and name not in _BESIDE_A_PLAN:
                option = "MODEL" if name == "positional" else f"--{name.replace('_', '-')}"
                raise UsageError(
                    f"--plan {self.typed['plan_file']} is a finished plan, and {option} asks for "
                    "another one.",
                    "Leave one of them out.",
                )

    @property
    def model(self) -> str | None:
        """What -m says."""
        name: str | None = self.typed["model"]
        return name

    @property
    def is_particular(self) -> bool:
        """Whether anything was asked for that only a load of one's own can give."""
        plain = inspect.signature(_read).parameters
        return any(
            value != plain[name].default
            for name, value in self.typed.items()
            if name not in _HARMLESS
        )


_PASSED_ON = ("positional", "parallel")
"""Parameters of a command that count for the load as well."""


def loads_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with the options above; it gets `load`, a LoadReader.

    Read only when called, because a command first checks what is its own: what is wrong there is
    said before anything of the load.
    """
    own = inspect.signature(command).parameters
    shared = inspect.signature(_read).parameters
    names = [name for name in shared if name not in _PASSED_ON]

    @functools.wraps(command)
    def wrapped(command_line: typer.Context, **values: Any) -> Any:
        knobs = {name: values.pop(name) for name in names}
        more = {name: values[name] for name in _PASSED_ON if name in values}
        kept = {name: value for name, value in values.items() if name in own}
        load = LoadReader(typed=knobs, also=more, given=_name_given(command_line))
        return command(**kept, load=load)

    place = inspect.Parameter(
        "command_line", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context
    )
    parameters = [place, *(p for p in own.values() if p.name != "load")]
    parameters += [shared[name] for name in names]
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _name_given(command_line: typer.Context) -> frozenset[str]:
    sources = {name: command_line.get_parameter_source(name) for name in command_line.params}
    return frozenset(
        name for name, source in sources.items() if source and source.name == "COMMANDLINE"
    )

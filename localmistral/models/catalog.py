"""The models known by name: `models.toml` as frozen dataclasses, checked as it is read, and the
rows that `localmistral models` shows.

Knows nothing of the network or of what is on disk; sizes marked inexact are for planning only.
"""

import functools
import importlib.resources
import re
import tomllib
from dataclasses import dataclass, fields
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from localmistral.errors import LocalMistralError
from localmistral.models.filenames import fold_base, fold_name, shard_paths
from localmistral.models.toml_table import TomlTable

Reasoning = Literal["effort", "system-prompt", "none"]
Tokenizer = Literal["v3-tekken", "v7", "v11", "v13", "v15"]
Template = Literal["v3-tekken", "v7", "v11", "v13", "v13-reasoning", "v15"]

# Kept free for a model that is to ship with the program.
RESERVED_NAMES = frozenset({"demo"})

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a repository; `bytes` and `sha256` are exact where known, else None."""

    path: str
    bytes: int | None = None
    sha256: str | None = None
    confirmed: bool = True  # False: the name follows the publisher's habit, nobody saw it


@dataclass(frozen=True, slots=True, kw_only=True)
class Quant:
    """One quantisation in one repository. `files` is empty where their names are unknown."""

    name: str
    repository: str
    files: tuple[File, ...]
    bytes: int | None  # all files together
    exact: bool  # False where `bytes` was published rounded, or is unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Mmproj:
    """An image encoder's file, with its size as `Quant` has it."""

    file: File
    bytes: int | None
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A Hub repository holding one model as GGUF; `revision` is the commit the sizes are of."""

    id: str
    revision: str | None
    confirmed: bool
    quants: tuple[Quant, ...]
    mmproj: Mmproj | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The model card's sampling values for one effort; None where it names none."""

    effort: Literal["none", "high"]
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's dimensions, in elements, where no file is there to read them from.

    `head_length` is what one head works with. The fields from `experts` on are 0 for dense models
    without latent attention; `expert_width` is the feed-forward length of one expert.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_length: int
    feed_forward: int
    vocabulary: int
    tied: bool = False  # the embedding serves as the output
    experts: int = 0
    experts_used: int = 0
    experts_shared: int = 0
    expert_width: int = 0
    q_lora: int = 0
    kv_lora: int = 0
    rope_length: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of the catalogue; `repositories` has the preferred one first."""

    name: str
    aliases: tuple[str, ...]
    description: str
    arch: str  # general.architecture of its GGUF
    parameters_billions: float
    active_billions: float | None  # per token, mixture of experts only
    context: int  # tokens it is meant to be served with; a file may claim more
    tokenizer: Tokenizer
    template: Template
    vision: bool
    reasoning: Reasoning
    licence: str
    sampling: tuple[Sampling, ...]
    shape: Shape
    siblings: tuple[str, ...]  # smaller models for the same use, the largest first
    repositories: tuple[Repository, ...]

    @property
    def quants(self) -> tuple[Quant, ...]:
        """One per quant name, from the preferred repository that has it."""
        found: dict[str, Quant] = {}
        for repository in self.repositories:
            for quant in repository.quants:
                found.setdefault(quant.name, quant)
        return tuple(found.values())

    @property
    def mmproj(self) -> tuple[Repository, Mmproj] | None:
        """The image encoder of the preferred repository that has one."""
        for repository in self.repositories:
            if repository.mmproj:
                return repository, repository.mmproj
        return None

    def sampling_for(self, effort: Literal["none", "high"]) -> Sampling:
        """The card's values at that effort; a model without the switch has one set for both."""
        for sampling in self.sampling:
            if sampling.effort == effort or self.reasoning != "effort":
                return sampling
        return Sampling(effort=effort)

    def to_json(self) -> dict[str, Any]:
        """One row of `localmistral models`, in plain types."""
        return {
            "name": self.name,
            "aliases": list(self.aliases),
            "description": self.description,
            "parameters_billions": self.parameters_billions,
            "active_billions": self.active_billions,
            "context": self.context,
            "vision": self.vision,
            "reasoning": self.reasoning,
            "licence": self.licence,
            "quants": [
                {"name": q.name, "repository": q.repository, "bytes": q.bytes, "exact": q.exact}
                for q in self.quants
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """All models, in the order in which they are shown."""

    models: tuple[Model, ...]

    def find(self, name: str) -> Model | None:
        """The model of that name or alias; case, `_` and spaces don't matter."""
        folded = fold_name(name)
        return next((m for m in self.models if folded in (m.name, *m.aliases)), None)

    def model_of(self, repository: str | None, base: str) -> Model | None:
        """Which model a GGUF is, by its repository's id, else by its file's base name."""
        for model in self.models:
            if repository and any(r.id == repository for r in model.repositories):
                return model
        return self.find(fold_base(base))


@functools.cache
def load_catalog() -> Catalog:
    """The catalogue shipped with the program. LocalMistralError when it's missing or wrong."""
    source: Traversable = importlib.resources.files("localmistral") / "models.toml"
    if not source.is_file():  # an editable install: the file is beside the package
        source = Path(__file__).parents[2] / "models.toml"
    try:
        return parse_catalog(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise LocalMistralError(
            f"The catalogue models.toml can't be read: {error}.", "Reinstall localmistral."
        ) from error


def parse_catalog(text: str) -> Catalog:
    """Read and check a catalogue. LocalMistralError names the model and the field at fault."""
    try:
        top = TomlTable(tomllib.loads(text), "the top level")
    except tomllib.TOMLDecodeError as error:
        raise LocalMistralError(f"models.toml is not TOML: {error}.") from error
    models = tuple(_model(table) for table in top.tables("model"))
    top.done()
    owners: dict[str, str] = dict.fromkeys(RESERVED_NAMES, "the program itself")
    for model in models:
        for name in (model.name, *model.aliases):
            if name in owners:
                raise LocalMistralError(f"models.toml: {name!r} is taken by {owners[name]}.")
            if name != fold_name(name) or not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
                raise LocalMistralError(f"models.toml: {name!r} is not a lower-case name.")
            owners[name] = model.name
    for model in models:
        for sibling in model.siblings:
            if owners.get(sibling) != sibling or sibling == model.name:
                raise LocalMistralError(f"models.toml: {model.name}: no sibling {sibling!r}.")
    return Catalog(models=models)


def _model(table: TomlTable) -> Model:
    model = Model(
        name=table.take("name", str),
        aliases=tuple(str(alias) for alias in table.take("aliases", list)),
        description=table.take("description", str),
        arch=table.take("arch", str),
        parameters_billions=table.take("parameters_billions", float),
        active_billions=table.optional("active_billions", float),
        context=table.size("context") or 0,
        tokenizer=table.choice("tokenizer", Tokenizer),
        template=table.choice("template", Template),
        vision=table.take("vision", bool),
        reasoning=table.choice("reasoning", Reasoning),
        licence=table.take("licence", str),
        sampling=_samplings(table),
        shape=_shape(table),
        siblings=tuple(str(sibling) for sibling in table.take("siblings", list, [])),
        repositories=tuple(_repository(inner) for inner in table.tables("repository")),
    )
    if not model.context:
        raise table.fail("context is missing")
    table.done()
    return model


def _shape(table: TomlTable) -> Shape:
    numbers = table.table("shape")
    if numbers is None:
        raise table.fail("shape is missing")
    tied = numbers.take("tied", bool, False)
    names = [field.name for field in fields(Shape) if field.name != "tied"]
    given = {name: size for name in names if (size := numbers.size(name)) is not None}
    required = ("layers", "width", "heads", "kv_heads", "head_length", "feed_forward", "vocabulary")
    for name in required:
        if name not in given:
            raise numbers.fail(f"{name} is missing")
    numbers.done()
    return Shape(tied=tied, **given)


def _samplings(table: TomlTable) -> tuple[Sampling, ...]:
    efforts = table.table("sampling")
    if efforts is None:
        return ()
    found = []
    for effort in ("none", "high"):
        values = efforts.table(effort)
        if values is not None:
            temperature, top_p = (values.optional(k, float) for k in ("temperature", "top_p"))
            if not 0 <= (temperature or 0) <= 2 or not 0 < (1 if top_p is None else top_p) <= 1:
                raise values.fail("temperature or top_p is out of range")
            found.append(Sampling(effort=effort, temperature=temperature, top_p=top_p))
            values.done()
    efforts.done()
    return tuple(found)


def _repository(table: TomlTable) -> Repository:
    repository = table.matching("id", _REPOSITORY)
    if repository is None:
        raise table.fail("id is missing")
    mmproj = table.table("mmproj")
    built = Repository(
        id=repository,
        revision=table.matching("revision", _COMMIT),
        confirmed=table.take("confirmed", bool, True),
        quants=tuple(_quant(inner, repository) for inner in table.tables("quants")),
        mmproj=None if mmproj is None else _mmproj(mmproj),
    )
    if len({quant.name for quant in built.quants}) != len(built.quants):
        raise table.fail("a quant is listed twice")
    table.done()
    return built


def _quant(table: TomlTable, repository: str) -> Quant:
    name = table.take("name", str)
    files, size, exact = _files(table)
    table.done()
    return Quant(name=name, repository=repository, files=files, bytes=size, exact=exact)


def _mmproj(table: TomlTable) -> Mmproj:
    files, size, exact = _files(table)
    table.done()
    if len(files) != 1:
        raise table.fail("path is missing")
    return Mmproj(file=files[0], bytes=size, exact=exact)


def _files(table: TomlTable) -> tuple[tuple[File, ...], int | None, bool]:
    """Files, their total and whether it's exact: the sum of exact sizes, else the rounded total."""
    path, shards = table.optional("path", str), table.size("shards") or 1
    total, exact = table.size("bytes"), table.take("exact", bool, True)
    confirmed = table.take("confirmed", bool, True)
    sizes = table.take("shard_bytes", list, [])
    hashes = table.take("shard_sha256", list, [])
    sha256 = table.optional("sha256", str)
    if shards == 1:
        sizes, hashes = [total] if exact else [], [sha256] if sha256 else []
    elif sha256 or (total and exact):
        raise table.fail("sha256 and exact bytes of several shards belong in shard lists")
    if path is None and (hashes or sizes != [None] * len(sizes) or shards > 1):
        raise table.fail("there are facts about files, but no path")
    paths = () if path is None else shard_paths(path, shards)
    for key, values in (("bytes", sizes), ("sha256", hashes)):
        if values and len(values) != max(len(paths), 1):
            raise table.fail(f"{len(values)} values of {key} for {len(paths)} files")
    if any(not isinstance(h, str) or not _SHA256.fullmatch(h) for h in hashes):
        raise table.fail("a sha256 is not 64 lower-case hex digits")
    if any(part in ("", ".", "..") for name in paths for part in name.split("/")):
        raise table.fail(f"path = {path!r} is malformed")
    files = tuple(
        File(
            path=name,
            bytes=sizes[n] if sizes else None,
            sha256=hashes[n] if hashes else None,
            confirmed=confirmed,
        )
        for n, name in enumerate(paths)
    )
    if files and all(file.bytes for file in files):
        total = sum(file.bytes or 0 for file in files)
    return files, total, exact and total is not None

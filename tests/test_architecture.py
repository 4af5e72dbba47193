"""The shape of the code, kept by reading it: layers, sole importers, sizes, what start-up loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "localmistral"

# A unit is a module or folder directly in the package. It may import itself and whatever stands
# in an earlier line; units on one line don't know each other.
LAYERS = (
    ("__init__",),
    ("errors",),
    ("units",),
    ("models",),
    ("fit", "chatformat"),
    ("engine",),
    ("answer", "calling", "markup"),
    ("planning",),
    ("fetching", "loading"),
    ("benchmark", "session"),
    ("server", "terminal"),
    ("cli",),
    ("__main__",),
)
SOLE_IMPORTERS = {
    "llama_cpp": ("engine/",),
    "llguidance": ("engine/guidance.py",),
    "huggingface_hub": ("models/cache.py", "models/download.py"),
    "rich": ("terminal/render.py",),
    "prompt_toolkit": ("terminal/",),
}
HEAVY = ("llama_cpp", "llguidance", "huggingface_hub", "numpy", "jinja2", "rich", "prompt_toolkit")
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "scripts").glob("*.py"))]
TEXTS = [
    path
    for pattern in ("*.py", "*.md", "*.toml", "*.jinja", "*.html", ".ci/run")
    for folder in (PACKAGE, ROOT / "scripts", ROOT / "tests", ROOT)
    for path in (folder.glob(pattern) if folder == ROOT else folder.rglob(pattern))
]


def name_of(path: Path) -> str:
    """A path as pytest shows it."""
    return path.relative_to(ROOT).as_posix()


def imported_modules(module: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, also inside functions and by name.

    `module` is its path in the package, such as "models/gguf.py", to resolve relative imports.
    `from a import b` yields a.b: b may be a module, and the first parts are what is judged.
    """
    parents = ["localmistral", *module.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def layer_of(unit: str) -> int:
    """Position of a unit in LAYERS; -1 for one that has no place yet."""
    return next((index for index, units in enumerate(LAYERS) if unit in units), -1)


def unit_of(module: str) -> str:
    """ "models/gguf.py" -> "models", "cli.py" -> "cli"."""
    return module.split("/")[0].removesuffix(".py")


def layer_faults(module: str, source: str) -> list[str]:
    """What a module imports that it must not know."""
    own = unit_of(module)
    if layer_of(own) < 0:
        return [f"{own} has no place in LAYERS"]
    faults = []
    for name in imported_modules(module, source):
        parts = name.split(".")
        if parts[0] != "localmistral":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if layer_of(target) < 0 and len(parts) == 2:
            target = "__init__"  # `from localmistral import __version__`
        if target != own and not 0 <= layer_of(target) < layer_of(own):
            faults.append(f"{module} imports {name}")
    return faults


def importer_faults(module: str, source: str) -> list[str]:
    """Third-party libraries that a module imports though another one is their only importer."""
    return [
        f"{module} imports {name}"
        for name in imported_modules(module, source)
        for library, allowed in SOLE_IMPORTERS.items()
        if name.split(".")[0] == library and not module.startswith(allowed)
    ]


def size_faults(source: str) -> list[str]:
    """Functions over their size."""
    return [
        f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def silence_faults(source: str) -> list[str]:
    """Handlers that catch everything by name or by leaving the name out, or do nothing at all."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                faults.append(f"line {node.lineno}: bare except")
            elif all(isinstance(step, ast.Pass) for step in node.body):
                faults.append(f"line {node.lineno}: except that passes")
    return faults


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_the_layers_below_it(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    assert layer_faults(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_library_with_one_importer_is_imported_nowhere_else(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    assert importer_faults(module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_keeps_its_size_says_what_it_is_for_and_swallows_no_error(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert size_faults(source) == []
    assert silence_faults(source) == []
    documented = not source or ast.get_docstring(ast.parse(source)) is not None
    assert documented, "no docstring"
    if path.is_relative_to(PACKAGE):
        line_count = len(source.splitlines())
        assert line_count <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_no_text_names_a_folder_of_the_machine_it_was_written_on(path: Path) -> None:
    here = "|".join(re.escape(str(folder)) for folder in {ROOT, Path.home()})
    text = path.read_text(encoding="utf-8")
    assert re.search(rf"(?<![\w.])(?:{here})[/\\]", text) is None


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models/gguf.py", "from localmistral.fit.plan import Plan"),
        ("models/gguf.py", "from ..engine import scheduler"),
        ("models/gguf.py", "def f():\n    import localmistral.session"),
        ("chatformat/render.py", "from localmistral.fit import plan"),
        ("errors.py", "from localmistral import units"),
        ("errors.py", "from . import units"),
        ("__init__.py", "from localmistral.errors import UsageError"),
        ("terminal/chat.py", "from localmistral.server.app import create_app"),
        ("session.py", "import importlib; importlib.import_module('localmistral.cli')"),
        ("session.py", "from localmistral.novelty import thing"),
        ("novelty.py", ""),
    ],
)
def test_an_import_against_the_layers_is_found(module: str, source: str) -> None:
    assert layer_faults(module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models/catalog.py", "from .gguf import read_shape\nfrom localmistral.errors import X"),
        ("units.py", "from localmistral.errors import UsageError"),
        ("cli.py", "from localmistral import __version__\nfrom localmistral.session import Chat"),
        ("__main__.py", "from localmistral.cli import main"),
        ("engine/load.py", "import os\nfrom localmistral.fit.hardware import Gpu"),
    ],
)
def test_an_import_along_the_layers_is_allowed(module: str, source: str) -> None:
    assert layer_faults(module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "faults"),
    [
        ("session.py", "import llama_cpp.llama_cpp as c", 1),
        ("engine/load.py", "import llama_cpp", 0),
        ("models/catalog.py", "from huggingface_hub import HfApi", 1),
        ("models/cache.py", "from huggingface_hub import HfApi", 0),
        ("terminal/chat.py", "def f():\n    from rich.console import Console", 1),
        ("terminal/render.py", "from rich.console import Console", 0),
        ("cli.py", "__import__('prompt_toolkit')", 1),
        ("cli.py", "import richness", 0),
    ],
)
def test_only_the_sole_importer_gets_away_with_it(module: str, source: str, faults: int) -> None:
    assert len(importer_faults(module, source)) == faults


def test_the_checks_of_size_and_silence_find_what_they_look_for() -> None:
    long_function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    assert size_faults(long_function) == ["f has 61 lines"]
    assert size_faults(long_function.removesuffix("    x = 1\n")) == []
    assert silence_faults("try:\n    f()\nexcept:\n    raise") == ["line 3: bare except"]
    assert silence_faults("try:\n    f()\nexcept OSError:\n    pass") != []
    assert silence_faults("try:\n    f()\nexcept OSError:\n    g()") == []


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_glance_at_the_program_loads_nothing_heavy(option: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "localmistral", option],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    assert "localmistral" in answer.stdout.lower()
    times = [line for line in answer.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in times}
    assert "localmistral" in loaded
    assert loaded.isdisjoint(HEAVY)

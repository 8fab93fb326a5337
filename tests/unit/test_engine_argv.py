"""Command lines of the engines, compared with files under tests/golden/argv. UPDATE_GOLDEN=1 writes them anew."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.engines import ENGINES, Adapter, Command, Deployment
from toolkit.engines.vllm import allowed_rank
from toolkit.errors import EngineError
from toolkit.recipe.serve import ServeSection

GOLDEN = Path(__file__).parent.parent / "golden" / "argv"
MODEL = Path("/models/base")
ONE = (Adapter("tickets", Path("/adapters/tickets"), 24),)
TWO = (*ONE, Adapter("other", Path("/adapters/other"), 8))


def deployment(serve=None, **changes):
    given = {"model": MODEL, "name": "tickets", "max_length": 1024, "device": "cuda"}
    given["chat_template"] = MODEL / "chat_template.jinja"
    return Deployment(serve=ServeSection(**(serve or {})), **(given | changes))


CASES = {
    "cpu-base": deployment(device="cpu"),
    "cpu-adapter": deployment(
        device="cpu", adapters=ONE, serve={"kv_cache_gib": 0.5, "max_concurrent": 8}
    ),
    "cuda-base": deployment(),
    "cuda-two-adapters": deployment(adapters=TWO, serve={"dtype": "bf16", "eager": True}),
    "cuda-quantized": deployment(
        model=Path("/models/gptq"), chat_template=None, name="tickets-gptq"
    ),
    "cuda-large": deployment(
        serve={"tensor_parallel": 4, "memory_fraction": 0.8, "extra_args": ["--seed", "7"]}
    ),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("case", CASES)
def test_command_is_the_golden_one(engine, case):
    command = ENGINES[engine]().command(Path("/env/bin/python"), CASES[case], 8123)
    text = json.dumps({"argv": command.argv, "env": dict(command.env)}, indent=1) + "\n"
    file = GOLDEN / f"{engine}-{case}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("case", CASES)
def test_every_engine_listens_on_loopback_and_is_never_told_the_quantization(engine, case):
    argv = ENGINES[engine]().command(Path("/env/bin/python"), CASES[case], 8123).argv
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert "--quantization" not in argv
    assert "--trust-remote-code" not in argv


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_code_of_the_model_runs_only_where_the_recipe_trusts_it(engine):
    trusted = replace(deployment(), trust_remote_code=True)
    assert "--trust-remote-code" in ENGINES[engine]().command(Path("/py"), trusted, 8123).argv


def test_the_base_under_an_adapter_has_a_name_of_its_own():
    assert deployment().base_name == "tickets"
    assert deployment(adapters=ONE).base_name == "tickets-base"


def test_model_ids_are_what_each_engine_wants():
    with_adapter = deployment(adapters=ONE)
    assert ENGINES["vllm"]().model_id(with_adapter, "tickets") == "tickets"
    assert ENGINES["sglang"]().model_id(with_adapter, "tickets") == "tickets-base:tickets"
    assert ENGINES["sglang"]().model_id(with_adapter, None) == "tickets-base"


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512), (600, 600)]
)
def test_vllm_gets_the_smallest_rank_that_holds_the_adapters(rank, allowed):
    assert allowed_rank(rank) == allowed


def test_a_variable_set_to_none_is_removed():
    assert Command(("x",), {"A": None, "B": "2"}).environ({"A": "1", "C": "3"}) == {
        "B": "2",
        "C": "3",
    }


def read(tmp_path, adapters=None, **serve):
    (tmp_path / "config.json").write_text("{}")
    return Deployment.read(
        tmp_path, adapters or {}, ServeSection(**serve), name="m", max_length=64, device="cpu"
    )


def adapter(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(text)
    return folder


def test_rank_is_the_largest_that_the_adapter_names(tmp_path):
    path = adapter(tmp_path / "a", '{"r": 8, "rank_pattern": {"q_proj": 48}}')
    assert read(tmp_path, {"a": path}).max_rank == 48


def test_a_template_is_passed_only_when_the_folder_has_one(tmp_path):
    assert read(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read(tmp_path).chat_template == tmp_path / "chat_template.jinja"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
def test_an_open_address_is_refused(tmp_path, host):
    with pytest.raises(EngineError, match="only loopback is served") as caught:
        read(tmp_path, host=host)
    assert "127.0.0.1" in caught.value.hint


@pytest.mark.parametrize("text", ["{}", "not json", "[]", '{"r": "many"}'])
def test_a_folder_that_is_no_lora_adapter_is_refused(tmp_path, text):
    path = adapter(tmp_path / "a", text)
    with pytest.raises(EngineError, match="not the configuration of a LoRA adapter"):
        read(tmp_path, {"a": path})


def test_a_missing_adapter_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"no adapter_config\.json there"):
        read(tmp_path, {"a": tmp_path / "nowhere"})


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(EngineError, match="is not a model folder"):
        Deployment.read(tmp_path, {}, ServeSection(), name="m", max_length=64, device="cpu")

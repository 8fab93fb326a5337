"""Command lines of the engines, compared with files under tests/golden/argv. UPDATE_GOLDEN=1 writes them anew."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from toolkit.engines import BLOCK, ENGINES, Adapter, Call, Command, Deployment, versioned
from toolkit.engines.parsers import command_line, known_versions
from toolkit.engines.sglang import Sglang
from toolkit.engines.vllm import Vllm, allowed_rank
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


VERSIONED = (replace(ONE[0], name="tickets@1a2b3c4d5e6f7081"),)
CASES = {
    "cpu-base": deployment(device="cpu"),
    "cpu-adapter": deployment(
        device="cpu", adapters=ONE, serve={"kv_cache_gib": 0.5, "max_concurrent": 8}
    ),
    "cuda-base": deployment(),
    "cuda-two-adapters": deployment(adapters=TWO, serve={"dtype": "bf16", "eager": True}),
    "cuda-versioned-adapter": deployment(
        adapters=VERSIONED, serve={"adapter_slots": 4, "max_rank": 64}
    ),
    "cuda-adapters-that-stay": deployment(adapters=TWO, serve={"live_adapters": False}),
    "cuda-adapter-of-a-block": deployment(
        adapters=(Adapter("tickets", Path("/adapters/tickets"), 24, ("q_proj", "v_proj")),)
    ),
    "cuda-adapter-targets": deployment(
        adapters=ONE, serve={"adapter_targets": ["q_proj", "v_proj"]}
    ),
    "cuda-room-for-adapters": deployment(serve={"adapter_slots": 2, "max_rank": 16}),
    "cuda-quantized": deployment(
        model=Path("/models/gptq"), chat_template=None, name="tickets-gptq"
    ),
    **{
        f"cuda-{method}-adapter": deployment(
            model=Path("/models") / method, adapters=VERSIONED, quantization=method
        )
        for method in ("awq", "gptq", "compressed-tensors", "bitsandbytes")
    },
    "cuda-every-option": deployment(
        draft=Path("/models/draft"),
        adapters=ONE,
        serve={
            "tensor_parallel": 2,
            "pipeline_parallel": 2,
            "expert_parallel": True,
            "prefix_caching": True,
            "chunked_prefill": True,
            "max_batched_tokens": 4096,
            "kv_cache_type": "fp8",
            "cpu_offload_gib": 1.5,
            "kv_offload_gib": 16,
            "tool_parser": "hermes",
            "reasoning_parser": "qwen3",
            "structured_output": "llguidance",
            "seed": 7,
            "log_requests": True,
            "multimodal": {"images": 2, "videos": 0, "audios": 1},
            "speculative": {"method": "eagle", "model": "draft", "tokens": 3},
        },
    ),
    "cuda-the-other-way": deployment(
        serve={
            "data_parallel": 2,
            "prefix_caching": False,
            "chunked_prefill": False,
            "max_batched_tokens": 8192,
            "kv_cache_type": "bf16",
            "eager": True,
            "structured_output": "xgrammar",
            "speculative": {"method": "ngram"},
        },
    ),
    "cuda-large": deployment(
        serve={
            "tensor_parallel": 4,
            "memory_fraction": 0.8,
            "extra_args": ["--disable-custom-all-reduce"],
        }
    ),
}


def targets_of(*targets, **serve):
    made = tuple(Adapter(f"a{n}", Path("/a"), 8, given) for n, given in enumerate(targets))
    return deployment(adapters=made, serve=serve).targets


def test_room_for_later_adapters_is_in_the_block_but_not_in_embedding_and_head():
    assert targets_of(("q_proj",), ("v_proj", "q_proj")) == BLOCK
    assert targets_of(("q_proj",), ("v_proj", "q_proj"), live_adapters=False) == (
        "q_proj",
        "v_proj",
    )
    assert targets_of(("q_proj",), adapter_targets=["o_proj"]) == ("o_proj",)


@pytest.mark.parametrize("other", [("lm_head",), ("qkv_proj",), None])
def test_other_modules_than_those_of_a_block_need_room_everywhere(other):
    assert targets_of(("q_proj",), other) is None


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("case", CASES)
def test_command_is_the_golden_one(engine, case):
    command = ENGINES[engine]().command(Path("/env/bin/python"), CASES[case], 8123)
    shown = {"argv": command.argv, "env": dict(command.env), "defaults": dict(command.defaults)}
    text = json.dumps(shown, indent=1) + "\n"
    file = GOLDEN / f"{engine}-{case}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("engine", "version"),
    [(engine, version) for engine in ("vllm", "sglang") for version in known_versions(engine)],
)
def test_every_known_version_accepts_the_command(engine, version, case):
    argv = ENGINES[engine]().command(Path("/env/bin/python"), CASES[case], 8123).argv[3:]
    assert list(command_line(engine, version).problems(argv)) == []


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


def test_what_the_user_set_goes_before_defaults_and_what_must_be_before_both():
    command = Command(("x",), {"MUST": "1", "GONE": None}, {"METHOD": "fork", "MUST": "0"})
    assert command.environ({"HOME": "/", "GONE": "1"}) == {
        "HOME": "/", "METHOD": "fork", "MUST": "1",
    }  # fmt: skip
    assert command.environ({"METHOD": "spawn"})["METHOD"] == "spawn"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_keep_what_python_compiles(engine):
    command = ENGINES[engine]().command(Path("/py"), deployment(), 8123)
    assert "PYTHONDONTWRITEBYTECODE" not in command.environ({"PYTHONDONTWRITEBYTECODE": "1"})


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "fork"),
        ({"serve": {"extra_args": ["--swap-space", "1"]}}, "fork"),
        ({"device": "cpu"}, None),
        ({"serve": {"tensor_parallel": 2}}, None),
        ({"serve": {"pipeline_parallel": 2}}, None),
        ({"serve": {"data_parallel": 2}}, None),
        ({"serve": {"extra_args": ["--numa-bind"]}}, None),
        ({"serve": {"extra_args": ["--mm-tensor-ipc=torch_shm"]}}, None),
        ({"serve": {"extra_args": ["--distributed-executor-backend", "ray"]}}, None),
    ],
)
def test_vllm_forks_its_engine_on_one_gpu_and_nowhere_else(changes, method):
    environ = Vllm().command(Path("/py"), deployment(**changes), 8123).environ({})
    assert environ.get("VLLM_WORKER_MULTIPROC_METHOD") == method


def test_the_base_under_an_adapter_has_a_name_of_its_own():
    assert deployment().base_name == "tickets"
    assert deployment(adapters=ONE).base_name == "tickets-base"


def test_model_ids_are_what_each_engine_wants():
    with_adapter = deployment(adapters=ONE)
    assert ENGINES["vllm"]().model_id(with_adapter, "tickets") == "tickets"
    assert ENGINES["sglang"]().model_id(with_adapter, "tickets") == "tickets-base:tickets"
    assert ENGINES["sglang"]().model_id(with_adapter, None) == "tickets-base"


def test_an_adapter_is_loaded_and_unloaded_under_its_versioned_name():
    name, path = versioned("tickets", "1a2b3c4d5e6f7081" + "0" * 48), Path("/adapters/new")
    assert name == "tickets@1a2b3c4d5e6f7081"
    assert (
        Adapter(name, path, 8).public_name == Adapter("tickets", path, 8).public_name == "tickets"
    )
    body = {"lora_name": name, "lora_path": "/adapters/new"}
    assert Vllm().load_adapter(name, path) == Call("POST", "/v1/load_lora_adapter", body)
    assert Sglang().load_adapter(name, path) == Call("POST", "/load_lora_adapter", body)
    gone = {"lora_name": name}
    assert Vllm().unload_adapter(name) == Call("POST", "/v1/unload_lora_adapter", gone)
    assert Sglang().unload_adapter(name) == Call("POST", "/unload_lora_adapter", gone)


def test_one_slot_is_spare_so_that_a_new_version_fits_beside_the_old():
    assert deployment(adapters=TWO).slots == 3
    assert deployment(adapters=TWO, serve={"live_adapters": False}).slots == 2
    assert deployment(adapters=TWO, serve={"adapter_slots": 1}).slots == 1


def test_a_base_with_room_for_adapters_leaves_them_the_plain_name():
    room = deployment(serve={"adapter_slots": 2, "max_rank": 16})
    assert (room.base_name, room.live, room.max_rank) == ("tickets-base", True, 16)
    assert not deployment().live


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512), (600, 600)]
)
def test_vllm_gets_the_smallest_rank_that_holds_the_adapters(rank, allowed):
    assert allowed_rank(rank) == allowed


def test_sglang_is_told_to_unpack_bitsandbytes_and_nothing_else(tmp_path):
    def argv(method):
        folder = tmp_path / method
        folder.mkdir()
        config = {"quantization_config": {"quant_method": method}}
        (folder / "config.json").write_text(json.dumps(config))
        found = Deployment.read(folder, {}, ServeSection(), name="m", max_length=64, device="cuda")
        assert found.quantization == method
        return ENGINES["sglang"]().command(Path("/py"), found, 8123).argv

    assert "--load-format" not in argv("gptq")
    assert "--load-format" in argv("bitsandbytes")


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


def test_a_rank_that_does_not_hold_the_adapters_is_refused(tmp_path):
    path = adapter(tmp_path / "a", '{"r": 32}')
    assert read(tmp_path, {"a": path}, max_rank=64).max_rank == 64
    with pytest.raises(EngineError, match="max_rank is 16, but adapter 'a' has rank 32") as caught:
        read(tmp_path, {"a": path}, max_rank=16)
    assert "max_rank: 32" in caught.value.hint


def test_room_for_adapters_needs_their_rank(tmp_path):
    with pytest.raises(EngineError, match="none to read the rank from") as caught:
        read(tmp_path, adapter_slots=2)
    assert "set serve.max_rank" in caught.value.hint


def test_a_template_is_passed_only_when_the_folder_has_one(tmp_path):
    assert read(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read(tmp_path).chat_template == tmp_path / "chat_template.jinja"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_listens_on_loopback_wherever_the_front_listens(tmp_path, engine, host):
    argv = ENGINES[engine]().command(Path("/py"), read(tmp_path, host=host), 8001).argv
    assert argv[argv.index("--host") + 1] == "127.0.0.1"


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

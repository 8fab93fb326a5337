"""Typed options of ``serve``: every one reaches every engine or is refused, and what the engines' parsers accept."""

import pytest
from pydantic import ValidationError

from toolkit.engines import ENGINES
from toolkit.engines.options import OPTIONS, arguments, owned_flags, refusals
from toolkit.engines.parsers import command_line, known_versions
from toolkit.recipe.serve import ServeSection

ELSEWHERE = {
    *(
        "engine",
        "models",
        "name",
        "host",
        "port",
        "start_timeout_s",
        "replicas",
        "engines",
        "drain_s",
        "watch_s",
        "prefer",
    ),
    *("front", "proof", "extra_args", "questions", "adapters"),
    *("dtype", "max_concurrent", "memory_fraction", "kv_cache_gib", "eager"),
    *("live_adapters", "adapter_slots", "adapter_targets", "max_rank"),
}
"""Keys of serve that the engines' own modules write, or that no engine sees."""


def serve(**keys):
    return ServeSection(**keys)


def refused(engine, *, adapters=False, version=(), **keys):
    found = refusals(engine, serve(**keys), adapters=adapters, version=version)
    return [(refusal.key, refusal.text, refusal.fix) for refusal in found]


def test_every_key_of_serve_has_a_row_or_a_place_elsewhere():
    assert {option.key for option in OPTIONS} | ELSEWHERE == set(ServeSection.model_fields)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_row_knows_both_engines(option):
    assert set(option.engines) == set(ENGINES)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_flag_of_every_row_is_in_every_known_version(engine):
    for version in known_versions(engine):
        line = command_line(engine, version)
        assert [flag for flag in owned_flags(engine) if flag not in line.flags] == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_defaults_leave_everything_to_the_engine(engine):
    assert arguments(engine, serve()) == []
    assert refused(engine) == []


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("backend", ["xgrammar", "outlines", "llguidance"])
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_every_word_is_one_that_the_parser_knows(engine, kind, backend):
    argv = arguments(engine, serve(kv_cache_type=kind, structured_output=backend))
    for version in known_versions(engine):
        assert list(command_line(engine, version).problems(argv)) == []


def test_rounding_gives_the_memory_that_was_asked_for():
    assert arguments("sglang", serve(cpu_offload_gib=1.2)) == ["--cpu-offload-gb", "2"]
    assert arguments("sglang", serve(cpu_offload_gib=2)) == ["--cpu-offload-gb", "2"]
    assert arguments("vllm", serve(cpu_offload_gib=1.2)) == ["--cpu-offload-gb", "1.2"]


def test_sglang_checks_one_token_more_than_it_guesses():
    section = serve(speculative={"method": "eagle3", "model": "head", "tokens": 3})
    argv = arguments("sglang", section)
    assert argv[argv.index("--speculative-num-steps") + 1] == "3"
    assert argv[argv.index("--speculative-num-draft-tokens") + 1] == "4"


@pytest.mark.parametrize("tokens", [1, 4, 9, 20])
def test_sglang_keeps_at_least_one_step_of_ngram_speculation(tokens):
    argv = arguments("sglang", serve(speculative={"method": "ngram", "tokens": tokens}))
    breadth = "--speculative-ngram-max-bfs-breadth"
    wide = int(argv[argv.index(breadth) + 1]) if breadth in argv else 10
    assert int(argv[argv.index("--speculative-num-draft-tokens") + 1]) // wide >= 1


@pytest.mark.parametrize(
    ("speculative", "text"),
    [
        ({"method": "eagle"}, "eagle needs the key model"),
        ({"method": "ngram", "model": "draft"}, "ngram takes no model"),
        ({"method": "medusa"}, "Input should be 'ngram', 'draft', 'eagle' or 'eagle3'"),
    ],
)
def test_a_speculative_section_that_cannot_work_is_refused(speculative, text):
    with pytest.raises(ValidationError, match=text):
        serve(speculative=speculative)


DRAFT = {"speculative": {"method": "draft", "model": "small"}}
EAGLE = {"speculative": {"method": "eagle", "model": "head"}}


def test_speculation_under_adapters_is_refused_where_the_version_cannot():
    old, new = (0, 5, 17), (0, 5, 23)
    [(key, text, fix)] = refused("sglang", adapters=True, version=old, **EAGLE)
    assert key == "serve.speculative"
    assert "ngram only" in text
    assert "merged" in fix
    assert refused("sglang", adapters=True, version=new, **EAGLE) == []
    assert len(refused("sglang", adapters=True, version=new, **DRAFT)) == 1
    assert refused("sglang", adapters=False, version=old, **DRAFT) == []
    assert refused("vllm", adapters=True, **DRAFT) == []
    assert refused("sglang", adapters=True, version=old, speculative={"method": "ngram"}) == []


def test_sglang_moves_no_adapters_between_data_parallel_copies():
    [(_, text, fix)] = refused("sglang", adapters=True, data_parallel=2)
    assert "data_parallel" in text
    assert "serve.replicas" in fix
    assert refused("sglang", adapters=True, data_parallel=2, live_adapters=False) == []
    assert refused("vllm", adapters=True, data_parallel=2) == []


def test_offloaded_cache_without_prefix_caching_is_refused_by_sglang():
    assert len(refused("sglang", kv_offload_gib=4, prefix_caching=False)) == 1


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_experts_are_not_spread_over_one_gpu(engine):
    [(key, _, fix)] = refused(engine, expert_parallel=True)
    assert key == "serve.expert_parallel"
    assert "tensor_parallel" in fix
    assert refused(engine, expert_parallel=True, tensor_parallel=2) == []


def test_flags_of_rows_are_owned_by_their_key():
    assert owned_flags("vllm")["--speculative-config"] == "serve.speculative"
    assert owned_flags("sglang")["--disable-radix-cache"] == "serve.prefix_caching"
    for option in OPTIONS:
        for engine, how in option.engines.items():
            assert set(how.names) <= set(owned_flags(engine))


LINE = command_line("vllm", (0, 32, 0))


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (
            ["--max-lora-rnk", "8"],
            "vllm 0.32.0 has no --max-lora-rnk (did you mean '--max-lora-rank'?)",
        ),
        (["--max-lora-rank", "24"], "--max-lora-rank may not be '24'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "seven"], "--seed needs a number, not 'seven'"),
        (["--enforce-eager", "yes"], "--enforce-eager takes no values, not yes"),
        (["--tool-call-parser", "hermess"], "may not be 'hermess' (did you mean 'hermes'?)"),
    ],
)
def test_what_the_parser_would_refuse_is_named(argv, problem):
    [found] = LINE.problems(argv)
    assert problem in found


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed=7"],
        ["--seed", "-1"],
        ["--max_lora_rank", "16"],
        ["--compilation-config.cudagraph_mode", "FULL"],
        ["--no-enable-prefix-caching"],
        ["-O3"],
        ["--lora-modules", "a=/x", "b=/y"],
    ],
)
def test_what_the_parser_takes_is_no_problem(argv):
    assert list(LINE.problems(argv)) == []


def test_an_unknown_version_is_judged_by_the_one_before_it():
    assert command_line("vllm", (0, 27, 1)).version == "0.26.0"
    assert command_line("vllm", (0, 40, 0)).version == command_line("vllm").version == "0.32.0"
    assert command_line("sglang", (0, 4)).version == "0.5.17"


def test_architectures_are_known_by_engine():
    assert "LlamaForCausalLM" in command_line("vllm").architectures
    assert "LlamaForCausalLM" in command_line("sglang").architectures

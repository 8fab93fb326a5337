"""Which requests an engine cannot answer, by engine, version, machine and adapters."""

import pytest

from toolkit.preflight.requests import ASKS, ROWS, refused


def test_every_row_names_what_is_asked_and_where_it_was_learned():
    assert {row.asks for row in ROWS} == set(ASKS)
    assert all(row.source and row.why for row in ROWS)


@pytest.mark.parametrize(
    ("engine", "version", "accelerator", "lora", "names"),
    [
        ("vllm", "0.32.0", "cpu", True, {"prompt_logprobs"}),
        ("vllm", "0.32.0+cpu", "cpu", True, {"prompt_logprobs"}),
        ("vllm", "", "cpu", True, {"prompt_logprobs"}),
        ("vllm", "0.32.0", "cpu", False, set()),
        ("vllm", "0.32.0", "cuda", True, set()),
        ("sglang", "0.5.23", "cuda", True, set()),
    ],
)
def test_only_where_the_table_says_so(engine, version, accelerator, lora, names):
    assert set(refused(engine, version, accelerator, lora=lora)) == names

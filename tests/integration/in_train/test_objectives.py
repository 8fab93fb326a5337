"""DPO, KTO, ORPO and GRPO over a small Llama: what is trained moves, and rows are those served."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from templates import CHATML, tokenizer

from toolkit.data.render import question_ids
from toolkit.data.store import TokenStore
from toolkit.errors import DataError, NotInstalledError, StepFailedError
from toolkit.stages import Input, Kind, StageContext
from toolkit.stages.data import Data, DataConfig
from toolkit.stages.train import Train, TrainConfig
from toolkit.train.answers import Answers, LabelledBatches, PairBatches

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),
]
MAX_LENGTH = 64
GOOD, BAD = "It is on its way to you.", "The printer is broken, find the number."
REWARD = "def likes_e(completions):\n    return [text.count('e') / 8 for text in completions]\n"


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A small Llama behind a chat template."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("talker")
    tok = tokenizer(CHATML)
    tok.save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tok.eos_token_id)
    model.save_pretrained(folder)
    return folder


def row(objective: str, n: int) -> dict[str, object]:
    question = f"Where is order number {n}?"
    if objective in ("dpo", "orpo"):
        return {"prompt": question, "chosen": GOOD, "rejected": BAD}
    if objective == "kto":
        return {"prompt": question, "completion": GOOD if n % 2 else BAD, "label": bool(n % 2)}
    return {"prompt": question, "number": n}


@pytest.fixture
def steps(tmp_path, talker):
    """Runs the data and the train stage; a name of a train step that ran before goes on there."""
    (tmp_path / "r.py").write_text(REWARD)
    model = Input(talker, Kind.model, "b" * 64, {"source": "tests/talker"})

    def context(name, inputs, kind=StageContext, **changes):
        output, state = tmp_path / name / "output", tmp_path / name / "state"
        state.mkdir(parents=True, exist_ok=True)
        for old in output.glob("*") if output.is_dir() else ():
            old.unlink()
        output.mkdir(exist_ok=True)
        return kind(inputs, output, state, tmp_path, **changes)

    def data(objective, rows=None, name="data", max_length=MAX_LENGTH, **section):
        rows = rows or [row(objective, n) for n in range(32)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        ctx = context(f"{name}-{objective}", {"model": model})
        values = {"sources": [{"path": "a.jsonl"}], "heldout": {"fraction": 0.2}} | section
        config = DataConfig.model_validate(
            {
                "data": values,
                "max_length": max_length,
                "seed": 0,
                "objective": objective,
                "answer_tokens": 16 if objective == "grpo" else 0,
            }
        )
        return ctx.output, Data().run(config, ctx)

    def config(objective, **changes):
        section = {
            "objective": objective,
            "lora": {"rank": 8, "alpha": 16},
            "max_steps": 8,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "checkpoint_every": None,
        }
        if objective == "grpo":
            section["grpo"] = {
                "rewards": ["r.py:likes_e"],
                "group_size": 4,
                "max_completion_tokens": 16,
            }
        return TrainConfig.model_validate(
            {"train": section | changes, "max_length": MAX_LENGTH, "seed": 3}
        )

    def train(objective, dataset, name="train", kind=StageContext, record=None, **changes):
        inputs = {"model": model, "dataset": Input(dataset, Kind.dataset, "d" * 64, {})}
        ctx = context(name, inputs, kind, profile_steps=record)
        return ctx, Train().run(config(objective, **changes), ctx)

    return dataclasses.make_dataclass("Steps", ["data", "train", "root"])(data, train, tmp_path)


# --- the objectives -------------------------------------------------------------------------------


def test_dpo_raises_the_margin_of_the_better_answer(steps, logged):
    dataset, _ = steps.data("dpo")
    ctx, result = steps.train("dpo", dataset, gradient_accumulation=2, evaluate_every=4)
    margins = logged(ctx.output, "rewards_margins")
    assert margins[0] == 0  # the reference is the base, and the adapter starts as nothing
    assert margins[-1] > 0.3
    assert logged(ctx.output, "loss")[0] == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid 0
    assert logged(ctx.output, "heldout_rewards_margins")[-1] > 0.3
    assert len(logged(ctx.output, "heldout_loss")) == 2
    assert result.metrics["heldout_rewards_accuracies"] == 1
    assert result.facts["objective"] == "dpo"


def test_another_objective_is_watched_and_recorded_too(steps, logged):
    dataset, _ = steps.data("orpo")
    ctx, result = steps.train("orpo", dataset, record=(2, 3), max_steps=4)
    assert logged(ctx.output, "eta_s")[-1] == 0 < logged(ctx.output, "eta_s")[0]
    for name in ("tokens_per_second", "step_s", "peak_memory_gib", "learning_rate", "grad_norm"):
        assert len(logged(ctx.output, name)) == 4
    assert "mfu_percentage" not in result.metrics  # what is useful there has no one answer
    names = {path.name for path in (ctx.output / "profile").iterdir()}
    assert names == {"steps-2-3.json.gz", "steps-2-3.txt"}
    assert (ctx.output / "throughput.png").is_file()


def test_orpo_learns_the_better_answer(steps, logged):
    dataset, _ = steps.data("orpo")
    ctx, _result = steps.train("orpo", dataset)
    losses = logged(ctx.output, "loss")
    assert losses[-1] < losses[0] - 0.3
    odds = logged(ctx.output, "log_odds_chosen")
    assert odds[-1] > odds[0]


def test_kto_parts_good_answers_from_bad_ones(steps, logged):
    dataset, _ = steps.data("kto")
    ctx, result = steps.train("kto", dataset, batch_size=8, log_every=2)
    losses = logged(ctx.output, "loss")
    assert losses[0] == pytest.approx(0.5, abs=0.02)
    assert losses[-1] < losses[0] - 0.05
    assert result.metrics["rewards_margins"] > 0.3


def test_grpo_raises_the_reward(steps, logged):
    dataset, _ = steps.data("grpo")
    ctx, result = steps.train("grpo", dataset, max_steps=12, batch_size=16, learning_rate=3e-2)
    rewards = logged(ctx.output, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    assert result.metrics["reward"] == rewards[-1]
    assert result.metrics["rows_seen"] == 12 * 16 / 4


def test_grpo_is_held_to_the_base_by_its_kl(steps, logged):
    dataset, _ = steps.data("grpo")
    grpo = {"rewards": ["r.py:likes_e"], "group_size": 4, "max_completion_tokens": 8, "beta": 0.1}
    ctx, _result = steps.train("grpo", dataset, max_steps=3, grpo=grpo)
    divergence = logged(ctx.output, "kl")
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[-1] > 0
    assert not (ctx.output / "ref").exists()


def test_what_leaves_is_an_adapter_as_any_other(steps, talker):
    dataset, _ = steps.data("dpo")
    sft, _ = steps.train("sft", dataset, name="sft", max_steps=2)
    dpo, _ = steps.train("dpo", dataset, name="dpo", max_steps=2)
    names = [sorted(p.name for p in ctx.output.iterdir()) for ctx in (sft, dpo)]
    assert names[0] == names[1]
    one, other = (load_file(ctx.output / "adapter_model.safetensors") for ctx in (sft, dpo))
    assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in other.items()}
    assert all(weight.dtype == torch.float32 for weight in other.values())
    settings = [json.loads((c.output / "adapter_config.json").read_text()) for c in (sft, dpo)]
    assert settings[0] == settings[1]
    for file in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (dpo.output / file).read_bytes() == (talker / file).read_bytes()


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_pairs_train_every_method(steps, logged, method, talker):
    dataset, _ = steps.data("dpo")
    rate = 1e-2 if method == "qlora" else 1e-3
    ctx, result = steps.train("dpo", dataset, method=method, max_steps=4, learning_rate=rate)
    assert logged(ctx.output, "rewards_margins")[-1] > 0.05
    assert result.facts["trained_on"] == ("nf4" if method == "qlora" else "fp32")
    if method == "full":
        base = load_file(talker / "model.safetensors")
        tuned = load_file(ctx.output / "model.safetensors")
        assert base.keys() == tuned.keys()
        assert any(not torch.equal(base[name], tuned[name]) for name in base)
    else:
        weights = load_file(ctx.output / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_an_adapter_that_acts_from_the_start_is_its_own_reference(steps, logged, monkeypatch):
    from peft import LoraConfig, get_peft_model

    from toolkit.train import trainer
    from toolkit.train.model import load_base

    built = {}

    def pissa(folder, config, numerics, device, facts, **_):
        settings = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
        model = get_peft_model(load_base(folder, numerics, device), settings)
        built["model"] = model
        built["base"] = {n: w.clone() for n, w in model.named_parameters() if "base_layer" in n}
        return model.train()

    monkeypatch.setattr(trainer, "build_model", pissa)
    dataset, _ = steps.data("dpo")
    ctx, _result = steps.train("dpo", dataset, max_steps=3)
    margins = logged(ctx.output, "rewards_margins")
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0
    now = dict(built["model"].named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in built["base"].items())
    settings = json.loads((ctx.output / "adapter_config.json").read_text())
    assert settings["init_lora_weights"] == "pissa"
    assert not (ctx.output / "ref").exists()


# --- rows -----------------------------------------------------------------------------------------


def test_both_answers_of_a_pair_stand_behind_the_question_that_a_server_renders(steps, talker):
    dataset, _ = steps.data("dpo")
    tok = tokenizer(CHATML)
    lines = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    chosen = TokenStore(dataset / "tokens" / "train")
    rejected = TokenStore(dataset / "tokens" / "train-rejected")
    assert len(chosen) == len(rejected) == len(lines)
    for n, line in enumerate(lines):
        question = question_ids(tok, line["messages"][:-1])
        for store, answer in ((chosen, line["messages"][-1]), (rejected, line["rejected"])):
            ids, trained = store[n]
            served = tok.apply_chat_template(
                [*line["messages"][:-1], answer], tokenize=True, return_dict=False
            )
            assert ids.tolist() == served
            assert ids[: len(question)].tolist() == question
            assert not trained[: len(question)].any()
            assert tok.decode(ids[trained]) == answer["content"] + "<|im_end|>"


def test_pairs_reach_the_loss_as_trl_itself_would_batch_them(steps):
    """The same ids and masks, but that TRL also trains the line break behind the stop token."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    dataset, _ = steps.data("dpo")
    lines = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()][:3]
    pairs = [
        {
            "prompt": line["messages"][:-1],
            "chosen": line["messages"][-1:],
            "rejected": [line["rejected"]],
        }
        for line in lines
    ]
    from datasets import Dataset

    class Bare(DPOTrainer):
        def __init__(self, tok):
            self._tokenizer = tok

    tok = tokenizer(CHATML)
    from trl import DPOConfig

    args = DPOConfig("unused", use_cpu=True, bf16=False, max_length=None, report_to="none")
    rows = Bare(tok)._prepare_dataset(Dataset.from_list(pairs), tok, args, "train")
    theirs = DataCollatorForPreference(pad_token_id=0)([dict(r) for r in rows])
    examples = [{"row": n, "heldout": False} for n in range(3)]
    ours = PairBatches(Answers(dataset, "rejected"), 0)(examples)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    more = theirs["completion_mask"] - ours["completion_mask"]
    assert (more >= 0).all()
    assert tok.decode(ours["input_ids"][more.bool()]) == "\n" * 6


def test_prompts_are_asked_as_a_server_asks_them(steps, monkeypatch):
    dataset, _ = steps.data("grpo")
    asked = []
    (steps.root / "r.py").write_text(
        "SEEN = []\n"
        "def likes_e(prompts, completions, number, references):\n"
        "    assert references == [None] * len(prompts)\n"
        "    assert [p[-1]['content'] for p in prompts] == "
        "[f'Where is order number {n}?' for n in number]\n"
        "    return [text.count('e') / 8 for text in completions]\n"
    )
    from transformers import GenerationMixin

    generate = GenerationMixin.generate

    def spy(self, *args, **kwargs):
        asked.append((kwargs["input_ids"].clone(), kwargs["attention_mask"].clone()))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    steps.train("grpo", dataset, max_steps=2)
    tok = tokenizer(CHATML)
    lines = [json.loads(line) for line in (dataset / "train.jsonl").read_text().splitlines()]
    served = {tuple(question_ids(tok, line["messages"])) for line in lines}
    seen = {
        tuple(i[m.bool()].tolist()) for ids, mask in asked for i, m in zip(ids, mask, strict=True)
    }
    assert seen
    assert seen <= served


def test_mismatched_answers_of_kto_are_those_of_the_row_before(steps):
    dataset, _ = steps.data("kto")
    answers = Answers(dataset)
    examples = answers.examples("train")[:3]
    labels = {False: [True] * 32, True: [True] * 32}
    batch = LabelledBatches(answers, labels, 0, MAX_LENGTH, True)(examples)
    given = [answers.first(e).ids[answers.first(e).trained].tolist() for e in examples]
    for line in range(3):
        mask = batch["KL_completion_mask"][line].bool()
        assert batch["KL_input_ids"][line][mask].tolist() == given[line - 1]


def test_bad_answers_are_never_held_out(steps):
    dataset, _ = steps.data("kto", heldout={"fraction": 0.5})
    lines = [json.loads(line) for line in (dataset / "heldout.jsonl").read_text().splitlines()]
    assert lines
    assert all(line["label"] for line in lines)
    assert all(line["messages"][-1]["content"] == GOOD for line in lines)


def test_too_long_pairs_and_prompts_are_counted_by_their_longer_side(steps):
    rows = [row("dpo", n) for n in range(9)]
    rows[3]["rejected"] = BAD * 8
    dataset, result = steps.data("dpo", rows, max_dropped=0.2, heldout={"fraction": 0})
    ledger = json.loads((dataset / "ledger.json").read_text())
    assert ledger["dropped"]["too long"] == 1
    assert ledger["train"]["examples"]["too long"][0].startswith("a.jsonl:4: ")
    assert result.metrics["rows_too_long"] == 1
    prompts = [row("grpo", n) for n in range(9)] + [{"prompt": "order " * 40}]
    with pytest.raises(DataError, match=r"a\.jsonl:10: a question of \d+ tokens and an answer of"):
        steps.data("grpo", prompts, on_too_long="refuse")


def test_pairs_that_become_the_same_tokens_are_refused_with_their_line(steps):
    rows = [row("dpo", n) for n in range(4)]
    rows[2] |= {"chosen": GOOD, "rejected": GOOD}
    with pytest.raises(DataError, match=r"a\.jsonl:3: chosen and rejected are the same answer"):
        steps.data("dpo", rows)
    _, result = steps.data("dpo", rows, on_invalid="drop", max_dropped=0.5)
    assert result.metrics["rows_invalid"] == 1


def test_kto_needs_both_kinds_of_answers(steps):
    dataset, _ = steps.data(
        "kto", [row("kto", 2 * n + 1) for n in range(8)], heldout={"fraction": 0}
    )
    with pytest.raises(DataError, match="all 8 training answers are labelled good"):
        steps.train("kto", dataset)


# --- rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def likes_e(completions): return [1]", "returned 1 numbers for 4 answers"),
        ("def likes_e(completions): raise KeyError('x')", "raised KeyError: 'x'"),
        ("def other(completions): ...", "r.py has no function 'likes_e'"),
    ],
)
def test_a_wrong_reward_stops_before_a_model_is_loaded(steps, monkeypatch, code, says):
    dataset, _ = steps.data("grpo")
    (steps.root / "r.py").write_text(code)
    monkeypatch.setattr("toolkit.train.trainer.build_model", None)  # calling it would fail
    with pytest.raises(StepFailedError, match=says):
        steps.train("grpo", dataset)


def test_a_reward_that_fails_later_says_for_which_answer(steps):
    dataset, _ = steps.data("grpo")
    (steps.root / "r.py").write_text(
        "def likes_e(completions): return [float('nan') if c else 0.0 for c in completions]"
    )
    with pytest.raises(StepFailedError, match=r"reward r\.py:likes_e returned nan for answer 0"):
        steps.train("grpo", dataset)


def test_more_questions_in_a_step_than_there_are_is_said(steps):
    dataset, _ = steps.data("grpo", [row("grpo", n) for n in range(4)])
    with pytest.raises(DataError, match="a step asks 8 questions, and there are 3"):
        steps.train("grpo", dataset, batch_size=32)


def test_vllm_without_a_gpu_is_refused(steps):
    dataset, _ = steps.data("grpo")
    grpo = {"rewards": ["r.py:likes_e"], "group_size": 4, "rollout": "vllm"}
    with pytest.raises(NotInstalledError, match="no GPU"):
        steps.train("grpo", dataset, grpo=grpo | {"max_completion_tokens": 8})


def test_vllm_is_given_the_adapter_of_the_last_step_and_no_older_one(talker, tmp_path):
    """Files and numbers alone: tests/gpu/grpo_with_vllm.py has the engine."""
    from toolkit.recipe.train import TrainSection
    from toolkit.train.model import Numerics, build_model, trainable
    from toolkit.train.vllm_rollout import AdapterRollout

    config = TrainSection.model_validate({"lora": {"rank": 4, "alpha": 8}})
    model = build_model(talker, config, Numerics("bf16", False), "cpu", {})
    cleared = []
    llm = SimpleNamespace(generate=None, reset_prefix_cache=lambda: cleared.append(True))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
        model=model,
        vllm_generation=SimpleNamespace(llm=llm),
    )
    AdapterRollout(trainer, tmp_path).follow()
    for step in (1, 2, 3):
        for _, weight in trainable(model):
            torch.nn.init.normal_(weight, std=0.05)
        trainer.vllm_generation.sync_weights()
        assert [folder.name for folder in tmp_path.iterdir()] == [str(step)]
        stored = load_file(tmp_path / str(step) / "adapter_model.safetensors")
        trained = {name.replace(".default", ""): weight for name, weight in trainable(model)}
        assert stored.keys() == trained.keys()
        assert all(torch.equal(stored[name], trained[name]) for name in stored)
        assert len(cleared) == step
    assert json.loads((tmp_path / "3" / "adapter_config.json").read_text())["r"] == 4


def test_vllm_gets_base_and_adapter_together_and_the_base_stays_as_it_is(talker):
    from toolkit.recipe.train import TrainSection
    from toolkit.train.model import Numerics, build_model
    from toolkit.train.vllm_rollout import merged_weights

    config = TrainSection.model_validate({"lora": {"rank": 4, "alpha": 8}})
    model = build_model(talker, config, Numerics("bf16", False), "cpu", {})
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = dict(merged_weights(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    merged = model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, expected[name], rtol=2e-2, atol=1e-3)
    assert not torch.equal(
        found[changed := next(n for n in found if "q_proj" in n)],
        before[f"base_model.model.{changed.removesuffix('.weight')}.base_layer.weight"],
    )


# --- out of memory ---------------------------------------------------------------------------------


def test_out_of_memory_says_what_took_it(steps, monkeypatch):
    from toolkit.train import trainer

    build, calls = trainer.build_model, iter(range(1000))

    def small(*args, **kwargs):
        model = build(*args, **kwargs)

        def check(*_):
            if next(calls) >= 4:  # of two in each step
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU")

        model.register_forward_pre_hook(check)
        return model

    monkeypatch.setattr(trainer, "build_model", small)
    dataset, _ = steps.data("dpo")
    with pytest.raises(StepFailedError) as raised:
        steps.train("dpo", dataset, checkpoint_every=1)
    said = raised.value.message
    assert "with train.batch_size 4 (pairs): CUDA out of memory\nforecast for the largest" in said
    assert "(8 x 64 tokens" in said
    assert all(f"{part} " in said for part in ("weights", "adapter", "optimizer", "activations"))
    assert raised.value.hint.startswith("lower train.batch_size")


# --- interrupted ----------------------------------------------------------------------------------


class Stopped(StageContext):
    """SIGTERM when step 4 is logged."""

    def log(self, step, **metrics):
        super().log(step, **metrics)
        if step == 4 and "loss" in metrics:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_stopped_and_resumed_is_the_same_run(steps, logged, objective):
    dataset, _ = steps.data(objective)
    changes = {"checkpoint_every": 3, "lora": {"rank": 8, "dropout": 0.1}}
    whole, expected = steps.train(objective, dataset, name="whole", **changes)
    with pytest.raises(StepFailedError, match=r"SIGTERM.*after step 5 of 8") as raised:
        steps.train(objective, dataset, name="parts", kind=Stopped, **changes)
    assert "run the same command again" in raised.value.hint
    parts, result = steps.train(objective, dataset, name="parts", **changes)
    assert logged(parts.output, "loss") == logged(whole.output, "loss")
    assert result.facts["row_order"] == expected.facts["row_order"]
    one, other = (load_file(ctx.output / "adapter_model.safetensors") for ctx in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_asked_of_the_network(steps, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("asks for an address")

    dataset, _ = steps.data("dpo")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    steps.train("dpo", dataset, max_steps=2, checkpoint_every=1)

"""GRPO: the model answers every question several times and learns from how functions rate that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from toolkit.data.store import TokenStore
from toolkit.errors import DataError, StepFailedError
from toolkit.recipe.objectives import GrpoSection
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.model import Numerics
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.rewards import Question, Reward, load_rewards, read_questions, try_out
from toolkit.train.rollout import choose_rollout, installed_vllm
from toolkit.train.sft import Outcome
from toolkit.train.trainer import Run, insist_on_rows, quiet
from toolkit.train.vllm_rollout import beside
from toolkit.train.wired import Wired, seen


def fine_tune(
    config: TrainSection,
    max_length: int,
    seed: int,
    numerics: Numerics,
    *,
    ranks: Ranks,
    ctx: StageContext,
) -> Outcome:
    """Train on answers of the model's own; see :meth:`Run.train` for what else can go wrong.

    Raises:
        DataError: There are fewer questions than a step has.
        NotInstalledError: ``rollout: vllm`` without a vLLM that TRL supports.
        StepFailedError: A reward raises, or does not return one finite number per answer.
    """
    settings = config.grpo
    if settings is None:
        raise StepFailedError("objective is grpo, but there is no train.grpo", "name a reward")
    dataset = ctx.inputs["dataset"].path
    questions = read_questions(dataset / "train.jsonl")
    _insist_on_enough(questions, config, settings, ranks)
    rewards = load_rewards(settings.rewards, ctx.recipe_dir)
    try_out(rewards, questions)
    rollout = choose_rollout(config, ctx.device, installed_vllm())
    ctx.note(f"answers are written by {rollout}")
    asked = Asked(questions, TokenStore(dataset / "tokens" / "train-prompt"))
    with quiet(), beside(config) if rollout.vllm else nullcontext() as follow:
        run = Run.start(config, max_length, seed, numerics, ranks=ranks, ctx=ctx)
        trainer = _trainer(run, settings, asked, rewards, use_vllm=rollout.vllm)
        if follow:
            follow(trainer)
        return run.train(trainer)


@dataclass(frozen=True)
class Asked:
    """Questions by row number, as functions and as the model read them."""

    questions: list[Question]
    tokens: TokenStore


def _insist_on_enough(
    questions: Sequence[Question], config: TrainSection, settings: GrpoSection, ranks: Ranks
) -> None:
    insist_on_rows([{"row": n} for n in range(len(questions))], "question")
    answers = config.batch_size * config.gradient_accumulation * ranks.count
    wanted = answers // settings.group_size
    if len(questions) < wanted:
        raise DataError(
            f"a step asks {wanted} questions, and there are {len(questions)}",
            "lower train.batch_size or train.gradient_accumulation, or raise train.grpo.group_size",
        )


def _trainer(
    run: Run,
    settings: GrpoSection,
    asked: Asked,
    rewards: list[Reward],
    *,
    use_vllm: bool,
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Grpo(Wired, GRPOTrainer):  # type: ignore[misc]
        """TRL's trainer on our questions: a prompt is a row number, its ids are the data step's."""

        def _tokenize_prompts(
            self, prompts: list[str]
        ) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [asked.tokens[int(row)].ids.tolist() for row in prompts], None, {}

    arguments = GRPOConfig(
        **run.arguments() | {"eval_strategy": "no"},
        num_generations=settings.group_size,
        max_completion_length=settings.max_completion_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        beta=settings.beta,
        epsilon=settings.epsilon,
        loss_type=settings.loss,
        reward_weights=list(settings.weights) or None,
        disable_dropout=run.config.lora.dropout == 0,
        use_vllm=use_vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=settings.vllm_memory,
        vllm_max_model_length=run.max_length,
    )
    counted = [_rating(reward, asked, None if n else run) for n, reward in enumerate(rewards)]
    return Grpo(
        model=run.model,
        reward_funcs=counted,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(asked.questions))]}),
        processing_class=run.tokenizer,
    )


def _rating(reward: Reward, asked: Asked, run: Run | None) -> Callable[..., list[float]]:
    """A reward as TRL calls it; with ``run``, the rows and tokens that it sees are counted."""

    def rate(prompts: list[str], completions: list[str], **given: Any) -> list[float]:
        rows = [int(prompt) for prompt in prompts]
        if run is not None:
            written = sum(map(len, given["completion_ids"]))
            read = sum(len(asked.tokens[row].ids) for row in rows)
            seen(run, list(dict.fromkeys(rows)), written + read, written, at_once=True)
        return reward([asked.questions[row] for row in rows], completions)

    rate.__name__ = reward.name.rpartition(":")[2]
    return rate

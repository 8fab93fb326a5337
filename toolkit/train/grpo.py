"""GRPO: the model answers every question several times and learns from how functions rate that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolkit.data.store import TokenStore
from toolkit.errors import DataError, StepFailedError
from toolkit.recipe.objectives import GrpoSection
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.model import Numerics
from toolkit.train.rewards import Question, Reward, load_rewards, read_questions, try_out
from toolkit.train.rollout import choose_rollout, installed_vllm
from toolkit.train.sft import Outcome
from toolkit.train.trainer import Run, insist_on_rows, quiet
from toolkit.train.wired import Wired


def fine_tune(
    config: TrainSection, max_length: int, seed: int, numerics: Numerics, ctx: StageContext
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
    _insist_on_enough(questions, config, settings)
    rewards = load_rewards(settings.rewards, ctx.recipe_dir)
    try_out(rewards, questions)
    rollout = choose_rollout(settings.rollout, ctx.device, installed_vllm())
    ctx.note(f"answers are written by {'vLLM' if rollout.vllm else 'transformers'}: {rollout.why}")
    with quiet():
        run = Run.start(config, max_length, seed, numerics, ctx)
        trainer = _trainer(run, settings, questions, rewards, use_vllm=rollout.vllm)
        trainer.prompts = TokenStore(dataset / "tokens" / "train-prompt")
        return run.train(trainer)


def _insist_on_enough(
    questions: Sequence[Question], config: TrainSection, settings: GrpoSection
) -> None:
    insist_on_rows([{"row": n} for n in range(len(questions))], "question")
    wanted = config.batch_size * config.gradient_accumulation // settings.group_size
    if len(questions) < wanted:
        raise DataError(
            f"a step asks {wanted} questions, and there are {len(questions)}",
            "lower train.batch_size or train.gradient_accumulation, or raise train.grpo.group_size",
        )


def _trainer(
    run: Run,
    settings: GrpoSection,
    questions: list[Question],
    rewards: list[Reward],
    *,
    use_vllm: bool,
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class Grpo(Wired, GRPOTrainer):  # type: ignore[misc]
        """TRL's trainer on our questions: a prompt is a row number, its ids are the data step's."""

        prompts: TokenStore

        def _tokenize_prompts(
            self, prompts: list[str]
        ) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [self.prompts[int(row)].ids.tolist() for row in prompts], None, {}

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
    counted = [_named(reward, questions, None if n else run) for n, reward in enumerate(rewards)]
    return Grpo(
        model=run.model,
        reward_funcs=counted,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(questions))]}),
        processing_class=run.tokenizer,
    )


def _named(
    reward: Reward, questions: list[Question], run: Run | None
) -> Callable[..., list[float]]:
    """A reward as TRL calls it. With ``run``, the answers it sees are counted."""

    def rate(prompts: list[str], completions: list[str], **given: Any) -> list[float]:
        if run is not None:
            _count(run, prompts, given["completion_ids"])
        return reward([questions[int(row)] for row in prompts], completions)

    rate.__name__ = Path(reward.name.rpartition(":")[2]).name
    return rate


def _count(run: Run, prompts: list[str], completion_ids: list[list[int]]) -> None:
    run.position.rows.add(list(dict.fromkeys(int(row) for row in prompts)))
    run.position.trained_tokens += sum(map(len, completion_ids))
    run.position.tokens += sum(map(len, completion_ids))

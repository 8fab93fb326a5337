"""ORPO: learn the better answer and its odds over the worse one, without a reference model."""

from __future__ import annotations

import warnings

from toolkit.recipe.objectives import OrpoSection
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.answers import Answers, OddsBatches
from toolkit.train.model import Numerics
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.sft import Outcome
from toolkit.train.trainer import Run, insist_on_rows, quiet
from toolkit.train.wired import Wired


def fine_tune(
    config: TrainSection,
    max_length: int,
    seed: int,
    numerics: Numerics,
    *,
    ranks: Ranks,
    ctx: StageContext,
) -> Outcome:
    """Train on pairs; see :meth:`Run.train` for what can go wrong.

    The likelihood term of TRL's ORPO reads question and answer, as the authors' code does.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Orpo(Wired, ORPOTrainer):  # type: ignore[misc]
        """TRL's trainer on our rows."""

    settings = config.orpo or OrpoSection()
    answers = Answers(ctx.inputs["dataset"].path, "rejected")
    examples = answers.examples("train")
    insist_on_rows(examples, "pair of answers")
    with quiet():
        run = Run.start(config, max_length, seed, numerics, ranks=ranks, ctx=ctx)
        arguments = ORPOConfig(
            **run.arguments(),
            beta=settings.beta,
            max_length=max_length,
            padding_value=run.pad_id,
            disable_dropout=config.lora.dropout == 0,
        )
        trainer = Orpo(
            model=run.model,
            args=arguments,
            data_collator=OddsBatches(answers, run.pad_id),
            train_dataset=run.table(examples),
            eval_dataset=run.scored(answers.examples("heldout")),
            processing_class=run.tokenizer,
        )
        trainer.use_dpo_data_collator = True  # ours is no other, and TRL would warn in every batch
        return run.train(trainer)

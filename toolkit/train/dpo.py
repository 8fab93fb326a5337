"""Direct preference optimisation: raise the better answer of a pair over the worse one."""

from __future__ import annotations

from toolkit.recipe.objectives import DpoSection
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.answers import Answers, PairBatches
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
    """Train on pairs, the base being the reference; see :meth:`Run.train` for what can go wrong."""
    from trl import DPOConfig, DPOTrainer

    class Dpo(Wired, DPOTrainer):  # type: ignore[misc]
        """TRL's trainer on our rows."""

    settings = config.dpo or DpoSection()
    answers = Answers(ctx.inputs["dataset"].path, "rejected")
    examples = answers.examples("train")
    insist_on_rows(examples, "pair of answers")
    with quiet():
        run = Run.start(config, max_length, seed, numerics, ranks=ranks, ctx=ctx)
        arguments = DPOConfig(
            **run.arguments(),
            beta=settings.beta,
            loss_type=[settings.loss],
            label_smoothing=settings.label_smoothing,
            max_length=None,
            disable_dropout=config.lora.dropout == 0,
        )
        trainer = Dpo(
            model=run.model,
            ref_model=run.reference(),
            args=arguments,
            data_collator=PairBatches(answers, run.pad_id),
            train_dataset=run.table(examples),
            eval_dataset=run.scored(answers.examples("heldout")),
            processing_class=run.tokenizer,
        )
        return run.train(trainer)

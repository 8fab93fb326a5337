"""KTO: learn from answers that are each marked good or bad."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.errors import DataError
from toolkit.recipe.objectives import KtoSection
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train.answers import Answers, LabelledBatches
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
    """Train on labelled answers, the base being the reference; see :meth:`Run.train`.

    Raises:
        DataError: All answers are good, or all are bad.
    """
    from trl import KTOConfig, KTOTrainer

    class Kto(Wired, KTOTrainer):  # type: ignore[misc]
        """TRL's trainer on our rows."""

    settings = config.kto or KtoSection()
    dataset = ctx.inputs["dataset"].path
    answers = Answers(dataset)
    examples = answers.examples("train")
    insist_on_rows(examples, "answer")
    labels = {
        False: read_labels(dataset / "train.jsonl"),
        True: read_labels(dataset / "heldout.jsonl"),
    }
    _insist_on_both([labels[False][example["row"]] for example in examples])
    with quiet():
        run = Run.start(config, max_length, seed, numerics, ranks=ranks, ctx=ctx)
        arguments = KTOConfig(
            **run.arguments(),
            beta=settings.beta,
            loss_type=settings.loss,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
            max_length=None,
            disable_dropout=config.lora.dropout == 0,
            train_sampling_strategy="sequential",  # the constructor insists, see below
        )
        trainer = Kto(
            model=run.model,
            ref_model=run.reference(),
            args=arguments,
            data_collator=LabelledBatches(
                answers, labels, run.pad_id, max_length, settings.loss == "kto"
            ),
            train_dataset=run.table(examples),
            eval_dataset=run.scored(answers.examples("heldout")),
            processing_class=run.tokenizer,
        )
        # TRL mismatches rows once, before training, so it must keep their order; our collator does
        # it in every batch
        trainer.args.train_sampling_strategy = "random"
        return run.train(trainer)


def read_labels(file: Path) -> list[bool]:
    """Whether each row of a ``.jsonl`` is a good answer; one without a label is."""
    with file.open(encoding="utf-8") as lines:
        return [bool(json.loads(line).get("label", True)) for line in lines]


def _insist_on_both(labels: list[bool]) -> None:
    good = sum(labels)
    if good in (0, len(labels)):
        raise DataError(
            f"all {len(labels)} training answers are labelled {'good' if good else 'bad'}",
            "KTO needs both; train on good answers alone with objective: sft",
        )

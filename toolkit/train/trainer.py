"""TRL's trainers in our world: our model, rows, optimizer, schedule, metrics, checkpoints, signals.

TRL does the loop and the loss; ``wired.py`` changes what must be ours, ``reporting.py`` tells what
happens. What an objective adds stands in ``dpo.py``, ``kto.py``, ``orpo.py`` and ``grpo.py``.
Several processes train data parallel: every one holds the model, and Accelerate averages gradients.
``docs/adr/0016-trl-behind-our-seams.md`` says what is ours and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from toolkit.errors import DataError, PreflightError, StepFailedError
from toolkit.recipe.train import TrainSection
from toolkit.stages import StageContext
from toolkit.train import trainer_checkpoint
from toolkit.train.answers import Example
from toolkit.train.checkpoint import KEPT, Position
from toolkit.train.checkpoint_files import damage, unusable, writing
from toolkit.train.expected import setup_of_objective
from toolkit.train.interrupt import StopOnTerm
from toolkit.train.model import Numerics, build_model, load_base, trainable
from toolkit.train.oom import explained
from toolkit.train.parallel.engine import Engine
from toolkit.train.parallel.ranks import Ranks
from toolkit.train.reporting import reporter
from toolkit.train.sft import Outcome, seed_everything
from toolkit.train.start import start_file
from toolkit.train.watch.watch import Watch

TOLD_LAST = (
    *("rewards_margins", "rewards_accuracies", "rewards_chosen", "rewards_rejected"),
    *("reward", "reward_std", "kl", "completions_mean_length"),
)
"""Of the numbers of the last step, those that the run as a whole is judged by."""


@dataclass
class Run:
    """One run: what every objective needs to build its trainer, and what becomes of it."""

    config: TrainSection
    max_length: int
    seed: int
    numerics: Numerics
    ranks: Ranks
    ctx: StageContext
    model: Any
    tokenizer: Any
    position: Position = field(default_factory=Position)
    last: dict[str, float] = field(default_factory=dict)
    """Numbers of the newest step."""
    heldout: dict[str, float] = field(default_factory=dict)
    began: Any = True
    """How the adapter's weights began, as its config says it."""
    watch: Watch = field(init=False)
    """Of the steps; there from the first one on."""

    @classmethod
    def start(
        cls,
        config: TrainSection,
        max_length: int,
        seed: int,
        numerics: Numerics,
        *,
        ranks: Ranks,
        ctx: StageContext,
    ) -> Run:
        """Load model and tokenizer.

        Raises:
            PreflightError: A target of the adapter is not in the model, or ``parallel`` shares out what
                these trainers hold whole.
            ArtifactError: The ranks cannot share out a step of the checkpoint.
        """
        from toolkit.data.encode import load_tokenizer

        if ranks.count > 1 and config.parallel not in ("auto", "ddp"):
            raise PreflightError(
                f"train.objective is {config.objective!r} and train.parallel {config.parallel!r}: this "
                "objective trains with ddp alone",
                "set train.parallel: ddp, with method: qlora or a smaller base if it does not fit",
            )
        position = trainer_checkpoint.began(ctx, config, ranks)
        if ranks.count > 1 and ctx.device == "cpu":
            _know_numbered_cpus()
        base = ctx.inputs["model"]
        seed_everything(seed)
        ctx.note(f"loading the base model ({numerics.trained_on})")
        model = build_model(
            base.path,
            config,
            _plain(config, numerics),
            ctx.device,
            base.facts,
            start=start_file(ctx.state, resume=ctx.resume),
        )
        tokenizer = load_tokenizer(base.path, trust_remote_code=base.trusts_code)
        run = cls(config, max_length, seed, numerics, ranks, ctx, model, tokenizer, position)
        # frozen weights were read from the same files: DDP need not send them
        model._ddp_params_and_buffers_to_ignore = [
            *(name for name, weight in model.named_parameters() if not weight.requires_grad),
            *(name for name, _ in model.named_buffers()),
        ]
        if adapter := getattr(model, "peft_config", {}).get("default"):
            # TRL copies the adapter by its config: one that begins with PiSSA would take its share
            # out of the base a second time
            run.began, adapter.init_lora_weights = adapter.init_lora_weights, True
        return run

    @property
    def folder(self) -> Path:
        """Where the Trainer keeps its checkpoints."""
        return trainer_checkpoint.folder_of(self.ctx)

    @property
    def pad_id(self) -> int:
        """A token for padding, which is masked everywhere: the tokenizer's own, or 0."""
        found = self.tokenizer.pad_token_id
        return 0 if found is None else int(found)

    def reference(self) -> Any:
        """The base again, where no adapter can be switched off to get it; else None."""
        if self.config.method != "full":
            return None
        base = self.ctx.inputs["model"]
        plain = _plain(self.config, self.numerics)
        return load_base(base.path, plain, self.ctx.device, trust_remote_code=base.trusts_code)

    def arguments(self) -> dict[str, Any]:
        """Arguments that all TRL configs share; its defaults assume a GPU with bf16 and a network."""
        config, cpu = self.config, self.ctx.device == "cpu"
        recompute = config.gradient_checkpointing
        return {
            "output_dir": str(self.folder),
            "per_device_train_batch_size": config.batch_size,
            "per_device_eval_batch_size": config.batch_size,
            "gradient_accumulation_steps": self.position.micro_batches // self.ranks.count,
            "ddp_find_unused_parameters": False,
            "ddp_broadcast_buffers": False,
            "num_train_epochs": config.epochs,
            "max_steps": config.max_steps or -1,
            "learning_rate": config.learning_rate,
            "max_grad_norm": config.max_grad_norm,
            "seed": self.seed % 2**32,
            "use_cpu": cpu,
            # adapters are float32 on a base that is already bf16: autocast is for float32 weights
            "bf16": config.method == "full" and self.numerics.precision == "bf16",
            "gradient_checkpointing": not cpu if recompute == "auto" else recompute,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "logging_steps": config.log_every,
            "logging_nan_inf_filter": False,
            "save_strategy": "steps" if config.checkpoint_every else "no",
            "save_steps": config.checkpoint_every or 1,
            "save_total_limit": KEPT,
            "eval_strategy": "steps" if config.evaluate_every else "no",
            "eval_steps": config.evaluate_every,
            "prediction_loss_only": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": not cpu,
            "report_to": "none",
            "disable_tqdm": True,
        }

    def table(self, examples: Sequence[Example]) -> Any:
        """A dataset of row numbers: the collator reads the rows."""
        from datasets import Dataset

        return Dataset.from_list(list(examples))

    def scored(self, examples: Sequence[Example]) -> Any:
        """The held-out rows that ``evaluate_rows`` chooses, as a dataset; None where there are none."""
        import numpy as np

        order = np.random.default_rng((self.seed, 1)).permutation(len(examples))
        chosen = sorted(order[: self.config.evaluate_rows].tolist())
        return self.table([examples[i] for i in chosen]) if chosen else None

    def train(self, trainer: Any) -> Outcome:
        """Train from the newest checkpoint, or from the start, to the last step.

        Raises:
            StepFailedError: The loss is not finite, memory ran out, or SIGTERM came; a checkpoint is kept.
            ArtifactError: A checkpoint cannot be used.
        """
        import torch
        from transformers import PrinterCallback

        trainer.args._n_gpu = 1  # nn.DataParallel would take every GPU in sight
        _keep_float32(self.model)
        _base_as_reference(self.model)
        found = trainer_checkpoint.restore(self.ctx, self.position, self.ranks)
        with StopOnTerm() as stop, ExitStack() as watches:
            trainer.run = self
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(reporter(self, stop, watches))
            try:
                trainer.train(resume_from_checkpoint=str(found) if found else None)
            except torch.OutOfMemoryError as error:
                raise self._out_of_memory(error) from error
            except damage() as error:
                if found is None or self.position.step > trainer_checkpoint.step_of(found):
                    raise
                raise unusable(found, f"{error}".partition("\n")[0]) from error
            self.watch.settle(self.position)
            total = trainer.state.max_steps
            if self.position.step < total and self.ranks.any(stop.requested):
                raise StepFailedError(
                    "training was asked to stop (SIGTERM), after step "
                    f"{self.position.step} of {total}",
                    "a checkpoint is kept: run the same command again and it goes on from there",
                )
        if trainer.eval_dataset is not None and not self._evaluated_last():
            trainer.evaluate()
        return self._outcome()

    def _out_of_memory(self, error: Exception) -> StepFailedError:
        """What took it, by the forecast."""
        config = self.config
        what = "pairs" if config.objective in ("dpo", "orpo") else "sequences"
        setup = setup_of_objective(config, self.max_length, self.ctx, self.numerics, self.ranks)
        tried = f"with train.batch_size {config.batch_size} ({what})"
        return explained(str(error), self.position.step, tried, setup)

    def _evaluated_last(self) -> bool:
        return bool(self.heldout) and self.config.evaluate_every is not None

    def _outcome(self) -> Outcome:
        adapters = getattr(self.model, "peft_config", {})
        if "ref" in adapters:
            self.model.delete_adapter("ref")
        if "default" in adapters:
            adapters["default"].init_lora_weights = self.began
        scores = {name: self.last[name] for name in TOLD_LAST if name in self.last}
        scores |= {k: v for k, v in self.heldout.items() if k.partition("_")[2] in TOLD_LAST}
        kind = Engine if self.ranks.count == 1 else Copied
        return Outcome(
            kind(self.model, self.config, self.numerics, self.ranks),
            self.position,
            self.last.get("loss", math.nan),
            self.heldout.get("heldout_loss"),
            scores,
            self.watch.summary(),
        )

    def writing(self, step: int) -> AbstractContextManager[None]:
        """While a checkpoint is written; see :func:`toolkit.train.checkpoint_files.writing`."""
        return writing(self.folder, step, trainer_checkpoint.newest(self.folder))

    def mark(self, written: Path) -> None:
        """Complete a checkpoint: position and log beside what the Trainer wrote."""
        self.ranks.wait()  # each process writes its generators
        if self.ranks.first:
            with self.writing(self.position.step):
                trainer_checkpoint.mark(written, self.position, self.ctx)


class Copied(Engine):
    """What several processes trained: each holds all of it, and nothing more is sent."""

    name: ClassVar[str] = "ddp"


@cache
def _know_numbered_cpus() -> None:
    """Accelerate numbers the CPUs of several processes, and torch restores nothing onto ``cpu:0`` by itself."""
    from torch.serialization import register_package

    register_package(
        17, lambda _: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )


def insist_on_rows(examples: Sequence[Example], what: str) -> None:
    """Refuse to train on nothing.

    Raises:
        DataError: There are no rows.
    """
    if not examples:
        raise DataError(
            f"the training rows have no {what}: nothing to learn from",
            "look at the ledger of the data step",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and hints of the libraries below: ours say it."""
    import datasets
    from transformers.utils import logging

    shown, level = datasets.is_progress_bar_enabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _plain(config: TrainSection, numerics: Numerics) -> Numerics:
    """With all weights trained, the Trainer's own autocast computes in bf16, not ours."""
    return numerics._replace(precision="fp32") if config.method == "full" else numerics


def _keep_float32(model: Any) -> None:
    """Undo what TRL does to adapters on a 4-bit base: in bf16 small updates vanish."""
    import torch

    if getattr(model, "is_loaded_in_4bit", False):
        for _, weight in trainable(model):
            weight.data = weight.data.to(torch.float32)


def _base_as_reference(model: Any) -> None:
    """Drop TRL's copy of a new adapter: one that does nothing yet is the base without adapters.

    An adapter that does something from the start (PiSSA) keeps its copy: the base without it is
    another model.
    """
    if "ref" not in getattr(model, "peft_config", {}):
        return
    products = [w for name, w in model.named_parameters() if "lora_B.ref" in name]
    if products and not any(bool(weight.any()) for weight in products):
        model.delete_adapter("ref")

"""What is put in front of TRL's trainers: the parts of them that must be ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from toolkit.train.finite import not_finite
from toolkit.train.optimizer import build_optimizer
from toolkit.train.schedule import factor, warmup_steps

if TYPE_CHECKING:
    from toolkit.train.trainer import Run


class Wired:
    """Stands before a TRL trainer in the order of its bases, and changes what must be ours."""

    run: Run
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def _send_telemetry(self) -> None:
        """Nothing: training talks to nobody."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: export writes a card with content."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        """The dataset as it is: the data step rendered and tokenized it."""
        return dataset

    def tokenize_row(self, *_: Any, **__: Any) -> dict[str, Any]:
        """No columns more, for the same reason (ORPO)."""
        return {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights of a checkpoint; of an adapter without a look at the base on the Hub."""
        if not hasattr(self.model, "peft_config"):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint of the Trainer's.

        Raises:
            StepFailedError: The disk is full, or cannot be written; older checkpoints stay.
        """
        with self.run.writing(self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *_: Any) -> Any:
        """The optimizer of ``optimizer.py``."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, self.run.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of ``schedule.py``."""
        from torch.optim.lr_scheduler import LambdaLR

        config = self.run.config
        warmup = warmup_steps(num_training_steps, config.warmup)
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: factor(
                min(step, num_training_steps), num_training_steps, warmup, config.schedule
            ),
        )
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss, with the rows counted and nothing but numbers let through.

        Raises:
            StepFailedError: The loss is not finite.
        """
        rows = inputs.pop("rows", None)
        found = super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss = float((found[0] if isinstance(found, tuple) else found).detach())
        if not math.isfinite(loss):
            self._refuse("loss", loss, rows)
        if rows is not None and self.model.training:
            seen(self.run, rows.tolist(), *_tokens(inputs))
        return found

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the gradients, before the optimizer takes them.

        Raises:
            StepFailedError: It is not finite: no weight, and no checkpoint, has seen it.
        """
        found = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if not math.isfinite(float(found)):
            self._refuse("gradient norm", float(found), None)
        return found

    def _refuse(self, what: str, value: float, rows: Any) -> None:
        done = self.state.global_step
        if self.model.training:
            not_finite(what, value, f"at step {done + 1}", rows)
        not_finite(f"held-out {what}", value, f"after step {done}", rows, "heldout.jsonl")


def seen(run: Run, rows: list[int], tokens: int, trained: int, *, at_once: bool = False) -> None:
    """Account for a batch of every process, in their order; all call.

    Args:
        run: Whose position moves.
        rows: Of this process's batch.
        tokens: In it.
        trained: Tokens of it that are trained.
        at_once: Whether one process would see the rows of all as one batch.
    """
    every = run.ranks.all_of((rows, tokens, trained))
    batches = [theirs for theirs, _, _ in every]
    for batch in [list(chain(*batches))] if at_once else batches:
        run.position.rows.add(batch)
    run.position.tokens += sum(more for _, more, _ in every)
    run.position.trained_tokens += sum(more for _, _, more in every)


def _tokens(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens, and trained tokens, of a batch."""
    tokens = trained = 0
    for name, mask in inputs.items():
        if name in ("attention_mask", "chosen_attention_mask", "rejected_attention_mask"):
            tokens += int(mask.sum())
        elif name == "completion_mask":
            trained += int(mask.sum())
        elif name in ("chosen_labels", "rejected_labels"):
            trained += int((mask >= 0).sum())
    return tokens, trained

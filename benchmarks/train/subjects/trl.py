"""TRL's SFTTrainer with Liger's kernels: its own loop, timed from a callback."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train import rows
from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock
from benchmarks.train.shapes import SHAPES
from benchmarks.train.subjects import plain


def measure(case: Case, batch: int, folder: Path, clock: Clock) -> None:
    """Liger for the layers; the loss is TRL's own, which never holds all logits either."""
    import torch
    from transformers import AutoTokenizer

    model = plain.base(case, folder)
    train(case, batch, clock, model, AutoTokenizer.from_pretrained(folder), peft_config=plain.lora(),
          use_liger_kernel=torch.cuda.is_available(), torch_compile=bool(case.settings["compile"]),
          gradient_checkpointing=bool(case.settings.get("recompute")))  # fmt: skip


def train(  # noqa: PLR0917 - what SFTTrainer itself is given
    case: Case, batch: int, clock: Clock, model: Any, tokenizer: Any, peft_config: Any = None,
    **settings: Any,
) -> None:  # fmt: skip
    """Run the trainer for as many steps as the clock wants; no logs, no checkpoints."""
    import pyarrow as pa
    import torch
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl import SFTConfig, SFTTrainer

    made = rows.full_batch(batch * clock.total, case.sequence, SHAPES[case.shape].vocab_size, 0)
    columns = pa.table({"input_ids": made.ids.tolist()})
    # named, or its whole class is pickled for a name, which fails outside of site-packages
    data = Dataset(InMemoryTable(columns), fingerprint="benchmark")
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as output:
        options = SFTConfig(
            output_dir=output, per_device_train_batch_size=batch, max_steps=clock.total,
            gradient_accumulation_steps=1,  # Unsloth's default is two
            max_length=case.sequence, learning_rate=1e-4, lr_scheduler_type="constant",
            optim="adamw_torch_fused", bf16=cuda, use_cpu=not cuda, report_to="none",
            logging_steps=clock.total + 1, save_strategy="no", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True}, **settings,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=options, train_dataset=data, peft_config=peft_config,
            processing_class=tokenizer,
            callbacks=[timing(clock, batch * case.sequence)],
        )  # fmt: skip
        clock.facts["trainable_parameters"] = sum(
            weight.numel() for weight in trainer.model.parameters() if weight.requires_grad
        )
        trainer.train()


def timing(clock: Clock, tokens: int) -> Any:
    """A callback that takes the time after every optimizer step, which must be of ``tokens``."""
    from transformers import TrainerCallback

    class Timing(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            if args.gradient_accumulation_steps != 1 or args.n_gpu > 1:
                raise ValueError("a step must be one micro-batch on one GPU: tokens count so")
            clock.built()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick(tokens)

    return Timing()

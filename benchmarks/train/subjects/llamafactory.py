"""LLaMA-Factory's ``run_exp``, with rows that are tokenized already."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.train import rows
from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock
from benchmarks.train.shapes import SHAPES


def measure(case: Case, batch: int, folder: Path, clock: Clock) -> None:
    """Liger's kernels and the base in bf16; recomputation as the case says."""
    import torch
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    from benchmarks.train.subjects.trl import timing

    made = rows.full_batch(batch * clock.total, case.sequence, SHAPES[case.shape].vocab_size, 0)
    ids = made.ids.tolist()
    ones = [[1] * case.sequence] * len(ids)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Dataset.from_dict({"input_ids": ids, "attention_mask": ones, "labels": ids})
        DatasetDict({"train": tokens}).save_to_disk(f"{scratch}/tokens")
        settings = {
            "model_name_or_path": str(folder), "stage": "sft", "do_train": True, "template": "default",
            "finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_target": "all",
            "dataset": "tokenized", "tokenized_path": f"{scratch}/tokens", "output_dir": f"{scratch}/out",
            "cutoff_len": case.sequence,
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "max_steps": clock.total,
            "learning_rate": 1e-4, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
            "bf16": cuda, "use_cpu": not cuda, "enable_liger_kernel": cuda, "flash_attn": "sdpa",
            "disable_gradient_checkpointing": not case.settings["recompute"], "report_to": "none",
            "save_strategy": "no", "logging_steps": clock.total + 1, "disable_tqdm": True,
        }  # fmt: skip
        run_exp(settings, callbacks=[timing(clock, batch * case.sequence)])

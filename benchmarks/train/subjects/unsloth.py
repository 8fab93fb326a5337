"""Unsloth: its patched model and kernels under the trainer of TRL, as its notebooks do."""

from __future__ import annotations

from pathlib import Path

from benchmarks.train.cases import Case
from benchmarks.train.clock import Clock

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(case: Case, batch: int, folder: Path, clock: Clock) -> None:
    """Without recomputation where it fits, with Unsloth's own (activations go to the CPU) elsewhere."""
    from unsloth import FastLanguageModel  # first: it patches what is imported after it

    from benchmarks.train import weights
    from benchmarks.train.subjects import trl

    weights.install()  # again: Unsloth may have put its own in place
    recompute = "unsloth" if case.settings["recompute"] else False
    quantized = case.settings.get("method") == "qlora"
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=case.sequence, dtype=None,
        load_in_4bit=quantized, local_files_only=True,
    )  # fmt: skip
    if quantized != any(type(module).__name__ == "Linear4bit" for module in model.modules()):
        raise RuntimeError("Unsloth loads in 16 bits where it finds bitsandbytes unusable")
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=recompute, random_state=1, max_seq_length=case.sequence,
    )  # fmt: skip
    # rows are full: batches of them have nothing to pad, and Unsloth compiles their blocks
    trl.train(case, batch, clock, model, tokenizer, padding_free=False,
              gradient_checkpointing=bool(recompute))  # fmt: skip

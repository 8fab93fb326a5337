"""What vLLM beside GRPO holds: the base as it is, and the adapter as the last step left it.

TRL gives vLLM the sum of both. In bf16 that sum is the base itself wherever an update is below half of what a weight
can tell apart, so answers come from an older policy than the one that learns from them. A plain adapter is loaded
instead, as a server loads the export, and no weight of the base is sent at all. Other trainings send the sum, made in
float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from toolkit.engines.vllm import allowed_rank
from toolkit.recipe.train import TrainSection


def loads_adapter(config: TrainSection) -> bool:
    """Whether the adapter itself is what vLLM answers with: a plain one, on the base that vLLM reads."""
    return config.method == "lora" and not config.lora.dora and not config.lora.is_pissa


@contextmanager
def beside(config: TrainSection) -> Iterator[Any]:
    """Gives what is to be called with a trainer that was made within, or None where TRL's own way will do."""
    prepare(os.environ)
    with TemporaryDirectory(prefix="rollout-") as folder:
        if loads_adapter(config):
            with _slots_for(config.lora.rank):
                yield lambda trainer: AdapterRollout(trainer, Path(folder)).follow()
        else:
            yield _send_sum if config.method == "lora" else None


@contextmanager
def _slots_for(rank: int) -> Iterator[None]:
    """TRL makes its engine without room for adapters, and has no option for it."""
    from trl.generation import vllm_generation as theirs

    plain = theirs.LLM
    theirs.LLM = partial(
        plain, enable_lora=True, max_loras=1, max_cpu_loras=1, max_lora_rank=allowed_rank(rank)
    )
    try:
        yield
    finally:
        theirs.LLM = plain


class AdapterRollout:
    """One adapter of vLLM's after the other, each the trained one at the time."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.model = trainer.accelerator.unwrap_model(trainer.model)
        self.generation = trainer.vllm_generation
        self.llm = self.generation.llm
        self.generate = self.llm.generate
        self.folder = folder
        self.step = 0

    def follow(self) -> None:
        """Put both in the place of what TRL calls before and for every generation."""
        self.generation.sync_weights = self.sync
        self.llm.generate = self.answer

    @property
    def newest(self) -> Path:
        """Folder of the last adapter that was written."""
        return self.folder / str(self.step)

    def sync(self) -> None:
        """Write the adapter; under a new number, so that vLLM reads it and reuses no key or value of an older one."""
        rmtree(self.newest, ignore_errors=True)
        self.step += 1
        self.model.save_pretrained(self.newest, save_embedding_layers=False)
        self.llm.reset_prefix_cache()

    def answer(self, *prompts: Any, **settings: Any) -> Any:
        """What the engine writes with the newest adapter."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(f"step-{self.step}", self.step, str(self.newest))
        return self.generate(*prompts, lora_request=adapter, **settings)


def _send_sum(trainer: Any) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.vllm_generation._iter_named_params = lambda: merged_weights(model)


def merged_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and weights of base and adapter together, one after the other, for vLLM.

    TRL merges the adapter into the base and takes it out again for this. In bf16 that leaves a
    rounding error in the base with every step, and the exported adapter would be one for a base
    that nobody has. Here the sum is made apart, in float32, and the base stays as it is.
    """
    import torch

    lora = {
        f"{name}.base_layer.weight": module
        for name, module in model.get_base_model().named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    with torch.no_grad():
        for name, weight in model.get_base_model().named_parameters():
            if ".lora_" in name:
                continue
            if name in lora:
                delta = lora[name].get_delta_weight("default")
                yield (
                    name.replace(".base_layer", ""),
                    (weight.float() + delta.float()).to(weight.dtype),
                )
            else:
                yield name.replace(".base_layer", ""), weight.data


def prepare(environ: MutableMapping[str, str]) -> None:
    """Let vLLM sample by itself where FlashInfer is not installed; a variable that is set stays.

    On CUDA it takes FlashInfer's sampler without asking whether it is there (0.26 and 0.32). vLLM's own
    requirements bring it; a host where vLLM was put together by hand may lack it.
    """
    if find_spec("flashinfer") is None:
        environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

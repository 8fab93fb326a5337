"""The model that is trained: the base in the right precision, with or without an adapter on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

from toolkit.errors import NotInstalledError, PreflightError
from toolkit.recipe.train import LoraSection, TrainSection
from toolkit.registry import close_match
from toolkit.train.speed.choose import FP8_FROM, Choice, Machine, choose

Precision = Literal["bf16", "fp32"]


class Numerics(NamedTuple):
    """In which number formats a run computes."""

    precision: Precision
    """Activations, and a frozen base that is not quantized."""
    quantized: bool
    """Whether the base's linear layers are in 4-bit NF4."""
    fp8: bool = False
    """Whether those with an adapter are rounded to FP8 when they are loaded."""

    @property
    def trained_on(self) -> str:
        """What the adapter saw as its base: ``fp32``, ``bf16``, ``fp8`` or ``nf4``."""
        return "nf4" if self.quantized else "fp8" if self.fp8 else self.precision


def torch_dtype(name: str) -> Any:
    """``"bf16"`` -> ``torch.bfloat16``."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def numerics_for(config: TrainSection, device: str) -> Numerics:
    """Fill in ``precision: auto``: bf16 on a GPU that has it, fp32 elsewhere.

    Raises:
        PreflightError: ``base_precision: fp8`` on a GPU without products of FP8 numbers.
    """
    import torch

    capability = machine(device).capability
    if config.base_precision == "fp8" and capability is not None and capability < FP8_FROM:
        raise PreflightError(
            f"train.base_precision is fp8, and the GPU's compute capability is {capability}: FP8 products begin "
            f"with {FP8_FROM}",
            "set train.base_precision: auto, or train.method: qlora for as little memory",
        )

    precision: Precision = "fp32"
    if config.precision != "auto":
        precision = config.precision
    elif device == "cuda" and torch.cuda.is_bf16_supported():
        precision = "bf16"
    return Numerics(precision, config.method == "qlora", config.base_precision == "fp8")


def use_cores() -> None:
    """Compute on ``OMP_NUM_THREADS`` or the cores this process may use, not on all there are."""
    import os

    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def load_base(
    folder: Path, numerics: Numerics, device: str, *, trust_remote_code: bool = False
) -> Any:
    """Load a causal language model from a folder onto ``device``, never from the network.

    Raises:
        NotInstalledError: 4-bit weights without bitsandbytes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch_dtype(numerics.precision)
    placed: dict[str, Any] = {}
    if numerics.quantized:
        # the number: "cuda" alone would be the first GPU on every rank
        place = torch.cuda.current_device() if device == "cuda" else device
        placed = {"quantization_config": _nf4(dtype), "device_map": {"": place}}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        **placed,
    )
    return model if numerics.quantized else model.to(device)


def _nf4(dtype: Any) -> Any:
    """NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314)."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise NotInstalledError(
            "train.method is 'qlora', but bitsandbytes is not in the training environment",
            "use train.method: lora, or build the environment anew: toolkit env sync train",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def linear_layers(model: Any) -> list[str]:
    """Full names of all linear layers but the output head."""
    import torch

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def resolve_targets(
    wanted: Literal["all-linear"] | tuple[str, ...], layers: list[str]
) -> list[str]:
    """Names of the layers that get an adapter, as PEFT matches them: a full name or its last parts.

    Raises:
        PreflightError: A name matches no linear layer.
    """
    suffixes = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == "all-linear":
        return suffixes
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise PreflightError(
                f"train.lora.targets names {target!r}, but the model has no such linear layer"
                f"{close_match(target, suffixes)}",
                f"its linear layers: {', '.join(suffixes)}",
            )
    return sorted(wanted)


def add_adapter(
    model: Any, lora: LoraSection, base_id: str, folder: Path, start: Path | None = None
) -> Any:
    """Freeze ``model`` and put LoRA layers into it; their weights are float32 whatever the base is.

    Args:
        model: A base from :func:`load_base`.
        lora: Rank, alpha, dropout, targets, and how A and B start.
        base_id: What ``adapter_config.json`` names as the base: never a path.
        folder: The base's folder.
        start: Where A and B are kept as they start, if not at zero; a resumed run finds them there.

    Raises:
        ArtifactError: What is kept is damaged.
        PreflightError: A target is not in the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    from toolkit.train.start import begin, first_alone

    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=resolve_targets(lora.targets, linear_layers(model)),
    )
    with first_alone() if lora.init != "default" else nullcontext():
        if lora.is_pissa and not (start and start.is_file()):
            settings.init_lora_weights = lora.init
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=True)
        if lora.init != "default":
            begin(adapted, lora, folder, start)
    stored = adapted.peft_config["default"]
    stored.base_model_name_or_path = base_id
    stored.init_lora_weights = lora.init if lora.is_pissa else True
    return adapted


def build_model(
    folder: Path,
    config: TrainSection,
    numerics: Numerics,
    device: str,
    facts: Mapping[str, Any],
    *,
    place: str | None = None,
    start: Path | None = None,
) -> Any:
    """The model to train, in training mode, with the right weights trainable.

    ``start`` is where A and B are kept as they start; see :func:`add_adapter`.
    ``full`` keeps float32 weights and computes in bf16 by autocast: small updates vanish in bf16.
    It computes on ``device``; ``place`` is where it is built, when an engine moves it there.
    """
    from toolkit.train.folder import base_id

    trust = bool(facts.get("trust_remote_code", False))
    stored = numerics._replace(precision="fp32") if config.method == "full" else numerics
    model = load_base(folder, stored, place or device, trust_remote_code=trust)
    model.config.use_cache = False
    settings = json.loads((folder / "config.json").read_text())
    choice = choose(config, settings, machine(place or device))
    recompute = config.gradient_checkpointing
    if recompute == "auto":
        recompute = device == "cuda"
    if recompute and not choice.fast:
        # not reentrant: gradients then reach the adapters although the embeddings are frozen
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.method != "full":
        model = add_adapter(model, config.lora, base_id(folder, facts), folder, start)
        _speed_up(model, config, numerics, choice)
    elif numerics.precision == "bf16":
        _compute_in_bf16(model, device)
    model.train()
    return model


def machine(device: str) -> Machine:
    """What :func:`~toolkit.train.speed.choose.choose` needs to know of this process's device."""
    import torch

    if device != "cuda":
        return Machine(device)
    major, minor = torch.cuda.get_device_capability()
    gpus = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return Machine(device, major + minor / 10, gpus)


def _speed_up(model: Any, config: TrainSection, numerics: Numerics, choice: Choice) -> None:
    """Give ``model`` the fast path; an FP8 base is ours on the plain one too, layer by layer."""
    if not choice.fast and not numerics.fp8:
        return
    from toolkit.train.speed.apply import Speed, group_layers

    if choice.fast:
        kind = numerics.trained_on if numerics.fp8 or numerics.quantized else "bf16"
        model.speed = Speed(model, config, choice, kind)
    else:
        group_layers(model, "fp8", merge=False)


def _compute_in_bf16(model: Any, device: str) -> None:
    import torch

    model.forward = torch.autocast(device, torch.bfloat16)(model.forward)


def trainable(model: Any) -> Iterator[tuple[str, Any]]:
    """Names and weights that the optimizer changes; tied weights once."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)

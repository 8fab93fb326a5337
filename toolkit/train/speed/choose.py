"""``train.speed: auto``: what a run is computed by, and why, in one sentence. Pure: no torch.

The plan shows it, and the worker decides by the same function from what it finds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.forecast.block import Keep, fused_elements
from toolkit.forecast.training import KEEPS

if TYPE_CHECKING:
    from toolkit.recipe.train import TrainSection

FAMILIES: Mapping[str, str] = {
    "CohereForCausalLM": "scaled logits",
    "Gemma2ForCausalLM": "capped logits, windows",
    "Gemma3ForCausalLM": "windows",
    "GraniteForCausalLM": "scaled logits",
    "LlamaForCausalLM": "",
    "MistralForCausalLM": "",
    "Olmo2ForCausalLM": "",
    "Phi3ForCausalLM": "",
    "Qwen2ForCausalLM": "",
    "Qwen3ForCausalLM": "",
    "SmolLM3ForCausalLM": "",
}
"""Architectures whose fast path is tested against the plain one, and what is special about each."""

BF16_FROM = 8.0
FP8_FROM = 8.9
"""Compute capabilities: Ampere has bf16, Ada and Hopper have FP8 products."""


@dataclass(frozen=True)
class Machine:
    """Where training runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        capability: Of the GPU, e.g. 9.0; ``None`` where it is not known.
        gpus: How many share the work.
    """

    device: str
    capability: float | None = None
    gpus: int = 1


@dataclass(frozen=True)
class Choice:
    """What ``auto`` came to.

    Attributes:
        fast: Whether layers are compiled with the adapter inside, and the loss is fused.
        packs: Whether packed rows are kept apart by the attention kernel, without a mask.
        reason: The rest of a sentence that begins with ``fast`` or ``plain``.
        certain: Whether all is known that could say otherwise; where not, ``reason`` says what.
    """

    fast: bool
    packs: bool
    reason: str
    certain: bool = True

    @property
    def path(self) -> str:
        """``fast`` or ``plain``."""
        return "fast" if self.fast else "plain"


def choose(section: TrainSection, config: Mapping[str, Any] | None, machine: Machine) -> Choice:
    """The fast path where it is known to be right, else the plain one and why.

    Args:
        section: The recipe's ``train``.
        config: ``config.json`` of the base, or ``None`` where it is not here yet.
        machine: Where training runs.
    """
    against = next(_objections(section, config, machine), None)
    if against:
        return Choice(False, False, against)
    packs = _packs(config or {})
    parts = ["layers compiled with the adapter inside", "a loss that never holds all logits"]
    if section.packing:
        parts.append(f"packed rows kept apart {'without' if packs else 'by'} a mask")
    unknown = list(_unknown(config, machine))
    return Choice(True, packs, "; ".join([", ".join(parts), *unknown]), not unknown)


def _unknown(config: Mapping[str, Any] | None, machine: Machine) -> Iterator[str]:
    """What may still turn a plan to the plain path; a worker knows all of it."""
    if config is None:
        yield "not certain before the base is fetched: some architectures take the plain path"
    if machine.capability is None:
        yield f"not certain without gpu.capability in the profile: bf16 begins with {BF16_FROM}"


def _objections(
    section: TrainSection, config: Mapping[str, Any] | None, machine: Machine
) -> Iterator[str]:
    """Why not the fast path, the weightiest first."""
    if section.speed == "plain":
        yield "train.speed says so"
    if machine.device != "cuda":
        yield "there is no GPU"
    if machine.capability is not None and machine.capability < BF16_FROM:
        yield f"the GPU's compute capability is {machine.capability}, and bf16 begins with {BF16_FROM}"
    yield from _of_the_recipe(section, machine)
    yield from _of_the_base(config) if config is not None else ()


def _of_the_recipe(section: TrainSection, machine: Machine) -> Iterator[str]:
    objective = getattr(section, "objective", "sft")
    parallel = getattr(section, "parallel", "auto")
    if section.precision == "fp32":
        yield "train.precision is fp32, and the fast path computes in bf16"
    if section.method == "full":
        yield "train.method is full, and the fast path is for adapters"
    if objective != "sft":
        yield f"train.objective is {objective}, and the fast path is for sft"
    if getattr(section.lora, "dora", False):
        yield "DoRA scales by the norm of whole rows"
    if machine.gpus > 1 and parallel in ("zero3", "fsdp"):
        yield f"train.parallel is {parallel}, which shares out the base's weights"


def _of_the_base(config: Mapping[str, Any]) -> Iterator[str]:
    name = architecture(config)
    if name not in FAMILIES:
        yield f"the fast path is not tested with {name or 'the architecture of the base'}"
    if config.get("quantization_config"):
        yield "the base is quantized already, and the fast path takes none that is"


def architecture(config: Mapping[str, Any]) -> str | None:
    """First of ``architectures``."""
    named = config.get("architectures") or ()
    return str(named[0]) if named else None


def _packs(config: Mapping[str, Any]) -> bool:
    """Whether attention is nothing but causal: no window, no cap on its scores."""
    if config.get("attn_logit_softcapping"):
        return False
    kinds = config.get("layer_types") or ()
    if any(kind != "full_attention" for kind in kinds):
        return False
    return not (config.get("sliding_window") and config.get("use_sliding_window", not kinds))


@dataclass(frozen=True)
class LayerBytes:
    """What one decoder layer holds per token: kept until its backward pass, by policy."""

    hidden: int
    inner: int
    queries: int
    keys: int
    width: int = 2

    def kept(self, keep: Keep) -> int:
        """Bytes per token that are kept between forward and backward."""
        lse = 2  # of each token, at least: the softmax's logarithm
        elements = fused_elements(self.hidden, self.inner, self.queries, self.keys, keep)
        return self.width * (elements + (lse if keep != "nothing" else 0))

    @property
    def passing(self) -> int:
        """Bytes per token that come and go while one layer's backward pass runs."""
        return (5 * self.inner + 6 * self.hidden + 2 * self.queries) * self.width


SLOWER: Mapping[Keep, float] = {
    "products": 0.0, "but_mlp": 0.135, "attention": 0.18, "nothing": 0.27, "everything": 0.0,
}  # fmt: skip
"""Share of a step's products that a policy computes a second time."""


def keep_for(layer: LayerBytes, layers: int, tokens: int, free: float) -> list[Keep]:
    """The least recomputing that fits: what each layer keeps, the first layers the least.

    Every two policies may be mixed; of all mixes that fit, the cheapest is taken.

    Args:
        layer: Sizes of a decoder layer.
        layers: How many there are.
        tokens: Tokens of the largest micro-batch, with padding.
        free: Bytes for activations, with the gradients and optimizer state already taken off.
    """
    room = free - layer.passing * tokens
    best: tuple[float, Sequence[Keep]] = (2.0 * layers, ["nothing"] * layers)
    for rich in KEEPS:
        for poor in KEEPS[KEEPS.index(rich) :]:
            dear, cheap = layer.kept(rich) * tokens, layer.kept(poor) * tokens
            if dear == cheap:
                count = layers if layers * dear <= room else 0
            else:
                count = min(layers, int(max(0.0, room - layers * cheap) // (dear - cheap)))
            if count * dear + (layers - count) * cheap > room:
                continue
            cost = count * SLOWER[rich] + (layers - count) * SLOWER[poor]
            if cost < best[0]:
                best = (cost, [poor] * (layers - count) + [rich] * count)
    return list(best[1])

"""Put the fast path into a model that PEFT has prepared, and compute its loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from toolkit.forecast.block import Keep
from toolkit.train.speed import attention
from toolkit.train.speed.bases import merged_base, second_copy
from toolkit.train.speed.choose import Choice, LayerBytes, keep_for
from toolkit.train.speed.group import Group, gate, share_input, take_over
from toolkit.train.speed.loss import PIECE, AfterHead, HeadLoss
from toolkit.train.speed.recompute import COST, keeping

if TYPE_CHECKING:
    from toolkit.recipe.train import TrainSection
    from toolkit.train.batches import Batch

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children that a module of a known architecture calls with its own input."""
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""All children of a module that computes ``down(act(gate(x)) * up(x))``."""
MLP = ("gate_proj", "up_proj", "gate_up_proj")
SPARE_BYTES = 1.25 * 2**30
"""Left to libraries, to what does not fit its block, and to what was not thought of."""


def group_layers(root: Any, kind: str, *, merge: bool) -> list[Group]:
    """Let every PEFT linear layer below ``root`` compute by a :class:`Group`, which are returned.

    Args:
        root: A decoder layer, or a whole model.
        kind: ``bf16`` (any dense type), ``fp8`` or ``nf4``.
        merge: Whether layers that read the same input are computed as one.
    """
    groups: list[Group] = []
    taken: set[Any] = set()
    for parent in list(root.modules()) if merge else ():
        for names in SHARED:
            members = [getattr(parent, name, None) for name in names]
            if all(_is_adapted(member) for member in members) and _alike(members):
                groups.append(_group(members, kind, names[0]))
                share_input(parent, names, groups[-1])
                taken.update(members)
    for name, module in list(root.named_modules()):
        if _is_adapted(module) and module not in taken:
            groups.append(_group([module], kind, name.rpartition(".")[2]))
            take_over(module, groups[-1])
    for parent in list(root.modules()) if merge else ():
        if _is_gated(parent):
            gate(parent, parent.speed_group, parent.down_proj.speed_group)
    return groups


def _is_gated(module: Any) -> bool:
    if {name for name, _ in module.named_children()} != GATED:
        return False
    silu = (
        isinstance(module.act_fn, torch.nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
    )
    groups = getattr(module, "speed_group", None), getattr(module.down_proj, "speed_group", None)
    return silu and all(group is not None and group.plain for group in groups)


def _is_adapted(module: Any) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _alike(members: list[Any]) -> bool:
    """Same scale (a rank pattern may change it), all with a bias or none."""
    scales = {member.scaling["default"] for member in members}
    biased = {member.get_base_layer().bias is None for member in members}
    return len(scales) == 1 and len(biased) == 1


def _group(members: list[Any], kind: str, name: str) -> Group:
    cost = COST["mlp" if name in MLP else "projection"]
    return Group(members, kind, merged_base(members, kind), cost)


class Speed:
    """The fast path of one model: its layers, what they keep, and its loss.

    ``say``, on the rank that speaks, takes a line for the user: when compiling begins, for it takes its time, and when
    the compiler fails.
    """

    def __init__(self, model: Any, section: TrainSection, choice: Choice, kind: str) -> None:
        self.model = model
        self.section = section
        self.choice = choice
        causal = model.get_base_model()
        self.decoder = causal.base_model
        self.layers = list(self.decoder.layers)
        self.plain = [layer.forward for layer in self.layers]
        self.after = AfterHead.of(causal.config)
        self.groups = [g for layer in self.layers for g in group_layers(layer, kind, merge=True)]
        self.planned = 0  # tokens of the largest micro-batch so far
        self.keep: list[Keep] = []
        self.gave_up: str | None = None
        self.say: Callable[[str], None] | None = None
        if choice.packs:
            causal.set_attn_implementation(attention.register())
        # without it the first layer, whose input needs no gradient, would be compiled apart
        model.get_input_embeddings().register_forward_hook(_wants_gradient)
        torch._dynamo.config.recompile_limit = 64

    def summed_loss(self, batch: Batch) -> Tensor:
        """Cross entropy summed over the batch's targets, a scalar in float32."""
        device = self.model.device
        if self.model.training and torch.is_grad_enabled():
            self.prepare(batch.ids.size)
        given: dict[str, Any] = {}
        ids, positions = batch.ids, batch.positions
        if self.choice.packs and _is_packed(positions):
            ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
            bounds, longest = attention.row_bounds(positions)
            given = {
                "cu_seq_lens_q": torch.from_numpy(bounds).to(device, non_blocking=True),
                "max_length_q": -(-longest // 512) * 512,
            }
        hidden = self.decoder(
            input_ids=torch.from_numpy(ids).to(device),
            position_ids=torch.from_numpy(positions).to(device),
            use_cache=False,
            **given,
        ).last_hidden_state
        sources = torch.from_numpy(batch.sources).to(device)
        hidden = hidden.flatten(0, 1).index_select(0, sources)
        targets = torch.from_numpy(batch.targets).to(device)
        head = self.model.get_output_embeddings().weight
        loss: Tensor = HeadLoss.apply(hidden, head, targets, self.after, PIECE)
        return loss

    def prepare(self, tokens: int) -> None:
        """Choose what layers keep, by the memory that is free, and compile; again for more tokens."""
        if tokens <= self.planned:
            return
        if self.say and not self.planned:
            self.say(compiling())
        self.planned = tokens
        keep = self._keep(tokens)
        if keep != self.keep:
            self.keep = keep
            for layer, plain, kept in zip(self.layers, self.plain, keep, strict=True):
                layer.forward = self._compiled(plain, kept)

    def _keep(self, tokens: int) -> list[Keep]:
        wish = self.section.gradient_checkpointing
        count = len(self.layers)
        if wish is True:
            return ["nothing"] * count
        free = None if self.model.device.type != "cuda" else self._free_bytes()
        if free is None:
            return ["products"] * count
        for group in self.groups:
            second_copy(group, drop=True)
        free = self._free_bytes()
        sizes = self._sizes()
        every: list[Keep] = ["products"] * count
        twice = sum(group.frozen[0].numel() for group in self.groups if group.kind == "fp8")
        enough = free - twice > (sizes.kept("products") * count + sizes.passing) * tokens
        if twice and enough:
            for group in self.groups:
                second_copy(group, drop=False)
        if wish is False or (twice and enough):
            return every
        return keep_for(sizes, count, tokens, free)

    def _sizes(self) -> LayerBytes:
        config = self.model.get_base_model().config
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = (config.num_key_value_heads or heads) * size
        return LayerBytes(config.hidden_size, config.intermediate_size, heads * size, keys)

    def _free_bytes(self) -> float:
        """What activations may take: all, less weights, optimizer, gradients and logits."""
        device = self.model.device
        free, total = torch.cuda.mem_get_info(device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(device)
        mine = torch.cuda.memory_allocated(device)
        room = min(free + torch.cuda.memory_reserved(device), allowed) - mine
        trained = sum(w.numel() for w in self.model.parameters() if w.requires_grad)
        logits = 2 * 2 * PIECE * self.model.get_output_embeddings().weight.shape[0]
        return float(room - 12 * trained - logits - SPARE_BYTES)

    def _compiled(self, plain: Callable[..., Any], keep: Keep) -> Callable[..., Any]:
        kept = keeping(plain, keep)
        compiled = torch.compile(kept)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            if self.gave_up:
                return kept(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.gave_up = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if self.say:
                    self.say(f"the compiler failed, layers run slower without it: {self.gave_up}")
                return kept(*args, **kwargs)

        return forward


def compiling() -> str:
    """What is going on before the first step, and what earlier runs left for it (``environments/compiled.py``)."""
    kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if kept is None:
        return "compiling layers; later runs do it again: the cache folder cannot be written"
    files = sum(len(names) for _, _, names in os.walk(kept))
    found = f"with {files:,} files of earlier runs" if files else "for the first time"
    return f"compiling layers {found}, kept in {kept}"


def _is_packed(positions: np.ndarray[Any, Any]) -> bool:
    """Whether a line holds more than one row."""
    return bool((positions[:, 1:] == 0).any())


def _wants_gradient(_module: Any, _inputs: Any, output: Tensor) -> Tensor | None:
    return output.requires_grad_() if torch.is_grad_enabled() else None

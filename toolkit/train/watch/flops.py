"""How many floating point operations of a step are useful: those that no way of training can leave out.

A product of T tokens with a weight of N elements is 2 N T operations forward, as many for the
gradient of its input, and as many again for the gradient of the weight. So it is 4 N T where the
weight is frozen (LoRA's base) and 6 N T where it is trained (``full``, and A and B of adapters).
That is the count of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, "model FLOPs
utilization") with 4 in place of 6 for what takes no gradient.

- The output head works on the tokens that are trained on, and on no others: it counts for them.
- The embedding is looked up, not multiplied. Norms, activations and rotations are left out.
- Attention between T tokens of a row takes 4 Q operations forward (scores, and their product with
  the values; Q is the width of all query heads) for each pair of a token with itself or an earlier
  one, T (T + 1) / 2 of them, and twice that backward: 12 Q in all, in every layer. Rows that are
  packed together do not attend to each other, and a sliding window leaves out what lies behind it.
- What is computed again to save memory does not count, nor does padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from toolkit.forecast.block import has_adapter
from toolkit.forecast.shape import ModelShape
from toolkit.preflight.base_facts import BaseFacts, shape_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from toolkit.recipe.train import TrainSection
    from toolkit.stages import StageContext
    from toolkit.train.model import Numerics

Format = Literal["bf16", "fp32", "fp8"]
"""Number format of a matrix product."""

FROZEN, TRAINED = 4, 6
"""Operations for each element of a weight and each token."""

ATTENTION = 12
"""Operations for each pair of tokens and each element of a query."""


@dataclass(frozen=True)
class Work:
    """Useful operations of any step of one run.

    Attributes:
        fp8: For each token, in products that an FP8 base does in FP8.
        token: For each token, in the other products with weights.
        target: For each trained token: the output head.
        pair: For each pair of tokens that attend to each other in one layer.
        windows: How far back layers look (None: to the start) -> how many of them.
        other: Format of everything but ``fp8``.
    """

    fp8: float
    token: float
    target: float
    pair: float
    windows: Mapping[int | None, int]
    other: Format

    @classmethod
    def of_run(
        cls,
        shape: ModelShape,
        settings: Mapping[str, Any],
        *,
        targets: tuple[str, ...],
        rank: int,
        fp8: bool,
        other: Format,
    ) -> Work:
        """Work of a dense decoder.

        Args:
            shape: Its sizes.
            settings: Its ``config.json``.
            targets: Names of the linear layers with an adapter; empty when all weights are trained.
            rank: Of the adapters.
            fp8: Whether layers with an adapter have their frozen weights in FP8.
            other: In which format the rest is computed.
        """
        each = FROZEN if targets else TRAINED
        adapted = {name: s for name, s in shape.linears.items() if has_adapter(name, targets)}
        weights = sum(outputs * inputs for outputs, inputs in adapted.values())
        thin = rank * sum(outputs + inputs for outputs, inputs in adapted.values())
        low = weights if fp8 else 0
        return cls(
            fp8=each * shape.layers * low,
            token=shape.layers * (each * (shape.block_weights - low) + TRAINED * thin),
            target=each * shape.embedding_weights,
            pair=ATTENTION * shape.queries,
            windows=windows(settings, shape.layers),
            other=other,
        )

    @property
    def formats(self) -> tuple[Format, ...]:
        """In which formats it multiplies."""
        return ("fp8", self.other) if self.fp8 else (self.other,)

    def of(self, lengths: NDArray[np.int64], trained: int) -> dict[Format, float]:
        """Useful operations of a step, by format.

        Args:
            lengths: Tokens of its rows, [rows].
            trained: Its trained tokens.
        """
        tokens = int(lengths.sum())
        looked = sum(n * _pairs(lengths, window) for window, n in self.windows.items())
        rest = self.token * tokens + self.target * trained + self.pair * looked
        return {"fp8": self.fp8 * tokens, self.other: rest} if self.fp8 else {self.other: rest}


def work_of_run(config: TrainSection, ctx: StageContext, numerics: Numerics) -> Work | None:
    """Work of supervised training on ``ctx``'s base; ``None`` where that is no dense decoder."""
    settings = json.loads((ctx.inputs["model"].path / "config.json").read_text())
    shape = shape_of(BaseFacts(settings))
    if shape is None or not shape.linears:
        return None
    names = tuple(shape.linears) if config.lora.targets == "all-linear" else config.lora.targets
    return Work.of_run(
        shape,
        settings,
        targets=() if config.method == "full" else names,
        rank=config.lora.rank,
        fp8=numerics.fp8,
        other=numerics.precision,
    )


def _pairs(lengths: NDArray[np.int64], window: int | None) -> int:
    """Pairs of a token with itself or one of the ``window - 1`` before it, over all rows."""
    if window is None:
        return int((lengths * (lengths + 1) // 2).sum())
    near = lengths.clip(max=window)
    return int((near * (near + 1) // 2 + (lengths - near) * window).sum())


def windows(settings: Mapping[str, Any], layers: int) -> dict[int | None, int]:
    """How far back a decoder's layers look -> how many do, as its ``config.json`` says."""
    text = settings.get("text_config")
    settings = text if isinstance(text, Mapping) else settings
    window, kinds = settings.get("sliding_window"), settings.get("layer_types") or ()
    if not window or not settings.get("use_sliding_window", True):
        return {None: layers}
    if not kinds:  # Mistral: all of them
        return {int(window): layers}
    sliding = sum(kind == "sliding_attention" for kind in kinds)
    found = {int(window): sliding, None: layers - sliding}
    return {window: count for window, count in found.items() if count}

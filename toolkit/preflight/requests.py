"""What a client may ask that an engine cannot answer: a table, each row with its source. The front refuses it.

Everything else goes to the engine as it is, and the engine says what it does not take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.gateway.table import PROMPT_LOGPROBS
from toolkit.preflight.features import Does
from toolkit.preflight.versions import FOREVER, Version, parse_version

ASKS: Mapping[str, str] = {
    PROMPT_LOGPROBS: "logprobs of the prompt: `prompt_logprobs`, or `echo` with `logprobs` (chat: `top_logprobs`)",
}
"""What can be asked, by name."""


@dataclass(frozen=True)
class Row:
    """What one engine does with a request, from version ``since`` on and before ``until``.

    Attributes:
        asks: A name of :data:`ASKS`.
        engine: ``vllm`` or ``sglang``.
        accelerator: ``cpu`` or ``cuda``.
        lora: Whether it does so only where it was started with room for adapters.
        does: What happens.
        why: For the client who is refused, after "this server".
        source: File of the engine's source, or an issue.
        tried: Engines and versions on which it was seen.
    """

    asks: str
    engine: str
    accelerator: str
    lora: bool
    does: Does
    why: str
    source: str
    since: Version = ()
    until: Version = FOREVER
    tried: tuple[str, ...] = ()


ROWS: tuple[Row, ...] = (
    Row(
        PROMPT_LOGPROBS,
        "vllm",
        "cpu",
        lora=True,
        does=Does.dies,
        why="gives no logprobs of the prompt: beside adapters they would end its engine (vLLM on a CPU)",
        source="vllm 0.26.0 and 0.32.0, lora/punica_wrapper/punica_cpu.py: add_lora_logits takes one adapter index per "
        "request of the batch, and gets the rows of one prompt",
        tried=("vllm 0.32.0 cpu",),
    ),
)
"""What engines cannot answer."""


def refused(engine: str, version: str, accelerator: str, *, lora: bool) -> dict[str, str]:
    """What the front must refuse, by name of :data:`ASKS`, with the reason for the client.

    Args:
        engine: ``vllm`` or ``sglang``.
        version: As the live engine says it; every row counts where it does not say.
        accelerator: ``cpu`` or ``cuda``.
        lora: Whether the engine was started with room for adapters.
    """
    number = parse_version(version)
    return {
        row.asks: row.why
        for row in ROWS
        if (row.engine, row.accelerator) == (engine, accelerator)
        and (lora or not row.lora)
        and (not number or row.since <= number < row.until)
    }

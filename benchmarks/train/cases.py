"""What is measured, in order of importance: a budget that ends cuts the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

LIMIT_80 = 78.0
"""GiB for PyTorch's allocator, so that a larger GPU tries what fits a card of 80 GB."""
LIMIT_24 = 23.25
"""The same for a card of 24 GiB: the rest is CUDA's own context."""
LIMIT_10 = 8.5
"""And for 10 GB, which are 9.31 GiB, less the 0.75 of CUDA's context."""


@dataclass(frozen=True)
class Case:
    """One subject with one set of settings, measured in a process of its own."""

    name: str
    subject: str
    """``device``, ``ours``, ``plain``, ``trl``, ``unsloth``, ``llamafactory``, ``stage``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    shape: str = "8b"
    batches: tuple[int, ...] = (1,)
    """Rows of a step, tried from the left until one fits; each try is a process of its own."""
    sequence: int = 4096
    limit_gib: float = LIMIT_80
    """What PyTorch's allocator may take."""
    rows: str = "full"
    """``full``, or log-normal lengths: ``padded``, ``bucketed``, ``packed``."""
    site: str = "train"
    """Whose packages, before the training ones: ``train``, ``core``, ``unsloth``, ``llamafactory``."""
    warm: int = 3
    steps: int = 6
    expected_s: int = 25
    instead: str | None = None
    """The case to take when this one fails."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the process."""

    def quick(self) -> Case:
        """The same with fewer steps, for a first look."""
        return replace(self, warm=min(self.warm, 2), steps=min(self.steps, 4))

    def tiny(self) -> Case:
        """The same in a size for two cores."""
        sequence = max(32, self.sequence // 64)
        batches = tuple(min(b, 4) for b in self.batches[-1:])
        return replace(
            self, shape="tiny", sequence=sequence, batches=batches, warm=1, steps=2, expected_s=200
        )


AUTO = {"speed": "auto"}
PLAIN = {"speed": "plain", "gradient_checkpointing": False}
FP8 = AUTO | {"base_precision": "fp8"}
NF4 = AUTO | {"method": "qlora"}
REGIONAL = {"ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "1"}
"""Accelerate's compilation layer by layer, under the Trainer's ``torch_compile``."""
ONE_LENGTH = {"UNSLOTH_SDPA_CUDNN_BUCKET": "0"}
"""Unsloth pads attention so that cuDNN makes few plans; rows of one length need one anyway."""

CASES = (
    Case("device", "device", expected_s=6),
    Case("ours-auto-bf16", "ours", AUTO, batches=(3, 2), expected_s=45),
    Case("ours-auto-fp8", "ours", FP8, batches=(4, 3, 2), expected_s=40),
    Case("plain-peft", "plain", {"recompute": False}, batches=(2, 1), expected_s=15),
    Case("trl-liger-compiled", "trl", {"compile": True}, batches=(3, 2), expected_s=45,
         instead="trl-liger", variables=REGIONAL),
    Case("ours-auto-nf4", "ours", NF4, batches=(3, 2), expected_s=40),
    Case("ours-auto-bf16-24gb", "ours", AUTO, batches=(1,), limit_gib=LIMIT_24),
    Case("ours-auto-fp8-24gb", "ours", FP8, batches=(1,), limit_gib=LIMIT_24),
    Case("unsloth", "unsloth", {"recompute": False}, batches=(3, 2), site="unsloth",
         expected_s=60, variables=ONE_LENGTH),
    Case("ours-auto-nf4-10gb", "ours", NF4, batches=(1,), sequence=2048, limit_gib=LIMIT_10),
    Case("ours-auto-bf16-warm", "ours", AUTO, batches=(3, 2), warm=1, steps=1, expected_s=20),
    Case("ours-auto-packed", "ours", AUTO, batches=(2,), rows="packed", steps=10, expected_s=35),
    Case("ours-auto-padded", "ours", AUTO, batches=(8, 4), rows="padded", steps=10, expected_s=40),
    Case("ours-70b-nf4", "ours", NF4, shape="70b", batches=(1,), warm=1, steps=2, expected_s=75),
    Case("stage", "stage", AUTO, batches=(3, 2), warm=8, steps=24, site="core",
         expected_s=75),
    Case("plain-peft-recompute", "plain", {"recompute": True}, batches=(4, 2), expected_s=20),
    Case("trl-liger", "trl", {"compile": False}, batches=(3, 2), expected_s=30),
    Case("unsloth-recompute", "unsloth", {"recompute": True}, batches=(4, 2), site="unsloth",
         expected_s=60, variables=ONE_LENGTH),
    Case("ours-plain-bf16", "ours", PLAIN, batches=(2, 1), expected_s=15),
    Case("ours-auto-bucketed", "ours", AUTO, batches=(8, 4), rows="bucketed", steps=10),
    Case("plain-padded", "ours", PLAIN, batches=(4, 2), rows="padded", steps=10),
    Case("unsloth-nf4", "unsloth", {"recompute": False, "method": "qlora"}, batches=(3, 2),
         site="unsloth", expected_s=60, variables=ONE_LENGTH),
    Case("plain-peft-nf4", "plain", {"recompute": False, "method": "qlora"}, batches=(1,)),
    Case("plain-peft-nf4-10gb", "plain", {"recompute": True, "method": "qlora"}, batches=(1,),
         sequence=2048, limit_gib=LIMIT_10),
    Case("llamafactory", "llamafactory", {"recompute": False}, batches=(2, 1),
         site="llamafactory", expected_s=60),
)  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def chosen(only: str | None, *, tiny: bool) -> list[Case]:
    """Cases by name, in the order given; all of them without names.

    Raises:
        SystemExit: A name is not among the cases.
    """
    names = [name for name in (only or "").split(",") if name] or list(BY_NAME)
    unknown = [name for name in names if name not in BY_NAME]
    if unknown:
        raise SystemExit(f"there is no case {unknown[0]!r}; there are {', '.join(BY_NAME)}")
    return [BY_NAME[name].tiny() if tiny else BY_NAME[name] for name in names]

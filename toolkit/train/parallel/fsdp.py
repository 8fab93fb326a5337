"""FSDP2: each rank holds a part of every weight and gathers a decoder layer when it is its turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from toolkit.errors import PreflightError
from toolkit.train.model import Numerics, torch_dtype
from toolkit.train.parallel.engine import Engine


class FullyShard(Engine):
    """``torch.distributed.fsdp.fully_shard``, layer by layer, then the rest."""

    name: ClassVar[str] = "fsdp"
    shards_weights: ClassVar[bool] = True
    shares_state: ClassVar[bool] = True

    def wrap(self, root: Any, numerics: Numerics) -> Any:
        """Shard in place; frozen weights keep their type, adapters theirs.

        Full fine-tuning in bf16 gathers bf16 copies and adds gradients up in float32.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.ranks.device, (self.ranks.count,))
        policy = MixedPrecisionPolicy()
        if self.config.method == "full" and numerics.precision == "bf16":
            policy = MixedPrecisionPolicy(torch_dtype("bf16"), torch.float32)
        for layer in decoder_layers(self.model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(root, mesh=mesh, mp_policy=policy)
        return root

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Afterwards whole weights are let go: FSDP keeps the outermost ones for a backward pass."""
        with super().scoring():
            yield
        self.wrapped.reshard()


def decoder_layers(model: Any) -> list[Any]:
    """The modules that Transformers says must not be split.

    Raises:
        PreflightError: The model names none.
    """
    named = {name for module in model.modules() for name in _unsplit(module)}
    found = [module for module in model.modules() if type(module).__name__ in named]
    if not found:
        raise PreflightError(
            f"{type(model).__name__} does not say which of its modules are decoder layers, so "
            "FSDP cannot shard it layer by layer",
            "set train.parallel: zero3, which needs no layers, or ddp",
        )
    return found


def _unsplit(module: Any) -> tuple[str, ...]:
    return tuple(getattr(module, "_no_split_modules", None) or ())

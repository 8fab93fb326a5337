"""What the step loop asks of whatever computes: one process here, several in the modules beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.recipe.train import TrainSection
from toolkit.train.batches import Batch
from toolkit.train.loss import summed_loss
from toolkit.train.model import Numerics, trainable
from toolkit.train.optimizer import build_optimizer, set_learning_rate
from toolkit.train.parallel.ranks import Ranks

if TYPE_CHECKING:
    import torch


class Engine:
    """One process: nothing is shared, nothing is sent.

    Engines of several processes override what differs. All of them average gradients over ranks, so
    the loop multiplies its loss by their number.

    Attributes:
        model: The model as it was built; with a sharded engine its weights are whole only inside
            :meth:`call`.
        optimizer: Its ``param_groups`` hold the learning rate.
        ranks: This process among all.
    """

    name: ClassVar[str] = "single"
    shards_weights: ClassVar[bool] = False
    """Whether a GPU need not hold all weights."""
    shares_state: ClassVar[bool] = False
    """Whether no rank alone holds all trained weights and what the optimizer keeps for them."""

    def __init__(self, model: Any, config: TrainSection, numerics: Numerics, ranks: Ranks) -> None:
        self.model = model
        self.config = config
        self.ranks = ranks
        self.wrapped = self.wrap(inside(model), numerics)
        self.optimizer = self.build_optimizer()

    @classmethod
    def built_on(cls, folder: Path, device: str) -> str:
        """Where to build the model: the device, or the CPU when it is shared out because it is large."""
        import torch

        if device == "cpu" or not cls.shards_weights:
            return device
        stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return device if stored < torch.cuda.mem_get_info()[1] / 3 else "cpu"

    def wrap(self, root: Any, numerics: Numerics) -> Any:  # noqa: ARG002 - for engines with a use for it
        """The module to call instead of ``root``."""
        return root

    def build_optimizer(self) -> Any:
        """The optimizer over what this rank updates."""
        return build_optimizer(self.model, self.config)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(model, *arguments)`` as one forward pass: weights are whole within.

        All ranks must call, as often as each other.
        """
        return self.wrapped(function, *arguments)

    def gradients(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
        """Add the gradients of ``scale * summed loss``; return that loss, on its device.

        Args:
            batch: This rank's.
            scale: What the summed loss is multiplied by.
            last: Whether this is the last forward pass before :meth:`update`.
        """
        del last
        loss: torch.Tensor = self.call(summed_loss, batch) * scale
        loss.backward()
        return loss.detach()

    def update(self, learning_rate: float) -> float:
        """Clip to ``max_grad_norm``, step, forget the gradients; return the norm they had."""
        set_learning_rate(self.optimizer, learning_rate)
        norm = self.clip(self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(whole(norm))  # read last: a GPU that is waited for has nothing to do meanwhile

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale gradients down to ``max_norm``; the norm they had, on its device, in shards."""
        import torch

        return torch.nn.utils.clip_grad_norm_([w for _, w in trainable(self.model)], max_norm)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Without gradients and dropout."""
        import torch

        was_training = self.wrapped.training
        self.wrapped.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.wrapped.train(was_training)

    def weights(self) -> Iterator[tuple[str, Any]]:
        """Name and whole value of each trainable weight, one after the other; on all ranks at once."""
        for name, weight in trainable(self.model):
            yield name, whole(weight.detach())

    def moments(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name of each trainable weight, and what the optimizer keeps for it: tensors, numbers."""
        for name, weight in trainable(self.model):
            kept = self.optimizer.state.get(weight, {})
            yield name, {key: whole(value) for key, value in kept.items()}

    def restore(self, moments: Callable[[str], Mapping[str, Any]]) -> None:
        """Put back what :meth:`moments` gave on any number of ranks, asked for by name."""
        for name, weight in trainable(self.model):
            kept = moments(name)
            if kept:
                self.optimizer.state[weight] = {
                    key: like(value, weight) for key, value in kept.items()
                }


def inside(model: Any) -> Any:
    """A module around ``model`` whose forward pass calls any function of it."""
    import torch

    class Inside(torch.nn.Module):  # type: ignore[misc] # torch is not there when types are checked
        """What engines wrap: hooks of the outermost module then cover whatever is computed."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
            return function(self.model, *arguments)

    return Inside()


def whole(value: Any) -> Any:
    """A tensor without its sharding; anything else as it is."""
    gather = getattr(value, "full_tensor", None)
    return gather() if gather else value


def like(value: Any, weight: Any) -> Any:
    """What is kept for ``weight``, on its device; what has its shape also sharded as it is."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(weight.device)
    if value.shape != weight.shape or not hasattr(weight, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)

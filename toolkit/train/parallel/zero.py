"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054): stage 2 and stage 3."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from toolkit.errors import NotInstalledError
from toolkit.train.batches import Batch
from toolkit.train.loss import summed_loss
from toolkit.train.model import Numerics, trainable
from toolkit.train.optimizer import set_learning_rate
from toolkit.train.parallel.engine import Engine

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each weight, besides the count of its steps."""


class Zero2(Engine):
    """Gradients and optimizer state are shared out; every rank holds the weights."""

    name: ClassVar[str] = "zero2"
    stage: ClassVar[int] = 2
    shares_state: ClassVar[bool] = True

    def wrap(self, root: Any, numerics: Numerics) -> Any:
        """DeepSpeed's engine: it owns the optimizer, and clips in its own step.

        Neither ``bf16`` nor ``fp16`` of DeepSpeed is switched on: weights then keep the types in
        which they were built, and adapters stay in float32 on a base in bf16.

        Raises:
            NotInstalledError: deepspeed is not in the training environment.
        """
        del numerics
        deepspeed = _deepspeed(self.ranks.device)
        self.engine, *_ = deepspeed.initialize(
            model=root,
            optimizer=super().build_optimizer(),
            config=settings(self.stage, self.config.max_grad_norm, self.ranks.count),
            dist_init_required=False,
        )
        return self.engine

    def build_optimizer(self) -> Any:
        """DeepSpeed's, around ours."""
        return self.engine.optimizer

    def gradients(self, batch: Batch, scale: float, *, last: bool) -> torch.Tensor:
        """DeepSpeed sends gradients in every pass and wants to know which is the last."""
        self.engine.set_gradient_accumulation_boundary(last)
        loss: torch.Tensor = self.call(summed_loss, batch) * scale
        self.engine.backward(loss, scale_wrt_gas=False)
        return loss.detach()

    def update(self, learning_rate: float) -> float:
        """The engine clips, steps and forgets the gradients."""
        set_learning_rate(self.optimizer, learning_rate)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> Iterator[tuple[str, Any]]:
        """From the shards of the optimizer, which are the truth."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, weight in trainable(self.model):
            yield name, safe_get_full_fp32_param(weight).detach()

    def moments(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Gathered weight by weight; all weights were stepped equally often."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = next(iter(self._inner.state.values()))["step"]
        for name, weight in trainable(self.model):
            kept = {key: safe_get_full_optimizer_state(weight, key) for key in MOMENTS}
            yield name, kept | {"step": steps}

    def restore(self, moments: Callable[[str], Mapping[str, Any]]) -> None:
        """Make the state that AdamW would make in its first step, then fill it."""
        import torch
        from deepspeed.utils import safe_set_full_optimizer_state

        named = {name: moments(name) for name, _ in trainable(self.model)}
        steps = next(iter(named.values()))["step"]
        for part in self._parts():
            made = {key: torch.zeros_like(part) for key in MOMENTS}
            self._inner.state[part] = made | {"step": steps.clone().to(part.device)}
        self._link_state()
        for name, weight in trainable(self.model):
            for key in MOMENTS:
                value = named[name][key].to(self.engine.device)
                safe_set_full_optimizer_state(weight, value, key)

    @property
    def _inner(self) -> Any:
        """Our AdamW, over the parts of this rank."""
        return self.engine.optimizer.optimizer

    def _parts(self) -> list[Any]:
        """The flat weights that AdamW steps on this rank, one for each of its groups."""
        return list(self.engine.optimizer.single_partition_of_fp32_groups)

    def _link_state(self) -> None:
        """Tell the weights where their state is; ZeRO-2 does so by itself only after a step."""
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()


class Zero3(Zero2):
    """Weights are shared out too, and gathered module by module."""

    name: ClassVar[str] = "zero3"
    stage: ClassVar[int] = 3
    shards_weights: ClassVar[bool] = True

    def _parts(self) -> list[Any]:
        return list(self.engine.optimizer.fp32_partitioned_groups_flat)

    def _link_state(self) -> None:
        """Stage 3 looks its state up by itself."""


def settings(stage: int, max_norm: float, ranks: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Batches are ours: it is told sizes only because it insists."""
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": stage == 3,
        },
    }


def _deepspeed(device: str) -> Any:
    """The package, told which accelerator is meant: it looks for one while it is imported."""
    os.environ["DS_ACCELERATOR"] = device
    try:
        import deepspeed
    except ImportError as error:
        raise NotInstalledError(
            "train.parallel is zero2 or zero3, but deepspeed is not in the training environment",
            "use train.parallel: fsdp, or build the environment anew: toolkit env sync train",
        ) from error
    # a kernel that is compiled at the first start, for tensors that are tiny here
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "gloo" if device == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed

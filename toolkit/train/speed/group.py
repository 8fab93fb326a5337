"""Linear layers that read the same input, computed as one; and how a model's own code meets them.

PEFT's modules stay where they are (saving, loading and effect go on as before); only their class,
and that of the module that calls them, is replaced by a subclass with another ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from toolkit.train.speed.gated import GatedProduct
from toolkit.train.speed.linear import LoraProduct, base_product

ADAPTER = "default"


class Group:
    """Layers with the same input: their merged base, and their adapters as PEFT holds them."""

    def __init__(
        self, members: Sequence[Any], kind: str, frozen: tuple[Tensor, ...], cost: int
    ) -> None:
        self.members = list(members)
        self.kind = kind
        self.frozen = frozen
        self.cost = cost
        first = members[0]
        self.scale = float(first.scaling[ADAPTER])
        self.sizes = [member.out_features for member in members]
        biases = [member.get_base_layer().bias for member in members]
        self.bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each member gives for ``x`` [..., I]."""
        rows = x.reshape(-1, x.shape[-1])
        first = self.members[0]
        if first.disable_adapters:
            return self._split(
                base_product(self.kind, rows, self.frozen, *self._nothing(rows), 0), x
            )
        a, b = self.factors(x.dtype)
        dropout = first.lora_dropout[ADAPTER]
        dropped = None
        if first.training and isinstance(dropout, torch.nn.Dropout) and dropout.p > 0:
            dropped = dropout(rows)
        y = LoraProduct.apply(rows, dropped, a, b, self.scale, self.kind, self.cost, *self.frozen)
        return self._split(y, x)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A stacked [R, I] and B block-diagonal [O, R]."""
        a = torch.cat([m.lora_A[ADAPTER].weight for m in self.members]).to(dtype)
        up = [m.lora_B[ADAPTER].weight for m in self.members]
        return a, (up[0] if len(up) == 1 else torch.block_diag(*up)).to(dtype)

    @property
    def plain(self) -> bool:
        """Whether it is a product and its adapter, with no bias and nothing dropped."""
        dropouts = (m.lora_dropout[ADAPTER] for m in self.members)
        return self.bias is None and not any(getattr(d, "p", 0) for d in dropouts)

    def _split(self, y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        if self.bias is not None:
            y = y + self.bias
        parts: tuple[Tensor, ...] = y.view(*x.shape[:-1], y.shape[-1]).split(self.sizes, dim=-1)
        return parts

    def _nothing(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of an adapter of rank 0."""
        return rows.new_empty(len(rows), 0), rows.new_empty(0, sum(self.sizes))


class _Given:
    """Stands for a layer whose result is known, as long as it is asked for the same input."""

    def __init__(self, layer: Any, x: Tensor, y: Tensor) -> None:
        self.layer = layer
        self.x = x
        self.y = y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y if x is self.x else self.layer(x)


class _View:
    """A module with some of its children replaced, for the length of one call."""

    def __init__(self, module: Any, given: dict[str, _Given]) -> None:
        self.speed_module = module
        self.speed_given = given

    def __getattr__(self, name: str) -> Any:
        if name in self.speed_given:
            return self.speed_given[name]
        return getattr(self.speed_module, name)


def _alone(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return self.speed_group(x)[0]


def take_over(layer: Any, group: Group) -> None:
    """Let ``layer``, a PEFT linear layer, compute by ``group``, which has it as its only member."""
    layer.speed_group = group
    layer.__class__ = _alone_class(type(layer))  # type: ignore[arg-type] # types are hashable


@cache
def _alone_class(plain: type) -> type:
    """One class for all layers: compiled code is shared by modules of the same class."""
    return type("Speed" + plain.__name__, (plain,), {"forward": _alone})


def gate(parent: Any, up: Group, down: Group) -> None:
    """Let ``parent``, whose ``up`` shares its input, compute its whole block at once."""
    parent.speed_down = down
    parent.__class__ = _gating_class(type(parent))  # type: ignore[arg-type]


@cache
def _gating_class(sharing: Any) -> type:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        up, down = self.speed_group, self.speed_down
        if up.members[0].disable_adapters:
            result: Tensor = sharing.forward(self, hidden_states)
            return result
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        given = (*up.factors(rows.dtype), *down.factors(rows.dtype))
        result = GatedProduct.apply(
            rows, *given, (up.scale, down.scale), up.kind, (up.cost, down.cost), len(up.frozen),
            *up.frozen, *down.frozen,
        )  # fmt: skip
        return result.view_as(hidden_states)

    return type(sharing.__name__, (sharing,), {"forward": forward})


def share_input(parent: Any, names: Sequence[str], group: Group) -> None:
    """Let ``parent`` compute its children ``names`` at once, when it is called with their input.

    The model's own code then runs on a view of the module in which these layers are already done. A
    layer that is nevertheless asked for something else computes that.
    """
    parent.speed_group = group
    parent.__class__ = _sharing_class(type(parent), tuple(names))  # type: ignore[arg-type]


@cache
def _sharing_class(plain: Any, names: tuple[str, ...]) -> type:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        results = self.speed_group(hidden_states)
        given = {
            name: _Given(getattr(self, name), hidden_states, result)
            for name, result in zip(names, results, strict=True)
        }
        return plain.forward(_View(self, given), hidden_states, *args, **kwargs)

    return type("Speed" + plain.__name__, (plain,), {"forward": forward})

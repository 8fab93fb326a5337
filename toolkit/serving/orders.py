"""What ``toolkit adapters`` may ask of a running server: paths of the control socket, and what they do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolkit.errors import UsageError
from toolkit.recipe.base import slug
from toolkit.serving.state import AdapterSpec

if TYPE_CHECKING:
    from toolkit.serving.adapters import AdapterSet, Change

Order = Callable[["AdapterSet", Mapping[str, Any]], "Change"]

ORDERS: Mapping[str, Order] = {
    "load": lambda adapters, body: adapters.load(_spec(body)),
    "unload": lambda adapters, body: adapters.unload(_text(body, "name")),
    "swap": lambda adapters, body: adapters.swap(_spec(body), body.get("label", "stable")),
    "canary": lambda adapters, body: adapters.canary(
        _spec(body), _share(body), _text(body, "header")
    ),
    "promote": lambda adapters, body: adapters.promote(_text(body, "name")),
    "abort": lambda adapters, body: adapters.abort(_text(body, "name")),
}
"""``POST /adapters/<order>``; the body has ``spec`` (an AdapterSpec whose folder is here) or ``name``."""


def answer(
    adapters: AdapterSet, method: str, path: str, body: Mapping[str, Any]
) -> tuple[int, Mapping[str, Any]]:
    """``GET /adapters``, or an order; the answer to an order comes when it is done.

    Raises:
        ToolkitError: The order was refused; nothing changed.
    """
    if (method, path) == ("GET", "/adapters"):
        room = adapters.room
        told = {"doing": adapters.doing, "slots": room.slots, "max_rank": room.max_rank}
        return 200, {"adapters": adapters.rows(), **told}
    order = ORDERS.get(path.removeprefix("/adapters/"))
    if method != "POST" or order is None:
        return 404, {"error": {"message": f"the control socket knows no {method} {path}"}}
    return 200, asdict(order(adapters, body))


def _spec(body: Mapping[str, Any]) -> AdapterSpec:
    try:
        spec = AdapterSpec(**body["spec"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"the body has no adapter in `spec`: {error!r}") from error
    try:
        slug(spec.name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return spec


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise UsageError(f"the body has no text in `{key}`")
    return value


def _share(body: Mapping[str, Any]) -> float:
    weight = body.get("weight")
    if not isinstance(weight, int | float) or not 0 <= weight <= 1:
        raise UsageError(f"the body's `weight` is {weight!r}, not a share from 0 to 1")
    return float(weight)

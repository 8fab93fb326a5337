"""Which names the front answers to, and which web pages may ask it.

A front on loopback that asks nobody for a key trusts its machine. The pages that a browser of that machine shows are
not the machine: a page may send requests to ``http://127.0.0.1:8000`` (its browser then names the page as ``Origin``),
or let its own name lead there, so that the browser takes the server for the page's (DNS rebinding; ``Host`` has that
name then). Where keys are asked for, no page has one: then only what the recipe says is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from toolkit.gateway import refusals
from toolkit.gateway.exposure import is_loopback
from toolkit.recipe.front import FrontSection

ANY = "*"


class Callers:
    """Checks ``Host`` and ``Origin``.

    Args:
        front: Says whether keys are asked for, and who may call beside this machine.
    """

    def __init__(self, front: FrontSection) -> None:
        allow = front.allow
        is_open = not (front.keys or front.jwt)
        self._hosts = frozenset(map(str.lower, allow.hosts))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allow.origins)
        self._checks_host = (is_open or bool(allow.hosts)) and ANY not in self._hosts
        self._checks_origin = (is_open or bool(allow.origins)) and ANY not in self._origins

    def check(self, headers: Mapping[str, str]) -> None:
        """Refuse a request for another name, or of a page from elsewhere.

        Raises:
            toolkit.gateway.openai.ApiError: 403.
        """
        host, origin = headers.get("host"), headers.get("origin")
        if self._checks_host and host is not None and not self._is_ours(_name(f"//{host}")):
            raise refusals.unknown_host(host)
        if self._checks_origin and origin is not None and not self._may_ask(origin):
            raise refusals.unknown_origin(origin)

    def _is_ours(self, name: str) -> bool:
        return is_loopback(name) or name.endswith(".localhost") or name in self._hosts

    def _may_ask(self, origin: str) -> bool:
        return origin.lower() in self._origins or self._is_ours(_name(origin))


def _name(url: str) -> str:
    """The host of a URL; empty where there is none (``Origin: null``) or it cannot be read."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""

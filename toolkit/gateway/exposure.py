"""Who can reach an address, and the rule that nobody beyond this machine gets in unasked."""

from __future__ import annotations

import ipaddress

from toolkit.errors import ToolkitError
from toolkit.recipe.front import FrontSection


def is_loopback(host: str) -> bool:
    """Whether a host is this machine and nothing else. Names but ``localhost`` count as beyond it, so does ``""``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_open_server(host: str, front: FrontSection) -> None:
    """Beyond loopback the front must ask who comes.

    Raises:
        ToolkitError: It would let in anyone who can reach ``host``.
    """
    if is_loopback(host) or front.keys or front.jwt is not None:
        return
    everywhere = {"": "every interface", "0.0.0.0": "every interface", "::": "every interface"}  # noqa: S104
    raise ToolkitError(
        f"serve.host is {host!r} ({everywhere.get(host, 'beyond loopback')}), and the front lets everyone in",
        "set `front: {keys: true}` and make a key with `toolkit keys create NAME`, or set `front.jwt`, "
        "or serve on 127.0.0.1",
    )

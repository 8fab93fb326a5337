"""A port that stays ours from the moment it is chosen until the engine listens on it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from toolkit.engines import LOOPBACK
from toolkit.errors import EngineError


@contextlib.contextmanager
def held(port: int, host: str = LOOPBACK) -> Iterator[int]:
    """Bind ``port`` of ``host`` (0: a free one) without listening, and hold it while the block runs.

    Linux lets a second socket bind the same address if both set ``SO_REUSEADDR`` and neither listens yet, which is what
    the engines, the router and the front do; every other program is refused, and the kernel gives the port to nobody
    who asks for a free one. So the minutes that an engine imports before it binds are no race, and one that is started
    again finds its port free.

    Raises:
        EngineError: Another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((host, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise EngineError(
                f"port {port} of {host} cannot be taken: {error.strerror}",
                "choose another with --set serve.port=N, or 0 for a free one; `toolkit serve --status` lists ours",
            ) from None
        yield holder.getsockname()[1]

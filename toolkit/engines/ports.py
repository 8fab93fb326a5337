"""A port that stays ours from the moment it is chosen until the engine listens on it."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from toolkit.engines import LOOPBACK
from toolkit.errors import EngineError


@contextlib.contextmanager
def held(port: int) -> Iterator[int]:
    """Bind ``port`` on loopback (0: a free one) without listening, and hold it while the block runs.

    Linux lets a second socket bind the same address if both set ``SO_REUSEADDR`` and neither listens yet, which is what
    the engines do; every other program is refused, and the kernel gives the port to nobody who asks for a free one. So
    the minutes that an engine imports before it binds are no race.

    Raises:
        EngineError: Another program listens there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind((LOOPBACK, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise EngineError(
                f"port {port} of {LOOPBACK} cannot be taken: {error.strerror}",
                "choose another with --set serve.port=N, or 0 for a free one; `toolkit serve --status` lists ours",
            ) from None
        yield holder.getsockname()[1]

"""The key file as a running front sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.gateway import refusals
from toolkit.gateway.keys import Key, read

LOOK_EVERY_S = 1.0
"""How often a running front looks whether the file changed."""

log = logging.getLogger(__name__)


class LiveKeys:
    """The keys of a running front: looks at the file at most once a second and reads it again when it changed.

    A file that cannot be trusted (removed, damaged, open to others) lets nobody in until it is mended:
    going on with the keys of before would undo a revocation that was never read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seen = self._identity()  # first: what changes while it is read counts as new
        self._keys = read(path)
        self._looked_s = clock()
        self._failure: ToolkitError | None = None
        self._reading = asyncio.Lock()

    async def check(self, presented: str) -> Key:
        """The living key that was shown.

        Raises:
            toolkit.gateway.openai.ApiError: 401 it is unknown, revoked or expired; 503 the file cannot be read.
        """
        await self._look()
        if self._failure is not None:
            raise refusals.cannot_check("API keys")
        key = self._keys.match(presented)
        if key is None:
            raise refusals.bad_key("Incorrect API key provided.")
        if (state := key.state(time.time())) != "active":
            raise refusals.bad_key(f"This API key ({key.id}) is {state}.")
        return key

    @property
    def failure(self) -> ToolkitError | None:
        """Why no key is taken now."""
        return self._failure

    async def _look(self) -> None:
        if self._clock() - self._looked_s < LOOK_EVERY_S:
            return
        async with self._reading:  # the others wait for the one that reads
            if self._clock() - self._looked_s < LOOK_EVERY_S:
                return
            identity = self._identity()
            if identity != self._seen:
                await self._read_again()
                self._seen = identity
            self._looked_s = self._clock()

    async def _read_again(self) -> None:
        try:
            self._keys = await asyncio.to_thread(
                read, self._path
            )  # 100,000 keys take half a second
            self._failure = None
        except ToolkitError as error:
            self._failure = error
            log.error("no API key is taken: %s", error.message)

    def _identity(self) -> tuple[int, ...] | None:
        try:
            known = self._path.stat()
        except OSError:
            return None
        return (known.st_dev, known.st_ino, known.st_mtime_ns, known.st_ctime_ns, known.st_size)

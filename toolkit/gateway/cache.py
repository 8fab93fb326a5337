"""Answers kept for requests that would be answered the same again.

Kept are answers of complete (not streamed) requests with status 200:

- embeddings;
- chat and completions with ``temperature: 0`` or a ``seed``, one answer (``n`` and ``best_of`` 1), no beam search and
  no ``tools``: an answer may hold ids of tool calls, and a client that sees one twice may take it for done.

Everything else is asked anew, and so is a request with ``Cache-Control: no-cache`` or ``no-store``.

A key is the hash of who asks, of what the certificate says decides an answer, of the weights that answer, and of the
request without what does not change the answer. So no tenant sees another's answers, a new adapter or template starts
with an empty cache, and servers of one model share theirs in Redis.
A cache that does not work is a miss, never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from toolkit.errors import NotInstalledError, ToolkitError
from toolkit.gateway.access import Admission
from toolkit.gateway.table import Table, Target
from toolkit.recipe.front import CacheSection

if TYPE_CHECKING:
    from redis.asyncio import Redis

HEADER = "x-toolkit-cache"
"""Response header: ``hit`` or ``miss``; absent where the request is not cached."""

IGNORED = frozenset(
    {"user", "safety_identifier", "request_id", "metadata", "store", "service_tier", "priority",
     "prompt_cache_key", "prompt_cache_retention", "stream", "stream_options"}
)  # fmt: skip
"""Fields that do not change the answer."""

ENTRY_BYTES = 512
"""What an entry takes besides its answer, about."""
LARGEST_SHARE = 8
"""No answer may take more than this part of the memory."""
REDIS_TIMEOUT_S = 0.25
REDIS_PAUSE_S = 5.0
"""After a failure Redis is not asked for this time, so that an outage costs one request the time-out and not each."""
REDIS_PREFIX = "toolkit:answer:1:"

log = logging.getLogger(__name__)


class Cache(Protocol):
    """Where answers are kept."""

    async def get(self, key: str) -> bytes | None:
        """An answer, or ``None``."""

    async def put(self, key: str, answer: bytes) -> None:
        """Keep an answer."""

    async def close(self) -> None:
        """Give back connections."""


def is_deterministic(path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether the same request would get the same answer, and the client does not ask for a new one."""
    directives = headers.get("cache-control", "").lower()
    if body.get("stream") or "no-cache" in directives or "no-store" in directives:
        return False
    if path.endswith("/embeddings"):
        return True
    if body.get("tools") or body.get("functions") or body.get("use_beam_search"):
        return False
    if any(body.get(count) not in (None, 1) for count in ("n", "best_of")):
        return False
    temperature, seed = body.get("temperature"), body.get("seed")
    greedy = isinstance(temperature, int | float) and temperature == 0
    return greedy or (isinstance(seed, int) and not isinstance(seed, bool))


def certificate_digest(table: Table) -> str:
    """What :func:`key_of` wants; worked out once for each table.

    What the certificate says decides an answer (``answers``), which servers of one model share; all of it where it does
    not say.
    """
    if (answers := table.certificate.get("answers")) is not None:
        return str(answers)
    return hashlib.sha256(json.dumps(table.certificate, sort_keys=True).encode()).hexdigest()


def key_of(
    admission: Admission, certificate: str, target: Target, path: str, body: Mapping[str, Any]
) -> str:
    """The key of a request: 64 hex digits that tell nothing of it."""
    kind = admission.key_class if admission.key_class in ("none", "jwt") else "key"
    asked = {name: value for name, value in body.items() if name not in IGNORED}
    parts = (
        [kind, admission.tenant],
        certificate,
        [target.model_id, target.version],
        path,
        asked,
    )
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class MemoryCache:
    """Answers in this process: a size limit, an age limit, the least recently used go first."""

    def __init__(
        self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._ttl_s, self._clock = max_bytes, ttl_s, clock
        self._entries: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: str) -> bytes | None:
        """An answer that is not too old."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if self._clock() >= entry[0]:
            self._drop(key)
            return None
        self._entries.move_to_end(key)
        return entry[1]

    async def put(self, key: str, answer: bytes) -> None:
        """Keep an answer, unless it is large for this cache."""
        if len(answer) + ENTRY_BYTES > self._max_bytes // LARGEST_SHARE:
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = (self._clock() + self._ttl_s, answer)
        self.size_bytes += len(answer) + ENTRY_BYTES
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        self.size_bytes -= len(self._entries.pop(key)[1]) + ENTRY_BYTES

    async def close(self) -> None:
        """Nothing is held."""


class RedisCache:
    """Answers in a Redis server, shared by several fronts. Its own ``maxmemory`` limits the size."""

    def __init__(
        self,
        url: str,
        max_bytes: int,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = _connect(url)
        self._max_bytes, self._ttl_s, self._clock = max_bytes, ttl_s, clock
        self._paused_until_s = float("-inf")

    async def get(self, key: str) -> bytes | None:
        """An answer; ``None`` also while the server does not answer."""
        found = await self._ask("get", REDIS_PREFIX + key)
        return found if isinstance(found, bytes) else None

    async def put(self, key: str, answer: bytes) -> None:
        """Keep an answer; where that fails it is not kept."""
        if len(answer) <= self._max_bytes // LARGEST_SHARE:
            await self._ask("set", REDIS_PREFIX + key, answer, px=int(self._ttl_s * 1000))

    async def _ask(self, command: str, *arguments: Any, **options: Any) -> Any:
        import redis

        if self._clock() < self._paused_until_s:
            return None
        try:
            return await getattr(self._client, command)(*arguments, **options)
        except (redis.RedisError, OSError, TimeoutError) as error:
            self._paused_until_s = self._clock() + REDIS_PAUSE_S
            log.warning(
                "Redis does not answer, cached answers are misses: %s", type(error).__name__
            )
            return None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _connect(url: str) -> Redis:
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        raise NotInstalledError(
            "front.cache.kind is redis, and the package redis is not installed",
            "pip install 'toolkit[redis]'",
        ) from error
    try:
        return Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:  # the URL may hold a password: it is not repeated
        raise ToolkitError(
            "the URL of Redis is not one", "write redis://HOST:PORT/0, or rediss:// for TLS"
        ) from error


def cache_of(section: CacheSection | None, environ: Mapping[str, str] = os.environ) -> Cache | None:
    """The cache that a recipe asks for.

    Raises:
        ToolkitError: The variable with the URL is not set, or the URL is none.
        NotInstalledError: The package redis is missing.
    """
    if section is None:
        return None
    max_bytes = int(section.max_mib * 2**20)
    if section.kind == "memory":
        return MemoryCache(max_bytes, section.ttl_s)
    if not section.url_env or not environ.get(section.url_env):
        raise ToolkitError(
            f"front.cache.url_env names {section.url_env or 'no variable'}, and Redis needs a URL there",
            "export REDIS_URL=redis://127.0.0.1:6379/0 and set `cache: {kind: redis, url_env: REDIS_URL}`",
        )
    return RedisCache(environ[section.url_env], max_bytes, section.ttl_s)

"""Keys that verify tokens: one shared secret, or the public keys that an identity provider publishes (JWKS).

Each key is bound to the algorithms of its type when it is read. What a token says of itself only picks among these, so
that ``alg: none``, a public key used as an HMAC secret, and keys that a token brings along (``jwk``, ``jku``, ``x5u``)
lead nowhere.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from toolkit.errors import ToolkitError
from toolkit.gateway import refusals
from toolkit.gateway.exposure import is_loopback

ALGORITHMS: dict[tuple[str, str | None], tuple[str, ...]] = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
}
"""(type, curve) of a public key -> the algorithms it may verify. Shared secrets (`oct`) are not taken from a JWKS."""

PUBLIC = ("kty", "crv", "n", "e", "x", "y")
SMALLEST_RSA_BITS = 2048
SMALLEST_SECRET_BYTES = 32
LARGEST_SET_BYTES = 512 * 1024
FETCH_TIMEOUT_S = 5.0
FRESH_S = 600.0
"""A set is fetched again after this time, so that a key taken out of it ends."""
TRY_EVERY_S = 5.0
"""At most one fetch in this time, however many tokens name keys that are not there."""
LOOK_EVERY_S = 1.0

log = logging.getLogger(__name__)


class KeySource(Protocol):
    """Where verification keys come from."""

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key of that id for that algorithm; ``None`` where there is none.

        Raises:
            toolkit.gateway.openai.ApiError: 503, no key could be fetched yet.
        """

    async def close(self) -> None:
        """Give back connections."""


class KeySet:
    """A parsed JWKS. Keys that cannot verify (other uses, weak, unknown types) are left out."""

    def __init__(self, keys: Mapping[str | None, Mapping[str, jwt.PyJWK]]) -> None:
        self._keys = keys

    @classmethod
    def parse(cls, text: str | bytes) -> KeySet:
        """Read a JWKS.

        Raises:
            ValueError: It is none, or no key in it can verify a token.
        """
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        listed = values.get("keys") if isinstance(values, dict) else None
        if not isinstance(listed, list):
            raise ValueError("it has no list `keys`")
        keys: dict[str | None, dict[str, jwt.PyJWK]] = {}
        for entry in listed:
            if isinstance(entry, dict):
                kid = entry.get("kid") if isinstance(entry.get("kid"), str) else None
                keys.setdefault(kid, {}).update(_usable(entry))
        if not any(keys.values()):
            raise ValueError(
                "none of its keys can verify a token (RSA of 2048 bits, EC or Ed25519)"
            )
        return cls(keys)

    def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """By id; a token without one is taken where the set has one key only."""
        if kid is None and len(self._keys) == 1:
            (kid,) = self._keys
        return self._keys.get(kid, {}).get(algorithm)


def _usable(entry: Mapping[str, Any]) -> dict[str, jwt.PyJWK]:
    """The key once for each algorithm it may verify; a field of a type that it should not have leaves a key out."""
    use, uses, curve = entry.get("use"), entry.get("key_ops"), entry.get("crv")
    if use not in (None, "sig") or not isinstance(curve, str | None):
        return {}
    if uses is not None and not (isinstance(uses, list) and "verify" in uses):
        return {}
    fitting = ALGORITHMS.get((str(entry.get("kty")), curve), ())
    stated = entry.get("alg")
    public = {name: entry[name] for name in PUBLIC if name in entry}
    try:
        keys = {a: jwt.PyJWK(public, a) for a in fitting if stated in (None, a)}
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return {}
    strong = (
        not isinstance(key.key, RSAPublicKey) or key.key.key_size >= SMALLEST_RSA_BITS
        for key in keys.values()
    )
    return keys if all(strong) else {}


class Secret:
    """HS256 with a shared secret."""

    def __init__(self, secret: str, variable: str) -> None:
        if len(secret.encode()) < SMALLEST_SECRET_BYTES:
            raise ToolkitError(
                f"${variable} holds {len(secret.encode())} bytes, and a secret for HS256 needs "
                f"{SMALLEST_SECRET_BYTES} at least",
                "make one: openssl rand -hex 32",
            )
        if secret.lstrip().startswith(("-----BEGIN", "ssh-")):
            raise ToolkitError(
                f"${variable} holds a public or private key, not a secret",
                "give public keys as `jwks`; make a secret with: openssl rand -hex 32",
            )
        key = {"kty": "oct", "k": jwt.utils.base64url_encode(secret.encode()).decode()}
        self._key = jwt.PyJWK(key, "HS256")

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:  # noqa: ARG002
        """The secret, for HS256 alone."""
        return self._key if algorithm == "HS256" else None

    async def close(self) -> None:
        """Nothing is held."""


class KeySetFile:
    """A JWKS in a file, read again when it changes. A changed file that is damaged does not replace what was read."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._looked_s, self._seen = clock(), self._identity()
        try:
            self._set = KeySet.parse(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ToolkitError(
                f"{path} is not a set of keys: {error}",
                "front.jwt.jwks names a JWKS file or its URL",
            ) from error

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """By id, in the file as it is now."""
        if self._clock() - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = self._clock()
            self._read_if_changed()
        return self._set.find(kid, algorithm)

    def _read_if_changed(self) -> None:
        identity = self._identity()
        if identity == self._seen:
            return
        self._seen = identity
        try:
            self._set = KeySet.parse(self._path.read_bytes())
        except (OSError, ValueError) as error:
            log.warning(
                "%s changed and cannot be read, the keys of before stay: %s", self._path, error
            )

    def _identity(self) -> tuple[int, int, int] | None:
        try:
            known = self._path.stat()
        except OSError:
            return None
        return (known.st_ino, known.st_mtime_ns, known.st_size)

    async def close(self) -> None:
        """Nothing is held."""


class KeySetUrl:
    """A JWKS at a URL: fetched when first needed, when it is old, and when a token names a key that is not in it.

    While the provider does not answer, the keys of before stay.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        refuse_unsafe_url(url)
        self._url, self._clock = url, clock
        self._set: KeySet | None = None
        self._fetched_s = self._tried_s = float("-inf")
        self._session: aiohttp.ClientSession | None = None
        self._fetching = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None

    async def find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """By id; fetches where that can help."""
        if self._set is None:
            await self._refresh()
        elif self._clock() - self._fetched_s >= FRESH_S:
            self._refresh_beside()
        if self._set is None:
            raise refusals.cannot_check("The identity provider's keys")
        found = self._set.find(kid, algorithm)
        if found is None and self._clock() - self._tried_s >= TRY_EVERY_S:
            await self._refresh()
            found = self._set.find(kid, algorithm)
        return found

    def _refresh_beside(self) -> None:
        """Fetch while requests go on with the keys that are there."""
        if self._background is None or self._background.done():
            self._background = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        async with self._fetching:  # whoever waited finds it done
            if self._clock() - self._tried_s < TRY_EVERY_S:
                return
            self._tried_s = self._clock()
            try:
                self._set = KeySet.parse(await self._fetch())
                self._fetched_s = self._clock()
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                log.warning("%s gives no keys, those of before stay: %r", self._url, error)

    async def _fetch(self) -> bytes:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=FETCH_TIMEOUT_S)
            self._session = aiohttp.ClientSession(timeout=timeout)
        async with self._session.get(self._url, allow_redirects=False) as answer:
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}")
            body = b""
            async for piece in answer.content.iter_chunked(65_536):
                body += piece
                if len(body) > LARGEST_SET_BYTES:
                    raise ValueError(f"it is larger than {LARGEST_SET_BYTES} bytes")
            return body

    async def close(self) -> None:
        """Close the connection."""
        if self._background is not None:
            self._background.cancel()
        if self._session is not None:
            await self._session.close()


def refuse_unsafe_url(url: str) -> None:
    """Whoever can change the keys on their way can make tokens: only https, or http that stays on this machine.

    Raises:
        ToolkitError: It is neither.
    """
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return
    if parts.scheme == "http" and is_loopback(parts.hostname or ""):
        return
    raise ToolkitError(
        f"front.jwt.jwks is {url}, and keys are fetched over https (or http on loopback) only",
        "give the provider's https URL, or a file",
    )

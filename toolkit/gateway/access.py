"""Who asks, and what they may: the question the front puts before it reads a request's body."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from toolkit.errors import ToolkitError
from toolkit.gateway import refusals
from toolkit.gateway.exposure import refuse_open_server
from toolkit.gateway.jwt import Tokens
from toolkit.gateway.keys import PREFIX
from toolkit.gateway.limits import Kind, Meters
from toolkit.gateway.live_keys import LiveKeys
from toolkit.gateway.settings import GatewaySettings
from toolkit.recipe.front import LimitsSection

LARGEST_AUTHORIZATION = 20_000


class Admission(Protocol):
    """One request that was let in. The front calls :meth:`charge` exactly once, however the request ends."""

    @property
    def key_id(self) -> str:
        """Public id of the key (never the key), ``-`` without one; in the access log, never in metrics."""

    @property
    def tenant(self) -> str:
        """Whose request it is."""

    @property
    def key_class(self) -> str:
        """A label in metrics: ``none``, ``jwt``, ``key`` or the class that the key was made with."""

    @property
    def limits(self) -> LimitsSection:
        """Caps of this request: the key's own, or the recipe's."""

    @property
    def headers(self) -> Mapping[str, str]:
        """``x-ratelimit-*`` headers for the answer; empty without limits."""

    def may(self, model: str) -> bool:
        """Whether the bearer may ask this public model; ``/metrics`` stands for the metrics of everyone."""

    async def reserve(self, tokens: int) -> None:
        """Take what the request may need (see ``limits.estimate_tokens``) before it goes to the engine.

        Raises:
            toolkit.gateway.openai.ApiError: 429 with ``Retry-After``.
        """

    async def charge(self, tokens: int) -> None:
        """Settle what was reserved: prompt and completion tokens that the request took, 0 if it was refused."""


class Access(Protocol):
    """Decides who is let in."""

    async def admit(self, headers: Mapping[str, str], model: str | None) -> Admission:
        """Let a request in and reserve its place in the limits.

        The front asks before it reads the body (``model`` is ``None`` then) and calls ``may`` once it knows the
        model. Header names are lower case.

        Raises:
            toolkit.gateway.openai.ApiError: 401 who is it, 403 not allowed, 429 with ``Retry-After``.
        """

    async def close(self) -> None:
        """Give back files and connections."""


@dataclass(frozen=True)
class Bearer:
    """Who asks. ``models`` is ``None`` where all are allowed."""

    key_id: str
    tenant: str
    key_class: str
    limits: LimitsSection
    models: frozenset[str] | None = None


class Admitted:
    """One request of a bearer."""

    def __init__(self, bearer: Bearer, meters: Meters) -> None:
        self._bearer = bearer
        self._meters = meters
        self._reserved = 0
        self._headers: dict[str, str] = {}
        self.key_id = bearer.key_id
        self.tenant = bearer.tenant
        self.key_class = bearer.key_class
        self.limits = bearer.limits
        self.headers: Mapping[str, str] = self._headers
        self._take("requests", bearer.limits.requests_per_minute, 1)
        self._take("tokens", bearer.limits.tokens_per_minute, 0)  # a key in debt waits

    def may(self, model: str) -> bool:
        """Whether the bearer may ask this public model."""
        return self._bearer.models is None or model in self._bearer.models

    async def reserve(self, tokens: int) -> None:
        """Take an estimate; :meth:`charge` settles it."""
        self._take("tokens", self.limits.tokens_per_minute, tokens)
        self._reserved += tokens

    async def charge(self, tokens: int) -> None:
        """Take the difference to the estimate, or give it back."""
        limit = self.limits.tokens_per_minute
        if limit is not None and tokens != self._reserved:
            self._meters.settle(self._bearer.key_id, "tokens", limit, tokens - self._reserved)
        self._reserved = tokens

    def _take(self, kind: Kind, limit: int | None, amount: int) -> None:
        if limit is not None:
            standing = self._meters.take(self._bearer.key_id, kind, limit, amount)
            self._headers.update(standing.headers())


class Gate:
    """Asks for a key or a token; lets everyone in where neither is configured (loopback only)."""

    def __init__(
        self, limits: LimitsSection, keys: LiveKeys | None = None, tokens: Tokens | None = None
    ) -> None:
        self._limits = limits
        self._keys = keys
        self._tokens = tokens
        self._meters = Meters()
        self._anyone = Bearer("-", "-", "none", limits)

    async def admit(self, headers: Mapping[str, str], model: str | None) -> Admission:
        """Find out who asks, and take the request out of their limits."""
        admitted = Admitted(await self._bearer(headers.get("authorization")), self._meters)
        if model is not None and not admitted.may(model):
            raise refusals.not_for_you(model)
        return admitted

    async def _bearer(self, authorization: str | None) -> Bearer:
        if self._keys is None and self._tokens is None:
            return self._anyone
        if not authorization:
            raise refusals.no_key()
        scheme, _, shown = authorization.strip().partition(" ")
        shown = shown.strip()
        if scheme.lower() != "bearer" or not shown or len(authorization) > LARGEST_AUTHORIZATION:
            raise refusals.bad_key("The Authorization header is not 'Bearer KEY'.")
        if self._keys is not None and (self._tokens is None or shown.startswith(PREFIX)):
            return await self._bearer_of_key(self._keys, shown)
        if self._tokens is not None:
            return await self._bearer_of_token(self._tokens, shown)
        raise refusals.bad_key("Incorrect API key provided.")

    async def _bearer_of_key(self, keys: LiveKeys, shown: str) -> Bearer:
        key = await keys.check(shown)
        own = {
            "requests_per_minute": key.requests_per_minute,
            "tokens_per_minute": key.tokens_per_minute,
        }
        own = {name: value for name, value in own.items() if value is not None}
        limits = self._limits.model_copy(update=own) if own else self._limits
        models = None if key.models is None else frozenset(key.models)
        return Bearer(key.id, key.tenant, key.key_class, limits, models)

    async def _bearer_of_token(self, tokens: Tokens, shown: str) -> Bearer:
        claims = await tokens.check(shown)
        subject = claims["sub"]
        return Bearer(f"jwt:{subject}", subject, "jwt", self._limits, tokens.models(claims))

    async def close(self) -> None:
        """Close the connection to the identity provider."""
        if self._tokens is not None:
            await self._tokens.close()


class Open(Gate):
    """Lets everyone in, with the recipe's limits over all together: only for loopback."""

    def __init__(self, limits: LimitsSection) -> None:
        super().__init__(limits)


def access_of(settings: GatewaySettings) -> Access:
    """Who is let in by these settings. Called inside the running event loop.

    Raises:
        ToolkitError: Anyone who reaches the address would be let in, or keys and secrets cannot be read.
    """
    front = settings.front
    refuse_open_server(settings.host, front)
    if front.keys and settings.keys_file is None:
        raise ToolkitError("front.keys is true and no keys_file is set", "name it in the settings")
    keys = LiveKeys(settings.keys_file) if front.keys and settings.keys_file else None
    return Gate(front.limits, keys, Tokens(front.jwt) if front.jwt is not None else None)

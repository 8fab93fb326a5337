"""``serve.front:`` who may ask the served models, how much, and what is written down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from toolkit.recipe.base import Count, Section

Positive = Annotated[float, Field(gt=0)]


def _host(text: str) -> str:
    if not text or set(text) & set("/:@ "):
        raise ValueError(f"{text!r} is not a name: write llm.example.com, without scheme and port")
    return text


def _origin(text: str) -> str:
    scheme, _, rest = text.partition("://")
    if text != "*" and (scheme not in ("http", "https") or not rest or "/" in rest.rstrip("/")):
        raise ValueError(f"{text!r} is not an origin: write https://app.example.com")
    return text


Host = Annotated[str, AfterValidator(_host)]
Origin = Annotated[str, AfterValidator(_origin)]


class JwtSection(Section):
    """JSON Web Tokens that an identity provider signs."""

    issuer: str
    """Value that `iss` must have."""
    audience: str
    """Value that `aud` must have or hold."""
    jwks: str | None = None
    """URL (https, or http on loopback) of the keys for RS256, ES256 and the like, or their file, relative to the
    recipe; read again when a key id is new."""
    secret_env: str | None = None
    """Environment variable with the secret for HS256; give this or `jwks`."""
    models_claim: str = "models"
    """Claim with the model names (a list, or words in one string) that the bearer may ask; `*` is all.
    Words such as `model:NAME` in `scope` count too. A token that names no model may ask none."""

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> Self:
        if (self.jwks is None) == (self.secret_env is None):
            raise ValueError("give either `jwks` (RS256, ES256, ...) or `secret_env` (HS256)")
        return self


class LimitsSection(Section):
    """What one request and one key may take; a key made with limits of its own keeps those."""

    requests_per_minute: Count | None = None
    """Requests of one key per minute; no limit unless given."""
    tokens_per_minute: Count | None = None
    """Prompt and completion tokens of one key per minute; no limit unless given."""
    max_body_mib: Positive = 8
    """Largest request body, MiB."""
    max_n: Count = 8
    """Largest `n` (and `best_of`)."""
    max_tokens: Count | None = None
    """Largest `max_tokens` of a request, and what a request without one gets; the context unless given."""
    max_in_flight: Count = 4096
    """Requests that are open together over all keys; more get 503 with `Retry-After`."""


class AllowSection(Section):
    """What requests may bring that could make the server do something else than the recipe says, and whence."""

    chat_template: bool = False
    """A request may bring its own chat template."""
    remote_media: bool = False
    """A request may name media by URL, which the engine then fetches; `data:` URLs are always allowed."""
    hosts: tuple[Host, ...] = ()
    """Names (without port) that clients may use for this server beside loopback's, such as that of a proxy before it;
    `*` is any. Checked where the front asks for no key, and where names are given."""
    origins: tuple[Origin, ...] = ()
    """Web pages that may ask (`https://app.example.com`) beside those of this machine; `*` is any. Checked like
    `hosts`; a request without `Origin` does not come from a page."""


class CacheSection(Section):
    """Answers kept for deterministic requests (`temperature: 0`, or a `seed`), by tenant and by what decides them."""

    kind: Literal["memory", "redis"] = "memory"
    """In the front's memory, or in a Redis server, where servers of one model share them."""
    url_env: str | None = None
    """Environment variable with the Redis URL."""
    max_mib: Positive = 64
    """Memory for answers, MiB; the least recently used go first."""
    ttl_s: Count = 3600
    """Seconds that an answer is kept."""

    @model_validator(mode="after")
    def _redis_has_a_url(self) -> Self:
        if self.kind == "redis" and self.url_env is None:
            raise ValueError("`kind: redis` needs `url_env`, the variable that holds the URL")
        return self


class FrontSection(Section):
    """The server that clients talk to; the engine listens on loopback behind it."""

    keys: bool = False
    """Ask for an API key made by `toolkit keys`; needed (or `jwt`) when `serve.host` is not loopback."""
    jwt: JwtSection | None = None
    """Take JSON Web Tokens too."""
    limits: LimitsSection = LimitsSection()
    """Limits per request and per key."""
    allow: AllowSection = AllowSection()
    """What requests may bring."""
    cache: CacheSection | None = None
    """Keep answers to deterministic requests."""
    log_prompts: bool = False
    """Write prompts and answers into the access log; off, it has ids, counts and times only."""
    traces: bool = False
    """Write a trace of each request into MLflow (ids, counts, times; texts only with `log_prompts`)."""

    def beside(self, folder: Path) -> FrontSection:
        """The same, with the files it names found from ``folder``, where the recipe lies."""
        if self.jwt is None or self.jwt.jwks is None or "://" in self.jwt.jwks:
            return self
        jwt = self.jwt.model_copy(update={"jwks": str(folder.absolute() / self.jwt.jwks)})
        return self.model_copy(update={"jwt": jwt})

"""JSON Web Tokens of one issuer: who the bearer is and which models they may ask."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt

from toolkit.errors import ToolkitError
from toolkit.gateway import refusals
from toolkit.gateway.jwks import KeySetFile, KeySetUrl, KeySource, Secret
from toolkit.recipe.front import JwtSection

LEEWAY_S = 10
"""Clocks of issuer and server may differ by this much."""
LARGEST_TOKEN = 16 * 1024
LONGEST_SUBJECT = 256
COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
SCOPE_PREFIX = "model:"
"""Words of `scope` that name models: `model:tickets`, `model:*`."""


class Tokens:
    """Checks the tokens that a recipe's `front.jwt` allows."""

    def __init__(self, section: JwtSection, environ: Mapping[str, str] = os.environ) -> None:
        self._section = section
        self._source = _source(section, environ)

    async def check(self, token: str) -> Mapping[str, Any]:
        """The claims of a token whose signature, issuer, audience and times are right.

        Raises:
            toolkit.gateway.openai.ApiError: 401 they are not; 503 the keys cannot be fetched.
        """
        if len(token) > LARGEST_TOKEN or not COMPACT.fullmatch(token):
            raise refusals.bad_key("The token is not a signed JSON Web Token.")
        try:
            header = jwt.get_unverified_header(token)  # picks a key; nothing else in it is believed
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise refusals.bad_key("The token is not a signed JSON Web Token.") from error
        key = await self._source.find(header.get("kid"), str(header.get("alg")))
        if key is None:
            raise refusals.bad_key(
                "The token is not signed with a key and algorithm of this issuer."
            )
        return self._verified(token, key)

    def _verified(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any]:
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self._section.audience,
                issuer=self._section.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, OverflowError) as error:
            raise refusals.bad_key(_reason(error)) from error
        if not 0 < len(claims["sub"]) <= LONGEST_SUBJECT:
            raise refusals.bad_key(
                f"The token's `sub` must have 1 to {LONGEST_SUBJECT} characters."
            )
        return claims

    def models(self, claims: Mapping[str, Any]) -> frozenset[str] | None:
        """Public models that the bearer may ask; ``None`` is all. A token that names none may ask none."""
        named = _words(claims.get(self._section.models_claim))
        scope = _words(claims.get("scope", claims.get("scp")))
        named |= {w.removeprefix(SCOPE_PREFIX) for w in scope if w.startswith(SCOPE_PREFIX)}
        return None if "*" in named else frozenset(named)

    async def close(self) -> None:
        """Close the connection to the identity provider."""
        await self._source.close()


def _source(section: JwtSection, environ: Mapping[str, str]) -> KeySource:
    if section.secret_env is not None:
        if section.secret_env not in environ:
            raise ToolkitError(
                f"front.jwt.secret_env names ${section.secret_env}, which is not set",
                f"export {section.secret_env}=$(openssl rand -hex 32)",
            )
        return Secret(environ[section.secret_env], section.secret_env)
    jwks = section.jwks or ""
    return KeySetUrl(jwks) if "://" in jwks else KeySetFile(Path(jwks))


def _words(value: Any) -> set[str]:
    """A claim that is a list of names, or names in one string."""
    if isinstance(value, str):
        return set(value.split())
    return {word for word in value if isinstance(word, str)} if isinstance(value, list) else set()


def _reason(error: Exception) -> str:
    """What to say; first match counts, and what is not listed here is not told apart."""
    reasons: list[tuple[type[Exception], str]] = [
        (jwt.ExpiredSignatureError, "The token has expired."),
        (jwt.ImmatureSignatureError, "The token is not valid yet (`nbf` or `iat`)."),
        (jwt.InvalidAudienceError, "The token is for another audience (`aud`)."),
        (jwt.InvalidIssuerError, "The token is from another issuer (`iss`)."),
        (jwt.MissingRequiredClaimError, f"{error}.".replace("Token is missing", "The token lacks")),
        (jwt.InvalidSignatureError, "The token's signature is wrong."),
    ]
    return next(
        (text for kind, text in reasons if isinstance(error, kind)), "The token is not valid."
    )

"""The connection to the engine, or to the router before several."""

from __future__ import annotations

import aiohttp

from toolkit.gateway.openai import ApiError

IDLE_S = 3.0
"""How long an idle connection is kept: engines close theirs after 5 s, and a request into a closing one is lost."""
SILENCE_S = 1800.0
"""A request on which nothing comes for this long is given up; the supervisor notices a hung engine far sooner."""
RETRY = {"Retry-After": "1"}


class Upstream:
    """Asks; made and closed inside the event loop."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=SILENCE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            trust_env=False,
        )

    async def post(self, url: str, body: bytes, request_id: str) -> aiohttp.ClientResponse:
        """Send a request and wait until the engine begins to answer.

        Raises:
            ApiError: 503 nothing listens there, 502 it went away, 504 it says nothing.
        """
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        try:
            return await self._session.post(url, data=body, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError as error:
            raise unavailable() from error
        except (aiohttp.ClientError, TimeoutError) as error:  # gone, silent, or not HTTP
            raise broken(error) from error

    async def close(self) -> None:
        """Close the idle connections."""
        await self._session.close()


def unavailable() -> ApiError:
    """Nothing listens where the engine should."""
    return ApiError(
        503,
        "The engine cannot be reached; it may be restarting.",
        code="engine_unavailable",
        headers=RETRY,
    )


def broken(error: Exception) -> ApiError:
    """The connection to the engine broke before it answered."""
    if isinstance(error, TimeoutError):
        return ApiError(504, "The engine did not answer in time.", code="engine_timeout")
    return ApiError(
        502, "The engine went away before it answered.", code="engine_died", headers=RETRY
    )

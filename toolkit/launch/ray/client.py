"""Ray's Jobs API over HTTP, with the standard library.

The documented API is five addresses. Ray's own client for it comes with 300 MB of Ray, and with versions of its own of
what the core has.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from toolkit.errors import BackendError
from toolkit.launch import secrets
from toolkit.launch.ray.section import RaySection

TOKEN_FILE = Path(".ray/auth_token")
"""Below the home folder: where Ray keeps its token."""
JOBS = "/api/jobs/"


class Refused(BackendError):  # noqa: N818 - named for what happened
    """The head's answer was no; ``status`` is HTTP's."""

    def __init__(self, message: str, hint: str | None, status: int) -> None:
        super().__init__(message, hint)
        self.status = status


@dataclass(frozen=True)
class Head:
    """The head of a cluster."""

    section: RaySection

    def create(self, body: str) -> None:
        """Submit a job.

        Raises:
            BackendError: The head does not answer.
            Refused: It says no; with an id that it has already too.
        """
        self._ask("POST", JOBS, body.encode())

    def list(self) -> dict[str, dict[str, Any]]:
        """Every job that the cluster remembers, by its submission id.

        Raises:
            BackendError: The head does not answer.
            Refused: It says no.
        """
        found = self._json(JOBS)
        return {one["submission_id"]: one for one in found if one.get("submission_id")}

    def find(self, name: str) -> dict[str, Any] | None:
        """One job; ``None`` where there is none.

        Raises:
            BackendError: The head does not answer.
            Refused: It says no.
        """
        try:
            found: dict[str, Any] = self._json(JOBS + quote(name))
        except Refused as error:
            if error.status != 404:
                raise
            return None
        return found

    def stop(self, name: str) -> None:
        """Send SIGTERM to every process of a job, and SIGKILL to what is left; one that is not there is left at that.

        Raises:
            BackendError: The head does not answer.
            Refused: It says no.
        """
        try:
            self._ask("POST", f"{JOBS}{quote(name)}/stop")
        except Refused as error:
            if error.status != 404:
                raise

    def forget(self, name: str) -> None:
        """Remove a job that ended.

        Raises:
            BackendError: The head does not answer.
            Refused: It says no.
        """
        self._ask("DELETE", JOBS + quote(name))

    def log(self, name: str) -> str:
        """What a job printed so far.

        Raises:
            BackendError: The head does not answer.
            Refused: It says no.
        """
        return str(self._json(f"{JOBS}{quote(name)}/logs")["logs"])

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        url = self.section.address.rstrip("/") + path
        headers = {"Content-Type": "application/json"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        asked = Request(url, body, headers, method=method)  # noqa: S310 - http or https by the section
        tls = self._tls()
        try:
            with urlopen(asked, timeout=self.section.timeout_s, context=tls) as answer:  # noqa: S310
                found: bytes = answer.read()
        except HTTPError as error:
            raise _refused(error) from error
        except (URLError, OSError) as error:
            why = getattr(error, "reason", None) or error
            raise BackendError(
                f"Ray at {self.section.address} does not answer: {why}",
                "is the cluster up, and its dashboard reachable from here? ray.address in the profile, or a tunnel: "
                "ssh -L 8265:127.0.0.1:8265 HEAD",
            ) from error
        return found

    def _json(self, path: str) -> Any:
        found = self._ask("GET", path)
        try:
            return json.loads(found)
        except ValueError as error:
            raise BackendError(
                f"{self.section.address} does not answer as Ray's Jobs API does: {found[:100]!r}",
                "ray.address in the profile is the address of the dashboard, such as http://HEAD:8265",
            ) from error

    def _tls(self) -> ssl.SSLContext | None:
        if not self.section.address.startswith("https:"):
            return None
        try:
            return ssl.create_default_context(cafile=self.section.ca)
        except OSError as error:
            raise BackendError(f"ray.ca in the profile: {self.section.ca}: {error}") from error

    def _token(self) -> str | None:
        """The profile's, or the one that Ray's own client would show."""
        if self.section.token:
            return secrets.values({"token": self.section.token})["token"]
        return _token_of(os.environ)


def _token_of(environ: Mapping[str, str]) -> str | None:
    """``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names, or ``~/.ray/auth_token``."""
    if given := environ.get("RAY_AUTH_TOKEN"):
        return given
    file = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE)
    return file.read_text().strip() if file.is_file() else None


def _refused(error: HTTPError) -> Refused:
    """Ray answers with a traceback; its last line with a word in it says what is wrong."""
    found = error.read().decode(errors="replace").splitlines()
    lines = [line.strip() for line in found if any(letter.isalnum() for letter in line)]
    said = lines[-1][:500] if lines else error.reason
    hint = None
    if error.code in (401, 403):
        hint = "the cluster wants its token: ray.token in the profile, RAY_AUTH_TOKEN, or ~/.ray/auth_token"
    return Refused(f"Ray refuses ({error.code}): {said}", hint, error.code)

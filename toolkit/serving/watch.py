"""Follow aliases of the registry: when one moves, fetch, check, prove and swap; or refuse, and say so in the registry.

Roll-back is moving the alias back. A store that is away changes nothing: the server serves on what it has.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from toolkit.errors import EngineError, ToolkitError, TrackingError
from toolkit.serving.desired import follows_alias, read_spec
from toolkit.serving.fleet import Fleet
from toolkit.serving.registry import ModelRegistry, Registered, is_away
from toolkit.serving.state import AdapterSpec

if TYPE_CHECKING:
    from toolkit.serving.adapters import AdapterSet

TRIES = 3
"""Times that an engine may fail to load a version before the version is refused."""
JOIN_S = 1.0


class Say(Protocol):
    """``Fleet.event``."""

    def __call__(self, event: str, **values: Any) -> None:
        """Tell whoever watches the server."""
        ...


class Watcher:
    """Looks at every alias that the server's adapters come from, in a thread of its own.

    Args:
        adapters: What is changed.
        registry: Where aliases are.
        server: Name of the server, in tags: ``toolkit.serving.<server>``.
        every_s: Seconds between two looks.
        say: Told what happens.
    """

    def __init__(
        self,
        adapters: AdapterSet,
        registry: ModelRegistry,
        server: str,
        every_s: float,
        say: Say,
    ) -> None:
        self._adapters, self._registry, self._say = adapters, registry, say
        self._tag = f"toolkit.serving.{server}"
        self._every_s = every_s
        self._refused: dict[tuple[str, str], str] = {}
        self._failed: dict[str, int] = {}
        self._unsaid: dict[tuple[str, str], str] = {}
        self._away = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch-aliases", daemon=True)

    @classmethod
    def of(cls, fleet: Fleet, adapters: AdapterSet, every_s: float) -> Watcher:
        """For the store of a server."""
        registry = ModelRegistry.of(fleet.spec)
        return cls(adapters, registry, fleet.spec.name, every_s, fleet.event)

    def start(self) -> None:
        """Begin; says of every version that is served now that it is."""
        for spec in self._adapters.desired():
            if spec.registered:
                self._note(spec.registered, f"serving since {_now()}")
        self._thread.start()

    def close(self) -> None:
        """End; a call that hangs in the network ends with the process."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def look(self) -> None:
        """Follow each alias that moved; tell the registry what could not be told before."""
        for spec in self._adapters.desired():
            if follows_alias(spec) and not self._closing.is_set():
                self._follow(spec)
        self._tell_registry()

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self.look()
            except OSError as error:  # a full disk: another time there may be room
                self._is_away(EngineError(str(error)))

    def _follow(self, spec: AdapterSpec) -> None:
        key, source = (spec.name, spec.label), str(spec.source)
        try:
            found = self._registry.resolve(source, remembered=False)
        except TrackingError as error:
            self._is_away(error)
            return
        self._away = False
        if found.uri == spec.registered:
            self._refused.pop(key, None)
        elif self._refused.get(key) != found.uri:
            self._say("note", text=f"{source} is version {found.version} now")
            self._swap(spec, source, found)

    def _swap(self, spec: AdapterSpec, source: str, found: Registered) -> None:
        try:
            folder = self._registry.fetch(found)
            new = read_spec(spec.name, folder, source, found.uri)
            change = self._adapters.swap(new, spec.label)
        except ToolkitError as error:
            self._refuse(spec, found, error)
            return
        self._failed.pop(found.uri, None)
        shown = change.proven.get(new.lora_name)
        self._note(found.uri, f"serving since {_now()}" + (f": {shown}" if shown else ""))
        if spec.registered:
            self._note(spec.registered, f"served until {_now()}")
        self._say("swap", name=spec.name, version=found.uri, instead_of=spec.registered)

    def _refuse(self, spec: AdapterSpec, found: Registered, error: ToolkitError) -> None:
        """Once and for all what says something about the version; what may pass is tried again."""
        if is_away(error):
            self._is_away(error)
            return
        self._failed[found.uri] = self._failed.get(found.uri, 0) + 1
        if isinstance(error, EngineError) and self._failed[found.uri] < TRIES:
            self._say("note", text=f"{found.uri} was not loaded, trying again: {error.message}")
            return
        self._failed.pop(found.uri)
        self._refused[spec.name, spec.label] = found.uri
        self._note(found.uri, f"refused: {error.message}")
        self._say("refused", name=spec.name, version=found.uri, cause=error.message)

    def _is_away(self, error: ToolkitError) -> None:
        if not self._away:
            self._say("note", text=f"aliases are not followed for now: {error.message}")
        self._away = True

    def _note(self, uri: str, text: str) -> None:
        name, _, version = uri.removeprefix("models:/").rpartition("/")
        self._unsaid[name, version] = text

    def _tell_registry(self) -> None:
        for (name, version), text in list(self._unsaid.items()):
            try:
                self._registry.tag(name, version, self._tag, text)
            except TrackingError as error:
                self._is_away(error)
                return
            self._unsaid.pop((name, version))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Inference engines: programs that are started and never imported.

An engine module is pure: it turns a :class:`Deployment` into the exact command line, knows which line of its log begins
which phase of start-up, and reads the cause out of a log that ends badly. ``server.py`` does the rest for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from toolkit.errors import EngineError
from toolkit.recipe.serve import ServeSection
from toolkit.registry import Registry

LOOPBACK = "127.0.0.1"
"""The only address an engine listens on; a wider one is the business of a front that knows its clients."""


@dataclass(frozen=True)
class Command:
    """What is started: a list of arguments and changes to the environment; ``None`` removes a variable."""

    argv: tuple[str, ...]
    env: Mapping[str, str | None] = field(default_factory=dict)

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with the changes made."""
        changed: dict[str, str | None] = {**base, **self.env}
        return {key: value for key, value in changed.items() if value is not None}


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter folder and the model name that clients ask for."""

    name: str
    path: Path
    rank: int

    @classmethod
    def read(cls, name: str, path: Path) -> Adapter:
        """Read the rank from ``adapter_config.json``: the largest of ``r`` and ``rank_pattern``.

        Raises:
            EngineError: The folder is not a LoRA adapter.
        """
        file = path / "adapter_config.json"
        try:
            config = json.loads(file.read_text())
            ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
        except FileNotFoundError:
            raise EngineError(
                f"adapter {name!r} is not in {path}: no adapter_config.json there",
                "give the folder that PEFT or the export stage wrote",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{file} is not the configuration of a LoRA adapter: {error!r}",
                "train or export it again",
            ) from None
        return cls(name, path, max(ranks))


@dataclass(frozen=True)
class Deployment:
    """Everything that decides the command line of one engine process."""

    model: Path
    name: str
    max_length: int
    device: str
    serve: ServeSection
    adapters: tuple[Adapter, ...] = ()
    chat_template: Path | None = None
    trust_remote_code: bool = False
    """Whether the engine may run Python code that lies in the model's folder."""

    @classmethod
    def read(
        cls,
        model: Path,
        adapters: Mapping[str, Path],
        serve: ServeSection,
        *,
        name: str,
        max_length: int,
        device: str,
        trust_remote_code: bool = False,
    ) -> Deployment:
        """Look at the folders once: ranks of the adapters, the template of the model.

        Raises:
            EngineError: A folder is not what it should be, or ``serve.host`` is not loopback.
        """
        refuse_open_host(serve.host)
        if not (model / "config.json").is_file():
            raise EngineError(f"{model} is not a model folder: no config.json there")
        template = model / "chat_template.jinja"
        return cls(
            model=model,
            name=name,
            max_length=max_length,
            device=device,
            serve=serve,
            adapters=tuple(Adapter.read(key, path) for key, path in adapters.items()),
            chat_template=template if template.is_file() else None,
            trust_remote_code=trust_remote_code,
        )

    @property
    def base_name(self) -> str:
        """What clients call the base: the plain name belongs to the adapter when there is one."""
        return f"{self.name}-base" if self.adapters else self.name

    @property
    def max_rank(self) -> int:
        """Largest rank of the adapters; 0 without any."""
        return max((adapter.rank for adapter in self.adapters), default=0)

    @property
    def eager(self) -> bool:
        """Whether to skip compilation and CUDA graphs."""
        return self.device == "cpu" if self.serve.eager == "auto" else self.serve.eager


class Engine(Protocol):
    """A program that serves the OpenAI API. Every method is pure."""

    name: ClassVar[str]
    phases: ClassVar[tuple[tuple[str, str], ...]]
    """(phase of start-up, text in the log line that begins it), in order."""

    def command(self, python: Path, deployment: Deployment, port: int) -> Command:
        """The command that serves ``deployment`` on loopback."""
        ...

    def model_id(self, deployment: Deployment, adapter: str | None) -> str:
        """What a request writes as ``model`` to get ``adapter``, or the base."""
        ...

    def explain(self, log: str) -> str | None:
        """The cause of a failed start and what to do, in one or two lines; ``None`` if the log is not understood."""
        ...


def refuse_open_host(host: str) -> None:
    """Refuse every address but loopback.

    Raises:
        EngineError: ``host`` could be reached from other machines.
    """
    if host not in (LOOPBACK, "localhost", "::1"):
        raise EngineError(
            f"serve.host is {host!r}, but engines have no authentication worth the name: only loopback is served",
            f"set serve.host to {LOOPBACK} and reach it through an SSH tunnel (ssh -L 8000:127.0.0.1:8000 HOST)",
        )


ENGINES = Registry(
    "engine", {"vllm": "toolkit.engines.vllm:Vllm", "sglang": "toolkit.engines.sglang:Sglang"}
)
"""Engine classes by name."""

"""Inference engines: programs that are started and never imported.

An engine module is pure: it turns a :class:`Deployment` into the exact command line, knows which line of its log begins
which phase of start-up, and reads the cause out of a log that ends badly. ``server.py`` does the rest for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from toolkit.errors import EngineError
from toolkit.registry import Registry

if TYPE_CHECKING:
    from toolkit.recipe.serve import ServeSection

LOOPBACK = "127.0.0.1"
"""The only address an engine listens on; ``serve.host`` is the front's, which knows its clients."""


@dataclass(frozen=True)
class Command:
    """What is started: a list of arguments and changes to the environment.

    Attributes:
        argv: The arguments.
        env: Variables that are set; ``None`` removes one.
        defaults: Variables that are set where the user (or the profile) did not.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str | None] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with the changes made."""
        changed: dict[str, str | None] = {**self.defaults, **base, **self.env}
        return {key: value for key, value in changed.items() if value is not None}


@dataclass(frozen=True)
class Call:
    """A request to a running engine on loopback.

    Attributes:
        method: ``POST`` or ``GET``.
        path: Absolute path of the URL.
        body: What is sent as JSON.
    """

    method: str
    path: str
    body: Mapping[str, Any] = field(default_factory=dict)


def versioned(name: str, digest: str) -> str:
    """The name that an adapter has inside an engine: ``tickets@1a2b3c4d5e6f7081``.

    A public name never holds an ``@``, so two versions of one adapter can be loaded side by side.

    Args:
        name: What clients ask for.
        digest: sha256 of the adapter's folder, hex; 16 digits are kept.
    """
    return f"{name}@{digest[:VERSION_SHOWN]}"


VERSION_SHOWN = 16
"""Hex digits of an adapter's digest in its name inside an engine."""


BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block of Llama, Mistral, Qwen, Gemma and their kin."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter folder and its name inside the engine, which may be versioned (:func:`versioned`)."""

    name: str
    path: Path
    rank: int
    targets: tuple[str, ...] | None = None
    """Modules that it changes; ``None`` when a pattern names them."""

    @property
    def public_name(self) -> str:
        """What clients ask for: the name without its version."""
        return self.name.partition("@")[0]

    @classmethod
    def read(cls, name: str, path: Path) -> Adapter:
        """Read ``adapter_config.json``: the largest of ``r`` and ``rank_pattern``, and the targets.

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
        named = config.get("target_modules")
        targets = tuple(sorted(map(str, named))) if isinstance(named, list) else None
        return cls(name, path, max(ranks), targets)


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
    draft: Path | None = None
    """Folder of the model that guesses for speculative decoding."""
    quantization: str | None = None
    """Method that the checkpoint itself names, such as ``gptq`` or ``bitsandbytes``."""
    trust_remote_code: bool = False
    """Whether the engine may run Python code that lies in the model's folder."""
    served_as: str | None = None
    """Name of the base where it must not depend on whether adapters are loaded now."""

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
        draft: Path | None = None,
        trust_remote_code: bool = False,
    ) -> Deployment:
        """Look at the folders once: ranks of the adapters, the template of the model.

        Raises:
            EngineError: A folder is not what it should be, or ``serve.max_rank`` is less than an adapter's.
        """
        _refuse_no_draft(serve, draft)
        if not (model / "config.json").is_file():
            raise EngineError(f"{model} is not a model folder: no config.json there")
        template = model / "chat_template.jinja"
        found = tuple(Adapter.read(key, path) for key, path in adapters.items())
        _refuse_rank(serve, found)
        return cls(
            model=model,
            name=name,
            max_length=max_length,
            device=device,
            serve=serve,
            adapters=found,
            chat_template=template if template.is_file() else None,
            draft=draft,
            quantization=quantization_of(model),
            trust_remote_code=trust_remote_code,
        )

    @property
    def lora(self) -> bool:
        """Whether the engine is started with room for adapters: it has some, or ``serve.adapter_slots`` asks for it."""
        return bool(self.adapters) or self.serve.adapter_slots is not None

    @property
    def base_name(self) -> str:
        """What clients call the base: the plain name belongs to the adapter where there can be one."""
        return self.served_as or (f"{self.name}-base" if self.lora else self.name)

    @property
    def live(self) -> bool:
        """Whether adapters may come and go while the engine runs."""
        return self.lora and self.serve.live_adapters

    @property
    def slots(self) -> int:
        """Adapters that one batch may mix: all, and one to spare so that a new version fits beside the old."""
        return self.serve.adapter_slots or len(self.adapters) + self.serve.live_adapters

    @property
    def max_rank(self) -> int:
        """Largest rank that the engine makes room for; 0 without adapters."""
        return self.serve.max_rank or max((adapter.rank for adapter in self.adapters), default=0)

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Modules that adapters may change; ``None`` where that is not known, which has to mean all of them.

        One that comes later may change more than those that are there: all linear layers of a block, but not the
        embedding and the head, for which SGLang would run its kernels in every request, the base's too.
        """
        if self.serve.adapter_targets:
            return self.serve.adapter_targets
        known = [adapter.targets for adapter in self.adapters]
        named = {module for targets in known for module in targets or ()}
        if not named or None in known:
            return None
        if not self.live:
            return tuple(sorted(named))
        return BLOCK if named <= {*BLOCK} else None

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
        """What a request writes as ``model`` to get ``adapter`` (its name inside the engine), or the base."""
        ...

    def load_adapter(self, name: str, path: Path) -> Call:
        """The request that loads an adapter under a name; 200 when it is there.

        The folder stays where it is until the adapter is unloaded: engines read it again after they put it aside.
        """
        ...

    def unload_adapter(self, name: str) -> Call:
        """The request that forgets an adapter; send it when no request asks for it any more."""
        ...

    def caches(self, folder: Path) -> Mapping[str, str]:
        """Environment variables that keep what is compiled in ``folder``; a user's own go before them."""
        ...

    def explain(self, log: str) -> str | None:
        """The cause of a failed start and what to do, in one or two lines; ``None`` if the log is not understood."""
        ...


def quantization_of(model: Path) -> str | None:
    """``quant_method`` of the checkpoint; a config of another kind is for the engine to refuse."""
    try:
        config = json.loads((model / "config.json").read_text())
    except ValueError:
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found.get("quant_method") if isinstance(found, dict) else None


def draft_folder(serve: ServeSection, recipe_dir: Path) -> Path | None:
    """Where ``serve.speculative.model`` lies, absolute; relative paths start at the recipe."""
    if serve.speculative is None or serve.speculative.model is None:
        return None
    return (recipe_dir / Path(serve.speculative.model).expanduser()).resolve()


def _refuse_no_draft(serve: ServeSection, draft: Path | None) -> None:
    wanted = serve.speculative.model if serve.speculative else None
    if wanted is not None and (draft is None or not (draft / "config.json").is_file()):
        raise EngineError(
            f"serve.speculative.model names {wanted!r}, but {draft} is not a model folder: no config.json there",
            "give the folder of a draft model or head; relative paths start at the recipe",
        )


def _refuse_rank(serve: ServeSection, adapters: tuple[Adapter, ...]) -> None:
    """Room for adapters has a rank; the recipe's must hold every adapter that is there."""
    if serve.adapter_slots and not adapters and not serve.max_rank:
        raise EngineError(
            "serve.adapter_slots asks for room for adapters, but there is none to read the rank from",
            "set serve.max_rank to the largest rank that will come",
        )
    for adapter in adapters:
        if serve.max_rank and adapter.rank > serve.max_rank:
            raise EngineError(
                f"serve.max_rank is {serve.max_rank}, but adapter {adapter.name!r} has rank {adapter.rank}",
                f"set serve.max_rank: {adapter.rank}, or leave it out",
            )


ENGINES = Registry(
    "engine", {"vllm": "toolkit.engines.vllm:Vllm", "sglang": "toolkit.engines.sglang:Sglang"}
)
"""Engine classes by name."""

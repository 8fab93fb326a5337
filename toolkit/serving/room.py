"""What the engines of a server have room for: names, slots, ranks, and kinds of adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from toolkit.engines import Adapter, Engine
from toolkit.errors import UsageError
from toolkit.serving.state import AdapterSpec, ServerSpec

RANK_FLAG = "--max-lora-rank"
"""Of both engines."""


@dataclass(frozen=True)
class Room:
    """Limits that an engine was started with.

    Attributes:
        slots: Adapters that it holds together, the spare one included; 0 when adapters cannot come.
        max_rank: Largest rank; what the engine's own flag says, which may be more than the recipe's.
        reserved: Public names of the base.
        check: Preflight of a version.
    """

    slots: int
    max_rank: int
    reserved: frozenset[str]
    check: Callable[[AdapterSpec], None]

    @classmethod
    def of(
        cls,
        spec: ServerSpec,
        adapters: tuple[AdapterSpec, ...],
        engine: Engine,
        check: Callable[[AdapterSpec], None] | None,
    ) -> Room:
        """Read them off the command line that engines with these ``adapters`` are started with."""
        deployment = spec.deployment(adapters)
        argv = engine.command(Path("python"), deployment, 0).argv
        named = argv[argv.index(RANK_FLAG) + 1] if RANK_FLAG in argv else deployment.max_rank
        slots = deployment.slots if deployment.live else 0
        reserved = frozenset({spec.base_name, deployment.base_name})
        return cls(slots, int(named), reserved, check or Preflight(spec))

    def refuse_name(self, name: str) -> None:
        """Raise :class:`UsageError` for a public name of the base."""
        if name in self.reserved:
            raise UsageError(
                f"the name {name!r} is taken by the base", "give the adapter another name"
            )

    def refuse(self, spec: AdapterSpec) -> None:
        """All that can be said of a folder before an engine sees it.

        Raises:
            UsageError: The server was started without room for adapters, or its rank is too large.
            PreflightError: The engine cannot serve such an adapter.
        """
        if not self.slots:
            raise UsageError(
                "this server was started without room for adapters that come later",
                "set serve.adapter_slots and serve.max_rank in the recipe and start the server again",
            )
        rank = Adapter.read(spec.name, spec.place).rank
        if rank > self.max_rank:
            raise UsageError(
                f"adapter {spec.name!r} has rank {rank}, but the engine was started with room for rank {self.max_rank}",
                f"set serve.max_rank: {rank} in the recipe and start the server again",
            )
        self.check(spec)

    def refuse_full(self, loaded: int, retiring: int, added: int, spare: int) -> None:
        """Raise :class:`UsageError` when ``added`` more do not fit; ``spare`` slots stay free for swaps."""
        needed = loaded + retiring + added + spare
        if not self.slots or needed <= self.slots:
            return
        parts = [f"{loaded} loaded"]
        parts += [f"{retiring} finishing their last requests"] if retiring else []
        parts += [f"{spare} kept free for swaps"] if spare else []
        raise UsageError(
            f"no adapter slot is free: the engine has {self.slots} ({', '.join(parts)}), and this needs {added} more",
            f"set serve.adapter_slots: {needed} in the recipe and start the server again, or unload an adapter",
        )


@dataclass(frozen=True)
class Preflight:
    """The adapter rules of :mod:`toolkit.preflight`, for a folder that comes while the server runs."""

    spec: ServerSpec

    def __call__(self, adapter: AdapterSpec) -> None:
        """Judge a folder.

        Raises:
            PreflightError: The engine would refuse it, or serve something else than was trained.
        """
        from toolkit.preflight import Accelerator, check, gather, insist
        from toolkit.recipe import Recipe

        served = {"name": adapter.name, "path": str(adapter.place.absolute())}
        serve = self.spec.section.model_dump(mode="json") | {"models": [], "adapters": [served]}
        values = {"name": "live", "model": {"source": self.spec.model}, "serve": serve}
        recipe = Recipe.model_validate(values)
        on: Accelerator = "cuda" if self.spec.device == "cuda" else "cpu"
        facts = gather(recipe, self.spec.place, accelerator=on)
        insist([verdict for verdict in check(recipe, facts) if verdict.rule.startswith("adapter.")])

"""From a recipe file to something that can be planned, shown or run: the way every command begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from toolkit import environments, preflight, tracking
from toolkit.engines import auto, parsers
from toolkit.environments import Environment
from toolkit.environments.lockfile import load_lock
from toolkit.errors import NotInstalledError, UsageError
from toolkit.launch import profiles
from toolkit.observe import observe
from toolkit.plan import Observed, Plan, make_plan
from toolkit.preflight import Facts, Outcome, Verdict, gather_here
from toolkit.preflight.gpu import GpuFacts, ask_driver, described
from toolkit.preflight.memory import StepMemory, forecasts, no_forecast
from toolkit.recipe.load import Loaded, load
from toolkit.survey import StepStatus, survey
from toolkit.train.parallel import choose
from toolkit.train.parallel.launch import Launch
from toolkit.train.rollout import choose_rollout
from toolkit.train.speed import choose as fast
from toolkit.workspace import Workspace

STAGE_ENVIRONMENTS = ("core", "train", "quantize")


@dataclass(frozen=True)
class Prepared:
    """A checked recipe with its plan, on one machine."""

    loaded: Loaded
    plan: Plan
    workspace: Workspace
    device: Literal["cpu", "cuda"]
    environments: dict[str, Environment]
    """By logical name: core, train, quantize and the recipe's engine."""
    verdicts: tuple[Verdict, ...] = ()
    """What preflight said: one verdict for each rule that was silent, and one for each finding."""
    memory: tuple[StepMemory, ...] = ()
    """Forecast of every step that puts a model on the GPU."""
    memory_unknown: str | None = None
    """Why there is no forecast though a model goes onto a GPU."""
    choice: auto.Choice | None = None
    """What ``serve.engine: auto`` came to; ``loaded`` and ``plan`` have it in place of ``auto``."""
    launch: Launch = field(default_factory=Launch)
    """How many processes train together."""
    parallel: choose.Choice | None = None
    """What ``train.parallel: auto`` came to, likewise."""
    speed: fast.Choice | None = None
    """What ``train.speed`` comes to on this machine, where the recipe trains."""
    profile: profiles.Profile | None = None
    """Where it runs."""

    @property
    def elsewhere(self) -> bool:
        """Whether steps run in images: what their interpreters are cannot be seen from here."""
        return self.profile is not None and self.profile.backend == "kubernetes"

    @property
    def training_said(self) -> str | None:
        """How several GPUs share the training, and the batch of an optimizer step; for people."""
        train = self.loaded.recipe.train
        if train is None or self.launch.ranks == 1:
            return None
        reason = f": {self.parallel.reason}" if self.parallel else ""
        each = train.batch_size * train.gradient_accumulation
        what = "GPUs" if self.device == "cuda" else "processes"
        return (
            f"trained by {train.parallel} on {self.launch.ranks} {what}{reason}; a step sees "
            f"{each * self.launch.ranks} sequences ({train.batch_size} a pass * "
            f"{train.gradient_accumulation} * {self.launch.ranks})"
        )

    @property
    def speed_said(self) -> str | None:
        """By which path training computes, the key that decides it, and why; for people."""
        train = self.loaded.recipe.train
        if train is None or self.speed is None:
            return None
        key = " (train.speed: auto)" if train.speed == "auto" else ""
        return f"trained by the {self.speed.path} path{key}: {self.speed.reason}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Verdicts that something works, but not as one may think, each with its fix."""
        return tuple(str(v) for v in self.verdicts if v.outcome is Outcome.warn)

    @property
    def rollout(self) -> str | None:
        """What will write the answers of GRPO, and why; None where no answers are written.

        Raises:
            NotInstalledError: The recipe wants vLLM, and the training environment has none for it.
        """
        train = self.loaded.recipe.train
        if train is None or train.grpo is None:
            return None
        lock = self.environments["train"].lock
        if lock is None:
            return "decided when it runs, by what the profile's interpreter has"
        installed = load_lock(lock).pins.get("vllm")
        return str(choose_rollout(train, self.device, installed))

    def cut(self, stages: Sequence[str] = (), names: Sequence[str] = ()) -> Prepared:
        """The same, with the plan cut to some stages or steps and what they need."""
        return replace(self, plan=self.plan.upto(stages, names))

    def survey(self) -> list[StepStatus]:
        """What is done and what will run."""
        return survey(self.plan, self.workspace)

    def require_environments(self, statuses: Sequence[StepStatus]) -> None:
        """Refuse to start when a step that will run has no environment.

        Raises:
            NotInstalledError: Names every missing one and the command that builds them.
        """
        if self.elsewhere:
            return
        needed = {e for status in statuses if not status.done for e in status.step.environments}
        missing = sorted(name for name in needed if not self.environments[name].is_ready)
        for name in missing:
            if self.environments[name].lock is None:
                self.environments[
                    name
                ].interpreter()  # raises: no command builds what a profile names
        if missing:
            raise NotInstalledError(
                f"not built: {'environment' if len(missing) == 1 else 'environments'} {', '.join(missing)}",
                f"toolkit env sync {' '.join(missing)}",
            )

    def require_inputs(self, statuses: Sequence[StepStatus], stages: Sequence[str]) -> None:
        """With ``--only``: refuse when a step before the wanted ones is not done.

        Raises:
            UsageError: Names the steps.
        """
        late = [s for s in statuses if not s.done and s.step.stage not in stages]
        if late:
            raise UsageError(
                f"--only, but {', '.join(s.step.name for s in late)} must be made first ({late[0].why})",
                "leave out --only, and they are",
            )


def prepare(
    recipe: Path,
    overrides: Sequence[str] = (),
    profile: str | None = None,
    workspace: Path | None = None,
) -> Prepared:
    """Load, check and plan a recipe. Takes under a second; needs no GPU and no torch.

    Raises:
        RecipeError: The recipe is wrong, or files that it names are missing.
        PreflightError: It cannot work with the chosen engine, format or machine.
        TrackingError: The base is named by an MLflow alias, and the store cannot be opened.
    """
    prepared = examine(recipe, overrides, profile, workspace)
    preflight.insist(prepared.verdicts)
    return prepared


def examine(
    recipe: Path,
    overrides: Sequence[str] = (),
    profile: str | None = None,
    workspace: Path | None = None,
) -> Prepared:
    """:func:`prepare` for those who want to see what is refused: ``verdicts`` holds it.

    Raises:
        RecipeError: The recipe is wrong, or files that it names are missing.
        TrackingError: The base is named by an MLflow alias, and the store cannot be opened.
    """
    loaded = load(recipe, overrides)
    where = profiles.load(profile)
    space = Workspace.locate(workspace)
    resolved = {
        name: environments.resolve(name, accelerator=where.accelerator, profile=where)
        for name in (*STAGE_ENVIRONMENTS, *engines_of(loaded))
    }
    store = tracking.resolve(loaded.recipe.tracking.uri, space)
    digests = {name: e.digest for name, e in resolved.items()}
    observed = observe(loaded, digests, store, trains=resolved["train"].is_ready)
    gpu = gpu_of(where)
    loaded, choice = decided(loaded, observed, space, resolved, where.device, gpu=gpu)
    plan = make_plan(loaded, observed)
    facts = gather_here(loaded, plan, space, resolved, where.device, gpu=gpu)
    launch = launch_of(where, gpu)
    loaded, shared = shared_out(loaded, launch, facts)
    plan = make_plan(loaded, observed) if shared else plan
    facts = replace(facts, ranks=launch.ranks)
    verdicts = tuple(preflight.check(loaded.recipe, facts))
    takes = forecasts(loaded.recipe, facts)
    speed = speed_of(loaded, facts, where.device)
    chosen = (choice, launch, shared, speed, where)
    unknown = no_forecast(loaded.recipe, facts)
    return Prepared(loaded, plan, space, where.device, resolved, verdicts, takes, unknown, *chosen)


def launch_of(profile: profiles.Profile, gpu: GpuFacts | None) -> Launch:
    """How many processes a profile trains with: one for each GPU unless it says otherwise."""
    nodes = profile.nodes
    return Launch(
        profile.processes or (gpu.count if gpu else 1),
        nodes.count if nodes else 1,
        nodes.rendezvous if nodes else None,
    )


def shared_out(loaded: Loaded, launch: Launch, facts: Facts) -> tuple[Loaded, choose.Choice | None]:
    """The recipe with an engine in place of ``train.parallel: auto``, and why."""
    train = loaded.recipe.train
    choice = choose.choose(train, launch.ranks, facts.base, facts.gpu) if train else None
    if choice is None:
        return loaded, None
    return loaded.with_parallel(choice.parallel), choice


def gpu_of(profile: profiles.Profile) -> GpuFacts | None:
    """The GPU that a profile describes, or this machine's; ``None`` where nothing runs on one."""
    if profile.device == "cpu":
        return None
    return described(**profile.gpu.model_dump()) if profile.gpu else ask_driver()


def speed_of(loaded: Loaded, facts: Facts, device: str) -> fast.Choice | None:
    """How training would be computed, by the rules that the worker decides by."""
    section = loaded.recipe.train
    if section is None:
        return None
    here = fast.Machine(device, facts.capability, facts.ranks)
    return fast.choose(section, facts.base.config if facts.base else None, here)


def engines_of(loaded: Loaded) -> tuple[str, ...]:
    """The engines that the recipe may be served by, and the router where several stand side by side."""
    serve = loaded.recipe.serve
    if serve is None:
        return ()
    engines = auto.ORDER if serve.engine == "auto" else (serve.engine,)
    return (*engines, "router") if serve.needs_router else engines


def decided(
    loaded: Loaded,
    observed: Observed,
    space: Workspace,
    resolved: Mapping[str, Environment],
    device: Literal["cpu", "cuda"],
    *,
    gpu: GpuFacts | None = None,
) -> tuple[Loaded, auto.Choice | None]:
    """The recipe with an engine in place of ``auto``, and why; as it was where it names one."""
    if loaded.recipe.serve is None or loaded.recipe.serve.engine != "auto":
        return loaded, None
    choice = auto.choose(_candidates(loaded, observed, space, resolved, device, gpu=gpu))
    return loaded.with_engine(choice.engine), choice


def _candidates(
    loaded: Loaded,
    observed: Observed,
    space: Workspace,
    resolved: Mapping[str, Environment],
    device: Literal["cpu", "cuda"],
    *,
    gpu: GpuFacts | None,
) -> list[auto.Candidate]:
    """Every engine, judged by preflight as if the recipe named it."""
    found = []
    for name in auto.ORDER:
        tried = loaded.with_engine(name)
        facts = gather_here(tried, make_plan(tried, observed), space, resolved, device, gpu=gpu)
        verdicts = preflight.check(tried.recipe, facts)
        refused = tuple(v.message for v in verdicts if v.outcome is Outcome.refuse)
        found.append(_candidate(name, refused, facts, ready=resolved[name].is_ready))
    return found


def _candidate(name: str, refused: tuple[str, ...], facts: Facts, *, ready: bool) -> auto.Candidate:
    names = facts.base.config.get("architectures") if facts.base else None
    first = names[0] if isinstance(names, list) and names else None
    known = parsers.command_line(name, facts.engine_version).architectures
    return auto.Candidate(name, refused, first in known if first else None, first, ready)

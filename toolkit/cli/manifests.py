"""``manifests``: hand a recipe's server over to a serving stack on Kubernetes or Ray."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.cli import render
from toolkit.cli.options import set_option

TARGETS = ("kserve", "production-stack", "ray")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="Serving stack.")
@click.option(
    "--weights",
    metavar="ADDRESS",
    required=True,
    help="pvc://CLAIM/FOLDER or s3://BUCKET/FOLDER, with model/ and adapters/NAME/ below.",
)
@click.option(
    "--model",
    "subject",
    metavar="SUBJECT",
    help="base, tuned, merged or a quantized one. [default: the first of serve.models]",
)
@click.option("--image", help="Image of the engine. [default: vLLM's own of the locked version]")
@click.option("--namespace", help="Namespace of the objects. [default: kubectl's]")
@click.option(
    "--secret", metavar="NAME", help="Secret with the key `api-key` that clients must show."
)
@click.option("--accelerator", metavar="NAME", help="Ray's name of the GPU, such as H100.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="File. [default: print it]"
)
@set_option
def manifests(
    recipe: Path,
    target: str,
    subject: str | None,
    output: Path | None,
    overrides: tuple[str, ...],
    **places: str | None,
) -> None:
    """Write manifests that serve a model of RECIPE on a stack that a cluster has already.

    The engine gets the arguments that `toolkit serve` would give it; nothing is sent to the
    cluster. The toolkit's front does not come along: access is the stack's business, and the
    proofs were made where the recipe ran.

    \b
    Examples:
      toolkit manifests recipes/demo/tickets.yaml --to kserve --weights pvc://models/tickets
      toolkit manifests my.yaml --to ray --weights s3://models/tickets --accelerator H100
    """
    from toolkit.handover import TARGETS as KNOWN
    from toolkit.handover import Places, resolve
    from toolkit.recipe.load import load

    loaded = load(recipe, overrides)
    handover = resolve(loaded.recipe, subject, recipe.parent, Places(**places))  # type: ignore[arg-type]
    text = KNOWN[target]().render(handover)
    if handover.places.secret is None and target != "ray":
        render.hint("without --secret everyone who reaches the service may ask the model")
    if output is None:
        render.say(text.rstrip("\n"))
    else:
        output.write_text(text)
        render.say(f"wrote {output}")

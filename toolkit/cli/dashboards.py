"""``toolkit dashboards``: what Grafana and Prometheus need to watch a server."""

from __future__ import annotations

from pathlib import Path

import click

from toolkit.cli import render


@click.group()
def dashboards() -> None:
    """Copy the Grafana dashboard, the Prometheus alerts and a configuration to start from.

    \b
    Example:
      toolkit dashboards export ./observability
    """


@dashboards.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--force", is_flag=True, help="Replace files that are there.")
def export(folder: Path, force: bool) -> None:
    """Copy the files into FOLDER.

    \b
    Example:
      toolkit dashboards export /etc/prometheus/toolkit
    """
    import shutil

    from toolkit.errors import UsageError
    from toolkit.resources import shipped

    files = sorted(p for p in shipped("jobs/observability").iterdir() if p.is_file())
    there = [p.name for p in files if (folder / p.name).exists()]
    if there and not force:
        raise UsageError(f"{folder} has {', '.join(there)} already", "add --force to replace them")
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)
        render.say(str(folder / file.name))

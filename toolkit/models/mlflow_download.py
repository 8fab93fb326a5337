"""Download a model from an MLflow registry: ``python mlflow_download.py URI FOLDER``.

Prints the folder that the model lies in. It is a script for the interpreter of the ``core``
environment, which has MLflow; stage environments do not. It is started by path and imports nothing
of ours.
"""

from __future__ import annotations

import sys


def main(uri: str, folder: str) -> None:
    """Download ``uri`` (``models:/name@alias`` or ``models:/name/version``) below ``folder``."""
    import mlflow.artifacts

    print(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

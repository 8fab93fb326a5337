"""``python start_ray.py FOLDER PORT TOKEN``: a Ray head in the foreground, for tests; its Python has Ray.

``ray start`` gives its parts 30 seconds to come up, which a busy machine exceeds. This waits as long as it takes; the
test that started it has a deadline of its own. It binds loopback where Ray lets it (the GCS listens on every
interface), wants its token everywhere, and keeps all files below FOLDER.
"""

import os
import socket
import sys
import time
from pathlib import Path

PATIENCE_S = 300
PORTS = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port",
         "runtime-env-agent-port", "ray-client-server-port", "node-manager-port",
         "object-manager-port")  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def main(folder: Path, port: str, token: str) -> None:
    """Start it; returns when it ends."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(PATIENCE_S),
        "RAY_agent_register_timeout_ms": str(PATIENCE_S * 1000),
    }
    from ray._private import services

    import psutil  # isort: skip - Ray brings its own, and finds it once it is imported

    impatient = services.get_node

    def get_node(*args):
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return impatient(*args)
            except RuntimeError:
                # A raylet has a patience of its own with its agents, and dies of it.
                lives = [
                    one
                    for one in psutil.Process().children()
                    if "raylet" in one.name() and one.status() != psutil.STATUS_ZOMBIE
                ]
                if not lives or time.monotonic() > deadline:
                    raise

    services.get_node = get_node
    from ray.scripts.scripts import main as ray

    ports = [f"--{name}={p}" for name, p in zip(PORTS, free_ports(len(PORTS)), strict=True)]
    sys.argv = [
        "ray", "start", "--head", "--block", "--num-cpus=4", "--num-gpus=4", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        "--object-store-memory=80000000", f"--temp-dir={folder / 't'}",
        "--min-worker-port=0", "--max-worker-port=0", *ports,
    ]  # fmt: skip
    ray()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

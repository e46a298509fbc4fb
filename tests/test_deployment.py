"""Real SuperLink and SuperNode processes on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from pfedgpa_app.config import APP_DIR
from pfedgpa_app.engine.ray import _processes_of, free_port, stage
from tests.test_federation import SMALL, federate, records


def test_deployed_processes_come_to_the_same_numbers(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "num-clients": 2,
        "num-server-rounds": 2,
        "method": "fedavg,client-mean,scaffold",
        "dataset": "digits",
    }
    reference, _ = federate(
        tmp_path / "reference", **{key.replace("-", "_"): v for key, v in more.items()}
    )
    settings = SMALL | more | {"out-dir": str(tmp_path / "deployed"), "run-name": "run"}
    home = Path(tempfile.mkdtemp(dir="/tmp"))
    link = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\n'
        "insecure = true\n"
    )
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),  # marks the processes
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    log = (home / "log").open("w+")

    def start(*command: str) -> None:
        subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=subprocess.STDOUT)

    loopback = ["--insecure", "--host", "127.0.0.1"]
    try:
        start(
            "flower-superlink",
            *loopback,
            *("--port", str(link), "--disable-runtime-dependency-installation"),
        )
        for node in range(2):
            its = f'partition-id={node} num-partitions=2 state-dir="{home}/state"'
            start(
                "flower-supernode",
                *loopback,
                *("--superlink", f"127.0.0.1:{link}", "--port", str(free_port())),
                *("--node-config", its),
            )
        _wait_for(f"http://127.0.0.1:{link}/health")
        app = stage(APP_DIR, home / "app")
        words = " ".join(
            f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"
            for key, value in settings.items()
        )
        done = subprocess.run(
            ["flwr", "run", str(app), "here", "--stream", "-c", words],
            cwd=home,
            env=env,
            capture_output=True,
            text=True,
            timeout=400,
        )
        log.seek(0)
        folder = tmp_path / "deployed" / "run"
        assert f"results are in {folder}" in done.stdout, done.stdout + log.read()
        for file in ("metrics.jsonl", "clients.jsonl"):
            assert records(folder, file) == records(reference, file)
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in _processes_of(home):
                os.kill(pid, sign)
            time.sleep(2)
        log.close()
        shutil.rmtree(home, ignore_errors=True)


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=1):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise TimeoutError(url)

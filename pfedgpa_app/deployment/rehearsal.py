"""Rehearse a whole deployment on one machine: keys, a SuperLink, SuperNodes with data."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from joblib import cpu_count

from pfedgpa_app.config.names import without_idle
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import NODES, Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data import IMAGEFOLDER
from pfedgpa_app.data.datasets import load
from pfedgpa_app.deployment import keys
from pfedgpa_app.deployment.processes import Deployment
from pfedgpa_app.engine import LaunchError, Poll
from pfedgpa_app.engine.flower import stage
from pfedgpa_app.runs.folder import LOG, NODE_LOG, run_folder
from pfedgpa_app.runs.launcher import plain_console, watched, with_absolute_paths

SETTINGS: dict[str, Any] = {
    "method": "pfedgpa",
    "dataset": NODES,
    "num-server-rounds": 3,
    "learning-rate": 0.05,
    "pfedgpa.fit-steps": 200,
    "timeout": 300.0,
}
NODES_A_CORE = 5  # how many begin to work in time (benchmarks/nodes.py)


def site_images(folder: Path, site: int, sites: int) -> None:
    """Write a site's images as ``train/CLASS/IMAGE`` and ``test/CLASS/IMAGE``.

    They are Scikit-learn's digits, dealt to the sites in turn; half of a site's classes are rare.
    """
    from PIL import Image

    digits = load("digits", "")
    for split in ("train", "test"):
        images, labels = getattr(digits, f"{split}_images"), getattr(digits, f"{split}_labels")
        for label in range(10):
            mine = images[labels == label][site::sites]
            rare = (label + site) % 2
            place = folder / split / str(label)
            place.mkdir(parents=True)
            for i, image in enumerate(mine[: max(2, len(mine) // 6)] if rare else mine):
                Image.fromarray(image[0]).save(place / f"{i:03}.png")


def node_config(folder: Path, number: int, sites: int, config: Config) -> dict[str, str]:
    """Return a site's node config, and write its images if every site has data of its own."""
    state = {"state_dir": str(folder / f"state-{number}")}
    if config.dataset != NODES:  # the run's partition deals out the data
        return state
    images = folder / f"site-{number}"
    site_images(images, number, sites)
    return state | {"dataset": f"{IMAGEFOLDER}{images}"}


def prepared(nodes: int, overrides: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return the run's settings, and its folder, which is made.

    Raises:
        ConfigError: the settings cannot run, or ``num-clients`` is not the number of nodes.
    """
    usual = {k: v for k, v in SETTINGS.items() if k != "method" or "conf" not in overrides}
    methods = resolve({k: v for k, v in usual.items() if "." not in k} | overrides).config.method
    usual = without_idle(usual, methods)
    settings = usual | {"num-clients": nodes} | overrides
    config = resolve(settings).config
    if config.num_clients != nodes:
        raise ConfigError(
            f"num-clients = {config.num_clients}: the rehearsal has --nodes {nodes}, one per client"
        )
    settings = with_absolute_paths(settings, config)
    folder = run_folder(resolve(settings))
    return settings | {"out-dir": str(folder.parent), "run-name": folder.name}, folder


def rehearse(nodes: int, overrides: dict[str, Any], app: Path = APP_DIR) -> Path:
    """Bring everything up, run the app, take everything down; return the folder of the results.

    Args:
        overrides: settings of the run.

    Raises:
        ConfigError: refused before anything started.
        LaunchError: the rehearsal failed.
    """
    console = plain_console()
    say = console.print
    if nodes > (most := NODES_A_CORE * cpu_count()):
        raise ConfigError(
            f"--nodes {nodes}: at most {most} on this machine's {cpu_count()} cores: Flower starts "
            "another process for each client that has not begun after 30 s, until memory is full"
        )
    settings, folder = prepared(nodes, overrides)
    config = resolve(settings).config
    with tempfile.TemporaryDirectory(prefix="pfedgpa-rehearsal-") as place:
        certificates = Path(place) / "keys"
        keys.make(certificates, ["localhost"], nodes)
        say(f"keys and certificates for 1 server and {nodes} nodes")
        with Deployment(certificates) as deployment:
            deployment.wait_until_ready()
            say(f"SuperLink at 127.0.0.1:{deployment.port}, with TLS and nodes known by their keys")
            for node in range(nodes):
                deployment.register(node)
                deployment.start_node(node, **node_config(Path(place), node, nodes, config))
            own = config.dataset == NODES
            data = "its own images" if own else f"its part of {config.dataset}"
            say(f"{nodes} SuperNodes, each with {data}; they will take part in about 15 s")
            staged = stage(app, deployment.home / "app", settings)

            def run_it(poll: Poll) -> str:
                return deployment.wait(deployment.run(staged, settings), folder / LOG, poll)

            if reason := watched(folder, console, config, run_it):
                for node in range(nodes):
                    said = deployment.node_log(node).read_text(encoding="utf-8", errors="replace")
                    (folder / NODE_LOG.format(node)).write_text(said, encoding="utf-8")
                raise LaunchError(f"{reason}\nFlower's and the nodes' logs are in {folder}")
    say("everything is stopped; only the results are left")
    return folder

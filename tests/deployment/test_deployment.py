"""Real SuperLink and SuperNode processes on loopback, and what gets them there."""

from __future__ import annotations

import configparser
import datetime
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from flwr.app import Message, MetricRecord
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from packaging.requirements import Requirement
from PIL import Image

from pfedgpa_app import cli
from pfedgpa_app.config.parse import in_toml
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data.client import forget, load_own
from pfedgpa_app.data.datasets import load
from pfedgpa_app.deployment import doctor, keys
from pfedgpa_app.deployment.doctor import Node, NodeError, examine
from pfedgpa_app.deployment.processes import Deployment
from pfedgpa_app.deployment.rehearsal import node_config, prepared, rehearse, site_images
from pfedgpa_app.engine.flower import CONNECTION, stage
from pfedgpa_app.engine.guard import processes_of
from pfedgpa_app.runs.about import read_about
from pfedgpa_app.runs.experiment import run
from pfedgpa_app.runs.folder import is_running
from pfedgpa_app.server.nodes import NodesError
from pfedgpa_app.server.roster import Roster
from tests.support.federations import PLAIN, federate, records, results, summary
from tests.support.local_grid import InProcessGrid
from tests.support.processes import until


@dataclass(frozen=True)
class Deployed:
    """What became of a deployment, and of the same federation in this process."""

    folder: Path
    reference: Path
    stranger: int  # exit status of a node whose key nobody registered
    listed: list[str]  # the status of each node that the SuperLink knows
    left: list[int]  # processes that are left behind


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    """Over TLS, nodes known by their keys; the SuperLink is killed in round 2 and comes back."""
    tmp_path = tmp_path_factory.mktemp("deployed")
    more: dict[str, Any] = {
        "num-clients": 2,
        "num-server-rounds": 2,
        "method": "scaffold",  # which has state on its clients, too
        "evaluate-every": 0,  # each message starts a process
        "dataset": "digits",
    }
    reference, _ = federate(tmp_path / "reference", **more)
    settings = PLAIN | more | {"out-dir": str(tmp_path), "run-name": "run"}
    events = tmp_path / "run" / "events.jsonl"
    keys.make(tmp_path / "keys", ["fed.example.org"], 3)  # and loopback, of its own accord
    with Deployment(tmp_path / "keys") as deployment:
        deployment.wait_until_ready()
        for node in range(3):
            if node < 2:
                deployment.register(node)
            deployment.start_node(node, state_dir=str(deployment.home / "state"))
        stranger = deployment.nodes.pop(2).wait(timeout=600)
        deployment.await_nodes()
        listed = [n["status"] for n in deployment.flwr("supernode", "list", CONNECTION)["nodes"]]
        staged, words = deployment.home / "app", [f"{k}={v}" for k, v in settings.items()]
        assert cli.main(["app", str(staged), *words]) == 0
        deployment.run(staged, {})
        until(lambda: events.exists() and "scaffold round 1/2" in events.read_text())
        os.killpg(deployment.superlink.pid, signal.SIGKILL)
        deployment.superlink.wait()
        deployment.start_superlink()
        deployment.wait_until_ready()
        until(lambda: not is_running(tmp_path / "run"))  # its server app notices within seconds
        run_id = deployment.run(staged, {"resume": True})
        failure = deployment.wait(run_id, tmp_path / "log")
    assert not failure, (tmp_path / "log").read_text()
    left = processes_of(deployment.home)
    return Deployed(tmp_path / "run", reference, stranger, listed, left)


@pytest.mark.slow
@pytest.mark.xdist_group("deployed")  # once
class TestDeployed:
    def test_only_registered_keys_enter(self, deployed: Deployed) -> None:
        assert deployed.stranger != 0
        assert deployed.listed == ["online", "online"]

    def test_the_same_numbers_as_in_this_process(self, deployed: Deployed) -> None:
        for file in ("metrics.jsonl", "clients.jsonl"):
            assert records(deployed.folder, file) == records(deployed.reference, file)
        assert not deployed.left

    def test_a_superlink_that_is_killed(self, deployed: Deployed) -> None:
        """Nodes reconnect; the run is started again and ends as if nothing had happened."""
        assert results(deployed.folder) == results(deployed.reference)
        assert any(e["kind"] == "resumed" for e in records(deployed.folder, "events.jsonl"))


def test_a_clients_process_imports_little() -> None:
    """It is a new one for every message."""
    code = """if True:
        import sys
        import client_app
        from pfedgpa_app.config.resolve import resolve
        from pfedgpa_app.data.client import load_client
        load_client(resolve({"dataset": "digits"}).config, 0)
        print(*sys.modules)
    """
    load("digits", "")  # read once a machine
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=APP_DIR, check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded
    assert not loaded & {"sklearn", "scipy", "pandas", "matplotlib", "torchvision", "ray"}


class TestOwnData:
    """What nodes bring themselves, in this process."""

    def grid(self, tmp_path: Path, sources: list[str], **settings: Any) -> InProcessGrid:
        run_config = PLAIN | {"dataset": "nodes", "num-server-rounds": 1, "method": "fedavg"}
        run_config |= {"num-clients": len(sources), "out-dir": str(tmp_path), "run-name": "run"}
        run_config = {k: v for k, v in run_config.items() if not k.startswith("pfedgpa.")}
        grid = InProcessGrid(run_config | settings, len(sources))
        for context, source in zip(grid.contexts.values(), sources, strict=True):
            if source:
                context.node_config["dataset"] = source
        return grid

    def sites(self, tmp_path: Path, count: int) -> list[str]:
        for site in range(count):
            site_images(tmp_path / str(site), site, count)
        return [f"imagefolder:{tmp_path / str(site)}" for site in range(count)]

    def start(self, grid: InProcessGrid) -> Path:
        context = next(iter(grid.contexts.values()))
        return run(grid, resolve(context.run_config))

    def test_every_client_trains_on_all_its_own(self, tmp_path: Path) -> None:
        grid = self.grid(tmp_path, self.sites(tmp_path, 3))
        folder = self.start(grid)
        for site in range(3):
            held = len(list((tmp_path / str(site) / "train").glob("*/*.png")))
            tested = len(list((tmp_path / str(site) / "test").glob("*/*.png")))
            sizes = [m for m in grid.received if m["client"] == site]
            assert {m["num-examples"] for m in sizes if "num-examples" in m} == {
                held - round(held * 0.2)
            }
            assert {m["images"] for m in sizes if "images" in m} == {tested}
        assert summary(folder)["fedavg"]["accuracy_before_ft"] > 0

    def test_data_that_come_out_otherwise_in_another_process_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a split by an unseeded generator: a client would be tested on what it trained on."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        rows, labels = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3
        sources = [f"npz:{tmp_path / str(site)}.npz" for site in range(2)]
        for site in range(2):
            np.savez(tmp_path / f"{site}.npz", x=rows, y=labels)
        grid = self.grid(tmp_path, sources, **{"num-server-rounds": 2, "model": "mlp"})
        failed = []

        def read_anew(message: Message, reply: Message) -> Message:
            if reply.has_error():
                failed.append(str(reply.error.reason))
            np.savez(tmp_path / "1.npz", x=rows[::-1], y=labels[::-1])
            forget()  # as another process would
            return reply

        grid.tamper = read_anew
        self.start(grid)
        assert len(failed) >= 4  # two rounds of training and evaluation
        assert all("this node's data differ from what it has read before" in why for why in failed)
        assert {m["client"] for m in grid.received} == {0}

    def test_too_few_nodes(self, tmp_path: Path) -> None:
        sources = self.sites(tmp_path, 2)
        grid = self.grid(tmp_path, [*sources, ""])
        said = r"nodes with data is 2 \(partition-id 0, 1\); one without data: .* names none: start"
        with pytest.raises(NodesError, match=said):
            self.start(grid)

    def test_nodes_that_are_not_as_many_as_the_run_says(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "pfedgpa")
        sources = self.tables(tmp_path, "age height", "age height")
        for clients, said in ((3, "start the others first"), (1, "set it to that")):
            here = rf"nodes with data is 2 \(partition-id 0, 1\): {said}"
            with pytest.raises(NodesError, match=f"num-clients is {clients}, .*{here}"):
                Roster(self.grid(tmp_path, sources), clients, 0.5, True)
        assert "2 of 3 nodes are here; waiting 0.5 s for the others" in caplog.text

    def test_partition_ids(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        grid = self.grid(tmp_path, self.tables(tmp_path, "age height", "age height"))
        first, second = (context.node_config for context in grid.contexts.values())
        second["partition-id"] = 7
        roster = Roster(grid, 2, 0.5, True)
        assert "partition-ids 0, 7: in this order they are clients 0 to 1" in caplog.text
        assert roster.node_of(1) == list(grid.contexts)[1]
        first["partition-id"] = 7
        with pytest.raises(NodesError, match="2 nodes have partition-id=7: give each its own"):
            Roster(grid, 2, 0.5, True)

    def test_a_run_goes_on_without_a_site(self, tmp_path: Path) -> None:
        """As a run that is not interrupted does; clients keep their numbers."""
        sources = self.tables(tmp_path, *["age height"] * 3)
        how: dict[str, Any] = {"num-server-rounds": 3, "checkpoint-every": 1, "timeout": 1.5}

        def cut(message: Message, reply: Message) -> Message:
            if message.content.config_records["config"].get("round") == 2:
                raise InterruptedError
            return reply

        def again(second: int) -> Path:
            grid = self.grid(tmp_path, [sources[0], sources[2]], **how, resume=True)
            for context, partition in zip(grid.contexts.values(), (0, second), strict=True):
                context.node_config["partition-id"] = partition
                context.run_config["num-clients"] = 3
            return self.start(grid)

        grid = self.grid(tmp_path, sources, **how)
        grid.tamper = cut
        with pytest.raises(InterruptedError):
            self.start(grid)
        with pytest.raises(NodesError, match=r"partition-ids 0, 1, 2, but nodes report 9:"):
            again(9)
        folder = again(2)
        said = [event["text"] for event in records(folder, "events.jsonl")]
        assert "the run goes on without partition-id 1, until its node is here" in said
        assert "2 of 3 nodes are here; waiting 1.5 s for the others" in said
        trained = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
        assert trained == {(1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (3, 0), (3, 2)}
        assert summary(folder)["fedavg"]["clients_evaluated"] == 2

    def test_a_network_that_a_node_has_not(self, tmp_path: Path) -> None:
        """It is asked for before the run, not in every round."""
        grid = self.grid(tmp_path, self.tables(tmp_path, "age height"), model="nowhere:build")
        with pytest.raises(NodesError, match=r"ConfigError: partition-id=0: model = 'nowhere:bui"):
            Roster(grid, 1, 0.5, True)

    def test_data_that_do_not_match(self, tmp_path: Path) -> None:
        sources = self.sites(tmp_path, 2)
        for split in ("train", "test"):
            place = tmp_path / "1" / split / "eleven"
            place.mkdir()
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(place / "x.png")
        with pytest.raises(NodesError, match=r"partition 0 has images of 1×8×8 in 10 classes"):
            self.start(self.grid(tmp_path, sources))

    def test_images_of_other_sizes_and_colours(self, tmp_path: Path) -> None:
        for node, (size, mode) in enumerate(((8, "L"), (12, "L"), (8, "RGB"))):
            for name in ("cat", "dog"):
                place = tmp_path / str(node) / name
                place.mkdir(parents=True)
                for i in range(4):
                    Image.new(mode, (size, size)).save(place / f"{i}.png")
        sources = [f"imagefolder:{tmp_path / str(node)}" for node in range(3)]
        with pytest.raises(NodesError, match=r"1×8×8 .* 3×8×8 .*: .* grey .*: convert those of"):
            Roster(self.grid(tmp_path, sources[::2]), 2, 0.5, True)
        sources.pop()
        with pytest.raises(NodesError, match=r"1×8×8 .* 1×12×12 .*: .* image-size=64 resizes"):
            Roster(self.grid(tmp_path, sources), 2, 0.5, True)
        grid = self.grid(tmp_path, sources, **{"image-size": 8})
        found = Roster(grid, 2, 0.5, True).schema
        assert found is not None
        assert found.shape == (1, 8, 8)

    def tables(self, tmp_path: Path, *columns: str) -> list[str]:
        """Sites with rows of a table, whose columns are called so, in that order."""
        draws = np.random.default_rng(0)
        for site, names in enumerate(columns):
            y = np.arange(40) % 2
            x = draws.normal(size=(40, len(names.split()))).astype(np.float32)
            np.savez(tmp_path / f"{site}.npz", x=x, y=y, columns=names.split())
        return [f"npz:{tmp_path / f'{site}.npz'}" for site in range(len(columns))]

    def test_tables(self, tmp_path: Path) -> None:
        grid = self.grid(tmp_path, self.tables(tmp_path, "age height", "age height"))
        folder = self.start(grid)
        assert summary(folder)["fedavg"]["accuracy_before_ft"] > 0
        kept = read_about(folder).schema
        assert (kept.shape, kept.columns, kept.pixels) == ((2,), ("age", "height"), False)

    @pytest.mark.parametrize(
        ("columns", "says"),
        [
            ("height age", "in another order: column 1 is 'age' in partition 0 and 'height' in"),
            ("age weight", r"0 has examples of 2 \(age, height\).* 1 .*\(age, weight\)"),
        ],
    )
    def test_other_columns_are_refused(self, columns: str, says: str, tmp_path: Path) -> None:
        sources = self.tables(tmp_path, "age height", columns)
        with pytest.raises(NodesError, match=f"{says}.*: give all nodes the same columns"):
            self.start(self.grid(tmp_path, sources))

    def test_a_node_without_examples_of_a_class(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Images of three at one, of two at the other; by name, not by number."""
        for node, names in enumerate((("cat", "dog", "owl"), ("cat", "owl"))):
            for i, name in enumerate(names):
                place = tmp_path / str(node) / name
                place.mkdir(parents=True)
                for j in range(10):
                    Image.fromarray(np.full((8, 8), 80 * i + j, np.uint8)).save(place / f"{j}.png")
        sources = [f"imagefolder:{tmp_path / str(node)}" for node in range(2)]
        with pytest.raises(NodesError, match=r"3 classes .*2 classes .*classes=cat,dog,owl"):
            self.start(self.grid(tmp_path / "a", sources))
        classes = "dog,owl,cat"
        grid = self.grid(tmp_path / "b", sources, classes=classes)
        assert summary(self.start(grid))["fedavg"]["accuracy_before_ft"] > 0
        assert read_about(tmp_path / "b" / "run").schema.classes == ("dog", "owl", "cat")
        config = resolve({"dataset": "nodes", "classes": classes}).config
        held = load_own(config, sources[1])
        assert np.bincount(held.train_labels).tolist() == [0, 8, 8]
        assert held.train_images[held.train_labels == 2].max() < 20  # the cats
        with pytest.raises(NodesError, match=r"partition-id=0: .* its own log says why") as found:
            self.start(self.grid(tmp_path / "c", sources, classes="cat,owl"))
        assert "dog" not in str(found.value)
        assert str(tmp_path) not in str(found.value)
        assert "has the class 'dog'" in caplog.text

    def test_sequences_of_words(self, tmp_path: Path) -> None:
        words = np.random.default_rng(0).integers(0, 9, (40, 5))
        np.savez(tmp_path / "0.npz", x=words, y=np.arange(40) % 2)
        (tmp_path / "words.py").write_text(
            "from torch import nn\n"
            "def build(classes, shape):\n"
            "    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, classes))\n"
        )
        sources = [f"npz:{tmp_path / '0.npz'}"]
        grid = self.grid(tmp_path, sources, model="words:build", **{"code-dir": str(tmp_path)})
        folder = self.start(grid)
        assert read_about(folder).schema.tokens
        assert summary(folder)["fedavg"]["accuracy_before_ft"] > 0

    def test_a_site_that_learns_nothing_is_told(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """BatchNorm takes no step on one example."""
        (tmp_path / "normed.py").write_text(
            "from torch import nn\ndef build(classes, shape):\n    return nn.Sequential("
            "nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, classes))\n"
        )
        rows, labels = np.random.default_rng(0).normal(size=(8, 5)), np.arange(8) % 2
        for node, held in enumerate((8, 1)):
            learned = {"x_train": rows[:held], "y_train": labels[:held]}
            arrays: dict[str, Any] = learned | {"x_test": rows, "y_test": labels}
            np.savez(tmp_path / f"{node}.npz", **arrays)
        sources = [f"npz:{tmp_path / f'{node}.npz'}" for node in range(2)]
        grid = self.grid(tmp_path, sources, model="normed:build", **{"code-dir": str(tmp_path)})
        assert summary(self.start(grid))["fedavg"]["accuracy_before_ft"] >= 0
        said = "partition-id=1 has only one training example, and the network's layer 1 (BatchN"
        assert caplog.text.count(said) == 1
        assert "partition-id=0 has" not in caplog.text

    @pytest.mark.parametrize("own_data", [True, False])
    def test_silence_is_told_from_failure(
        self, own_data: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(NodesError, match=r"[Nn]o .*query"):
            Roster(InProcessGrid({}, 2, app=ClientApp()), 2, 0.5, own_data)
        monkeypatch.setattr(InProcessGrid, "serve", lambda *_: [])
        with pytest.raises(NodesError, match=r"none of 2 nodes answered within timeout = 0\.5 s"):
            Roster(InProcessGrid({}, 2), 2, 0.5, own_data)

    def test_a_node_that_does_not_say_who_it_is(self) -> None:
        class Odd(InProcessGrid):
            def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
                replies = super().serve(messages, timeout)
                replies[1].content["node"] = MetricRecord({"partition-id": [1, 2]})
                return replies

        roster = Roster(Odd({}, 2), 2, 0.5)
        assert roster.node_of(0) == roster.node_of(1)

    def test_nobody_connects(self) -> None:
        with pytest.raises(NodesError, match=r"within 0\.\d+ s: start .* or raise timeout"):
            Roster(InProcessGrid({}, 0), 2, 0.01)

    def test_nobody_connects_for_as_long_as_a_run_ever_waits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pfedgpa_app.server.roster.MOST_PATIENCE", 0.01)
        with pytest.raises(NodesError, match=r"start the SuperNodes first$"):
            Roster(InProcessGrid({}, 0), 2, 3600.0)

    def test_nobody_knows_their_groups(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="groups"):
            self.start(self.grid(tmp_path, ["digits"] * 2, method="group-mean"))

    def test_not_in_a_simulation(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["run", "dataset=nodes"]) == 2
        assert "docs/deploy.md" in capsys.readouterr().err


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    keys.make(folder, ["fed.example.org", "10.1.2.3", "localhost"], 1, days=30)
    return folder


@pytest.fixture
def link(certificates: Path) -> Any:
    """HOST:PORT of something that speaks TLS with the server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / keys.SERVER, certificates / keys.SERVER_KEY)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                accepted, _ = listener.accept()
                with accepted, context.wrap_socket(accepted, server_side=True):
                    pass
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


class TestKeys:
    def test_the_authority_vouches_for_the_server(self, certificates: Path) -> None:
        root, server = (
            x509.load_pem_x509_certificate((certificates / name).read_bytes())
            for name in (keys.CA, keys.SERVER)
        )
        server.verify_directly_issued_by(root)
        left = server.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        assert 29 <= left.days <= 30
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["fed.example.org", "localhost"]
        addresses = [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
        assert addresses == ["10.1.2.3", "127.0.0.1", "::1"]  # the SuperLink's processes use those

    def test_private_keys_are_private_and_never_replaced(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["keys", str(tmp_path / "k"), "--host", "fed.example.org", "--nodes", "2"]
        assert cli.main(words) == 0
        for name in (keys.CA_KEY, keys.SERVER_KEY, "node-0", "node-1"):
            assert (tmp_path / "k" / name).stat().st_mode & 0o077 == 0
        before = (tmp_path / "k" / "node-0").read_bytes()
        assert before != (tmp_path / "k" / "node-1").read_bytes()
        assert cli.main(words) == 2
        assert "already exists" in capsys.readouterr().err
        assert (tmp_path / "k" / "node-0").read_bytes() == before

    @pytest.mark.parametrize(
        ("host", "said"),
        [
            ("fed.example.org:8000", "without the port"),
            ("10.0.0.1:8000", "without the port"),
            ("[::1]:8000", "without the port"),
            ("https://fed.example.org", "is not a host name"),
            ("a..b", "is not a host name"),
            ("a*b", "is not a host name"),
            ("fed.*.org", "is not a host name"),
            ("*", "is not a host name"),
            ("-fed.example.org", "is not a host name"),
            ("fed-.example.org", "is not a host name"),
            ("10.0.0.300", "is not a host name"),
            ("fed.example.org..", "is not a host name"),
            (".", "is not a host name"),
            ("", "is not a host name"),
        ],
    )
    def test_no_certificate_is_made_that_fits_nobody(
        self, host: str, said: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=f"--host {re.escape(repr(host))}: .*{said}"):
            keys.make(tmp_path / "keys", [host], 0)
        assert not (tmp_path / "keys").exists()

    def test_hosts_of_any_kind(self, tmp_path: Path) -> None:
        hosts = [
            "*.example.org",
            "super_link",
            "fed",
            "xn--mnchen-3ya.de",
            "2001:db8::7",
            "3com.com",
        ]
        keys.make(tmp_path, [*hosts[:-1], f"{hosts[-1]}."], 0)  # which ends as in the DNS
        server = x509.load_pem_x509_certificate((tmp_path / keys.SERVER).read_bytes())
        names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        named = names.get_values_for_type(x509.DNSName)
        assert named == [*hosts[:4], hosts[5], "localhost"]
        assert "2001:db8::7" in map(str, names.get_values_for_type(x509.IPAddress))


class TestDoctor:
    def outcome(self, **node: Any) -> dict[str, tuple[bool, str]]:
        return {name: (good, text) for name, good, text in examine(Node(**node))}

    def test_a_healthy_node(self, certificates: Path, link: str, tmp_path: Path) -> None:
        found = self.outcome(
            dataset="digits",
            superlink=link,
            certificates=str(certificates / keys.CA),
            key=str(certificates / "node-0"),
            state_dir=str(tmp_path / "state"),
        )
        assert all(good for good, _ in found.values()), found
        assert list(found) == [
            *("python", "packages", "data", "network", "state-dir", "certificate", "key"),
            "connection",
        ]
        assert "1×8×8" in found["data"][1]
        assert "TLS" in found["connection"][1]

    def test_command(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert cli.main(["doctor", "--dataset", "digits"]) == 0
        assert cli.main(["doctor", "--dataset", f"imagefolder:{tmp_path}"]) == 1
        assert "FAIL  data" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("node", "check", "says"),
        [
            ({"dataset": "imagefolder:/nowhere"}, "data", "no folder"),
            ({"dataset": "nodes"}, "data", "name this node's own data set"),
            ({"superlink": f"{'x' * 300}:1"}, "connection", "cannot be reached"),
            ({"superlink": "nowhere"}, "connection", "HOST:PORT"),
            ({"superlink": "127.0.0.1:9"}, "connection", "cannot be reached"),
            ({"key": "/nowhere"}, "key", "is not a private key"),
            ({"certificates": "/nowhere"}, "certificate", "is not a certificate"),
            (
                {"certificates": __file__, "key": "/nowhere", "superlink": "127.0.0.1:9"},
                "certificate key",
                "is not a certificate",
            ),
            ({"state_dir": f"{__file__}/nowhere"}, "state-dir", "cannot be written"),
        ],
    )
    def test_what_is_wrong(self, node: dict[str, Any], check: str, says: str) -> None:
        found = self.outcome(**node)
        failed = [name for name, (good, _) in found.items() if not good]
        assert failed == check.split()  # said once
        assert says in found[failed[0]][1]

    def test_a_server_of_another_authority(self, link: str, tmp_path: Path) -> None:
        keys.make(tmp_path, ["fed.example.org"], 1)
        good, text = self.outcome(superlink=link, certificates=str(tmp_path / keys.CA))[
            "connection"
        ]
        assert not good
        assert "by this authority" in text

    def test_a_certificate_for_another_host(self, certificates: Path, link: str) -> None:
        host = link.replace("127.0.0.1", "127.0.0.2")
        good, text = self.outcome(superlink=host, certificates=str(certificates / keys.CA))[
            "connection"
        ]
        assert not good
        assert "cannot be reached" in text or "for this host" in text

    def test_a_key_that_others_may_read(self, certificates: Path, tmp_path: Path) -> None:
        key = tmp_path / "node-0"
        key.write_bytes((certificates / "node-0").read_bytes())
        key.chmod(0o644)
        with pytest.raises(NodeError, match="chmod 600"):
            doctor.key(Node(key=str(key)))

    def test_packages_out_of_range(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "pfedgpa_app.deployment.doctor.importlib.metadata.version", lambda _: "0.0.1"
        )
        with pytest.raises(NodeError, match=r"torch 0\.0\.1 is not"):
            doctor.packages()


def test_no_more_sites_are_rehearsed_than_begin_or_are_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--nodes 1000: at most \d+ on this machine's \d+ cores"):
        rehearse(1000, {})
    with pytest.raises(ConfigError, match=r"num-clients = 5: .* --nodes 3, one per client"):
        rehearse(3, {"num-clients": 5})
    assert not list(tmp_path.iterdir())


def test_sites_have_images_of_their_own_or_share_what_is_named(tmp_path: Path) -> None:
    own = node_config(tmp_path, 1, 3, resolve({"dataset": "nodes"}).config)
    assert own["dataset"] == f"imagefolder:{tmp_path / 'site-1'}"
    assert load(own["dataset"], "").shape == (1, 8, 8)
    assert set(node_config(tmp_path, 2, 3, resolve({"dataset": "digits"}).config)) == {"state_dir"}
    assert not (tmp_path / "site-2").exists()


@pytest.mark.parametrize("method", ["fedavg", "local,scaffold", "pfedgpa-once", "fedavg,pfedgpa"])
def test_any_method_can_be_rehearsed(method: str, tmp_path: Path) -> None:
    settings, folder = prepared(2, {"method": method, "out-dir": str(tmp_path), "run-name": "run"})
    assert folder == tmp_path / "run"
    config = resolve(settings).config
    assert config.method == tuple(method.split(","))
    assert ("pfedgpa.fit-steps" in settings) == ("pfedgpa" in method)


def test_node_config_is_toml(tmp_path: Path) -> None:
    """Paths with spaces and quotes reach the node as they are."""
    text = in_toml({"partition-id": 1, "dataset": 'imagefolder:/a "b"/c d'})
    assert text == 'partition-id=1 dataset="imagefolder:/a \\"b\\"/c d"'
    assert json.loads(text.partition("dataset=")[2]) == 'imagefolder:/a "b"/c d'


@functools.cache
def options(command: str) -> set[str]:
    """Those that one of Flower's commands has."""
    shown = subprocess.run(
        [Path(sys.executable).parent / command, "--help"], capture_output=True, text=True
    ).stdout
    return set(re.findall(r"--[a-z][a-z-]+", shown))


@pytest.mark.xdist_group("options")  # asked for once
class TestShippedFiles:
    """Units and containers can only be checked against the options that Flower has."""

    @pytest.mark.parametrize("role", ["superlink", "supernode"])
    def test_units(self, role: str) -> None:
        text = (APP_DIR / "deploy" / f"{role}.service").read_text().replace("\\\n", " ")
        unit = configparser.RawConfigParser(strict=False)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(text)
        command = unit["Service"]["ExecStart"]
        assert command.split()[0].endswith(f"/flower-{role}")
        assert set(re.findall(r"--[a-z][a-z-]+", command)) <= options(f"flower-{role}")

    def test_compose(self) -> None:
        compose = yaml.safe_load((APP_DIR / "deploy" / "compose.yaml").read_text())
        services = compose["services"]
        assert set(services) == {"superlink", "node-0", "node-1", "node-2"}
        for name, service in services.items():
            role = "superlink" if name == "superlink" else "supernode"
            given = {word.partition("=")[0] for word in service["command"]}
            assert given <= options(f"flower-{role}")
            assert service["build"]["args"]["ROLE"] == role
            assert (APP_DIR / "deploy" / service["build"]["context"] / "pyproject.toml").exists()
        for i in range(3):  # each node has its own key, data and number
            service = services[f"node-{i}"]
            assert f"partition-id={i} " in service["command"][-1]
            assert any(f"keys/node-{i}:" in volume for volume in service["volumes"])

    def test_the_bundle_is_the_app_and_nothing_else(self, tmp_path: Path) -> None:
        staged = stage(APP_DIR, tmp_path / "app")
        app = {path.relative_to(staged).as_posix() for path in staged.rglob("*.*")}
        for folder in ("benchmarks", "docs", "sweeps", "tests"):
            shutil.copytree(APP_DIR / folder, staged / folder)
        bundle = build_fab_from_disk(staged)
        assert len(bundle) < 1_000_000  # of the 10 MiB that Flower takes
        with zipfile.ZipFile(io.BytesIO(bundle)) as file:
            names = set(file.namelist())
        app = {name for name in app if name.endswith((".py", ".yaml", ".toml"))}
        rooms = ["study/", "deployment/", "cli/", "dropin/"]
        rooms += ["runs/api.py", "runs/launcher.py", "runs/inspection.py", "runs/prediction.py"]
        engines = ("local", "process", "batched", "ray", "flower", "spawning")
        rooms += ["data/examples.py", *(f"engine/{name}.py" for name in engines)]
        left_out = (".", *(f"pfedgpa_app/{room}" for room in rooms))
        app = {name for name in app if not name.startswith(left_out)}
        assert names == app | {"README.md", "LICENSE", ".info/CONTENT"}

    def test_the_bundle_has_all_that_its_doors_import(self, tmp_path: Path) -> None:
        bundle = build_fab_from_disk(stage(APP_DIR, tmp_path / "app"))
        with zipfile.ZipFile(io.BytesIO(bundle)) as file:
            file.extractall(tmp_path / "bundle")
        code = "import sys; sys.path.insert(0, sys.argv[1]); import client_app, server_app"
        command = [sys.executable, "-P", "-c", code, str(tmp_path / "bundle")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_dockerfile_is_for_a_flower_that_we_take(self) -> None:
        text = (APP_DIR / "deploy" / "Dockerfile").read_text()
        [image] = re.findall(r"flwr/\$\{ROLE\}:(\S+)", text)
        wanted = map(Requirement, requires(doctor.DISTRIBUTION) or [])
        assert [image in r.specifier for r in wanted if r.name == "flwr"] == [True]

    def test_documented_commands_exist(self) -> None:
        """Options of the commands in docs/deploy.md are options that there are."""
        text = (APP_DIR / "docs" / "deploy.md").read_text().replace("\\\n", " ")
        for command in ("flower-superlink", "flower-supernode"):
            [line] = [line for line in text.splitlines() if f"{command} --" in line]
            line = line.partition("--node-config '")[0]
            assert set(re.findall(r"--[a-z][a-z-]+", line)) <= options(command)
        for line in re.findall(r"^pfedgpa (keys|doctor|app)(.*)$", text, re.MULTILINE):
            cli.parse([line[0], *shlex.split(line[1], comments=True)])

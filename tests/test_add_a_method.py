"""docs/add-a-method.md: its examples, as a reader would add them, and beginners' mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pfedgpa_app import cli, load_client
from pfedgpa_app.config import names
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.contract import MethodError
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.methods.halves import ServerHalf
from pfedgpa_app.methods.own import register_installed
from pfedgpa_app.runs.checkpoint import Checkpoint
from pfedgpa_app.runs.prediction import evaluate
from tests.support.federations import SMALL, federate, known_for_a_while, records, summary

PAGE = APP_DIR / "docs" / "add-a-method.md"


def block(file: str) -> str:
    """What the page has a reader write into ``file``."""
    [text] = re.findall(rf"^`{file}`:\n\n```\w+\n(.*?)```", PAGE.read_text(), re.M | re.S)
    return str(text)


def test_a_method_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedSlow by its import path, and by its name where its package is installed."""
    assert len(block("fedslow.py").splitlines()) < 60
    (tmp_path / "fedslow.py").write_text(block("fedslow.py"))
    project = tomllib.loads(block("pyproject.toml"))["project"]
    [(name, where)] = project["entry-points"]["pfedgpa.methods"].items()
    installed = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Name: {project['name']}\n")
    (installed / "entry_points.txt").write_text(f"[pfedgpa.methods]\n{name} = {where}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fedslow", raising=False)
    how: dict[str, Any] = {"num_server_rounds": 3, "learning_rate": 0.05, "fedslow.keep": 0.3}
    with known_for_a_while("fedslow"):
        folder, _ = federate(tmp_path / "path", method="fedavg,fedslow:FedSlow", **how)
        rows = summary(folder)
        assert rows["fedslow"]["accuracy_before_ft"] > 30
        assert rows["fedslow"]["bytes_up"] == rows["fedavg"]["bytes_up"]
        own = load_client(folder, 0, "fedslow").network.state_dict()
        shared = load_client(folder, 0, "fedavg").network.state_dict()
        assert not torch.equal(own["fc1.bias"], shared["fc1.bias"])
        for line in records(folder, "clients.jsonl"):
            again = evaluate(folder, line["client"], line["method"])
            assert again["accuracy"] == pytest.approx(line["before_ft"], abs=1e-9), line
    monkeypatch.syspath_prepend(tmp_path)
    with known_for_a_while("fedslow"):
        register_installed()
        names.sections.cache_clear()
        names.keys.cache_clear()
        folder, _ = federate(tmp_path / "name", method="fedslow", **how)
        assert (
            summary(folder)["fedslow"]["accuracy_before_ft"]
            == rows["fedslow"]["accuracy_before_ft"]
        )


def test_the_example_is_one_file_and_its_name(tmp_path: Path) -> None:
    file = block("pfedgpa_app/methods/fedsmooth.py")
    [lines] = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(file.splitlines()) < 60
    imported, line = lines.splitlines(keepends=True)
    app = tmp_path / "app"
    app.mkdir()
    for name in ("pyproject.toml", "server_app.py", "client_app.py"):
        shutil.copy(APP_DIR / name, app)
    for name in ("pfedgpa_app", "conf"):
        shutil.copytree(APP_DIR / name, app / name)
    (app / "pfedgpa_app" / "methods" / "fedsmooth.py").write_text(file)
    registry = app / "pfedgpa_app" / "methods" / "__init__.py"
    before = registry.read_text()
    first = "from pfedgpa_app.methods.fedavgm"
    after = before.replace('    "local": ', line + '    "local": ').replace(first, imported + first)
    registry.write_text(after)
    assert len(after) == len(before) + len(lines)

    settings = {k: v for k, v in SMALL.items() if not k.startswith("pfedgpa.")}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "method": "fedavg,fedsmooth"}
    settings |= {"fedsmooth.step": 0.3, "learning-rate": 0.05}

    words = ["run", *(f"{key}={value}" for key, value in settings.items())]
    commands = [words, ["settings"], [*words, "method=local"]]
    code = f"from pfedgpa_app import cli; print([cli.main(words) for words in {commands}])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=app,
        env=os.environ | {"PYTHONPATH": str(app)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("[0, 0, 2]\n"), done.stderr
    rows = {r["method"]: r for r in json.loads((tmp_path / "run" / "summary.json").read_text())}
    assert rows["fedsmooth"]["accuracy_before_ft"] > 30
    assert rows["fedsmooth"]["bytes_up"] < rows["fedavg"]["bytes_up"]  # biases stay at home
    assert "fedsmooth.step = 0.5" in done.stdout
    assert "fedsmooth.step" in done.stderr


MINE = """
import torch
from pfedgpa_app.core.uploads import weighted_mean
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.methods.base import Trained
from pfedgpa_app.models.networks import weights_of


class Mine(Averaging):
    @classmethod
    def end(cls, task):
        task.load(task.weights)
        loss = task.sgd(cls.recipes(task.config, list(task.weights), task.round))
        return weights_of(task.model), loss

"""
AGGREGATE = (
    "    def aggregate(self, server_round, uploads):\n        mean = weighted_mean(uploads)\n"
)
TRAIN = "    @classmethod\n    def train(cls, task):\n        weights, loss = cls.end(task)\n"
SHARED = "    @classmethod\n    def shared(cls, config, names):\n"
EVALUATED = "    @staticmethod\n    def evaluated(weights, state):\n"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a method of the user's own with some hooks, and returns its import path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def write(hooks: str) -> str:
        (tmp_path / "mine.py").write_text(MINE + hooks)
        return "mine:Mine"

    with known_for_a_while("mine"):
        yield write


class TestServerHalf:
    @pytest.mark.parametrize(
        ("does", "said"),
        [
            (
                "mean['fc1.bias'] = mean['fc1.bias'] / (server_round - 2)",
                "made weights that are not finite (fc1.bias) in round 2: clients' uploads were",
            ),
            ("{}['nothing']", "failed in round 1: KeyError: 'nothing' (mine.py, line 18)"),
            ("mean = None", "left state.global_weights as None in round 1: expected a dict"),
            ("del mean['fc2.bias']", "left state.global_weights without fc2.bias in round 1"),
            ("mean['b'] = mean['fc2.bias']", "put 'b', a Tensor, into state.global_weights"),
            ("mean['fc2.bias'] = 0.5", "put a float into state.global_weights['fc2.bias']"),
            (
                "mean = {n: t.mean() for n, t in mean.items()}",
                "changed state.global_weights['block1.conv.weight'] to torch.float32 [] in round 1",
            ),
            (
                "mean['fc2.bias'] = mean['fc2.bias'].double()",
                "changed state.global_weights['fc2.bias'] to torch.float64 [10] in round 1",
            ),
        ],
    )
    def test_what_aggregate_does_wrong_ends_the_run_by_name(
        self, mine: Callable[[str], str], tmp_path: Path, does: str, said: str
    ) -> None:
        method = mine(f"{AGGREGATE}        {does}\n        self.state.global_weights = mean\n")
        with pytest.raises(MethodError) as caught:
            federate(tmp_path, method=method, num_server_rounds=3)
        assert f"method mine: its aggregate {said}" in str(caught.value)
        failed = records(tmp_path / "run", "events.jsonl")[-1]
        assert failed["text"] == str(caught.value)
        kept = Checkpoint(tmp_path / "run" / "checkpoint").read()
        assert kept.get("round") == (1 if "in round 2" in said else None)

    @pytest.mark.parametrize("method", ["fedavg", "fedavgm", "scaffold", "cfl"])
    def test_constants_that_never_were_finite_stay_so(self, method: str) -> None:
        """A mask of -inf passes; where else a number is not finite, it does not."""
        initial = {"mask": torch.tensor([0.0, -torch.inf]), "fc.weight": torch.ones(2, 2)}
        kind, config = METHODS[method].rounds_class(), Config(num_clients=2)
        half = ServerHalf(method, kind(config, kind.begin(config, initial)), initial)

        def upload(**more: torch.Tensor) -> dict[int, Upload]:
            expected = half.expected_upload(1) | more
            return {client: Upload(expected, 1) for client in range(2)}

        half.aggregate(1, upload())
        with pytest.raises(MethodError, match=r"weights that are not finite \(mask\) in round 2"):
            half.aggregate(2, upload(mask=torch.tensor([torch.inf, -torch.inf])))

    @pytest.mark.parametrize(
        ("hook", "said"),
        [
            ("download(self, client): return None", "its download returned None in round 1"),
            (
                "evaluation_download(self, client): return {'fc1.bias': self.state}",
                "its evaluation_download returned a Shared as 'fc1.bias' in round 1",
            ),
            (
                "download(self, client):\n        w = self.state.global_weights\n"
                "        return {n: t.flatten() for n, t in w.items()}",
                "its download returned block1.conv.weight of shape [144] in round 1: in the",
            ),
            ("expected_upload(self): return []", "its expected_upload returned a list"),
            ("rate(self, server_round): return None", "its rate returned None in round 1"),
            ("personalise(self): return {0: {}}", "its personalise returned nothing for client 1"),
            (
                "personalise(self):\n        w = self.state.global_weights\n"
                "        return {c: {n: t / 0 for n, t in w.items()} for c in range(4)}",
                "its personalise made weights that are not finite (block1.conv.weight,",
            ),
            (
                "download(self, client): return {'fc1.bias': self.state.global_weights["
                "'fc1.bias'].bfloat16()}",
                "returned a tensor of torch.bfloat16 as 'fc1.bias' in round 1: Flower cannot send",
            ),
            (
                "learned(self): return self.state",
                "returned a Shared: expected a WeightDistributio",
            ),
            ("learned(self): return {}[0]", "its learned failed: KeyError: 0 (mine.py, line "),
            ("reference(self, client): return [1]", "reference returned a list: expected a dict"),
            ("rival(self, client): return [1]", "its rival returned a list in round 1: expected"),
            ("report(self): return None", "report returned None: expected a dict that JSON"),
            (
                "report(self): return {'mean': self.state.global_weights['fc1.bias']}",
                "its report returned a Tensor as 'mean': expected a dict that JSON can hold",
            ),
        ],
    )
    def test_what_other_hooks_return_is_looked_at(
        self, mine: Callable[[str], str], tmp_path: Path, hook: str, said: str
    ) -> None:
        with pytest.raises(MethodError) as caught:
            federate(tmp_path, method=mine(f"    def {hook}\n"), num_server_rounds=1)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("hook", "said"),
        [
            (f"{SHARED}        return 'b'\n", "shared returned a str: expected a list of names"),
            (f"{SHARED}        return None\n", "shared returned None: expected a list of names"),
            (f"{SHARED}        return ['nope']\n", "returned 'nope', which is no weight's name"),
            (f"{SHARED}        return [3]\n", "its shared returned 3, which is no weight's name"),
            (f"{SHARED}        return {{}}['b']\n", "failed: KeyError: 'b' (mine.py, line 18)"),
            (
                "    @classmethod\n    def begin(cls, config, initial): return initial.nothing\n",
                "its begin failed: AttributeError: 'dict' object has no attribute 'nothing'",
            ),
        ],
    )
    def test_what_cannot_begin_is_refused_before_anything_starts(
        self,
        mine: Callable[[str], str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        hook: str,
        said: str,
    ) -> None:
        assert cli.main(["run", f"method=fedavg,{mine(hook)}", "out-dir=out"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("pfedgpa: method mine: its ")
        assert said in err
        assert not (tmp_path / "out").exists()

    def test_what_begin_does_to_its_weights_is_its_own(
        self, mine: Callable[[str], str], tmp_path: Path
    ) -> None:
        """FedAvg, after it, begins with what it would begin with alone."""
        method = mine(
            "    @classmethod\n    def begin(cls, config, initial):\n"
            "        for tensor in initial.values(): tensor.zero_()\n"
            "        return Shared(initial)\n"
        )
        alone, _ = federate(tmp_path / "alone", method="fedavg", num_server_rounds=1)
        beside, _ = federate(tmp_path / "beside", method=f"{method},fedavg", num_server_rounds=1)
        mean = "accuracy_before_ft"
        assert summary(beside)["fedavg"][mean] == summary(alone)["fedavg"][mean]

    def test_a_state_in_the_place_of_another_is_checkpointed(
        self, mine: Callable[[str], str], tmp_path: Path
    ) -> None:
        method = mine(
            f"{AGGREGATE}        if server_round == 2: raise ValueError\n"
            "        self.state = Shared({n: 0 * t for n, t in mean.items()})\n"
        )
        with pytest.raises(MethodError, match=r"failed in round 2: ValueError \(mine.py"):
            federate(tmp_path, method=method, num_server_rounds=2)
        kept = Checkpoint(tmp_path / "run" / "checkpoint")
        state = kept.restore(kept.read()["state"])
        assert not state.global_weights["fc1.weight"].any()

    def test_with_debug_the_servers_own_traceback_is_shown(
        self, mine: Callable[[str], str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["run", f"method={mine(AGGREGATE + '        1 / 0')}", "num-clients=2", "out-dir=o"]
        assert cli.main([*words, "num-server-rounds=1", "--debug"]) == 1
        said = capsys.readouterr().err
        assert 'mine.py", line 18, in aggregate\n    1 / 0\n' in said
        last = "pfedgpa: the run failed: method mine: its aggregate failed in round 1: "
        assert f"{last}ZeroDivisionError: division by zero (mine.py, line 18)\n" in said

    @pytest.mark.parametrize(
        ("hook", "said"),
        [
            (
                "    def first_download(self, clients): return None\n",
                "its first_download returned None in round 1: expected a dict of every client's",
            ),
            (
                "    def first_download(self, clients): return {}\n",
                "its first_download returned nothing for client 3 in round 1",
            ),
            (
                "    def join(self, uploads): return dict.fromkeys(uploads, {'fc1.bias': 3})\n",
                "its join returned an int as client 3's weights 'fc1.bias' in round 2",
            ),
            (
                f"{TRAIN}        if task.round > 1: 1 / 0\n"
                "        return Trained(weights, {}, loss)\n",
                "its train failed in round 2: ZeroDivisionError",
            ),
        ],
    )
    def test_what_is_made_for_clients_that_join_is_looked_at(
        self, mine: Callable[[str], str], tmp_path: Path, hook: str, said: str
    ) -> None:
        with pytest.raises(MethodError) as caught:
            federate(tmp_path, method=mine(hook), num_server_rounds=1, join_clients=1)
        assert f"method mine: {said}" in str(caught.value)


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (
            "def personalise(self, more): pass",
            "its personalise(self, more) must take what personalise(self) takes: missing a requi",
        ),
        (
            "def aggregate(self, uploads): pass",
            "its aggregate(self, uploads) must take what aggregate(self, server_round, uploads)",
        ),
        (
            "def train(self, task): pass",
            "its train(self, task) must take what @classmethod train(cls, task) takes: missing",
        ),
        (
            "@staticmethod\n    def start(state): pass",
            "its @staticmethod start(state) must take what @staticmethod start(weights, state)",
        ),
        ("@classmethod\n    def shared(cls, names): pass", "its @classmethod shared(cls, names)"),
        ("def __init__(self): pass", "its __init__(self) must take"),
        ("report = None", "its report is None, not a function"),
    ],
)
def test_hooks_that_cannot_be_called_are_refused_in_time(
    mine: Callable[[str], str], capsys: pytest.CaptureFixture[str], hook: str, said: str
) -> None:
    assert cli.main(["run", f"method={mine(f'    {hook}')}"]) == 2
    assert f"method = 'mine:Mine': {said}" in capsys.readouterr().err
    assert not Path("results").exists()


def test_settings_of_a_method_of_ones_own_are_listed(
    mine: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    method = mine("    pass\n")
    own = "from dataclasses import dataclass\nfrom pfedgpa_app.core.settings import *\n\n"
    own += "@dataclass(frozen=True)\nclass Own(MethodSettings):\n"
    own += "    keep: float = setting(0.5, 'how much is kept')\n"
    Path("mine.py").write_text(own + MINE + "    settings = Own\n")
    assert cli.main(["settings", method]) == 0
    assert "mine.keep = 0.5\n    how much is kept\n" in capsys.readouterr().out


def test_a_method_by_its_files_name_alone_is_hinted_at(
    mine: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    mine("    pass\n")
    assert cli.main(["run", "method=mine"]) == 2
    assert "method: no method 'mine'; did you mean mine:Mine?" in capsys.readouterr().err


def test_hooks_may_take_more_with_defaults(mine: Callable[[str], str]) -> None:
    hooks = [
        "def personalise(self, more=0): pass",
        "def aggregate(self, *uploads): pass",
        "@classmethod\n    def start(cls, weights, state, *, more=0): pass",
    ]
    assert names.method_named(mine("".join(f"    {hook}\n" for hook in hooks))) == "mine"


class TestClientHalf:
    @pytest.mark.parametrize(
        ("returns", "said"),
        [
            ("None", "returned None in round 1: it must `return Trained(upload, state, loss)`"),
            ("weights, {}, loss", "returned a tuple in round 1: it must `return Trained("),
            ("Trained(weights, {'fc1.bias': 3}, loss)", "an int as state 'fc1.bias' in round 1"),
            ("Trained(weights, {'fc1.bias': [3]}, loss)", "a list as state 'fc1.bias'"),
            (
                "Trained({n: t.numpy() for n, t in weights.items()}, {}, loss)",
                "returned a ndarray as upload 'block1.conv.weight' in round 1: expected a dict",
            ),
            (
                "Trained({n: t.to_sparse() for n, t in weights.items()}, {}, loss)",
                "returned a tensor of torch.sparse_coo as upload 'block1.conv.weight' in round 1",
            ),
            ("Trained(weights, None, loss)", "returned None as state in round 1"),
            ("Trained(weights, {}, None)", "returned None as loss in round 1: expected a number"),
            ("Trained(weights, {}, torch.tensor(loss))", "returned a Tensor as loss in round 1"),
            ("weights['nope']", "failed in round 1: KeyError: 'nope' (mine.py, line 19)"),
            (
                "Trained(weights, {'rounds': torch.ones(1)}, loss)",
                "keeps rounds in its client's state, which is not a weight of the network in round",
            ),
            (
                "Trained(weights, {'fc1.bias': torch.ones(1)}, loss)",
                "returned fc1.bias of shape [1] in round 1: in the network its shape is [20]",
            ),
        ],
    )
    def test_what_train_returns_is_looked_at_in_the_first_round(
        self, mine: Callable[[str], str], tmp_path: Path, returns: str, said: str
    ) -> None:
        with pytest.raises(MethodError) as caught:
            federate(tmp_path, method=mine(f"{TRAIN}        return {returns}\n"))
        assert str(caught.value).startswith("method mine: its train ")
        assert said in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    @pytest.mark.parametrize(
        ("returns", "said"),
        [
            ("{**weights, **state}", "returned rounds, which is not a weight of the network in"),
            ("None", "returned None in round 1: expected a dict of torch tensors"),
            ("weights['nope']", "failed in round 1: KeyError: 'nope' (mine.py"),
        ],
    )
    def test_the_first_evaluation_that_fails_ends_the_run(
        self, mine: Callable[[str], str], tmp_path: Path, returns: str, said: str
    ) -> None:
        keeps = "        return Trained(weights, {'rounds': torch.ones(1)}, loss)\n"
        method = mine(f"{TRAIN}{keeps}{EVALUATED}        return {returns}\n")
        with pytest.raises(MethodError) as caught:
            federate(tmp_path, method=method)
        assert f"method mine: its evaluated {said}" in str(caught.value)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_what_a_client_keeps_of_diverged_training_is_told(
        self, mine: Callable[[str], str], tmp_path: Path
    ) -> None:
        """Its upload does not tell, and it is evaluated with what it kept before, or is sent."""
        keeps = "{'fc1.bias': weights['fc1.bias'] / 0}"
        method = mine(f"{TRAIN}        return Trained(weights, {keeps}, loss)\n")
        folder, _ = federate(tmp_path, method=method, num_server_rounds=1)
        warned = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        diverged = [text for text in warned if "trained its own weights to infinity" in text]
        assert len(diverged) == 4

    def test_a_client_that_fails_alone_is_named(
        self, mine: Callable[[str], str], tmp_path: Path
    ) -> None:
        upset = (
            "        if len(task.data.train) and task.generator().initial_seed() == SEED: 1 / 0\n"
        )
        how = "        return Trained(weights, {}, loss)\n"
        seed = torch_generator(0, "train", 1, 2).initial_seed()
        method = mine(f"{TRAIN}{upset.replace('SEED', str(seed))}{how}")
        folder, _ = federate(tmp_path, method=method, num_server_rounds=1)
        warned = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        [said] = [text for text in warned if "client 2" in text]
        assert said.startswith("mine round 1: client 2 failed: method mine: its train failed in")


class TestSettings:
    @pytest.mark.parametrize(
        ("declared", "said"),
        [
            (
                "class S(MethodSettings):\n    step: float = setting(0.5, 's')\n",
                "S declares step, but is not a dataclass: write @dataclass(frozen=True) above it",
            ),
            (
                "class S(MethodSettings):\n    step = setting(0.5, 's')\n",
                "S declares step, but is not a dataclass",
            ),
            ("class S: pass\n", "S, its `settings`, must extend MethodSettings"),
            ("S = {'step': 0.5}\n", "its `settings` must be a class that extends"),
            (
                "@dataclass(frozen=True)\nclass S(MethodSettings):\n    mode: str = 'plain'\n",
                'mode of S is not a setting: write it as mode: str = setting(DEFAULT, "what it ',
            ),
            (
                "@dataclass(frozen=True)\nclass S(MethodSettings):\n"
                "    steps: list[float] = setting((), 's')\n",
                "steps of S is a list",
            ),
            (
                "@dataclass(frozen=True)\nclass S(MethodSettings):\n"
                "    step: torch.Tensor = setting(None, 's')\n",
                "step of S is a Tensor: a setting must be a str, int,",
            ),
        ],
    )
    def test_those_that_would_not_be_there_are_refused(
        self,
        mine: Callable[[str], str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        declared: str,
        said: str,
    ) -> None:
        method = mine("    pass\n")
        (tmp_path / "mine.py").write_text(
            "from dataclasses import dataclass\n"
            "import torch\n"
            "from pfedgpa_app.core.settings import MethodSettings, setting\n"
            "from pfedgpa_app.methods.averaging import Averaging\n"
            f"{declared}class Mine(Averaging):\n    settings = S\n"
        )
        assert cli.main(["run", f"method={method}", "mine.step=0.3"]) == 2
        assert f"pfedgpa: method = 'mine:Mine': {said}" in capsys.readouterr().err
        assert "mine" not in METHODS

    @pytest.mark.parametrize(
        ("tuned", "said"),
        [
            (
                "('momentun',)",
                "names 'momentun', but there is no such setting in Config; did you mean mom",
            ),
            ("('local_epochs',)", "no such setting in Config; did you mean local-epochs?"),
            ("'momentum'", "must be a tuple of settings' names"),
        ],
    )
    def test_what_is_tuned_is_a_setting(
        self,
        mine: Callable[[str], str],
        capsys: pytest.CaptureFixture[str],
        tuned: str,
        said: str,
    ) -> None:
        assert cli.main(["run", f"method={mine(f'    tuned = {tuned}')}"]) == 2
        err = capsys.readouterr().err
        assert "method = 'mine:Mine': its `tuned` " in err
        assert said in err


def test_the_example_made_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text(block("halfway.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "halfway", raising=False)
    with known_for_a_while("halfway"):
        methods = "fedavg,last-upload,halfway:Halfway"
        folder, _ = federate(tmp_path, method=methods, num_server_rounds=3)
        weights = [
            load_client(folder, 1, method).network.state_dict()
            for method in ("fedavg", "last-upload", "halfway")
        ]
    for name, half in weights[2].items():
        torch.testing.assert_close(half, (weights[0][name] + weights[1][name]) / 2)


@pytest.mark.parametrize(
    ("fine_tuning", "said"),
    [
        (
            "gentle",
            "'gentle', but must be one of default, training, tuned, own; \"gentle\" is call",
        ),
        ("Tuned", "'Tuned', but must be one of default, training, tuned, own\n"),
        ("own", '"own": give it an own_fine_tuning'),
    ],
)
def test_a_fine_tuning_that_there_is_not_is_refused(
    mine: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    fine_tuning: str,
    said: str,
) -> None:
    """It was found when the tables were made, after all training."""
    assert cli.main(["run", f"method={mine(f'    fine_tuning = {fine_tuning!r}')}"]) == 2
    err = capsys.readouterr().err
    assert "method = 'mine:Mine': its `fine_tuning` is " in err
    assert said in err


def test_rounds_that_belong_to_no_method_are_refused(
    mine: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients find a method's rounds by its name: they would have run those of Averaging."""
    mine("    pass\n")
    code = (tmp_path / "mine.py").read_text().replace("class Mine(", "class Own(")
    code += "from pfedgpa_app.methods.base import Personaliser\n\nclass Mine(Personaliser):\n"
    (tmp_path / "mine.py").write_text(f"{code}    of = Own\n")
    assert cli.main(["run", "method=mine:Mine,fedavg", "out-dir=out"]) == 2
    assert "method mine: its rounds, Own, belong to no method: let Own" in capsys.readouterr().err
    with known_for_a_while("own"):
        assert resolve({"method": "mine:Own,mine:Mine"}).config.method == ("own", "mine")


def test_an_installed_method_of_no_methods_rounds_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(FedAvg):
        pass

    class After(Personaliser[Any]):
        of = Own

    entry = SimpleNamespace(name="after", value="theirs:After", load=lambda: After)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    with known_for_a_while("after"):
        register_installed()
        assert "after" not in METHODS
    assert "method after: its rounds, Own, belong to no method" in caplog.text

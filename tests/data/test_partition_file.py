"""Partitions by a file: what it may look like, what it deals, and what refuses it."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfedgpa_app import cli
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data.client import load_dataset, load_partition, users_of_clients
from pfedgpa_app.data.partition_file import by_file

KINDS = ("cat", "owl")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with photos of three classes, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog", "owl"):
        for j in range(30):
            photo(Path(f"photos/{name}/{j}.png"))
    return tmp_path


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


def by(file: str, dataset: str = "imagefolder:photos") -> Config:
    """Two clients, dealt to by a file, which may have changed since it was read last."""
    load_partition.cache_clear()
    users_of_clients.cache_clear()
    sizes: dict[str, Any] = {"train_per_client": None, "test_per_client": None}
    sizes["validation_share"] = 0.0
    return Config(dataset=dataset, num_clients=2, partition=f"file:{file}", **sizes)


class TestPartitionFile:
    def test_by_a_file(self, here: Path) -> None:
        owners = {f"{kind}/{j}.png": j % 2 for kind in ("cat", "owl") for j in range(30)}
        Path("who.json").write_text(json.dumps(owners))
        rows = "".join(f"{sample},{client}\n" for sample, client in owners.items())
        Path("who.csv").write_text(f"sample,client\n{rows}")
        for file in ("who.json", "who.csv"):
            splits, data = load_partition(by(file)), load_dataset(by(file))
            for client, split in enumerate(splits):
                samples = [*data.train_samples[split.train], *data.test_samples[split.test]]
                assert sorted(samples) == sorted(s for s, c in owners.items() if c == client)

    def test_clients_by_name(self, here: Path) -> None:
        """They are numbered in the order of their names."""
        owners = {f"{kind}/{j}.png": ("west", "east")[j % 2] for kind in KINDS for j in range(30)}
        Path("who.json").write_text(json.dumps(owners))
        assert users_of_clients(by("who.json")) == [["east"], ["west"]]
        data = load_dataset(by("who.json"))
        for name, split in zip(("east", "west"), load_partition(by("who.json")), strict=True):
            assert {owners[sample] for sample in data.train_samples[split.train]} == {name}
        Path("who.json").write_text(json.dumps({s: int(o == "east") for s, o in owners.items()}))
        assert users_of_clients(by("who.json")) == []

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ('{"cat/99.png": 0}', "names the sample 'cat/99.png', which the data set lacks"),
            (
                '{"cat/0.png": 0, "cat/1.png": 2}',
                "gives 'cat/1.png' to client 2, but nothing to client 1: number clients from",
            ),
            ('{"cat/0.png": 0, "cat/1.png": 1, "cat/2.png": 2}', "clients 0 to 2, .*num-clients=3"),
            ('{"cat/0.png": 0}', "client 0 alone, but num-clients is 2: set num-clients=1"),
            ('{"cat/0.png": "me", "cat/1.png": 0}', "gives 'cat/0.png' to 'me': give the client's"),
            ('{"cat/0.png": true}', "gives 'cat/0.png' to True: give the client's number"),
            ('{"cat/0.png": "nan"}', "gives 'cat/0.png' to 'nan': give the client's number"),
            ('{"cat/0.png": "me"}', "names as clients me, but num-clients is 2: set num-clients=1"),
            (
                '{"cat/0.png": "me", "cat/1.png": "you"}',
                "client 'me' would have no image to be tested on",
            ),
            (
                '{"cat/0.png": "me", "cat/1.png": "you", "cat/0.png": "you"}',
                "gives 'cat/0.png' to client 'you', and earlier to client 'me': a sample belongs",
            ),
            ("[1]", "must be a JSON object"),
            ("{1", "is not valid JSON: .*line 1"),
            ("{}", "names no sample"),
            (
                '{"cat/0.png": 0, "cat/1.png": 1, "cat/0.png": 1}',
                "gives 'cat/0.png' to client 1, and earlier to client 0: a sample belongs to one",
            ),
            (None, "cannot be read: No such file"),
        ],
    )
    def test_a_file_that_does_not_fit(self, here: Path, text: str | None, said: str) -> None:
        if text is not None:
            Path("who.json").write_text(text)
        with pytest.raises(ConfigError, match=f"^partition = file:who.json: .*{said}"):
            load_partition(by("who.json"))

    def test_num_clients_by_default(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is ten, and the file knows better."""
        Path("who.json").write_text('{"cat/0.png": 0, "cat/1.png": 1}')
        words = ["dataset=imagefolder:photos", "partition=file:who.json"]
        assert cli.main(["partition", *words]) == 2
        said = "the file names clients 0 to 1, but num-clients is 10: set num-clients=2"
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                b"sample,client\ncat/0.png,0\ncat/1.png,0\ncat/0.png,1\n",
                "line 4: gives 'cat/0.png' ",
            ),
            (b"sample,client\ncat/0.png,0\ncow/0.png,0\n", "line 3: names the sample 'cow/0.png'"),
            (
                b"sample;client\ncat/1.png;0\ncat/0.png;eins\n",
                "line 3: gives 'cat/0.png' to 'eins': give the",
            ),
            (b"sample,client\ncat/0.png\n", "line 2: gives 'cat/0.png' to '': give the"),
            (b"sample,client\ncat/0.png,-1\n", "line 2: gives 'cat/0.png' to '-1': give the"),
            (b"file,client\ncat/0.png,0\n", "line 1: has the columns 'file,client', but must have"),
            (b"", "line 1: has the columns '', but must have sample and client"),
            (b"sample,client,client\ncat/0.png,0,1\n", "line 1: has the columns 'sample,client,cl"),
            (b'sample,client\n"cat/0.png,0\n', "line 2: is not valid CSV: unexpected end"),
            ("sample,client\ncat/ä.png,0\n".encode("latin-1"), "line 2: is not in UTF-8: save it"),
            ("sample,client\ncat/0.png,0\n".encode("utf-16"), "line 1: is not in UTF-8: save it"),
        ],
    )
    def test_a_table_that_does_not_fit(self, here: Path, text: bytes, said: str) -> None:
        Path("who.csv").write_bytes(text)
        with pytest.raises(ConfigError, match=f"^partition = file:who.csv, {said}"):
            load_partition(by("who.csv"))

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("mark", [",", ";", "\t"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_a_table_as_programs_write_it(
        self, here: Path, mark: str, encoding: str, end: str
    ) -> None:
        """In any order, with other columns and an empty row; one sample twice for one client."""
        rows = [["client", "note", "Sample"], ["0", "a", "cat/0.png"]]
        rows += [[str(j % 2), "", f"{kind}/{j}.png"] for kind in ("cat", "owl") for j in range(30)]
        text = end.join(mark.join(row) for row in [*rows, ["", "", ""]])
        Path("who.csv").write_bytes(text.encode(encoding))
        splits = load_partition(by("who.csv"))
        assert [len(split.train) + len(split.test) for split in splits] == [30, 30]

    def test_samples_match_in_any_form_of_unicode(self, here: Path) -> None:
        """As where macOS listed the folder, and an editor wrote the file, or the reverse."""
        one, other = (unicodedata.normalize(form, "käse") for form in ("NFC", "NFD"))
        for j, name in enumerate((one, other)):
            Path(f"photos/cat/{j}.png").rename(f"photos/cat/{name}{j}.png")
        owners = {f"cat/{other}0.png": 0, f"cat/{one}1.png": 1}
        owners |= {f"{kind}/{j}.png": j % 2 for kind in ("dog", "owl") for j in range(30)}
        Path("who.json").write_text(json.dumps(owners))
        data, splits = load_dataset(by("who.json")), load_partition(by("who.json"))
        for j, (name, split) in enumerate(zip((one, other), splits, strict=True)):
            held = {*data.train_samples[split.train], *data.test_samples[split.test]}
            assert f"cat/{name}{j}.png" in held
        Path("who.json").write_text(json.dumps(owners | {f"cat/{one}0.png": 1}))
        with pytest.raises(ConfigError, match=r"0.png' to client 1, and earlier to client 0"):
            load_partition(by("who.json"))

    def test_samples_that_look_alike_are_refused(self, here: Path) -> None:
        for form in ("NFC", "NFD"):
            shutil.copy("photos/cat/0.png", f"photos/cat/{unicodedata.normalize(form, 'ä')}.png")
        Path("who.json").write_text('{"cat/0.png": 0, "cat/1.png": 1}')
        with pytest.raises(ConfigError, match=r"two samples that read 'cat/ä.png'"):
            load_partition(by("who.json"))

    def test_a_client_with_one_kind_of_samples(self, here: Path) -> None:
        """What to do is said: by name, and as the data set has a test split or has none."""
        data = load_dataset(by("who.json"))
        train, test = data.train_samples, data.test_samples
        for mine, few, said in (
            (train, test, r"client 0 .* be tested on: the file gives it 3 training and 0 test"),
            (test, train, r"client 0 .* train on: the file gives it 0 training and 3 test"),
        ):
            owners = dict.fromkeys(mine[:3].tolist(), 0) | {mine[3]: 1, few[0]: 1}
            Path("who.json").write_text(json.dumps(owners))
            kind = "test" if mine is train else "training"
            said += r" samples \(test-share decided .*: "
            said += f"give it a {kind} sample, such as '{few[1]}', "
            with pytest.raises(ConfigError, match=f"{said}.* make a test split yourself"):
                load_partition(by("who.json"))
        Path("who.json").write_text('{"train/0": 0, "train/1": 1, "test/0": 1}')
        said = (
            "gives it 1 training and 0 test samples: give it a test sample, "
            "such as 'test/1', 'test/2'"
        )
        with pytest.raises(ConfigError, match=said) as refused:
            load_partition(by("who.json", dataset="digits"))
        assert "test-share" not in str(refused.value)

    def test_a_client_that_lacks_what_others_hold(self, here: Path) -> None:
        train, test = np.array(["0", "1"]), np.array(["2"])
        Path("who.json").write_text('{"0": 0, "1": 1, "2": 1}')
        with pytest.raises(ConfigError, match="give it a test sample, which others hold, or"):
            by_file(Path("who.json"), train, test, 2)

    def test_the_documents_file(self, here: Path) -> None:
        """It is one that works."""
        shutil.rmtree("photos")
        page = (APP_DIR / "docs" / "own.md").read_text()
        [text] = re.findall(r"```\n(sample,client\n.*?)```", page, re.DOTALL)
        Path("mine.csv").write_text(text)
        for sample in re.findall(r"^(.*),\d$", text, re.MULTILINE):
            photo(Path("photos") / sample)
        [words] = re.findall(r"^pfedgpa run (.*file:mine.csv.*)$", page, re.MULTILINE)
        settings = dict(word.split("=") for word in words.split())
        splits = load_partition(resolve(settings).config)
        assert [(len(split.train), len(split.test)) for split in splits] == [(2, 1), (2, 1)]

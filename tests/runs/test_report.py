"""``report.html``: one page of what a run, or several, came to."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import statistics
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app import cli
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.results import figures, plots
from pfedgpa_app.results.tables import text_table
from pfedgpa_app.runs import report
from pfedgpa_app.runs.api import Result
from pfedgpa_app.runs.folder import kept_config
from pfedgpa_app.runs.reading import command_of, runs_in
from pfedgpa_app.runs.table import curves_of, table_of
from pfedgpa_app.study.sweep import _headline
from tests.support.federations import federate, summary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
METHODS = "local,fedavg,client-mean,pfedgpa-once"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that makes its report."""
    how: dict[str, Any] = {"method": METHODS, "report": True, "num_server_rounds": 3}
    return federate(tmp_path_factory.mktemp("report"), **how)[0]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three runs that differ in their seed, and one at another rate."""
    out = tmp_path_factory.mktemp("seeds")
    for seed in range(3):
        federate(out / str(seed), method="fedavg,client-mean", seed=seed, num_server_rounds=2)
    federate(out / "fast", method="fedavg", learning_rate=0.1, num_server_rounds=2)
    return out


def figures_in(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


class TestOneRun:
    def test_says_what_the_run_came_to(self, folder: Path) -> None:
        page = (folder / "report.html").read_text()
        for row in summary(folder).values():
            assert row["title"] in page
            assert f">{row['accuracy_kept']:.1f}</td>" in page
        with (folder / "table.csv").open() as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        for row in summary(folder).values():
            assert float(rows[row["title"]]["kept"]) == row["accuracy_kept"]
            assert float(rows[row["title"]]["as sent"]) == row["accuracy_before_ft"]
        assert len(re.findall(r"textbf", (folder / "table.tex").read_text())) >= 4

    def test_the_time_in_which_nothing_ran_does_not_count(
        self, folder: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        told = [("start", 0.0), ("round", 60.0), ("start", 9000.0), ("resumed", 9001.0)]
        told += [("done", 9030.0)]
        (copy / "events.jsonl").write_text(
            "".join(json.dumps({"kind": k, "time": t, "text": ""}) + "\n" for k, t in told)
        )
        assert ", took 1:30." in report.write([copy]).read_text()

    def test_needs_nothing_from_anywhere(self, folder: Path) -> None:
        page = (folder / "report.html").read_text()
        links = re.findall(r"""(?:href|src)=["']?([^"'> ]+)|url\(([^)]*)\)|@import""", page)
        assert all((a or b).strip("'\"").startswith("#") for a, b in links)
        assert "fetch(" not in page

    def test_its_figures(self, folder: Path) -> None:
        page = (folder / "report.html").read_text()
        named = [svg.attrib["aria-label"] for svg in figures_in(page)]
        assert named == [
            "accuracy over rounds",
            "each client before and after fine-tuning",
            "clients in latent space of pfedgpa-once",
            "who holds how many of each class",
        ]
        assert "#010203" not in page
        ids = [e.attrib["id"] for svg in figures_in(page) for e in svg.iter() if "id" in e.attrib]
        assert len(set(ids)) == len(ids)  # or a figure would be cut by another's edges

    def test_a_line_a_federation_that_none_hides(self, folder: Path) -> None:
        curves, *_ = figures_in((folder / "report.html").read_text())
        text = " ".join("".join(e.itertext()) for e in curves.iter() if e.tag.endswith("text"))
        for title in ("local-only", "FedAvg", "client mean"):
            assert title in text

    def test_the_command_makes_the_same_run(self, folder: Path) -> None:
        command = command_of(runs_in([folder])[0])
        assert command.startswith("pfedgpa run --conf demo ")
        assert f"method={METHODS}" in command
        assert "num-server-rounds=3" in command
        assert "out-dir" not in command

    def test_the_command_says_where_data_lie_that_were_named(self, folder: Path) -> None:
        [run] = runs_in([folder])
        assert "data-dir" not in command_of(run)
        run.settings["data-dir"] |= {"value": "/my data", "from": "run-config"}
        assert "'data-dir=/my data'" in command_of(run)

    def test_says_where_nothing_was_generated(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        row = summary(copy)["pfedgpa-once"]

        def said(**more: Any) -> tuple[str, str]:
            rows = [row | {"title": "pFedGPA", "rank": 2} | more]
            (copy / "summary.json").write_text(json.dumps(rows))
            return text_table(rows), report.write([copy]).read_text()

        for choice, what in (
            ({"chosen_by_validation": "mean", "rank": 0}, "one network for all, so all were sent"),
            ({"chosen_by_validation": "own"}, "own uploads; the generated weights stay close"),
            ({"chosen_by_validation": None, "rank": 0}, "did not tell clients apart (rank 0)"),
        ):
            assert all(what in " ".join(text.split()) for text in said(**choice)), choice
        for text in said(chosen_by_validation="generated"):
            assert "favoured one" not in text
            assert "their own uploads" not in text

    def test_of_a_deployment(self, folder: Path, tmp_path: Path) -> None:
        """It is begun by Flower, and what clients hold is on their nodes."""
        copy = tmp_path / "run"
        shutil.copytree(folder, copy)
        (copy / "holdings.json").unlink()
        settings = json.loads((copy / "config.json").read_text())
        settings["dataset"] = {"value": "nodes", "from": "run-config"}
        (copy / "config.json").write_text(json.dumps(settings))
        made, _, begun = command_of(runs_in([copy])[0]).partition(" && ")
        assert begun == "flwr run FOLDER SUPERLINK --stream"
        command, *words = shlex.split(made)
        assert cli.main([*words[:1], str(tmp_path / "app"), *words[2:]]) == 0
        app = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
        parsed = app["tool"]["flwr"]["app"]["config"]
        assert command == "pfedgpa"
        assert parsed["dataset"] == "nodes"
        assert parsed["method"] == METHODS
        assert parsed["num-server-rounds"] == 3
        page = report.write([copy]).read_text()
        assert "on their nodes" in page
        assert "slices" not in page

    def test_texts_are_of_a_size_whatever_the_number_of_methods_and_clients(self) -> None:
        """Pages stretch figures to their width."""
        widths = set()
        for methods in (1, 2, 4):
            for clients in (2, 30):
                scores = dict.fromkeys(range(clients), (50.0, 60.0))
                drawn = figures.before_and_after({f"m{i}": scores for i in range(methods)})
                [svg] = figures_in(drawn)
                widths.add(svg.attrib["width"])
                assert float(svg.attrib["height"].removesuffix("pt")) > 140  # room for its label
        assert len(widths) == 1

    def test_every_methods_clients_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each panel has an order of its own."""
        drawn: list[Any] = []

        def keep(figure: Any, _: str) -> str:
            drawn.append(figure)
            return ""

        monkeypatch.setattr(figures, "svg", keep)
        figures.before_and_after(
            {
                "A": {0: (3.0, 9.0), 1: (1.0, 9.0), 4: (2.0, 9.0)},
                "B": {0: (1.0, 9.0), 1: (3.0, 9.0)},
            }
        )
        named = [[t.get_text() for t in axes.get_yticklabels()] for axes in drawn[0].axes]
        assert named[:2] == [["1", "4", "0"], ["0", "1"]]

    def test_bars_stand_at_their_clients_numbers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where some are not evaluated."""
        made: list[Any] = []

        def keep(*size: float) -> Any:
            made.append(figures.canvas(*size))
            return made[-1]

        monkeypatch.setattr(plots, "canvas", keep)
        how: dict[str, Any] = {"attack": "scale", "malicious_share": 0.25, "report": True}
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=1, **how)
        honest = [c for c in range(4) if c not in kept_config(folder).malicious_clients]
        middles = {round(bar.get_x() + 0.2, 6) for bar in made[-1].axes[0].patches}
        assert {round(c + by, 6) for c in honest for by in (-0.2, 0.2)} == middles

    def test_who_is_in_its_rounds_and_figures(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"num_clients": 6, "join_clients": 1, "dropout_share": 0.2}
        how |= {"straggler_share": 0.2, "attack": "scale", "malicious_share": 0.2, "report": True}
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=2, **how)
        page = (folder / "report.html").read_text()
        said = "2 rounds, all clients that were there from the start in each (of whom 20 % drop out"
        assert f"{said} and 20 % are late); run" in page
        assert "Figures cover 4 of 6 clients: the honest clients that were there" in page
        joined = summary(folder)["fedavg"]["accuracy_of_joining_clients"]
        assert "Clients that joined" in page
        assert all(f">{accuracy:.1f}<" in page for accuracy in joined)

    def test_rounds_that_nobody_evaluated_are_not_drawn(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg,client-mean", "num_server_rounds": 1}
        folder, _ = federate(tmp_path, evaluate_every=0, report=True, **how)
        page = (folder / "report.html").read_text()
        assert "Accuracy over rounds" not in page
        assert "each client before and after fine-tuning" in page

    def test_rounds_are_whole(self) -> None:
        points = [(r, 50.0 + r, 0.0) for r in (1, 2, 3)]
        [svg] = figures_in(figures.curves({"FedAvg": points}, {}))
        texts = ["".join(e.itertext()) for e in svg.iter() if e.tag.endswith("text")]
        assert {"1", "2", "3"} <= set(texts)
        assert "1.5" not in texts

    def test_foreign_names_are_text(self, folder: Path, tmp_path: Path) -> None:
        copy = tmp_path / "run <b>"
        shutil.copytree(folder, copy)
        holdings = json.loads((copy / "holdings.json").read_text())
        holdings["classes"][0] = "<script>alert(1)</script>"
        (copy / "holdings.json").write_text(json.dumps(holdings))
        page = report.write([copy]).read_text()
        assert "<b>" not in page
        assert "alert(1)</script>" not in page

    def test_of_what_no_server_knows_alone(self, tmp_path: Path) -> None:
        """Nothing is best."""
        folder, _ = federate(tmp_path, method="group-mean", num_server_rounds=1, report=True)
        assert "group mean" in (folder / "report.html").read_text()

    def test_may_be_left_out(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=1)
        assert not [*folder.glob("*.png"), *folder.glob("*.html")]

    def test_a_failure_is_a_warning(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(**_: Any) -> str:
            raise RuntimeError("no ink")

        monkeypatch.setattr(report, "page", fail)
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=1, report=True)
        assert (
            "no report could be written: RuntimeError: no ink"
            in (folder / "events.jsonl").read_text()
        )
        assert summary(folder)


class TestSeveralRuns:
    def test_mean_and_spread_over_seeds(self, seeds: Path) -> None:
        out = report.write([seeds])
        named = report.write([seeds], seeds / "both.html")
        assert (seeds / "both.csv").read_text() == (seeds / "table.csv").read_text()
        assert (seeds / "both.tex").read_text() == (seeds / "table.tex").read_text()
        assert named.read_text() == out.read_text()
        kept = [summary(seeds / str(s) / "run")["fedavg"]["accuracy_kept"] for s in range(3)]
        with (seeds / "table.csv").open() as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        mine = next(
            row for name, row in rows.items() if name.startswith("FedAvg (learning-rate=0.0")
        )
        assert float(mine["kept"]) == pytest.approx(statistics.mean(kept), abs=1e-4)
        assert float(mine["kept sd"]) == pytest.approx(statistics.stdev(kept), abs=1e-4)
        assert mine["seeds"] == "3"
        assert rows["FedAvg (learning-rate=0.1)"]["seeds"] == "1"
        page = out.read_text()
        assert f"{statistics.mean(kept):.2f} ± {statistics.stdev(kept):.2f}" in page
        assert "Means over seeds (0, 1, 2)" in page
        assert "FedAvg (learning-rate=0.1) [seed 0 only]</td>" in page
        assert page.count("only]</td>") == 1
        assert "(learning-rate=0.1) [seed 0 only] &" in (seeds / "table.tex").read_text()

    def test_a_run_that_is_compared_keeps_its_own(self, seeds: Path, tmp_path: Path) -> None:
        shutil.copytree(seeds / "0" / "run", tmp_path / "mine")
        own = report.write([tmp_path / "mine"])
        assert own.name == "report.html"
        before = {path: path.read_bytes() for path in (own, *report.tables_beside(own))}
        page = report.write([tmp_path / "mine", seeds / "1"])
        assert page == tmp_path / "mine" / "comparison.html"
        assert (tmp_path / "mine" / "comparison.csv").is_file()
        assert {path: path.read_bytes() for path in before} == before

    def test_every_seeds_recipe_of_fine_tuning(self, seeds: Path, tmp_path: Path) -> None:
        """Tuning chooses one for each."""
        for seed, (epochs, rate) in enumerate([(2, 0.02), (1, 0.005), (2, 0.02)]):
            copy = tmp_path / str(seed)
            shutil.copytree(seeds / str(seed) / "run", copy)
            row = summary(copy)["fedavg"]
            row["fine_tuning"] |= {"epochs": epochs, "learning_rate": rate}
            (copy / "summary.json").write_text(json.dumps([row]))
        page = report.write([tmp_path]).read_text()
        assert "2 epochs at 0.02 or 1 epoch at 0.005<" in page

    def test_runs_of_other_code_or_data_are_told_apart(
        self, seeds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for seed in range(2):
            shutil.copytree(seeds / str(seed) / "run", tmp_path / str(seed))
        about = json.loads((tmp_path / "1" / "model.json").read_text())
        about["code"] = {"mine:Mine": {"mine.py": "a"}}
        for seed, digest in enumerate("ab"):
            about["code"]["mine:Mine"]["mine.py"] = digest
            (tmp_path / str(seed) / "model.json").write_text(json.dumps(about))
        held = json.loads((tmp_path / "1" / "holdings.json").read_text())
        held["data"]["examples"] += 1
        (tmp_path / "1" / "holdings.json").write_text(json.dumps(held))
        page = report.write([tmp_path]).read_text()
        for said in ("mine.py was another in 0 than in 1", "dataset digits was another in 0 than"):
            assert said in page
            assert said in caplog.text

    def test_figures_of_some_clients_are_marked(self, seeds: Path, tmp_path: Path) -> None:
        for seed in range(2):
            shutil.copytree(seeds / str(seed) / "run", tmp_path / str(seed))
        rows = json.loads((tmp_path / "1" / "summary.json").read_text())
        rows[0]["clients_evaluated"] -= 1
        (tmp_path / "1" / "summary.json").write_text(json.dumps(rows))
        report.write([tmp_path])
        for file in ("table.csv", "table.tex"):
            assert "FedAvg [3 of 4 clients]" in (tmp_path / file).read_text()

    def test_what_runs_warned_of(self, seeds: Path, tmp_path: Path) -> None:
        """In the report, and in the line that a sweep has for each run."""
        for seed in (0, 1):
            shutil.copytree(seeds / str(seed) / "run", tmp_path / f"seed={seed}")
        assert "warning" not in _headline(tmp_path / "seed=1")
        events = tmp_path / "seed=1" / "events.jsonl"
        told = [{"kind": "warning", "text": f"client {i} sent garbage"} for i in (3, 3, 5)]
        events.write_text("".join(json.dumps(e) + "\n" for e in told) + events.read_text())
        page = report.write([tmp_path]).read_text()
        assert "seed=1: client 3 sent garbage" in page
        assert page.count("client 3 sent garbage") == 1
        line = _headline(tmp_path / "seed=1")
        assert line.endswith("; warning: client 3 sent garbage (and 1 more, in events.jsonl)")

    def test_what_a_method_goes_by_is_told_apart_and_a_seed_counts_once(
        self, tmp_path: Path
    ) -> None:
        for mu in (0.01, 30.0):
            how: dict[str, Any] = {"method": "fedavg,fedprox", "fedprox.mu": mu}
            federate(tmp_path / str(mu), num_server_rounds=2, **how)
        report.write([tmp_path])
        with (tmp_path / "table.csv").open() as file:
            rows = {row["method"]: row for row in csv.DictReader(file)}
        apart = {f"FedProx (fedprox.mu={mu})": str(mu) for mu in (0.01, 30.0)}
        assert set(rows) == {"FedAvg", *apart}
        assert {row["seeds"] for row in rows.values()} == {"1"}
        for name, place in apart.items():
            kept = summary(tmp_path / place / "run")["fedprox"]["accuracy_kept"]
            assert float(rows[name]["kept"]) == pytest.approx(kept, abs=1e-4)
        curves, _ = curves_of(runs_in([tmp_path]))
        assert set(curves) == {"FedAvg", "FedProx (0.01)", "FedProx (30.0)"}

    def test_a_setting_that_a_run_of_an_earlier_version_lacked(self, tmp_path: Path) -> None:
        """It had its default, which another run may not have."""
        how: dict[str, Any] = {"method": "fedavg", "num_server_rounds": 1}
        before, _ = federate(tmp_path / "before", **how)
        kept = json.loads((before / "config.json").read_text())
        del kept["augment"], kept["seed"]
        (before / "config.json").write_text(json.dumps(kept))
        federate(tmp_path / "now", augment=True, **how)
        _, entries = table_of(runs_in([tmp_path]))
        assert {entry.name for entry in entries} == {
            "FedAvg (augment=false)",
            "FedAvg (augment=true)",
        }

    def test_settings_of_another_partition_name_no_run(self, tmp_path: Path) -> None:
        for partition in ("iid", "dirichlet"):
            more = {"dirichlet_alpha": 0.1} if partition == "dirichlet" else {}
            how: dict[str, Any] = {"method": "fedavg", "partition": partition, **more}
            federate(tmp_path / partition, num_server_rounds=1, **how)
        _, entries = table_of(runs_in([tmp_path]))
        assert {entry.name for entry in entries} == {
            "FedAvg (partition=iid)",
            "FedAvg (partition=dirichlet)",
        }

    @pytest.mark.parametrize(
        ("end", "said"),
        [
            ({"kind": "failed", "text": "too hot"}, "failed (too hot): its results cover only"),
            ({"kind": "round", "text": "round 3"}, "was interrupted: its results cover only"),
        ],
    )
    def test_what_a_run_that_is_not_done_has_is_said(
        self,
        end: dict[str, str],
        said: str,
        folder: Path,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        assert "its results cover only" not in report.write([copy]).read_text()
        with (copy / "events.jsonl").open("a") as file:
            file.write(json.dumps(end | {"time": 0.0, "progress": 0.5}) + "\n")
        assert said in report.write([copy]).read_text()
        caplog.clear()
        warn_once.cache_clear()
        (copy / "table.md").unlink()  # a run's last file
        shown = Result.of(copy)._repr_markdown_()
        assert str(Result.of(copy)) == f"{copy}\n\n{shown}"
        assert shown == (folder / "table.md").read_text().rstrip("\n")
        assert Result.of(copy).table == Result.of(folder).table
        assert f"{copy} {said}" in caplog.text

    def test_best_and_second_are_marked(self, seeds: Path) -> None:
        page = report.write([seeds]).read_text()
        rows = re.findall(
            r"<tr>(.*?)</tr>", page[page.index("<tbody>") : page.index("</tbody>")], re.DOTALL
        )
        cells = [re.findall(r'<td(?: class="(\w+)")?>(.*?)</td>', row) for row in rows]
        values = [(float(row[1][1].split()[0]), row[1][0]) for row in cells]
        assert max(values)[1] == "best"
        assert sorted(values)[1][1] == "second"


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["nowhere"], "nowhere: holds no finished run"),
            ([".", "--out", "no/where.html"], "there is no folder no"),
            ([".", "--out", "report.pdf"], "ends in .html"),
        ],
    )
    def test_by_name(
        self,
        words: list[str],
        said: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert cli.main(["report", *words]) == 2
        assert said in capsys.readouterr().err

    def test_runs_that_are_not_done_are_left_out(
        self, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        begun = tmp_path / "begun"
        begun.mkdir()
        shutil.copy(folder / "config.json", begun)
        [run] = runs_in([begun, folder])
        assert run.folder == folder
        assert f"{begun}: holds no finished run; it is left out" in caplog.text
        with pytest.raises(ConfigError, match=r"begun: holds no finished run$"):
            runs_in([begun])
        with pytest.raises(ConfigError, match="typo: holds no finished run"):
            runs_in([folder, tmp_path / "typo"])

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("summary.json", "[]"),
            ("summary.json", "{}"),
            ("summary.json", "[1, 2]"),
            ("config.json", "{}"),
            ("holdings.json", '{"train'),
            ("latents.json", "["),
            ("latents.json", "[1]"),
            ("holdings.json", "[1]"),
            ("model.json", "[1]"),
        ],
    )
    def test_a_damaged_file_is_named(
        self,
        file: str,
        content: str,
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / file).write_text(content)
        assert cli.main(["report", str(copy)]) == 2
        assert file in capsys.readouterr().err

    def test_without_clients_records_their_figures_are_left_out(
        self, folder: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        (copy / "clients.jsonl").write_text("")
        assert "FedAvg" in report.write([copy]).read_text()

    def test_a_place_that_cannot_be_written_to(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = tmp_path / f"{'x' * 249}.html"  # longer with what stands in for it meanwhile
        assert cli.main(["report", str(folder), "--out", str(page)]) == 2
        error = capsys.readouterr().err
        assert (
            f"{page}: the report and its tables cannot be written there: File name too long: "
            in error
        )
        assert ".new" not in error


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_nothing_overflows_in_a_browser(folder: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    measure = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    text = (folder / "report.html").read_text()
    page.write_text(text.replace("</body>", f"<script>{measure}</script></body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--window-size={width},900", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={tmp_path}/profile", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    [(there, room)] = re.findall(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert int(there) <= int(room)

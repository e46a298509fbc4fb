"""Where a sweep's runs work: in processes of this machine, on a Ray cluster, or on a Slurm one.

A run on a Ray cluster works in a folder of its machine's own, which is copied here when the run has
ended. Nothing of it is here before, so that a run that is lost with its machine begins anew
elsewhere.
Slurm's machines see the caller's folders: there a run goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from joblib import cpu_count

from pfedgpa_app.config.parse import argument
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.own_code import FOLDER
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.engine import PARENT
from pfedgpa_app.methods.own import STUDIED, studied
from pfedgpa_app.results.log import last_event
from pfedgpa_app.runs.folder import LOCK
from pfedgpa_app.runs.launcher import with_absolute_paths

Settings = Mapping[str, Any]
Event = dict[str, Any]
_LOOK = 1.0  # seconds between looks at what a run on a Ray cluster says
_QUEUE = 200  # how many runs Slurm is given at a time, unless the user says
_DAY = 24 * 60  # minutes, a Slurm job's time limit
_SAID = 10_000  # how many of the last bytes of a run's errors are passed on


class Lost(Exception):  # noqa: N818 (of the run, and no fault of its)
    """The machine that a run was on has left the cluster."""


class Going(Protocol):
    """A run that was started."""

    def event(self) -> Event:
        """Return the last event of the run, or {}."""

    def status(self) -> int | None:
        """Return the run's exit status; None until it has ended.

        Raises:
            Lost: the run's machine has left, so that there will be no exit status.
        """

    def said(self) -> str:
        """Return what the run wrote to stderr, once it has ended."""

    def stop(self) -> None:
        """Ask the run to end; it may take a moment."""

    def wait(self) -> None:
        """Wait until the run has ended."""


class Place(Protocol):
    """A place where runs can work.

    Attributes:
        shared: whether runs work in the folders that are to hold their results, and can go on
            there.
    """

    shared: bool

    def machines(self) -> list[int]:
        """Return the number of cores of each machine."""

    def check(self, configs: Sequence[Config], cores: int | None) -> None:
        """Warn of runs for which no machine is large enough.

        Args:
            cores: how many each run has for itself; None: as its settings say.
        """

    def start(self, settings: Settings, app: Path, folder: Path, cores: int | None) -> Going:
        """Start a run whose results go to ``folder``.

        Args:
            cores: how many the run has for itself; None: as its settings say.
        """

    def close(self) -> None:
        """Disconnect from the place."""


def command(settings: Settings, app: Path) -> list[str]:
    """Return the command that starts a run."""
    # -P: import nothing from the user's folder, whatever lies there
    words = [sys.executable, "-P", "-m", "pfedgpa_app", "run", "--app", str(app)]
    given = {key: argument(value) for key, value in settings.items()}
    return words + [f"{key}={text}" for key, text in given.items() if text]  # "": not given


class Here:
    """This machine."""

    shared = True

    def machines(self) -> list[int]:
        return [int(cpu_count())]

    def check(self, configs: Sequence[Config], cores: int | None) -> None:
        pass

    def start(self, settings: Settings, app: Path, folder: Path, cores: int | None) -> Going:
        return _Process(settings, app, folder, cores, studied())

    def close(self) -> None:
        pass


class _Process:
    """A run in a process of this machine."""

    def __init__(
        self, settings: Settings, app: Path, folder: Path, cores: int | None, methods: str
    ) -> None:
        """``methods``: as ``studied``."""
        self.folder = folder
        # not a pipe: if a user's own code wrote more than one holds, the run would block
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        env = os.environ | {PARENT: str(os.getpid()), STUDIED: methods}
        if cores:
            settings = {**settings, "workers": cores}
            env["OMP_NUM_THREADS"] = str(cores)  # the server's share, too
        self.process = subprocess.Popen(
            command(settings, app),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for the sweep, which then stops its runs
        )

    def event(self) -> Event:
        return last_event(self.folder)

    def status(self) -> int | None:
        return self.process.poll()

    def said(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _SAID))
        return self._errors.read().decode(errors="replace")

    def stop(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self.process.wait()


class RayCluster:
    """The Ray cluster at ``RAY_ADDRESS``; by default the one that this machine is part of."""

    shared = False

    def __init__(self) -> None:
        """Connect to the cluster.

        Raises:
            ConfigError: there is none.
        """
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns without it
        import ray

        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--on ray: there is no Ray cluster at {address}: start one with `ray start`, and "
                f"set RAY_ADDRESS=HOST:PORT to its head ({error})"
            ) from error
        self.ray: Any = ray

    def machines(self) -> list[int]:
        cores = (int(n["Resources"].get("CPU", 0)) for n in self.ray.nodes() if n["Alive"])
        return [number for number in cores if number]

    def check(self, configs: Sequence[Config], cores: int | None) -> None:
        most = max(self.machines(), default=0)
        wanted = max((cores or config.workers or 1 for config in configs), default=0)
        if wanted > most:
            warn_once(
                f"workers = {wanted}: no machine of the Ray cluster has as many cores now; the "
                f"largest has {most}: runs wait until one joins"
            )
        gpus = any(n["Resources"].get("GPU") for n in self.ray.nodes() if n["Alive"])
        if not gpus and any(config.device == "cuda" for config in configs):
            warn_once(
                "device = 'cuda': no machine of the Ray cluster has a GPU now: runs wait until one "
                "joins"
            )

    def start(self, settings: Settings, app: Path, folder: Path, cores: int | None) -> Going:
        config = resolve(settings).config
        task = self.ray.remote(carry_out).options(
            num_cpus=cores or config.workers or 1,
            num_gpus=1 if config.device == "cuda" else 0,
            num_returns="streaming",
            max_retries=0,
        )
        there = with_absolute_paths(settings, config)
        if "data-dir" not in settings:  # each machine has a data folder of its own
            del there["data-dir"]
        # this package's own app lies somewhere else there
        given = there, None if app.samefile(APP_DIR) else app, cores, os.getcwd(), studied()
        return _Task(self.ray, task.remote(*given), folder)

    def close(self) -> None:
        self.ray.shutdown()


class _Task:
    def __init__(self, ray: Any, answers: Any, folder: Path) -> None:
        self.ray, self.answers, self.folder = ray, answers, folder
        self._event: Event = {}
        self._said = ""
        self._status: int | None = None
        self._node = ""

    def event(self) -> Event:
        return self._event

    def said(self) -> str:
        return self._said

    def status(self) -> int | None:
        while self._status is None and self.ray.wait([self.answers], timeout=0)[0]:
            try:
                answer = self.ray.get(next(self.answers))
            except StopIteration:
                raise Lost from None
            except self.ray.exceptions.RayTaskError as error:
                self._status, self._said = 1, str(error)
            except self.ray.exceptions.RayError as error:
                raise Lost(str(error)) from error
            else:
                if isinstance(answer, str):
                    self._node = answer
                elif isinstance(answer, dict):
                    self._event = answer
                else:
                    self._status, self._said, packed = answer
                    unpack(packed, self.folder)
        if self._status is None and self._has_left():
            raise Lost
        return self._status

    def _has_left(self) -> bool:
        """Whether the run's machine is gone.

        Ray fails a task only when its connection breaks. If the machine falls silent, as without
        power or network, Ray keeps waiting long after it has declared the machine dead.
        """
        dead = (node["NodeID"] for node in self.ray.nodes() if not node["Alive"])
        return self._node in dead

    def stop(self) -> None:
        self.ray.cancel(self.answers)

    def wait(self) -> None:
        with contextlib.suppress(Lost):
            while self.status() is None:
                time.sleep(0.1)


def carry_out(
    settings: dict[str, Any],
    app: Path | None,
    cores: int | None,
    users_folder: str,
    methods: str,
) -> Iterator[str | Event | tuple[int, str, bytes]]:
    """Run on the machine where Ray calls this, as one of its tasks.

    ``methods`` is as ``studied`` where the study was started.

    Yields the machine's node ID in the cluster, then each new event of the run, and at last the
    run's exit status, its errors and its packed folder.
    """
    import ray

    yield ray.get_runtime_context().get_node_id()
    home = Path(tempfile.mkdtemp(prefix="pfedgpa-"))
    folder = home / settings["run-name"]
    if not Path(settings["code-dir"]).is_dir():  # the user has no code of their own there
        del settings["code-dir"]
    os.environ[FOLDER] = users_folder if Path(users_folder).is_dir() else os.getcwd()
    run = _Process(settings | {"out-dir": str(home)}, app or APP_DIR, folder, cores, methods)
    told: Event = {}
    try:
        while (status := run.status()) is None:
            if (event := run.event()) != told:
                told = event
                yield event
            time.sleep(_LOOK)
        yield status, run.said(), pack(folder)
    finally:
        run.stop()
        run.wait()
        shutil.rmtree(home, ignore_errors=True)


def pack(folder: Path) -> bytes:
    """Pack the files below ``folder``, if it exists, into a gzipped tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for path in sorted(folder.glob("**/*")):
            if path.name != LOCK:
                tar.add(path, path.relative_to(folder), recursive=False)
    return buffer.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Replace ``folder`` and what it holds by the files that ``pack`` packed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as home:
        new = Path(home) / "new"
        new.mkdir()
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(new, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


class SlurmCluster:
    """The Slurm cluster of this machine, by submitit; its machines see the caller's folders.

    Further options of ``sbatch`` (partition, account, time limit) come from its own environment
    variables: ``SBATCH_PARTITION``, ``SBATCH_ACCOUNT``, ``SBATCH_TIMELIMIT``.
    """

    shared = True

    def __init__(self, out: Path) -> None:
        """Check that jobs can be submitted; ``out`` is the sweep's folder.

        Raises:
            ConfigError: submitit is not installed, or there is no Slurm here.
        """
        try:
            import submitit
        except ImportError as error:
            raise ConfigError(
                "--on slurm: needs submitit: pip install 'pfedgpa-app[slurm]'"
            ) from error
        if missing := [name for name in ("sbatch", "srun", "sacct") if not shutil.which(name)]:
            raise ConfigError(
                f"--on slurm: there is no {missing[0]} on this machine: start this where the "
                "cluster's jobs are submitted"
            )
        self.submitit: Any = submitit
        self.home = out.absolute() / ".slurm"

    def machines(self) -> list[int]:
        return [1] * _QUEUE  # Slurm itself queues them

    def check(self, configs: Sequence[Config], cores: int | None) -> None:
        pass  # Slurm itself tells what it has no machine for

    def start(self, settings: Settings, app: Path, folder: Path, cores: int | None) -> Going:
        executor = self.submitit.SlurmExecutor(self.home)
        config = resolve(settings).config
        gpus = {"gpus_per_node": 1} if config.device == "cuda" else {}
        executor.update_parameters(
            job_name=folder.name,
            cpus_per_task=cores or config.workers or 1,
            time=_DAY,
            **gpus,
        )
        there = with_absolute_paths(settings, config)
        try:
            job = executor.submit(on_slurm, there, app, cores, studied())
        except self.submitit.core.utils.FailedJobError as error:
            raise ConfigError(f"--on slurm: sbatch refused: {error}") from error
        return _Job(self.submitit, job, folder)

    def close(self) -> None:
        pass


class _Job:
    def __init__(self, submitit: Any, job: Any, folder: Path) -> None:
        self.submitit, self.job, self.folder = submitit, job, folder
        self._said = ""

    def event(self) -> Event:
        return last_event(self.folder)

    def said(self) -> str:
        return self._said

    def status(self) -> int | None:
        if not self.job.done():
            return None
        try:
            status, self._said = self.job.result()
        except self.submitit.core.utils.FailedJobError as error:  # also an UncompletedJobError
            status, self._said = 1, str(error)
        except self.submitit.core.utils.UncompletedJobError as error:
            raise Lost(str(error)) from error
        return int(status)

    def stop(self) -> None:
        self.job.cancel()

    def wait(self) -> None:
        with contextlib.suppress(Lost):
            while self.status() is None:
                time.sleep(0.1)


def on_slurm(settings: Settings, app: Path, cores: int | None, methods: str) -> tuple[int, str]:
    """Run on the machine where Slurm calls this; return the run's exit status and errors.

    ``methods`` is as ``studied`` where the study was started.
    """
    run = _Process(settings, app, Path(settings["out-dir"], settings["run-name"]), cores, methods)
    run.wait()
    return run.process.returncode, run.said()


def place_of(name: str, out: Path) -> Place:
    """Return the place of that name, for a sweep whose folder is ``out``.

    Raises:
        ConfigError: it is not available.
    """
    if name == "slurm":
        return SlurmCluster(out)
    return RayCluster() if name == "ray" else Here()

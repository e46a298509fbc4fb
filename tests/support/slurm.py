"""A fake Slurm on this machine: what submitit asks of ``sbatch``, ``srun``, ``sacct``, ``scancel``.

    python slurm.py HOME sbatch FILE

A job is a process group; one that is killed counts as a node that failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel")


def install(home: Path) -> None:
    """Put the commands into ``home``."""
    home.mkdir()
    for name in COMMANDS:
        path = home / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {home} {name} "$@"\n')
        path.chmod(0o755)


def jobs(home: Path) -> dict[str, int]:
    """Return {job: its process group}."""
    return {path.stem: int(path.read_text()) for path in sorted(home.glob("*.job"))}


def sbatch(home: Path, file: str) -> None:
    job = str(1 + len(jobs(home)))
    told = {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    told |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    env = os.environ | told | {"SLURM_JOB_NODELIST": "here"}
    # as Slurm keeps a copy of its own: submitit takes the file away once it is submitted
    kept = shutil.copy(file, home / f"{job}.sh")
    # the shell writes how the job ended, unless it is killed with the job
    script = f'bash "{kept}" > "{home}/{job}.log" 2>&1; echo COMPLETED > "{home}/{job}.end"'
    process = subprocess.Popen(
        ["sh", "-c", script],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    (home / f"{job}.job").write_text(str(process.pid))
    print(f"Submitted batch job {job}")


def srun(_: Path, *words: str) -> None:
    command = list(words)
    while command[0].startswith("--"):
        command = command[1 if command[0] == "--unbuffered" or "=" in command[0] else 2 :]
    os.execvp(command[0], command)


def sacct(home: Path, *_: str) -> None:
    print("JobID|State|NodeList")
    for job, group in jobs(home).items():
        end = home / f"{job}.end"
        state = "RUNNING" if Path(f"/proc/{group}").exists() else "NODE_FAIL"
        print(f"{job}|{end.read_text().strip() if end.exists() else state}|here")


def scancel(home: Path, job: str) -> None:
    os.killpg(jobs(home)[job], signal.SIGTERM)


if __name__ == "__main__":
    {command.__name__: command for command in (sbatch, srun, sacct, scancel)}[sys.argv[2]](
        Path(sys.argv[1]), *sys.argv[3:]
    )

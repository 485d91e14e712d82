"""A study's jobs on a Ray cluster, their records brought home."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from urllib.parse import urlsplit

import ray

from ..errors import RunError
from ..files import write_atomically
from .launch import LOG, PATIENCE, work
from .plan import Job

RETRIES = 3  # of a group of runs whose node died
FILES = ("record.json", LOG)


def ray_tasks(
    jobs: Sequence[Job], together: int, address: str | None, device: str, gpus: float
) -> Iterator[int]:
    """A Launcher: `together` jobs are a task of a Ray cluster, which takes a core and `gpus` GPUs.

    The nodes need this package, and the data and the teacher, at the same paths as here. Where
    they share the study's folder, the runs of a node that died go on after their last epoch;
    else they begin anew. Records and logs come home either way.

    Args:
        address: of the cluster; None: RAY_ADDRESS, else the one of this machine, else a new one.

    Raises:
        RunError: there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        place = urlsplit(f"//{address}") if address else None
        if place and place.port:  # Ray itself would try for minutes
            socket.create_connection((place.hostname, place.port), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"--address {address}: no Ray cluster: {error}") from error
    try:
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(on_node)
        here = os.getcwd()
        groups = [jobs[i : i + together] for i in range(0, len(jobs), together)]
        running = {task.remote(group, device, here): group for group in groups}
        while running:
            ended = 0
            for reference in ray.wait(list(running), timeout=PATIENCE)[0]:
                group = running.pop(reference)
                ended += len(group)
                try:
                    bring_home(ray.get(reference))
                except ray.exceptions.RayError as error:
                    group[0].folder.mkdir(parents=True, exist_ok=True)
                    with (group[0].folder / LOG).open("a") as log:
                        print(f"error: {' '.join(str(error).split())}", file=log)
            yield ended
    finally:
        ray.shutdown()


def on_node(jobs: Sequence[Job], device: str, folder: str) -> dict[Path, bytes]:
    """A task: train the jobs in `folder`, where the driver works; returns their small files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    work(jobs, device, threads=1, together=len(jobs))
    files = [job.folder / name for job in jobs for name in FILES]
    return {file: file.read_bytes() for file in files if file.exists()}


def bring_home(files: dict[Path, bytes]) -> None:
    """Write the files that are not here already, as they are where the folder is shared."""
    for file, content in files.items():
        if not file.exists() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, methodcaller("write", content))

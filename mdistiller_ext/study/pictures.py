"""Which pictures a study has, and what they are called."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from ..data import facts, get_dataset
from ..engine import predict
from ..errors import ConfigError, RunError
from ..models import build_network
from ..teacher import load_into, load_weights
from . import plots
from .analysis import Findings
from .plan import Study, slug

# Of the picture of the teacher.
TEMPERATURE, RATIO = 4.0, 0.4
IMAGES = 1000  # of the test set, the first
METRICS = (
    ("top1", "test_top1", "test top-1, %", 100.0, "Test accuracy by epoch; bands end at 100 %."),
    (
        "l2",
        "test_l2_probabilities",
        "L2 distance to the teacher's softmax",
        2**0.5,
        "Distance between student and teacher by epoch; bands end at 0.",
    ),
)
# What a method finds while it trains, means over the images of an epoch.
FOUND = (
    ("found_temperature", "mean_temperature", "temperature", "The temperatures found."),
    ("found_pruning", "mean_pruned_ratio", "pruned share of the classes", "The pruning found."),
)
SCHEDULES = (
    ("temperature", "temperature", "temperature", "The temperature schedules as run."),
    ("pruning", "pruned_ratio", "pruned share of the classes", "The pruning as run."),
)


def pictures(
    study: Study, records: dict[str, dict[str, Any]], runs: pd.DataFrame, findings: Findings
) -> tuple[dict[str, tuple[str, Figure]], list[str]]:
    """File name -> (caption, figure); and a line for what could not be drawn."""
    found: dict[str, tuple[str, Figure]] = {}

    def add(name: str, caption: str, figure: Figure | None) -> None:
        if figure:
            found[slug(name)] = (caption, figure)

    add(
        "forest",
        f"Paired differences to {study.baseline}: each seed, mean, interval.",
        plots.forest(study, runs, findings),
    )
    for student in dict.fromkeys(arm.student for arm in findings.arms):
        add(
            f"accuracy_{student}",
            f"{student}: accuracy of the last epoch, each seed, mean and interval.",
            plots.accuracy(study, runs, findings, student),
        )
        for name, key, label, most, caption in METRICS:
            figure = plots.by_epoch(study, records, student, key, label, most)
            add(f"{name}_{student}", f"{student}: {caption}", figure)
        for name, key, label, caption in FOUND:
            figure = plots.by_epoch(study, records, student, key, label)
            add(f"{name}_{student}", f"{student}: {caption}", figure)
        for name, key, label, caption in SCHEDULES:
            figure = plots.schedule(study, records, student, key, label)
            add(f"{name}_{student}", f"{student}: {caption}", figure)
        for arm in study.arms:
            jobs = [job for job in study.jobs if (job.student, job.arm) == (student, arm)]
            figure = plots.dat_groups(
                [records[job.name]["epochs"] for job in jobs if job.name in records]
            )
            caption = f"{student}, {arm}: the groups of DAT, by their loss."
            add(f"dat_{slug(student)}_{slug(arm)}", caption, figure)
    try:
        add(
            "teacher",
            f"What the teacher says of three test images: one it is sure of, one in between, one "
            f"it doubts; as it is, at T = {TEMPERATURE:g}, and there with {100 * RATIO:g} % of the "
            f"classes pruned.",
            _teacher(study, records),
        )
    except (ConfigError, RunError) as error:
        return found, [f"no picture of the teacher: {error}"]
    return found, []


def _teacher(study: Study, records: dict[str, dict[str, Any]]) -> Figure:
    job = next((j for j in study.jobs if j.name in records and records[j.name]["teacher"]), None)
    if job is None:
        raise ConfigError("no run has one")
    record, cfg = records[job.name]["teacher"], job.cfg
    weights = load_weights(Path(record["file"]))
    if weights.sha256 != record["sha256"]:
        raise RunError(f"{weights.file}: not the one that the runs had")
    _, test = get_dataset(cfg.DATASET)
    place = facts(cfg.DATASET).classes, test.side, cfg.DATASET.TYPE
    teacher = build_network(record["name"], *place)
    load_into(teacher, weights, record["name"])
    test = replace(test, padded=test.padded[:IMAGES], targets=test.targets[:IMAGES])
    logits = predict(teacher, test, 250)
    sure = logits.softmax(1).amax(1).argsort(descending=True)
    chosen = sure[[len(sure) // 10, len(sure) * 7 // 10, len(sure) * 19 // 20]]
    side = slice(test.padding, test.padded.shape[2] - test.padding)
    images = test.padded[chosen][:, :, side, side]
    return plots.softened(images, logits[chosen], test.targets[chosen], TEMPERATURE, RATIO)

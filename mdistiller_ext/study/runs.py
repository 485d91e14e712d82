"""Single runs as one page of pictures, which needs no study around them."""

from collections.abc import Mapping
from typing import Any

import yaml

from ..engine.record import confusion_of, own_figures, printable
from . import plots
from .formats import PAGES, drawn, embedded
from .pictures import FOUND, SCHEDULES


def page(runs: Mapping[str, dict[str, Any]], facts: Mapping[str, Mapping[str, str]]) -> str:
    """HTML that needs nothing beside it: what the runs are, and their figures by epoch.

    Args:
        runs: records, by the names that the page gives them; also of runs that go on or failed.
        facts: of each run the lines that say what it is and how far.
    """
    histories = {name: record["epochs"] for name, record in runs.items()}
    firsts = [key for epochs in histories.values() for epoch in epochs[:1] for key in epoch]
    losses = {key: key for key in firsts if key.startswith("loss")}
    top1 = {"train_top1": "training top-1, %", "test_top1": "test top-1, %"}
    top1 |= {"test_ema_top1": "test top-1 of the average, %"}
    schedules = {"lr": "learning rate", "warmup": "share of the distillation loss's weight"}
    schedules |= {key: label for _, key, label, _ in SCHEDULES}
    figures = {
        "The loss in training and its terms, means over the images of an epoch.": plots.by_run(
            histories, losses, steps=False
        ),
        "Accuracy: in training on augmented images, while the weights change; on the test set, "
        "or the images held out, after the epoch.": plots.by_run(histories, top1, steps=False),
        "What was constant within an epoch, or what its last step had.": plots.by_run(
            histories, schedules, steps=True
        ),
        "What was found while training, means over the images of an epoch.": plots.by_run(
            histories, {key: label for _, key, label, _ in FOUND}, steps=False
        ),
        "What the methods schedule or log by themselves.": plots.by_run(
            histories,
            {key: key for run in histories.values() for key in own_figures(run)},
            steps=False,
        ),
    }
    for name, epochs in histories.items():
        figures[f"{name}: the groups of DAT, by their loss."] = plots.dat_groups([epochs])
        if counts := confusion_of(runs[name]):
            caption = f"{name}: what the images of each class are taken for, in the last epoch."
            names = [printable(word) for word in runs[name]["data"]["class_names"]]
            figures[caption] = plots.confusion(counts, names)
    return PAGES.get_template("runs.html.j2").render(
        title=next(iter(runs)) if len(runs) == 1 else f"{len(runs)} runs",
        facts=facts,
        rows=dict.fromkeys(fact for run in facts.values() for fact in run),
        classes=_top1(runs),
        pictures=[
            (caption, embedded(drawn(figure, "svg")))
            for caption, figure in figures.items()
            if figure
        ],
        configs={
            name: yaml.safe_dump(record["config"], sort_keys=False) for name, record in runs.items()
        },
    )


def _top1(runs: Mapping[str, dict[str, Any]]) -> dict[str, list[float | None]]:
    """The top-1 of each class in each run; None where a run has none."""
    of_run = [
        dict(zip(run["data"]["class_names"], run["by_class"]["top1"], strict=True))
        if "by_class" in run
        else {}
        for run in runs.values()
    ]
    names = dict.fromkeys(name for top1 in of_run for name in top1)
    return {printable(name): [top1.get(name) for top1 in of_run] for name in names}

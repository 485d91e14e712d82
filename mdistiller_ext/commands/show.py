"""What runs did, in a few lines here and as one page of pictures; also of runs that go on.

%(prog)s output/digits/dkd_lp,digits,seed0
%(prog)s output/digits/*seed0 --output seed0.html
"""

import argparse
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from ..command import existing, path
from ..errors import ConfigError

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters of a sparkline
FEW = 4  # classes, and confusions, that are named
FIGURES = {
    "loss": "loss",
    "train_top1": "train top-1, %",
    "test_top1": "test top-1, %",
    "test_ema_top1": "test top-1 of the average, %",
    "temperature": "temperature",
    "pruned_ratio": "pruned share",
    "mean_temperature": "temperature found",
    "mean_pruned_ratio": "pruning found",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=existing, metavar="RUN_FOLDER")
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="default: show.html in the first run's folder"
    )


def main(args: argparse.Namespace) -> None:
    from ..engine.record import read_record
    from ..files import write_atomically

    records = {
        name: read_record(folder / "record.json") for name, folder in named(args.runs).items()
    }
    facts = {name: about(record) for name, record in records.items()}
    for name, record in records.items():
        print("\n".join([name, *(f"  {line}" for line in lines(facts[name], record["epochs"]))]))
    try:
        from ..study.runs import page
    except ImportError as error:
        raise ConfigError(f"no page: {error}: pip install 'mdistiller-ext[study]'") from error
    file = args.output or args.runs[0] / "show.html"
    content = page(records, facts).encode()
    write_atomically(file, lambda sink: sink.write(content))
    print(f"page: {file}")


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their own names, or where two have the same one, by their paths."""
    short = {folder.resolve().name: folder for folder in folders}
    return short if len(short) == len(folders) else {str(folder): folder for folder in folders}


def about(record: dict[str, Any]) -> dict[str, str]:
    """What a run is, and how far."""
    from ..engine.record import printable

    config, epochs, session = record["config"], record["epochs"], record["environments"][-1]
    node, teacher = config["DISTILLER"], record["teacher"]
    seconds = timedelta(seconds=round(record["wall_seconds"]))
    where = record.get("data", {}).get("evaluated_on", "the test set")
    top1 = "not evaluated yet"
    if tested := [epoch["epoch"] for epoch in epochs if "test_top1" in epoch]:
        top1 = (
            f"{record['last_epoch_top1']:.2f} % in epoch {tested[-1]}, "
            f"{record['best_epoch_top1_selected_on_test']:.2f} % in epoch {record['best_epoch']} "
            f"(the best, selected on {where})"
        )
    data = config["DATASET"]["TYPE"]
    if limit := config["DATASET"].get("LIMIT"):
        data += f" (at most {limit} training images of a class)"
    facts = {
        "run": f"{method(config)}, "
        + (f"{teacher['name']} ({teacher['test_top1']:.2f} %) -> " if teacher else "")
        + f"{node['STUDENT']} on {data}, seed {config['SOLVER']['SEED']}",
        "status": f"{record['status']}, {len(epochs)} of {config['SOLVER']['EPOCHS']} epochs in "
        + f"{seconds}{': ' if record.get('error') else ''}{record.get('error', '')}",
        "test top-1": top1,
        **classes(record),
        "made": f"{session.get('started', '')[:10]} on {session['device_name']}, torch "
        + f"{session['torch']}, commit {str(session.get('git_commit'))[:12]}",
    }
    return {key: printable(text) for key, text in facts.items()}


def classes(record: dict[str, Any]) -> dict[str, str]:
    """Of a finished run: top-5 if there are more classes, the classes that are hardest, and what is
    confused most often."""
    from ..engine.record import confusion_of

    if not (counts := confusion_of(record)) or not record["epochs"]:
        return {}
    names, last = record["data"]["class_names"], record["epochs"][-1]
    top1 = [(top1, n) for n, top1 in enumerate(record["by_class"]["top1"]) if top1 is not None]
    wrong = [(-c, n, k) for n, row in enumerate(counts) for k, c in enumerate(row) if k != n and c]
    texts = {
        "test top-5": f"{last['test_top5']:.2f} %" if len(names) > 5 else "",
        "hardest": ", ".join(f"{names[n]} {top1:.1f} %" for top1, n in sorted(top1)[:FEW]),
        "confused": ", ".join(
            f"{names[n]} as {names[k]} ({-count} of {sum(counts[n])})"
            for count, n, k in sorted(wrong)[:FEW]
        ),
    }
    return {key: text for key, text in texts.items() if text}


def method(config: Mapping[str, Any]) -> str:
    """Its name; of LOGIT with the loss and the policies."""
    name = config["DISTILLER"]["TYPE"]
    parts = config.get(name, {})
    if not isinstance(parts.get("LOSS"), str):
        return name
    return f"{name} ({' + '.join(map(str, [parts['LOSS'], *parts.get('POLICIES', [])]))})"


def lines(facts: Mapping[str, str], epochs: Sequence[Mapping[str, float]]) -> list[str]:
    """A run for the terminal: its facts, and its figures from the first epoch to the last."""
    from ..engine.record import own_figures, printable

    rows = dict(facts)
    for key, label in (FIGURES | {key: printable(key) for key in own_figures(epochs)}).items():
        if values := [epoch[key] for epoch in epochs if key in epoch]:
            rows[label] = f"{values[0]:.4g} {sparkline(values)} {values[-1]:.4g}"
    width = max(map(len, rows))
    return [f"{label:<{width}}  {text}" for label, text in rows.items()]


def sparkline(values: Sequence[float]) -> str:
    """Values as blocks from the least to the greatest, of many in a row the means."""
    count = min(WIDTH, len(values))
    ends = [len(values) * place // count for place in range(count + 1)]
    means = [fmean(values[first:last]) for first, last in pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)

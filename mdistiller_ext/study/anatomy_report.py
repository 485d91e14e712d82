"""The measurements of `anatomy` on a teacher's table and a run's students, as text and pictures."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from yacs.config import CfgNode

from ..data import ImageSet, facts, get_dataset
from ..distillers import METHODS
from ..engine import teacher_weights
from ..engine.environment import environment
from ..files import default_cache
from ..models import build_network
from ..seeding import epoch_generator
from ..teacher import TeacherTable, load_into, load_weights
from . import anatomy
from .anatomy import Bin, Fit, Gradient, Ranks
from .plots import COLOURS, LINES, STYLE, WIDTH
from .statistics import Summary

TECHNIQUES = ("DKD_EAT", "DKD_DAT", "DKD_LP")
RATIO = 0.4  # of the classes, LP's last stage
BATCH = 64
SOME = 16  # views of the second teacher
Students = Sequence[tuple[int, Path]]


def write(
    cfg: CfgNode, students: Students, second: tuple[str, Path] | None, images: int, output: Path
) -> Path:
    """Measure and write `output`/anatomy.md; returns its path."""
    data, _ = get_dataset(cfg.DATASET)
    chosen = torch.randperm(len(data), generator=epoch_generator(0, 0))[:images].sort().values
    weights = teacher_weights(cfg, torch.device("cpu"))
    name = weights.network or cfg.DISTILLER.TEACHER  # an assistant, where there are some
    teacher = _network(cfg, "TEACHER", name, data)
    load_into(teacher, weights, name)
    table = TeacherTable(
        Path(cfg.DISTILLER.TEACHER_TABLE_ROOT or default_cache()),
        teacher,
        data,
        cfg.DISTILLER.TEACHER_TABLE_DTYPE,
    )
    every = torch.arange(data.num_views)
    views = _views(table.logits, chosen, every, name)
    target = data.targets[chosen]
    answers_of = {epoch: _view(epoch, len(chosen), data.num_views) for epoch, _ in students}
    answered = {e: views[torch.arange(len(chosen)), view] for e, view in answers_of.items()}
    views = views[:, torch.randperm(data.num_views, generator=epoch_generator(0, 2))]
    bins = anatomy.by_rank(views, target)
    half = data.num_views // 2
    rows = {
        "a view with another view": anatomy.agreement(views[:, :2], views[:, 2:3], target, RATIO),
        "the mean of views with that of others": anatomy.agreement(
            views[:, :half], views[:, half:], target, RATIO
        ),
    }
    if second:
        beside, file = second
        other = _network(cfg, "TEACHER", beside, data)
        load_into(other, load_weights(file), beside)
        some = torch.randperm(data.num_views, generator=epoch_generator(0, 1))[:SOME]
        theirs = _views(lambda i, view: other(data.batch(i, view).image)[0], chosen, some, beside)
        rows[f"a view with a view of {beside}"] = anatomy.agreement(
            views[:, :2], theirs[:, :1], target, RATIO
        )
        rows[f"the mean of views with that of {beside}"] = anatomy.agreement(
            views, theirs, target, RATIO
        )
    fits, gradients = {}, {}
    for epoch, file in tqdm(students, "students", leave=False):
        logits = _student(cfg, file, data, chosen, epoch)
        answers = answered[epoch]
        fits[epoch] = anatomy.fit(logits, answers, cfg.DKD.T)
        gradients[epoch] = {
            name: anatomy.gradient(
                _method(cfg, name), _method(cfg, "DKD"), epoch, _batches(logits, answers, target)
            )
            for name in TECHNIQUES
        }
    output.mkdir(parents=True, exist_ok=True)
    figures = {"views": _views_figure(bins), "fits": _fits_figure(cfg, fits)}
    figures["gradients"] = _gradients_figure(gradients)
    for name, figure in figures.items():
        if figure:
            figure.savefig(output / f"anatomy_{name}.svg", bbox_inches="tight")
    session = environment(torch.device("cpu"))
    teaches = f"{name} (sha256 {weights.sha256[:16]})"
    text = _text(cfg, teaches, images, data.num_views, bins, rows, fits, gradients, session)
    (output / "anatomy.md").write_text(text, encoding="utf-8")
    return output / "anatomy.md"


def _network(cfg: CfgNode, role: str, name: str, data: ImageSet) -> nn.Module:
    place = facts(cfg.DATASET).classes, data.side, cfg.DATASET.TYPE
    return build_network(name, *place, key=f"DISTILLER.{role}").eval()


def _views(
    answers: Callable[[Tensor, Tensor], Tensor], chosen: Tensor, views: Tensor, name: str
) -> Tensor:
    """A teacher's logits (N, V, C) of views of images."""
    parts = []
    with torch.inference_mode(), tqdm(total=len(chosen), desc=name, leave=False) as bar:
        for part in chosen.split(16):
            logits = answers(part.repeat_interleave(len(views)), views.repeat(len(part)))
            parts.append(logits.view(len(part), len(views), -1).clone())
            bar.update(len(part))
    return torch.cat(parts)


def _view(epoch: int, images: int, views: int) -> Tensor:
    return torch.randint(views, (images,), generator=epoch_generator(1, epoch))


def _student(cfg: CfgNode, file: Path, data: ImageSet, chosen: Tensor, epoch: int) -> Tensor:
    """A student's logits (N, C) of a view of each image, in evaluation mode."""
    network = _network(cfg, "STUDENT", cfg.DISTILLER.STUDENT, data)
    load_into(network, load_weights(file), cfg.DISTILLER.STUDENT)
    view = _view(epoch, len(chosen), data.num_views)
    with torch.inference_mode():
        return torch.cat(
            [network(batch.image)[0] for batch in data.batches(chosen, view, 250)]
        ).clone()


def _method(cfg: CfgNode, name: str) -> Any:
    """A method at its own settings; T, ALPHA, BETA and the run's length are those of DKD."""
    own = cfg.clone()
    own.defrost()
    own.DISTILLER.TYPE = name
    own[name].update({key: cfg.DKD[key] for key in ("T", "ALPHA", "BETA")})
    return METHODS[name](nn.Identity(), nn.Identity(), own)


def _batches(
    student: Tensor, teacher: Tensor, target: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    parts = zip(*(x.split(BATCH) for x in (student, teacher, target)), strict=True)
    return (part for part in parts if len(part[2]) == BATCH)


def _views_figure(bins: Sequence[Bin]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, 3), Bin._fields, strict=True):
            _band(axes, range(1, len(bins) + 1), [getattr(b, name) for b in bins], 0, name)
            axes.set_xlabel("tenth of the classes, by mean logit")
            axes.set_title(name, fontsize=12)
            axes.set_ylim(0)
    return figure


def _fits_figure(cfg: CfgNode, fits: dict[int, Fit]) -> Figure | None:
    if len(fits) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 4.2), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(("all", "easiest", "hardest")):
            _band(axes, fits, [getattr(fit, name) for fit in fits.values()], place, name)
        eat = _method(cfg, "DKD_EAT")
        planned = [eat.schedule(epoch)["temperature"] for epoch in fits]
        axes.plot(list(fits), torch.tensor(planned).log2(), "k:", label="what EAT prescribes")
        axes.set_xlabel("epoch of DKD")
        axes.set_ylabel("log2 of the best-fit temperature")
        axes.legend(frameon=False)
    return figure


def _gradients_figure(gradients: dict[int, dict[str, Gradient]]) -> Figure | None:
    if len(gradients) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 4.0), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), Gradient._fields, strict=True):
            for place, method in enumerate(TECHNIQUES):
                rows = [getattr(row[method], name) for row in gradients.values()]
                _band(axes, gradients, rows, place, method)
            axes.axhline(1, color="0.6", lw=1, zorder=0)
            axes.set_xlabel("epoch of DKD")
            axes.set_title(f"{name} of the gradient, DKD's = 1", fontsize=12)
        axes.legend(frameon=False)
    return figure


def _band(axes: Any, x: Any, rows: Sequence[Summary], place: int, label: str) -> None:
    x = list(x)
    axes.plot(x, [r.mean for r in rows], LINES[place % 4], color=COLOURS[place], label=label)
    low, high = ([getattr(r, end) or r.mean for r in rows] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=COLOURS[place], alpha=0.2, lw=0)


def _text(
    cfg: CfgNode,
    teacher: str,
    images: int,
    views: int,
    bins: Sequence[Bin],
    ranks: dict[str, Ranks],
    fits: dict[int, Fit],
    gradients: dict[int, dict[str, Gradient]],
    facts: dict[str, Any],
) -> str:
    lines = [
        f"Teacher {teacher}, {images:,} training images of "
        f"{cfg.DATASET.TYPE}, {views} views of each. Means with 95 % t intervals over images, of "
        f"gradients over batches of {BATCH}. torch {facts['torch']}, {facts['device_name']}, "
        f"commit {str(facts['git_commit'])[:12]}.",
        "",
        "## How the teacher's logits vary from view to view",
        "",
        "| tenth of the classes | deviation over views | distance from the median | ratio |",
        "|---|---|---|---|",
        *(
            f"| {place}{' (lowest)' if place == 1 else ''} | {' | '.join(map(said, b))} |"
            for place, b in enumerate(bins, 1)
        ),
        "",
        "![](anatomy_views.svg)",
        "",
        f"Rank correlation among the lowest {RATIO:.0%} of the classes other than the label and "
        f"among the rest, chosen by other answers than those compared:",
        "",
        "| compared | lowest | rest |",
        "|---|---|---|",
        *(f"| {name} | {' | '.join(map(said, row))} |" for name, row in ranks.items()),
        "",
    ]
    if fits:
        lines += [
            "## The temperature that would bring the teacher nearest to the student",
            "",
            "log2 of it, by epoch of a run of DKD; easiest and hardest are the tenths by KL.",
            "",
            "| epoch | all | easiest | hardest | hardest - easiest | EAT prescribes |",
            "|---|---|---|---|---|---|",
        ]
        eat = _method(cfg, "DKD_EAT")
        for epoch, fit in fits.items():
            planned = torch.tensor(eat.schedule(epoch)["temperature"]).log2().item()
            lines.append(f"| {epoch} | {' | '.join(map(said, fit))} | {planned:.2f} |")
        lines += ["", "![](anatomy_fits.svg)", ""] if len(fits) > 1 else [""]
        lines += [
            "## The gradient beside DKD's",
            "",
            "By the student's logits: its length as a share of DKD's, and the cosine of the two.",
            "",
            f"| epoch | {' | '.join(f'{t[4:]} length | {t[4:]} cosine' for t in TECHNIQUES)} |",
            "|---" * (1 + 2 * len(TECHNIQUES)) + "|",
        ]
        for epoch, row in gradients.items():
            cells = [said(part) for t in TECHNIQUES for part in row[t]]
            lines.append(f"| {epoch} | {' | '.join(cells)} |")
        lines += ["", "![](anatomy_gradients.svg)", ""] if len(gradients) > 1 else [""]
    return "\n".join(lines)


def said(summary: Summary) -> str:
    if summary.low is None:
        return f"{summary.mean:.3f}"
    return f"{summary.mean:.3f} [{summary.low:.3f}, {summary.high:.3f}]"

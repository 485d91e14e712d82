"""A report as text for the terminal, Markdown, LaTeX and one HTML page."""

import base64
import io
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import jinja2
import matplotlib
import pandas as pd
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..engine.record import printable
from .plan import RUNS, slug
from .tables import Section

PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
WIDE = 48  # characters, of a cell that is prose
UNKNOWN: set[str] = set()  # characters that no font has, and that have been said
NEEDED = "% needs \\usepackage{booktabs}\n"
TEX = {c: f"\\{c}" for c in "&%$#_{}"}
TEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
TEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$"}


@dataclass(frozen=True)
class Report:
    """What every format says.

    Attributes:
        intro: paragraphs.
        verdicts: a line for each claim, and what holds for all of them.
        runs: student, arm, seed, top1 and name of each run.
    """

    title: str
    intro: list[str]
    warnings: list[str]
    verdicts: list[str]
    sections: list[Section]
    left_out: list[str]
    runs: pd.DataFrame


def text(report: Report) -> str:
    """For the terminal."""
    wrapped = lambda cell: textwrap.fill(printable(cell), WIDE)  # noqa: E731
    return _text(report, printable, wrapped, "simple")


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """As Markdown, in which nothing that a record says is markup; pictures are file -> caption."""
    escaped = lambda line: re.sub(r"[\\`*<>&\[\]|]", r"\\\g<0>", printable(line))  # noqa: E731
    return _text(
        report,
        escaped,
        # Brackets are intervals, but for links.
        lambda cell: re.sub(r"[\\`*<>&|]|(?<=\])\(", r"\\\g<0>", printable(cell)),
        above=[f"![{escaped(caption)}]({quote(file)})" for file, caption in pictures.items()],
    )


def latex(section: Section, title: str) -> str:
    r"""A table for \input."""
    heading, note, frame = section
    if "student" in frame and frame["student"].nunique() == 1:
        note, frame = f"{frame['student'][0]}. {note}", frame.drop(columns="student")
    wide = [frame[name].str.len().max() > WIDE for name in frame]
    columns = [
        f"p{{{0.6 / sum(wide):.2f}\\linewidth}}" if long else "lr"[_is_number(frame[name])]
        for name, long in zip(frame, wide, strict=True)
    ]
    table = (
        frame.map(_tex)
        .rename(columns=_tex_heading)
        .to_latex(
            index=False,
            caption=_tex(f"{heading}. {note}"),
            label="tab:" + re.sub(r"[^a-z0-9]+", "-", f"{title} {heading}".lower()).strip("-"),
            column_format=f"@{{}}{''.join(columns)}@{{}}",
            position="htbp",
        )
    )
    # As wide as a page of 345 pt allows.
    size, gap = ("scriptsize", 1.5) if len(columns) > 8 else ("footnotesize", 2)
    small = rf"\centering\{size}\setlength{{\tabcolsep}}{{{gap}pt}}"
    return NEEDED + table.replace(r"\begin{tabular}", f"{small}\n\\begin{{tabular}}")


def html(report: Report, above: list[tuple[str, bytes]], pictures: list[tuple[str, bytes]]) -> str:
    """One page that needs nothing beside it; pictures, above the tables and below, are (caption,
    SVG)."""
    return PAGES.get_template("report.html.j2").render(
        title=report.title,
        report=report,
        tables=[
            (heading, note, frame.to_html(index=False, border=0, classes=slug(heading)))
            for heading, note, frame in report.sections
        ],
        above=[(caption, embedded(picture)) for caption, picture in above],
        pictures=[(caption, embedded(picture)) for caption, picture in pictures],
        runs=[
            (f"../{RUNS}/{quote(run.name)}/", run) for run in report.runs.itertuples(index=False)
        ],
    )


def embedded(picture: bytes) -> str:
    """An SVG as a page holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"


def drawn(figure: Figure, kind: str) -> bytes:
    """A picture's file, the same bytes each time."""
    sink = io.BytesIO()
    written = figure.findobj(Text)
    family = families("".join(sorted({c for text in written for c in text.get_text()})))
    for text in written if len(family) > 1 else ():
        text.set_fontfamily(family)
    with matplotlib.rc_context({"svg.hashsalt": ""}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # one line has said so
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(sink, format=kind, dpi=150, metadata=metadata)
    return sink.getvalue()


def families(text: str) -> list[str]:
    """The usual font, and where it lacks characters of a text, installed ones that have them.

    What none of them has is said, once a character.
    """
    usual = matplotlib.rcParams["font.sans-serif"][0]
    wanted = {c for c in text if c.isprintable()} - _characters(font_manager.findfont(usual))
    names = [usual]
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        if not wanted:
            break
        if "Last Resort" not in entry.name and (found := wanted & _characters(entry.fname)):
            names.append(entry.name)
            wanted -= found
    if new := wanted - UNKNOWN:
        UNKNOWN.update(new)
        print(
            f"warning: pictures: no installed font has {printable(''.join(sorted(new)))}: they "
            f"show boxes instead; install a font that has them, as Noto Sans CJK"
        )
    return names


@cache
def _characters(file: str) -> set[str]:
    """Those that a font has."""
    try:
        return {chr(code) for code in font_manager.get_font(file).get_charmap()}
    except (OSError, RuntimeError):  # one that cannot be read
        return set()


def _text(
    report: Report,
    line: Callable[[str], str],
    cell: Callable[[str], str],
    layout: str = "pipe",
    above: Sequence[str] = (),
) -> str:
    parts = [f"# {line(report.title)}", *map(line, report.intro)]
    parts += [f"**Warning:** {line(warning)}" for warning in report.warnings]
    if report.verdicts:
        parts += ["## Verdicts", "\n".join(f"- {line(verdict)}" for verdict in report.verdicts)]
    parts += above
    for heading, note, frame in report.sections:
        shown = frame.map(cell).rename(columns=cell)
        grid = shown.to_markdown(index=False, disable_numparse=True, tablefmt=layout)
        parts += [f"## {line(heading)}", line(note), grid]
    if report.left_out:
        parts += ["## Left out", "\n".join(f"- {line(reason)}" for reason in report.left_out)]
    return "\n\n".join(parts) + "\n"


def _is_number(cells: "pd.Series[str]") -> bool:
    return not cells.str.contains(r"[^\W\d_]").any()


def _tex_heading(words: str) -> str:
    """In lines, of which numbers below need no more width."""
    lines = r" \\ ".join(map(_tex, textwrap.wrap(words, 10, break_long_words=False)))
    return rf"\shortstack{{{lines}}}"


def _tex(words: str) -> str:
    escaped = "".join(TEX.get(c, c) for c in printable(words))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", escaped)

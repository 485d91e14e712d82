"""What a run shows of itself: lines for the terminal, and one page."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import CPU, signal_at
from matplotlib import font_manager

from mdistiller_ext.commands import show
from mdistiller_ext.engine import train
from mdistiller_ext.engine.record import by_class, read_record, write_record
from mdistiller_ext.study import formats, plots


@pytest.fixture
def run(trained, workdir):
    """The folder of a run with all there is to show."""
    shutil.copytree(trained("dkd_eat_dat_lp"), "output/digits/all")
    return Path("output/digits/all")


def test_a_run_is_a_few_lines_and_a_page(run, tool):
    status, output, _ = tool("show", str(run))
    record = read_record(run / "record.json")
    last, best = record["last_epoch_top1"], record["best_epoch_top1_selected_on_test"]
    assert status == 0 and output.startswith("all\n  run             DKD_EAT_DAT_LP, resnet20 (")
    assert re.search(r"  status          finished, 3 of 3 epochs in \d:\d\d:\d\d\n", output)
    assert f"{last:.2f} % in epoch 3, {best:.2f} % in epoch {record['best_epoch']} (" in output
    assert re.search(r"  temperature     4 (\S)\1\1 4\n", output)
    assert output.endswith(f"page: {run / 'show.html'}\n")
    page = (run / "show.html").read_text()
    assert page.count("data:image/svg+xml") == 5 and "http" not in page
    assert "all: the groups of DAT" in page and "STEP_EPOCHS: 15" in page
    tool("show", str(run))
    assert (run / "show.html").read_text() == page


def test_a_run_names_its_hardest_classes_and_what_is_confused(run, tool, monkeypatch):
    record = read_record(run / "record.json")
    rows = [[20 * (n == k) for k in range(10)] for n in range(10)]
    rows[3][3], rows[3][5], rows[3][8] = 14, 5, 1
    rows[7][7], rows[7][1] = 18, 2
    rows[9] = [0] * 10
    names = [*"0123456\n<9"]
    changes = {"by_class": by_class(rows), "data": {**record["data"], "class_names": names}}
    write_record(run / "record.json", record | changes)
    output = tool("show", str(run))[1]
    top5 = record["epochs"][-1]["test_top5"]
    assert f"\n  test top-5      {top5:.2f} %\n" in output
    assert "\n  hardest         3 70.0 %,   90.0 %, 0 100.0 %, 1 100.0 %\n" in output
    confused = "3 as 5 (5 of 20),   as 1 (2 of 20), 3 as < (1 of 20)"
    assert f"\n  confused        {confused}\n" in output
    page = (run / "show.html").read_text()
    assert "<td>3</td><td>70.00</td>" in page and "<td>9</td><td></td>" in page
    assert "<td>&lt;</td><td>100.00</td>" in page
    few = {"by_class": by_class([[4, 1], [0, 5]])}
    few["data"] = {**record["data"], "class_names": ["cat", "dog"]}
    write_record(run / "record.json", record | few)
    output = tool("show", str(run))[1]
    assert "confused        cat as dog (1 of 5)\n" in output and "top-5" not in output


def test_runs_that_stopped_or_have_just_begun_are_shown_beside_others(run, digits_cfg, tool):
    with signal_at(2, 3):
        train(digits_cfg(), "stopped", CPU)
    record = json.loads((run / "record.json").read_text())
    for key in ("last_epoch_top1", "mean_last_10_top1"):
        del record[key]
    new = run.with_name("new")
    new.mkdir()
    write_record(new / "record.json", record | {"status": "running", "epochs": []})
    folders = [str(run.with_name(name)) for name in ("all", "stopped", "new")]
    status, output, error = tool("show", *folders, "--output", "page.html")
    assert status == 0, error
    assert re.search(r"interrupted, 1 of 3 epochs in \d:\d\d:\d\d: \w.* SIGTERM", output)
    assert "running, 0 of 3 epochs" in output and "not evaluated yet" in output
    assert "<title>3 runs</title>" in Path("page.html").read_text()
    assert tool("show", folders[2])[0] == 0


def test_runs_of_one_name_are_told_apart_by_their_folders(run, tool):
    other = Path("elsewhere", "all")
    other.mkdir(parents=True)
    (other / "record.json").write_bytes((run / "record.json").read_bytes())
    output = tool("show", str(run), "elsewhere/all")[1]
    assert output.startswith("output/digits/all\n") and "\nelsewhere/all\n" in output


def test_what_is_no_run_is_said(workdir, tool):
    Path("empty").mkdir()
    status, _, error = tool("show", "empty")
    assert status == 1 and "empty/record.json: " in error
    assert "nowhere: No such file or directory" in tool("show", "nowhere")[2]


def test_without_its_libraries_a_run_is_its_lines(run, tool, monkeypatch):
    for name in ("jinja2", "mdistiller_ext.study.runs", "mdistiller_ext.study.formats"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    status, output, error = tool("show", str(run))
    assert status == 2 and "test top-1" in output
    (line,) = error.splitlines()
    assert line.startswith("show.py: error: no page: ") and "'mdistiller-ext[study]'" in line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([1.0], "▁"),
        ([3.0, 3.0], "▁▁"),
        ([0.0, 1.0, 7.0], "▁▂█"),
        ([1.0] * 100 + [0.0] * 100, "█" * 20 + "▁" * 20),
    ],
)
def test_a_sparkline_goes_from_the_least_to_the_greatest(values, line):
    assert show.sparkline(values) == line


def test_characters_that_no_font_has_are_said_once(monkeypatch, capsys):
    """Python's warnings are errors here."""
    fonts = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    for name in ("\ud2b8\ub808", "\ub808"):
        runs = {name: [{"epoch": 1, "loss": 1.0}], "other": []}
        figure = plots.by_run(runs, {"loss": "loss"}, steps=False)
        assert b"<svg" in formats.drawn(figure, "svg")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: pictures: no installed font has \ub808\ud2b8: they show boxes")


def test_a_font_that_has_the_characters_is_taken(capsys):
    usual = formats._characters(font_manager.findfont("DejaVu Sans"))
    other = next(f for f in font_manager.fontManager.ttflist if f.name == "STIXGeneral")
    character = min(c for c in formats._characters(other.fname) - usual if c.isprintable())
    assert len(formats.families(f"a{character}")) == 2 and formats.families("a") == ["DejaVu Sans"]
    assert capsys.readouterr().out == ""


def test_a_panel_has_a_line_a_run_with_the_epochs_that_it_has():
    runs = {
        "one": [{"epoch": 1, "lr": 0.0, "test_top1": 5.0}, {"epoch": 2, "lr": 0.0}],
        "other": [{"epoch": 1, "lr": 0.1, "test_top1": 6.0}],
    }
    figure = plots.by_run(runs, {"lr": "rate", "test_top1": "top-1", "loss": "loss"}, steps=False)
    rate, top1 = figure.axes
    assert [line.get_xydata().tolist() for line in top1.lines] == [[[1, 5]], [[1, 6]]]
    assert rate.get_ylabel() == "rate" and len(rate.lines) == 2
    assert [text.get_text() for text in figure.legends[0].texts] == ["one", "other"]
    figure.draw_without_rendering()
    assert plots.by_run({"one": runs["one"]}, {"loss": "loss"}, steps=False) is None

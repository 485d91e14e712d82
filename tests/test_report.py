"""What a report says, in each of its formats, and what its pictures show. The runs are stubs."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from math import hypot
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import yaml
from test_study import (  # noqa: F401
    EFFECTS,
    SESSION,
    TEACHER,
    TREE,
    edit,
    stub_runs,
    study,
    swept,
)

from mdistiller_ext.engine.record import read_record, summary
from mdistiller_ext.errors import RunError
from mdistiller_ext.study import plots, report
from mdistiller_ext.study.analysis import analyse, interval
from mdistiller_ext.study.pictures import pictures
from mdistiller_ext.study.plan import read_study
from mdistiller_ext.study.records import collect, table
from mdistiller_ext.study.report import write_report
from mdistiller_ext.study.statistics import power
from mdistiller_ext.study.tables import condensed, of_test, spans

FORMATS = ("report.md", "report.html", "report.json", "conditions.csv")
MADE = {
    **SESSION,
    "started": "2026-03-01T10:00:00+00:00",
    "command": "tools/compare.py run stub.yaml",
    "code": "c0de" * 16,
    "git_commit": "f00d" * 10,
    "git_dirty": False,
    "together": 1,
}


@pytest.fixture
def stubs(study):  # noqa: F811
    """Builds a study with finished runs."""

    def build(*options, effects=EFFECTS, **changes):
        built = study(*options, **changes)
        stub_runs(built, effects)
        return built

    return build


@pytest.fixture
def write(monkeypatch):
    """Writes a report without pictures, which take most of its time: (text, folder)."""

    def write(built, *allowed):
        with monkeypatch.context() as patch:
            patch.setattr(report, "pictures", lambda *_: ({}, []))
            return write_report(built, allowed)

    return write


def findings_of(built):
    return analyse(built, table(built, collect(built)[0]))


def set_top1(job, values):
    """A run with this accuracy in each epoch."""
    record = read_record(job.folder / "record.json")
    epochs = [{**e, "test_top1": v} for e, v in zip(record["epochs"], values, strict=True)]
    edit(job, epochs=epochs, **summary(epochs))


def texts(folder):
    return {name: (folder / name).read_text() for name in FORMATS}


def section(text, heading):
    """The lines of a Markdown report under a heading."""
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def test_a_study_needs_no_student_alone(write, workdir):
    arms = {arm: node for arm, node in TREE["arms"].items() if arm != "student alone"}
    Path("stub.yaml").write_text(
        yaml.safe_dump({**{k: v for k, v in TREE.items() if k != "alone"}, "arms": arms})
    )
    built = read_study(Path("stub.yaml"), Path("out"))
    stub_runs(built)
    text, _ = write(built)
    assert "## Differences to DKD\n" in text and "alone" not in text


def test_the_report_and_its_files(stubs):
    built = stubs()
    text, folder = write_report(built)
    assert "LP" in text and "better than DKD (corrected p = 0.0156)" in text.replace("\n", " ")
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 5 and "http" not in page
    content = json.loads((folder / "report.json").read_text())
    assert len(content["arms"]) == 4 and content["claims"][1]["claimed"] == 0.64
    assert len((folder / "runs.csv").read_text().splitlines()) == 33
    names = {file.name for file in folder.iterdir()}
    assert {"forest.svg", "forest.png", "top1_resnet8.svg", "l2_resnet8.png"} <= names
    before = {file: file.read_bytes() for file in folder.iterdir()}
    write_report(built)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_report_of_nothing(study):  # noqa: F811
    with pytest.raises(RunError) as error:
        write_report(study())
    assert str(error.value).splitlines() == [
        f"{Path('out', 'stub')}: no finished run yet",
        *(f"resnet8, {arm}: 8 runs to go, seed 0 to 7" for arm in TREE["arms"]),
    ]


def test_what_never_acts_is_said(stubs, write):
    built = stubs()
    for job in built.jobs:
        if job.arm != "student alone":
            edit(job, teacher={**TEACHER, "test_top1": 11.0})
    text, folder = write(built)
    warnings = json.loads((folder / "report.json").read_text())["warnings"]
    assert "resnet8: DKD, EAT, LP: are the same run, for nothing that acts differs" in warnings
    assert "the teacher resnet20 has 11.00 % top-1 on the test set, chance has 10 %" in warnings
    assert all(line in text for line in warnings)


def test_runs_of_a_part_of_the_training_set_are_said_to_be_that(stubs, write):
    built = stubs(options={"SOLVER.EPOCHS": 3, "DATASET.LIMIT": 5})
    for job in built.jobs:
        edit(job, data={"train_images": 50, "evaluated_on": "the test set", "classes": 10})
    text, folder = write(built)
    line = "DATASET.LIMIT 5: trained on 50 images of the data set, as a quick try"
    assert line in json.loads((folder / "report.json").read_text())["warnings"] and line in text
    assert "DATASET.LIMIT 5," in section((folder / "report.md").read_text(), "What each arm set")


def test_missing_runs_are_a_line_an_arm(stubs):
    built = stubs()
    edit(built.jobs[0], status="failed", error="the loss is not finite")
    for job in built.jobs:
        if (job.arm, job.seed) in (("LP", 2), ("LP", 3), ("LP", 4), ("LP", 6), ("DKD", 5)):
            shutil.rmtree(job.folder)
    assert condensed(built, collect(built)[1]) == [
        f"{built.jobs[0].name}: left out: failed: the loss is not finite",
        "resnet8, DKD: 1 run to go, seed 5",
        "resnet8, LP: 4 runs to go, seed 2 to 4, 6",
    ]


# What the test can see


def test_the_power_is_that_of_the_claimed_arms(stubs):
    """Pooled over the two that are claimed; the arm that varies most has no part in it."""
    built = stubs()
    runs = table(built, collect(built)[0])
    found = analyse(built, runs)
    spread = [claim.found.sd for claim in found.claims]
    sd = hypot(*spread) / 2**0.5
    for row, points in zip(found.power, (0.15, 0.3, 0.5), strict=True):
        assert (row.difference, row.pairs, row.sd) == (points, 8, pytest.approx(sd))
        assert row.power == power(points, row.sd, 8, 2)
        assert power(points, row.sd, row.seeds, 2) >= 0.8
    runs.loc[runs["arm"] == "student alone", "top1"] *= np.linspace(0.1, 1.0, 8)
    assert analyse(built, runs).power == found.power


def test_what_five_pairs_can_see_is_nothing(stubs, write):
    text, folder = write(stubs(seeds=list(range(5))))
    assert "5 pairs cannot reach significance whatever happens" in text
    rows = [line.split() for line in section(text, "What the test can see").splitlines()]
    (half,) = [row for row in rows if row[1:2] == ["0.5"]]
    assert half[3:6] == ["5", "0", "%"] and int(half[6]) >= 7
    content = json.loads((folder / "report.json").read_text())
    assert [row["power"] for row in content["power"]] == [0.0, 0.0, 0.0]


def test_arms_that_do_not_differ_say_nothing(stubs, write):
    built = stubs()
    by_seed = {job.seed: job for job in built.jobs if job.arm == "DKD"}
    for job in built.jobs:
        if job.arm in ("EAT", "LP"):
            record = read_record(by_seed[job.seed].folder / "record.json")
            set_top1(job, [epoch["test_top1"] for epoch in record["epochs"]])
    text, folder = write(built)
    seen = section(text, "What the test can see")
    assert seen.count("nothing can be said: the differences do not vary") == 3
    claims = pd.read_csv(folder / "claims.csv")
    assert set(claims["verdict"]) == {"every pair gives +0.00: nothing can be concluded"}
    assert "-0.00" not in text


def test_a_study_without_claims_tests_nothing(stubs, write):
    text, _ = write(stubs(claims={}))
    assert "p value" not in text and "power" not in text


# Intervals and pairs


def test_the_intervals_of_the_claims_hold_together(stubs, write):
    built = stubs()
    runs = table(built, collect(built)[0])
    (eat, _), arms = analyse(built, runs).claims, {a.arm: a for a in analyse(built, runs).arms}
    own = arms["EAT"].to_baseline
    assert eat.low < own.low < own.high < eat.high
    # A claim between the two ends is excluded by the one, not by the other.
    between = (own.high + eat.high) / 2
    family = {"resnet8": {"EAT": between, "LP": 0.64}}
    verdicts = [
        analyse(replace(built, claims=claims), runs).claims[0].verdict
        for claims in (family, {"resnet8": {"EAT": between}})
    ]
    assert "contains 0 and the claimed" in verdicts[0]
    assert "contains 0 and excludes the claimed" in verdicts[1]
    text, _ = write(built)
    assert "simultaneous 95 % interval" in section(text, "Claims")
    assert "for the 2 claims of the study file" in section(text, "Claims")
    alone, _ = write(replace(built, claims={"resnet8": {"EAT": 0.5}}))
    assert "simultaneous" not in alone and "together" not in section(alone, "Claims")
    assert "not corrected for their number" in section(text, "Accuracy")
    assert "not corrected for their number" in section(text, "Differences to DKD")


def test_what_pairing_gains_is_shown(stubs, write):
    """Seeds have an sd of 1 in common, runs one of 0.1 of their own."""
    built = stubs()
    lp = findings_of(built).arms[-1].to_baseline
    assert lp.correlation > 0.9 and lp.unpaired_sd > 5 * lp.sd
    shown = section(write(built)[0], "Differences to DKD")
    (row,) = [line for line in shown.splitlines() if " LP " in line]
    assert row.split()[-3:] == [f"{v:.2f}" for v in (lp.sd, lp.unpaired_sd, lp.correlation)]


def test_an_interval_beyond_100_percent_is_said(stubs, write):
    built = stubs(seeds=[0, 1])
    said = "a t interval is not limited to 0 to 100 %"
    assert said not in write(built)[0]
    for job in built.jobs:
        set_top1(job, [50.0, 50.0, 99.0 - job.seed])
    assert said in write(built)[0]
    runs = table(built, collect(built)[0])
    figure = plots.accuracy(built, runs, analyse(built, runs), "resnet8")
    assert "t intervals are not limited to 0 to 100" in figure.axes[0].get_xlabel()


def test_the_test_says_where_its_patterns_are_drawn(stubs):
    built = findings_of(stubs())
    assert of_test(built) == "the sign-flip test, two-sided, exact"
    claims = [
        replace(claim, found=claim.found._replace(n=n)) for claim in built.claims for n in (9, 17)
    ]
    drawn = "of 9,999 random sign patterns"
    assert of_test(replace(built, claims=claims[1:2])).endswith(f"two-sided, {drawn}")
    assert of_test(replace(built, claims=claims)).endswith(
        f"exact up to 16 pairs and {drawn} above"
    )


# Verdicts


def test_a_verdict_has_beside_it_what_a_reader_must_know_of_the_seeds(stubs, write):
    """Two seeds carry the mean of LP; of EAT, of which nothing is shown, none is named."""
    built = stubs()
    effects = {"LP": [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 1.5, 2.0], "EAT": [0.2, -0.2] * 4}
    for job in built.jobs:
        if job.arm != "student alone":
            top1 = 70.0 + job.seed % 2 + effects.get(job.arm, [0.0] * 8)[job.seed]
            set_top1(job, [60.0, 60.0, top1])
    text, folder = write(built)
    eat, lp, pair = json.loads((folder / "report.json").read_text())["verdicts"]
    assert lp == (
        "resnet8, LP: better than DKD (corrected p = 0.0156): the interval [0.10, 1.50] excludes 0 "
        "and contains the claimed +0.64. Higher in 8 of 8 seeds, median +0.25; 2 seeds (+2.00, "
        "+1.50) carry more than half of the mean; sd over seeds 0.95, of DKD 0.53."
    )
    assert eat.endswith("Higher in 4 of 8 seeds, median +0.00; sd over seeds 0.32, of DKD 0.53.")
    assert pair == "All of it is of resnet8 taught by resnet20, and says nothing of other pairs."
    for content in [text, *list(texts(folder).values())[:2]]:
        assert content.index("better than DKD") < content.index("Accuracy")


def test_an_interval_is_never_shown_with_the_0_that_it_excludes():
    assert (
        interval(0.004, 0.0251) == "[0.004, 0.03]" and interval(-1.0, -2e-5) == "[-1.00, -0.00002]"
    )
    assert interval(-0.0, 1.015) == "[0.00, 1.02]" and interval(None, None) == "unbounded"


def test_whether_the_claims_were_fixed_before_the_first_run_is_said(stubs, write):
    """Where the commit that the first run names has the study file; a note may change."""
    built = stubs()

    def git(*words):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True)

    git("init")
    git("add", "stub.yaml")
    git("commit", "-m", "m")
    commit = git("rev-parse", "HEAD").stdout.strip()

    def said(**changes):
        Path("stub.yaml").write_text(yaml.safe_dump({**TREE, **changes}))
        return [line for line in write(built)[0].splitlines() if "efore the first run" in line]

    assert said() == []
    edit(built.jobs[3], environments=[{**MADE, "git_commit": commit}])
    assert said(note="new") == [
        f"- Fixed before the first run: commit {commit[:12]}, which that run names, has the study "
        f"file with the same arms, seeds and claims."
    ]
    (line,) = said(seeds=[0, 1], claims={"resnet8": {"LP": 0.5}})
    assert line.startswith("- Not as it was before the first run: since commit ")
    assert line.endswith("the study file's seeds and claims changed.")
    edit(built.jobs[3], environments=[{**MADE, "git_commit": "--output=x"}])
    assert said() == []


def test_a_grid_is_a_table_by_held_out_accuracy_and_a_choice(study, write, workdir):  # noqa: F811
    """Over the seeds that all cells with runs have; one of them has not run."""
    built = swept(study)
    effects = dict(zip(built.arms, (0.0, 1.0, -1.0, 5.0), strict=True))
    stub_runs(built, effects)
    first, second, _, last = built.arms
    for job in built.jobs:
        set_top1(job, [50.0, 50.0, 70.0 + job.seed + effects[job.arm]])
        if job.arm == last or (job.arm, job.seed) == (first, 7):
            shutil.rmtree(job.folder)
    text, folder = write(built)
    (verdict,) = json.loads((folder / "report.json").read_text())["verdicts"]
    assert verdict == (
        f"resnet8: of the grid of EAT, {second} has the highest top-1 on the held-out images: "
        f"74.00 % over 7 seeds, 1.00 above {first}. That is the cell to choose; what it gains is "
        f"for runs with DATASET.HOLDOUT 0 and other seeds."
    )
    assert f"resnet8: the grid of EAT lacks {last}: no finished run" in text
    rows = [line.split() for line in section(text, "Grid of EAT").splitlines() if "resnet8" in line]
    assert [row[1:6] for row in rows] == [
        ["0.2", "2", "0.02", "7", "74.00"],
        ["0.2", "1", "0.02", "7", "73.00"],
        ["0.4", "1", "0.02", "7", "72.00"],
    ]
    assert "Differences" not in text and "Claims" not in text and "forest" not in text
    assert (folder / "table_grid_of_eat.tex").exists()
    for job in built.jobs:
        if job.arm == second:
            set_top1(job, [50.0, 50.0, 60.0]) if job.seed == 7 else shutil.rmtree(job.folder)
    text, _ = write(built)
    assert "resnet8: no seed has all other cells of the grid of EAT" in text
    assert "the cell to choose" not in text


# Figures and what they are of


def test_means_are_of_figures_only(stubs):
    """Not of seeds; and 3 epochs have no mean of the last 10."""
    names = {"seconds", "agreement", "kl", "l2", "nll", "ece"}
    assert set(findings_of(stubs()).arms[1].means) == names
    for name in Path("out", "stub").iterdir():
        shutil.rmtree(name)
    assert set(findings_of(stubs("SOLVER.EPOCHS", "12")).arms[1].means) == {*names, "mean_last_10"}


def test_seconds_of_runs_trained_together_are_a_groups(stubs, write):
    built = stubs()
    heading = "Closeness to the teacher, calibration, cost"
    assert "of the whole group" not in section(write(built)[0], heading)
    edit(built.jobs[-1], environments=[{**SESSION, "together": 16}, SESSION])
    text, folder = write(built)
    assert "of the whole group" in section(text, heading)
    (row,) = [line for line in section(text, heading).splitlines() if " LP " in line]
    assert row.split()[-1] == "16"
    assert pd.read_csv(folder / "runs.csv")["together"].tolist() == [1] * 31 + [16]


def test_csv_holds_numbers(stubs, write):
    _, folder = write(stubs())
    names = {"student", "arm", "verdict", "beside"}
    for file in ("report.csv", "claims.csv"):
        frame = pd.read_csv(folder / file)
        assert {name for name in frame if frame[name].dtype.kind not in "if"} <= names
    arms = pd.read_csv(folder / "report.csv").set_index("arm")
    assert {"top1_mean", "top1_sd", "top1_low", "to_baseline_high"} <= set(arms)
    assert arms["to_baseline_mean"]["LP"] == pytest.approx(1.0, abs=0.15)
    assert np.isnan(arms["to_baseline_mean"]["DKD"]) and "to_baseline" not in arms


def test_where_it_comes_from_is_in_every_format(stubs, write):
    built = replace(stubs(), note="The teacher is another one than the paper's.")
    for job in built.jobs:
        edit(job, environments=[{**MADE, "started": f"2026-03-0{1 + job.seed}T10:00:00+00:00"}])
    text, folder = write(built)
    facts = [built.note, built.file_sha256[:12], "f00d" * 3, "c0de" * 3, "2026-03-01", "2026-03-08"]
    for content in [text, *texts(folder).values()]:
        assert all(fact in content.replace("&#39;", "'") for fact in facts)
    for content in (text, *list(texts(folder).values())[:2]):
        assert content.replace("&#39;", "'").index(built.note) < content.index("Accuracy")
    conditions = pd.read_csv(folder / "conditions.csv")
    assert len(conditions) == 32 and set(conditions["command"]) == {MADE["command"]}


def test_what_each_arm_set(stubs, write):
    _, folder = write(stubs())
    settings = json.loads((folder / "report.json").read_text())["settings"]
    by_arm = {row["arm"]: row["settings"] for row in settings}
    assert by_arm["EAT"] == "DISTILLER.TYPE DKD_EAT, RANGE 0.2, STEP_EPOCHS 8, MODE temperature"
    assert by_arm["student alone"] == "DISTILLER.TYPE NONE"
    assert "SOLVER.EPOCHS 3" in by_arm["all arms"] and "SOLVER.LR 0.02" in by_arm["all arms"]
    assert not re.search("SOLVER.SEED|LOG|MOMENTUM|TEACHER_TABLE", by_arm["all arms"])
    assert by_arm["DKD"].startswith("DISTILLER.TYPE DKD, T 4.0, ") and "BETA 2.0" in by_arm["DKD"]
    assert all(
        by_arm["EAT"] in (folder / name).read_text() for name in ("report.md", "report.html")
    )


def test_of_what_an_arm_could_be_made_of_only_its_parts_are_shown(stubs, write):
    parts = {"DISTILLER.TYPE": "LOGIT", "LOGIT": {"LOSS": "KD", "POLICIES": ["EAT"]}}
    arms = {arm: TREE["arms"][arm] for arm in ("student alone", "DKD")}
    arms["composed"] = {"cfg": "vanilla.yaml", "options": parts}
    _, folder = write(stubs(arms=arms, claims={}, effects=dict.fromkeys(arms, 0.0)))
    rows = json.loads((folder / "report.json").read_text())["settings"]
    (composed,) = [row["settings"] for row in rows if row["arm"] == "composed"]
    keys = [part.split()[0] for part in composed.split(", ")]
    assert keys[:3] == ["DISTILLER.TYPE", "LOSS", "POLICIES"] and "EAT.RANGE" in keys
    assert len(keys) < 12 and {key.split(".")[0] for key in keys if "." in key} < {
        "DISTILLER",
        "KD",
        "EAT",
    }


def test_each_run_has_a_link_to_its_folder(stubs, write):
    _, folder = write(stubs())
    links = map(unquote, re.findall('href="([^"]*/)"', (folder / "report.html").read_text()))
    assert sum((folder / link / "record.json").exists() for link in links) == 32


def test_runs_on_several_kinds_of_processor(stubs, write):
    built = stubs()
    heading = "Differences to DKD, each pair on one kind of processor"
    assert heading not in write(built)[0]
    for job in built.jobs:
        kind = "B" if job.seed >= 4 or (job.arm, job.seed) == ("LP", 3) else "A"
        edit(job, environments=[{**SESSION, "device_name": f"processor {kind}"}])
    kinds = [{**SESSION, "device_name": f"processor {kind}"} for kind in "AB"]
    for job in built.jobs:
        if job.seed == 0 and job.arm in ("DKD", "EAT"):
            edit(job, environments=kinds)
    text, folder = write(built, "device_name")
    content = json.loads((folder / "report.json").read_text())
    pairs = {a["arm"]: (a["to_baseline_one_processor"] or {}).get("n") for a in content["arms"]}
    assert pairs == {"student alone": 7, "DKD": None, "EAT": 7, "LP": 6}
    whole = {a["arm"]: (a["to_baseline"] or {}).get("n") for a in content["arms"]}
    assert whole == {"student alone": 8, "DKD": None, "EAT": 8, "LP": 8}
    assert len([line for line in section(text, heading).splitlines() if " 7 " in line]) == 2
    assert len([line for line in section(text, heading).splitlines() if " 6 " in line]) == 1
    rows = section(text, "Conditions").splitlines()
    shown = [re.split(r"\s{2,}", line) for line in rows if line.startswith("device_name")]
    assert shown == [
        ["device_name", "processor A", "15", "0 to 3"],
        ["device_name", "processor B", "19", "0, 3 to 7"],
    ]
    assert "processor A and processor B" in text.split("##")[0]


# Formats


def test_one_run_of_one_epoch(stubs, write):
    built = stubs("SOLVER.EPOCHS", "1", seeds=[0], claims={})
    for job in built.jobs:
        epochs = read_record(job.folder / "record.json")["epochs"][:1]
        edit(job, epochs=epochs, **summary(epochs))
    facts = "on digits; teacher: resnet20 (98.00 % top-1)."
    assert f"4 finished runs of 1 epoch {facts}" in write(built)[0]
    for job in built.jobs[1:]:
        shutil.rmtree(job.folder)
    assert "1 finished run of 1 epoch on digits; teacher: none." in write(built)[0]


def test_numbers_in_words():
    assert [spans(n) for n in ([], [3], [4, 3], [0, 1, 2, 5, 7, 8, 9])] == [
        "",
        "3",
        "3, 4",
        "0 to 2, 5, 7 to 9",
    ]


def test_the_terminal_has_no_markup(stubs, write):
    built = stubs()
    edit(
        built.jobs[0],
        config={**read_record(built.jobs[0].folder / "record.json")["config"], "X": 1},
    )
    text, folder = write(built)
    assert "another config: X 1 -> None" in text and "\\" not in text
    assert r"another config: X 1 -\> None" in (folder / "report.md").read_text()
    edit(built.jobs[1], environments=[{**SESSION, "device_name": "a|b <i> [x](http://y)"}])
    text, folder = write(built, "device_name")
    assert "a|b <i> [x](http://y)" in text
    assert r"a\|b \<i\> [x]\(http://y)" in (folder / "report.md").read_text()
    assert "git_dirty" not in text


def test_what_is_false_stays_false(stubs, write):
    built = stubs()
    edit(built.jobs[0], environments=[MADE])
    (row,) = [x for x in write(built)[0].splitlines() if x.startswith("git_dirty")]
    assert row.split() == ["git_dirty", "False", "1", "0"]


def test_each_table_is_a_file_for_latex(stubs, write):
    _, folder = write(stubs())
    tables = {file.name: file.read_text() for file in folder.glob("table_*.tex")}
    assert len(tables) >= 8 and {"table_claims.tex", "table_differences_to_dkd.tex"} <= set(tables)
    labels = [re.findall(r"\\label\{tab:study-stub-([a-z0-9-]+)\}", t) for t in tables.values()]
    assert all(len(found) == 1 for found in labels) and len(set(map(tuple, labels))) == len(tables)
    for text in tables.values():
        assert text.startswith("% needs \\usepackage{booktabs}\n\\begin{table}")
        assert text.endswith("\\end{table}\n") and text.count(r"\begin{tabular}") == 1
        assert not re.search(r"(?<![$\w-])-\d", text)
    assert re.search(r"& \$-\$\d\.\d\d & \[\$-\$\d", tables["table_differences_to_dkd.tex"])
    assert r"\shortstack{top-1 (\%)}" in tables["table_accuracy.tex"]
    rows = [line for line in tables["table_methods.tex"].splitlines() if line.endswith(r"\\")]
    cells = [[cell.strip() for cell in line[:-2].split("&")] for line in rows[1:]]
    assert [row[0] for row in cells] == list(TREE["arms"])
    top1 = re.compile(r"\d\d\.\d\d\$\\pm\$\d\.\d\d")
    assert all(len(row) == 3 and top1.fullmatch(row[1]) for row in cells)
    marked = {row[0]: row[2].endswith("*") for row in cells}  # not the student alone: no claim
    assert marked == {"student alone": False, "DKD": False, "EAT": False, "LP": True}


# Pictures


def curves(figure):
    """The lines of each axes that are drawn from data."""
    return [[line for line in axes.lines if len(line.get_xdata())] for axes in figure.axes]


def test_no_stage_of_a_schedule_is_cut_off(stubs):
    built = stubs("SOLVER.EPOCHS", "40")
    records, _ = collect(built)
    for job in built.jobs:
        if job.arm == "EAT":
            for epoch in records[job.name]["epochs"]:
                epoch["temperature"] = 5.6 if epoch["epoch"] <= 8 else 2.4
    figure = plots.schedule(built, records, "resnet8", "temperature", "temperature")
    (axes,) = figure.axes
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 5.6
    steps = {patch.get_label(): patch.get_data().values for patch in axes.patches}
    assert steps["EAT"].tolist() == [5.6] * 8 + [2.4] * 32
    assert set(steps) == {"EAT", "student alone, DKD, LP"}


def test_what_is_found_while_training_is_drawn(stubs):
    built = stubs()
    records, _ = collect(built)
    for job in built.jobs:
        if job.arm == "EAT":
            for epoch in records[job.name]["epochs"]:
                epoch["mean_temperature"] = 8.0 / epoch["epoch"]
    runs = table(built, records)
    drawn, _ = pictures(built, records, runs, analyse(built, runs))
    whole, _ = drawn["found_temperature_resnet8"][1].axes
    assert [line.get_ydata()[:2].tolist() for line in whole.lines] == [[8.0, 4.0]]
    assert "found_pruning_resnet8" not in drawn


def test_bands_stay_where_the_metric_can_be(stubs):
    built = stubs()
    records, _ = collect(built)
    rng = np.random.default_rng(0)
    for record in records.values():
        for epoch in record["epochs"]:
            epoch["test_top1"] = rng.choice([90.0, 100.0])
            epoch["test_l2_probabilities"] = rng.choice([0.0, 0.1])
    for key, most in (("test_top1", 100.0), ("test_l2_probabilities", 2**0.5)):
        figure = plots.by_epoch(built, records, "resnet8", key, "y", most)
        whole, late = figure.axes
        ends = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in whole.collections])
        assert len(whole.collections) == 4 and ends.min() >= 0 and ends.max() <= most
        assert whole.get_ylim()[0] == 0 and whole.get_ylim()[1] >= ends.max()
        assert not late.collections


def test_the_axis_of_the_last_quarter_says_where_it_starts(stubs):
    built = stubs("SOLVER.EPOCHS", "40")
    figure = plots.by_epoch(built, collect(built)[0], "resnet8", "test_top1", "top-1", 100.0)
    _, late = figure.axes
    start = late.get_ylim()[0]
    assert start > 50
    assert late.get_title() == f"means from epoch 30 on; this axis starts at {start:.4g}"
    shown = [line for line in late.lines if len(line.get_xdata()) == 11]
    assert len(shown) == 4
    low, high = late.get_ylim()
    assert all(low <= y <= high for line in shown for y in line.get_ydata())


def test_a_curve_has_the_epochs_that_were_evaluated(stubs):
    built = stubs("SOLVER.EPOCHS", "12")
    records, _ = collect(built)
    for record in records.values():
        for epoch in record["epochs"]:
            if epoch["epoch"] not in (5, 10, 12):
                del epoch["test_top1"]
    figure = plots.by_epoch(built, records, "resnet8", "test_top1", "top-1", 100.0)
    whole, late = figure.axes
    assert [line.get_xdata().tolist() for line in whole.lines] == [[5, 10, 12]] * 4
    assert [line.get_xdata().tolist() for line in late.lines[:4]] == [[10, 12]] * 4


def test_lines_that_end_together_have_names_apart(stubs):
    """Eleven arms with the same accuracy, or nearly."""
    arms = {f"arm {n}": {"cfg": "dkd.yaml"} for n in range(9)}
    built = stubs(arms={**TREE["arms"], **arms}, effects=dict.fromkeys([*TREE["arms"], *arms], 0.0))
    figure = plots.by_epoch(built, collect(built)[0], "resnet8", "test_top1", "top-1", 100.0)
    _, late = figure.axes
    low, high = late.get_ylim()
    places = sorted((text.get_position()[1] - low) / (high - low) for text in late.texts)
    assert len(places) == 13 and min(np.diff(places)) >= 0.069 and places[-1] <= 1.0001
    styles = {(line.get_color(), line.get_linestyle()) for line in late.lines[:13]}
    assert len(styles) == 13


def test_pictures_show_each_seed(stubs):
    built = stubs()
    runs = table(built, collect(built)[0])
    findings = analyse(built, runs)
    forest, accuracy = (
        plots.forest(built, runs, findings),
        plots.accuracy(built, runs, findings, "resnet8"),
    )
    lp = runs[runs["arm"] == "LP"].sort_values("seed")["top1"].to_numpy()
    dkd = runs[runs["arm"] == "DKD"].sort_values("seed")["top1"].to_numpy()
    for figure, expected in ((forest, lp - dkd), (accuracy, lp)):
        points = [line.get_xdata() for line in curves(figure)[0] if len(line.get_xdata()) == 8]
        assert any(sorted(p) == pytest.approx(sorted(expected)) for p in points)
    claim = findings.claims[1]
    ends = [tuple(line.get_xdata()) for line in curves(forest)[0] if len(line.get_xdata()) == 2]
    assert (claim.low, claim.high) in ends and (claim.found.low, claim.found.high) in ends


def test_a_baseline_alone_has_nothing_to_be_compared_with(stubs):
    arms = {arm: TREE["arms"][arm] for arm in ("student alone", "DKD")}
    _, folder = write_report(stubs(arms=arms, claims={}))
    names = {file.name for file in folder.iterdir()}
    assert "accuracy_resnet8.svg" in names and "forest.svg" not in names


def test_a_picture_of_a_teacher_that_is_gone_is_missed_in_the_report(stubs):
    text, folder = write_report(stubs())
    for content in (text, (folder / "report.html").read_text()):
        assert "no picture of the teacher: no.pth: cannot be read" in content


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser_without_a_console_error(stubs, workdir, width):
    _, folder = write_report(stubs())
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={workdir / 'browser'}"]
    flags += [f"--window-size={width},900", f"--screenshot={workdir / 'page.png'}"]
    page = (folder / "report.html").resolve().as_uri()
    result = subprocess.run(["chromium", *flags, page], capture_output=True, text=True, timeout=120)
    assert (workdir / "page.png").stat().st_size > 10_000, result.stderr[-500:]
    assert "CONSOLE" not in result.stderr

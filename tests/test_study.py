"""Studies: what is read, run, believed and concluded. The runs are stubs, or tiny."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT, signal_at, untrained_teacher

from mdistiller_ext.engine import train
from mdistiller_ext.engine.folder import plain
from mdistiller_ext.engine.record import summary, write_record
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.study.analysis import analyse
from mdistiller_ext.study.launch import processes, run_jobs
from mdistiller_ext.study.plan import read_study
from mdistiller_ext.study.records import check_conditions, collect, table
from mdistiller_ext.study.report import write_report

TREE = {
    "name": "stub",
    "students": {"resnet8": str(ROOT / "configs" / "digits")},
    "seeds": list(range(8)),
    "baseline": "DKD",
    "alone": "student alone",
    "arms": {
        "student alone": {"cfg": "vanilla.yaml"},
        "DKD": {"cfg": "dkd.yaml"},
        "EAT": {"cfg": "dkd_eat.yaml", "options": {"DKD_EAT.RANGE": 0.2}},
        "LP": {"cfg": "dkd_lp.yaml"},
    },
    "options": {"SOLVER.EPOCHS": 3},
    "claims": {"resnet8": {"EAT": 0.55, "LP": 0.64}},
}
TEACHER = {"name": "resnet20", "file": "no.pth", "sha256": "t", "test_top1": 98.0}
EFFECTS = {"student alone": -3.0, "DKD": 0.0, "EAT": 0.0, "LP": 1.0}


@pytest.fixture
def study(workdir):
    def build(*options, **changes):
        Path("stub.yaml").write_text(yaml.safe_dump({**TREE, **changes}, sort_keys=False))
        return read_study(Path("stub.yaml"), Path("out"), options)

    return build


def stub_runs(study, effects=EFFECTS):
    """Finished records with a common value of each seed and the planted effect of each arm."""
    for job in study.jobs:
        rng = np.random.default_rng([job.seed, study.arms.index(job.arm)])
        common = np.random.default_rng(job.seed).normal(70, 1.0)
        top1 = common + effects[job.arm] + rng.normal(0, 0.1)
        epochs = [
            {"epoch": n, "test_top1": top1 + d, "test_l2_probabilities": 0.5 - n / 10}
            | {"test_agreement": 80.0, "test_kl": 0.3, "test_nll": 1.0, "test_ece": 0.1}
            | {"temperature": 4.0}
            for n, d in enumerate([-5.0, 0.3, *[0.0] * (job.cfg.SOLVER.EPOCHS - 2)], start=1)
        ]
        alone = job.arm == "student alone"
        record = {
            "name": job.name,
            "status": "finished",
            "environment": {"torch": "2", "device_name": "stub", "mdistiller_ext": "0"},
            "teacher": None if alone else TEACHER,
            "config": plain(job.cfg),
            **summary(epochs),
            "wall_seconds": 1.0,
            "epochs": epochs,
        }
        job.folder.mkdir(parents=True)
        write_record(job.folder / "record.json", record)


def edit(job, rehash=True, **changes):
    file = job.folder / "record.json"
    record = json.loads(file.read_text()) | changes
    if rehash:
        write_record(file, record)
    else:
        file.write_text(json.dumps(record))


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_studies_are_valid(file, tmp_path):
    study = read_study(file, tmp_path)
    assert len(study.jobs) == len(study.students) * len(study.arms) * len(study.seeds)
    assert len({job.name for job in study.jobs}) == len(study.jobs)
    assert file.read_text().startswith(f"# python tools/compare.py run studies/{file.name}\n")


def test_the_paper_table_is_the_papers(tmp_path):
    study = read_study(ROOT / "studies" / "paper_table1.yaml", tmp_path)
    jobs = {(job.student, job.arm): job.cfg for job in study.jobs}
    assert len(study.jobs) == 2 * 11 * 10
    assert jobs["resnet20", "EAT 40 %"].DKD_EAT.RANGE == 0.4
    assert jobs["resnet8", "LP 0/20/30/40"].DKD_LP.RATIOS == [0.0, 0.2, 0.3, 0.4]
    assert {cfg.SOLVER.EPOCHS for cfg in jobs.values()} == {80}
    assert sum(map(len, study.claims.values())) == 6


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] is not allowed, expected different integers"),
        ({"arms": {}}, "arms: {} is not allowed, expected a dict"),
        ({"baseline": "KD"}, "baseline: 'KD' is no arm"),
        ({"claims": {"resnet8": {"X": 1.0}}}, "claims: 'X' is no arm"),
        ({"claims": {"resnet9": {}}}, "claims: 'resnet9' is no student"),
        ({"typo": 1}, "typo: no such key, expected name, students"),
        ({"name": ".."}, "name: '..' is not allowed, expected 1 to 200 letters and digits"),
        ({"students": {"resnet8": 3}}, "students: resnet8: 3 is not allowed, expected a path"),
        ({"arms": {1: {"cfg": "dkd.yaml"}}}, "arms: 1 is not allowed, expected a name"),
        ({"arms": {"DKD": {"cfg": "a\0b"}}}, r"arms: DKD: cfg: 'a\\x00b' is not allowed"),
        (
            {"arms": {"DKD": {"cfg": "dkd.yaml", "options": [1]}}},
            r"arms: DKD: options: \[1\] is not allowed, expected a dict",
        ),
        ({"claims": {"resnet8": {"EAT": "x"}}}, "claims: EAT: 'x' is not allowed, expected points"),
        ({"claims": {"resnet8": {"EAT": float("nan")}}}, "claims: EAT: nan is not allowed"),
        ({"options": {1: 2}}, "DKD: 1: no such key"),
        ({"options": {"SOLVER": {"EPOCHS": "x"}}}, "DKD: SOLVER.EPOCHS: 'x' is of the wrong type"),
        ({"options": {"SOLVER.EPOCH": 3}}, "DKD: SOLVER.EPOCH: no such key; did you mean"),
        (
            {
                "arms": {"DKD": {"cfg": "no.yaml"}, "student alone": {"cfg": "dkd.yaml"}},
                "claims": {},
            },
            "No such",
        ),
    ],
)
def test_faults_of_a_study_file(study, changes, fault):
    with pytest.raises(ConfigError, match=fault):
        study(**changes)


def test_an_option_without_a_value_is_said_once(study):
    with pytest.raises(ConfigError, match=r"\Aoptions come as KEY VALUE pairs, found 1 words: 'A'"):
        study("A")


def test_planted_effects_come_out(study):
    built = study()
    stub_runs(built)
    records, left_out = collect(built)
    findings = analyse(built, table(built, records))
    assert left_out == [] and findings.warnings == []
    arms = {arm.arm: arm for arm in findings.arms}
    assert arms["LP"].to_baseline.mean == pytest.approx(1.0, abs=0.15)
    assert arms["DKD"].to_alone.mean == pytest.approx(3.0, abs=0.15)
    assert arms["DKD"].to_baseline is None and arms["DKD"].top1.n == 8
    # Pairing removes what a seed has in common: the sd of a difference is far below an arm's.
    assert arms["LP"].to_baseline.sd < 0.3 < 0.5 < arms["LP"].top1.sd
    assert arms["LP"].best - arms["LP"].top1.mean == pytest.approx(0.3)
    eat, lp = findings.claims
    assert eat.verdict.startswith("no difference to DKD shown")
    assert eat.verdict.endswith("the interval excludes the claimed +0.55")
    assert lp.verdict.startswith("better than DKD") and lp.corrected_p == 2 * 2 / 2**8
    needed = findings.seeds_to_see["resnet8"]
    assert needed["0.15"] >= needed["0.3"] >= needed["0.5"] >= 2


def test_too_few_pairs_are_said_to_be_too_few(study):
    built = study(seeds=list(range(5)))
    stub_runs(built)
    findings = analyse(built, table(built, collect(built)[0]))
    assert len(findings.warnings) == 2
    assert "5 pairs cannot reach significance whatever happens: p is at least 0.0625" in str(
        findings.warnings
    )
    assert all(claim.verdict.startswith("no difference") for claim in findings.claims)


def test_pairs_are_the_seeds_that_both_have(study):
    built = study()
    stub_runs(built)
    whole = analyse(built, table(built, collect(built)[0]))
    for job in built.jobs:
        if (job.arm, job.seed) in (("LP", 2), ("DKD", 5)):
            shutil.rmtree(job.folder)
    records, left_out = collect(built)
    findings = analyse(built, table(built, records))
    lp = next(arm for arm in findings.arms if arm.arm == "LP")
    assert (lp.top1.n, lp.to_baseline.n) == (7, 6)
    before = next(arm for arm in whole.arms if arm.arm == "LP")
    assert lp.to_baseline.mean == pytest.approx(before.to_baseline.mean, abs=0.1)
    claims = [claim.corrected_p for claim in findings.claims]
    for job in built.jobs:
        records.pop(job.name) if job.arm == "EAT" else None
    (alone,) = analyse(built, table(built, records)).claims
    assert alone.corrected_p == claims[1] == 2 * alone.found.p  # the family stays one of two
    assert sorted(left_out) == ["resnet8,DKD,seed5: has not run", "resnet8,LP,seed2: has not run"]


def test_records_that_cannot_be_believed_are_named_and_left_out(study):
    built = study()
    stub_runs(built)
    jobs = {(job.arm, job.seed): job for job in built.jobs}
    edit(jobs["DKD", 0], rehash=False, last_epoch_top1=99.0)
    edit(jobs["DKD", 1], last_epoch_top1=99.0)
    edit(jobs["DKD", 2], status="failed", error="the loss is not finite")
    edit(jobs["DKD", 3], config=plain(jobs["LP", 3].cfg))
    (jobs["DKD", 4].folder / "record.json").write_text("{")
    shutil.rmtree(jobs["DKD", 5].folder)
    shutil.copytree(jobs["DKD", 6].folder, jobs["DKD", 5].folder)
    shutil.copytree(jobs["DKD", 6].folder, built.folder / "runs" / "copy")
    edit(jobs["LP", 0], name="other")
    records, left_out = collect(built)
    text = "\n".join(left_out)
    assert len(records) == 32 - 7
    for line in (
        "resnet8,DKD,seed0: left out: changed after it was written",
        "resnet8,DKD,seed1: left out: its epochs give another last_epoch_top1",
        "resnet8,DKD,seed2: left out: failed: the loss is not finite",
        "resnet8,DKD,seed3: left out: another config: DISTILLER.TYPE 'DKD_LP' -> 'DKD'",
        "resnet8,DKD,seed4: left out: damaged: JSONDecodeError",
        "resnet8,DKD,seed5: left out: a copy of resnet8,DKD,seed6",
        "copy: left out: a copy of resnet8,DKD,seed6",
        "resnet8,LP,seed0: left out: a copy of other",
    ):
        assert line in text


def test_different_conditions_are_not_mixed(study):
    built = study()
    stub_runs(built)
    job = built.jobs[-1]
    record = json.loads((job.folder / "record.json").read_text())
    edit(job, environment={**record["environment"], "torch": "3"})
    records, _ = collect(built)
    message = (
        r'resnet8: torch differs between runs: "2" in 31 runs, .* "3" in 1 runs, as resnet8,LP'
    )
    with pytest.raises(ConfigError, match=message):
        check_conditions(built, records, [])
    check_conditions(built, records, ["torch"])
    edit(job, teacher={**record["teacher"], "sha256": "other"})
    with pytest.raises(ConfigError, match="resnet8: teacher differs between runs"):
        check_conditions(built, collect(built)[0], ["torch"])


def test_arms_trained_unequally_are_not_mixed(study):
    arms = TREE["arms"] | {"LP": {"cfg": "dkd_lp.yaml", "options": {"SOLVER.EPOCHS": 4}}}
    built = study(arms=arms)
    stub_runs(built)
    with pytest.raises(ConfigError, match=r"SOLVER\.EPOCHS differs between runs: 3 in 24 runs"):
        check_conditions(built, collect(built)[0], [])


def test_the_report_and_its_files(study):
    built = study()
    stub_runs(built)
    text, folder = write_report(built)
    assert "| LP" in text and "better than DKD (corrected p = 0.0156)" in text
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 4 and "http" not in page.replace("http-equiv", "")
    content = json.loads((folder / "report.json").read_text())
    assert len(content["arms"]) == 4 and content["claims"][1]["claimed"] == 0.64
    assert len((folder / "runs.csv").read_text().splitlines()) == 33
    assert r"\begin{tabular}" in (folder / "report.tex").read_text()
    names = {file.name for file in folder.iterdir()}
    assert {"forest.svg", "forest.png", "top1_resnet8.svg", "l2_resnet8.png"} <= names


def test_a_report_of_nothing(study):
    with pytest.raises(RunError, match="no finished run yet"):
        write_report(study())


def test_a_study_runs_goes_on_and_survives_a_failure(study, workdir, capsys):
    """With processes of its own; what is finished is not run again."""
    arms = {
        "student alone": {"cfg": "vanilla.yaml"},
        "DKD": {"cfg": "dkd.yaml"},
        "broken": {"cfg": "kd.yaml", "options": {"SOLVER.LR": 1e30}},
    }
    options = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    built = study(*options, arms=arms, seeds=[0, 1], claims={}, options={"SOLVER.EPOCHS": 1})
    failed = run_jobs(built.jobs, partial(processes, device=CPU, count=2))
    assert sorted(failed) == ["resnet8,broken,seed0", "resnet8,broken,seed1"]
    assert "not finite" in failed["resnet8,broken,seed0"]
    done = [job for job in built.jobs if job.arm != "broken"]
    times = [(job.folder / "record.json").stat().st_mtime_ns for job in done]
    weights = [torch.load(job.folder / "student_last", weights_only=True) for job in done]
    assert len(weights) == 4
    run_jobs(built.jobs, partial(processes, device=CPU, count=1), together=3)
    assert times == [(job.folder / "record.json").stat().st_mtime_ns for job in done]
    assert "6 runs: 4 finished already, 2 to go" in capsys.readouterr().out
    records, left_out = collect(built)
    assert len(records) == 4 and len(left_out) == 2


def test_a_packed_study_goes_on_elsewhere(study, workdir, tool):
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    words = [*teacher, "SOLVER.EPOCHS", "2"]
    arms = {"DKD": {"cfg": "dkd.yaml"}, "student alone": {"cfg": "vanilla.yaml"}}
    built = study(*words, arms=arms, seeds=[0], claims={})
    train(built.jobs[0].cfg, built.jobs[0].name, CPU)
    with signal_at(2, 3):
        train(built.jobs[1].cfg, built.jobs[1].name, CPU)
    before = (built.jobs[0].folder / "record.json").read_bytes()
    assert tool("pack", "pack", "out/stub", "p.tar.xz", "--unfinished")[0] == 0
    shutil.move("out", "there")
    assert tool("pack", "unpack", "p.tar.xz", "out/stub")[0] == 0
    assert {file.name for file in built.jobs[0].folder.iterdir()} == {"record.json"}
    assert run_jobs(built.jobs, partial(processes, device=CPU, count=1)) == {}
    assert (built.jobs[0].folder / "record.json").read_bytes() == before
    log = (built.jobs[1].folder / "log.txt").read_text()
    assert "going on after epoch 1 and step 3 of 9 of the next" in log
    status, _, error = tool("pack", "pack", ".", "p.tar.xz")
    assert status == 1 and ".: no records of a study in runs/" in error


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser_without_a_console_error(study, workdir, width):
    built = study()
    stub_runs(built)
    _, folder = write_report(built)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={workdir / 'browser'}"]
    flags += [f"--window-size={width},900", f"--screenshot={workdir / 'page.png'}"]
    page = (folder / "report.html").resolve().as_uri()
    result = subprocess.run(["chromium", *flags, page], capture_output=True, text=True, timeout=120)
    assert (workdir / "page.png").stat().st_size > 10_000, result.stderr[-500:]
    assert "CONSOLE" not in result.stderr

"""Studies: what is read, run, believed and concluded. The runs are stubs, or tiny."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, ROOT, untrained_teacher

from mdistiller_ext.distillers import RECIPES
from mdistiller_ext.engine.folder import plain
from mdistiller_ext.engine.record import summary, write_record
from mdistiller_ext.errors import ConfigError, RunError
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.study import launch
from mdistiller_ext.study.analysis import analyse
from mdistiller_ext.study.launch import processes, progress, run_jobs
from mdistiller_ext.study.plan import inert_arms, read_study
from mdistiller_ext.study.records import check_conditions, collect, table

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
SESSION = {"first_epoch": 1, "torch": "2", "device_name": "stub", "mdistiller_ext": "0"}
SWEPT = {"cfg": "dkd_lp.yaml", "grid": {"DKD_LP.T": [2.0, 4.0]}}
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
            "environments": [SESSION],
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
    assert len({job.name for job in study.jobs}) == len(study.jobs)
    assert {job.arm for job in study.jobs} == set(study.arms)
    assert {job.student for job in study.jobs} == {job.cfg.DISTILLER.STUDENT for job in study.jobs}
    assert inert_arms(study) == []
    assert file.read_text().startswith(f"# python tools/compare.py run studies/{file.name}\n")


def test_the_paper_table_is_the_papers(tmp_path):
    study = read_study(ROOT / "studies" / "paper_table1.yaml", tmp_path)
    jobs = {(job.student, job.arm): job.cfg for job in study.jobs}
    assert len(study.jobs) == 2 * 11 * 10
    assert jobs["resnet20", "EAT 40 %"].DKD_EAT.RANGE == 0.4
    assert jobs["resnet8", "LP 0/20/30/40"].DKD_LP.RATIOS == [0.0, 0.2, 0.3, 0.4]
    assert {cfg.SOLVER.EPOCHS for cfg in jobs.values()} == {80}
    assert sum(map(len, study.claims.values())) == 6


def test_common_options_hold_for_the_arms_made_of_what_they_set(tmp_path):
    def read(key):
        study = read_study(ROOT / "studies" / "peers.yaml", tmp_path, [key, 2])
        return {job.arm: job.cfg.LOGIT for job in study.jobs}

    nodes = [node for node in read("LOGIT.EAT.STEP_EPOCHS").values() if "EAT" in node.POLICIES]
    assert {node.EAT.STEP_EPOCHS for node in nodes} == {2}
    with pytest.raises(ConfigError, match=r"LOGIT.EAKD.FOO: no such key"):
        read("LOGIT.EAKD.FOO")
    with pytest.raises(ConfigError, match=r"yaml: LOGIT.NORM.X: no arm uses it"):
        read_study(ROOT / "studies" / "paper_table1.yaml", tmp_path, ["LOGIT.NORM.X", 2])


def test_each_peer_is_with_each_technique_that_it_allows(tmp_path):
    study = read_study(ROOT / "studies" / "peers.yaml", tmp_path)
    nodes = {job.arm: job.cfg.LOGIT for job in study.jobs if job.arm != study.alone}
    general, peers = RECIPES["LOGIT"], [arm for arm in nodes if "+" not in arm]
    assert {nodes[arm].LOSS for arm in peers} == set(LOSSES)
    for arm in peers:
        for technique in ("EAT", "DAT", "LP"):
            node = nodes[arm].clone()
            node.defrost()
            node.POLICIES = [*node.POLICIES, technique]
            if general.read(node).conflict:
                assert f"{arm} + {technique}" not in nodes
            else:
                node.freeze()
                assert nodes[f"{arm} + {technique}"] == node


def test_runs_go_seed_by_seed_and_arms_with_seeds_of_their_own_after_those_before(study):
    arms = {
        "DKD": {"cfg": "dkd.yaml"},
        "LP": {"cfg": "dkd_lp.yaml"},
        "student alone": {"cfg": "vanilla.yaml", "seeds": [0]},
        "KD": {"cfg": "kd.yaml", "seeds": [0]},
        "EAT": {"cfg": "dkd_eat.yaml"},
    }
    jobs = study(arms=arms, seeds=[0, 1]).jobs
    assert [(job.arm, job.seed) for job in jobs] == [
        *(("DKD", 0), ("LP", 0), ("DKD", 1), ("LP", 1)),
        *(("student alone", 0), ("KD", 0)),
        *(("EAT", 0), ("EAT", 1)),
    ]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] is not allowed, expected different integers"),
        (
            {"arms": {**TREE["arms"], "LP": {"cfg": "dkd_lp.yaml", "seeds": 2}}},
            "arms: LP: seeds: 2 is not allowed, expected different integers",
        ),
        ({"arms": {}}, "arms: {} is not allowed, expected entries NAME: VALUE"),
        ({"name": 5}, "name: 5 is not allowed, expected text"),
        ({"seeds": 10}, "seeds: 10 is not allowed, expected a list"),
        ({"baseline": "KD"}, "baseline: 'KD' is no arm"),
        ({"claims": {"resnet8": {"X": 1.0}}}, "claims: 'X' is no arm"),
        ({"claims": {"resnet9": {}}}, "claims: 'resnet9' is no student"),
        ({"typo": 1}, "typo: no such key, expected name, note, students"),
        ({"name": ".."}, "name: '..' is not allowed, expected 1 to 200 letters and digits"),
        ({"students": {"resnet8": 3}}, "students: resnet8: 3 is not allowed, expected a path"),
        ({"arms": {1: {"cfg": "dkd.yaml"}}}, "arms: 1 is not allowed, expected a name"),
        (
            {"arms": TREE["arms"] | {"LP": SWEPT | {"grid": {"DKD_LP.T": [4, 4]}}}},
            r"arms: LP: grid: DKD_LP.T: \[4, 4\] is not allowed, expected a list of different v",
        ),
        (
            {"arms": TREE["arms"] | {"LP": SWEPT | {"options": {"DKD_LP": {"T": 1.0}}}}},
            "arms: LP: grid: DKD_LP.T: is in `options` too",
        ),
        (
            {"arms": TREE["arms"] | {"LP": SWEPT | {"grid": {}}}},
            "arms: LP: grid: {} is not allowed, expected entries KEY: ",
        ),
        (
            {"arms": {"LP": SWEPT | {"grid": {f"A.B{n}": [0, 1] for n in range(2000)}}}},
            "arms: LP: grid: has more than 1000 cells, expected fewer values",
        ),
        ({"arms": {"LP": SWEPT | {"grid": {"A.B": ["\n"]}}}}, r"arms: 'LP B \\n' is not allowed"),
        (
            {"arms": TREE["arms"] | {"LP": SWEPT}},
            "claims: 'LP' is a grid, expected a single arm",
        ),
        ({"arms": {"DKD": SWEPT}, "claims": {}}, "baseline: 'DKD' is a grid, expected a single"),
        (
            {"arms": TREE["arms"] | {"S": SWEPT, "S T 2.0": {"cfg": "dkd_lp.yaml"}}},
            "arms: two names differ by special characters only",
        ),
        ({"arms": {"DKD": {"cfg": "a\0b"}}}, r"arms: DKD: cfg: 'a\\x00b' is not allowed"),
        (
            {"arms": {"DKD": {"cfg": "dkd.yaml", "options": [1]}}},
            r"arms: DKD: options: \[1\] is not allowed, expected entries KEY: VALUE",
        ),
        ({"claims": {"resnet8": {"EAT": "x"}}}, "claims: EAT: 'x' is not allowed, expected points"),
        ({"claims": {"resnet8": {"EAT": float("nan")}}}, "claims: EAT: nan is not allowed"),
        (
            {"students": {"resnet14": str(ROOT / "configs" / "digits")}, "claims": {}},
            r"\A[^\n]*students: resnet14: is not what runs: DISTILLER.STUDENT is resnet8; [^\n]*\Z",
        ),
        (
            {"options": {1: 2}},
            r"1: no arm uses it; they have .*SOLVER, NONE, DKD, DKD_EAT, DKD_LP$",
        ),
        ({"options": {"SOLVR.EPOCHS": 2}}, "SOLVR.EPOCHS: no arm uses it; they have DATASET, "),
        (
            {"options": {"KD": {"TEMPERATURE": 2}}},
            "KD.TEMPERATURE: no arm uses it; they have DATASET",
        ),
        (
            {"arms": TREE["arms"] | {"LP": {"cfg": "dkd_lp.yaml", "options": {"DKD.BETA": 1.0}}}},
            "LP: DKD.BETA: does nothing with DISTILLER.TYPE DKD_LP; DKD_LP.BETA does",
        ),
        ({"options": {"SOLVER.SEED": 3}}, "options: SOLVER.SEED: is the study's own: `seeds` list"),
        ({"options": {"LOG": {"PREFIX": "x"}}}, "options: LOG.PREFIX: .*: --output names"),
        ({"options": {"EXPERIMENT.NAME": "x"}}, "options: EXPERIMENT.NAME: is the study's own: a"),
        (
            {
                "arms": TREE["arms"]
                | {"LP": {"cfg": "kd.yaml", "options": {"EXPERIMENT.PROJECT": "x"}}}
            },
            "arms: LP: options: EXPERIMENT.PROJECT: is the study's own: ",
        ),
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


@pytest.mark.parametrize("key", ["SOLVER.SEED", "EXPERIMENT.NAME", "LOG.PREFIX"])
def test_what_the_study_sets_is_refused_on_the_command_line_too(study, key):
    with pytest.raises(ConfigError, match=f"options: {key}: is the study's own: "):
        study(key, "1")


HELD = {"SOLVER.EPOCHS": 3, "DATASET.HOLDOUT": 0.333}


def swept(study, *options, **changes):
    """A study of one grid, and no arm beside it."""
    grid = {"DKD_EAT": {"RANGE": [0.2, 0.4], "STEP_EPOCHS": [1, 2]}, "SOLVER.LR": [0.02]}
    arms = {"EAT": {"cfg": "dkd_eat.yaml", "options": {"DKD_EAT.T": 3.0}, "grid": grid}}
    changes = {"baseline": None, "alone": None, "claims": None, "options": HELD, **changes}
    tree = {key: value for key, value in {**TREE, "arms": arms, **changes}.items() if value}
    Path("swept.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return read_study(Path("swept.yaml"), Path("out"), options)


def test_a_grid_is_an_arm_for_each_of_its_cells(study, workdir):
    built = swept(study)
    assert built.arms == [
        f"EAT RANGE {spread} STEP_EPOCHS {step} LR 0.02" for spread in (0.2, 0.4) for step in (1, 2)
    ]
    cfgs = {job.arm: job.cfg for job in built.jobs}
    assert len(built.jobs) == 4 * 8 and (built.baseline, built.alone) == ("", "")
    node = cfgs["EAT RANGE 0.4 STEP_EPOCHS 1 LR 0.02"].DKD_EAT
    assert (node.RANGE, node.STEP_EPOCHS, node.T) == (0.4, 1, 3.0)
    assert built.jobs[2].name == "resnet8,EAT_RANGE_0.4_STEP_EPOCHS_1_LR_0.02,seed0"


def test_a_grid_is_not_chosen_on_the_test_set(study, workdir):
    message = (
        "swept.yaml: arms: EAT: grid: is chosen on held-out images, never on the test set: "
        "DATASET.HOLDOUT is 0, expected a share of the training images, as 0.1"
    )
    with pytest.raises(ConfigError) as error:
        swept(study, options={"SOLVER.EPOCHS": 3})
    assert str(error.value) == message
    assert swept(study, "DATASET.HOLDOUT", "0.2", options={"SOLVER.EPOCHS": 3}).grids


def test_claims_need_a_baseline(study):
    with pytest.raises(ConfigError, match="claims: are over a baseline, and `baseline` is missing"):
        swept(study, claims=TREE["claims"], arms=TREE["arms"])


def test_a_grid_may_sweep_what_runs_must_else_have_in_common(study, workdir):
    grid = {"SOLVER.LR": [0.02, 0.05]}
    built = swept(study, arms={"EAT": {"cfg": "dkd_eat.yaml", "grid": grid}})
    stub_runs(built, dict.fromkeys(built.arms, 0.0))
    check_conditions(built, collect(built)[0], [])


def test_options_of_a_study_hold_for_the_arms_whose_method_has_them(study):
    built = study("DKD_LP.BETA", "5.0", options={"DKD.T": 2.0, "DKD_EAT.RANGE": 0.3})
    cfgs = {job.arm: job.cfg for job in built.jobs}
    assert (cfgs["DKD"].DKD.T, cfgs["LP"].DKD_LP.BETA) == (2.0, 5.0)
    assert (cfgs["LP"].DKD_LP.T, cfgs["LP"].DKD.T) == (4.0, 4.0)  # its own, and one of no use
    assert cfgs["EAT"].DKD_EAT.RANGE == 0.2  # the arm's own option


def test_what_never_acts_and_arms_that_are_the_same_run_are_said_once(study):
    options = {"SOLVER.EPOCHS": 6, "SOLVER.LR_DECAY_STAGES": [5, 6]}
    lines = inert_arms(study(options=options))
    every = "student alone, DKD, EAT, LP"
    assert lines[0] == (
        f"resnet8: {every}: SOLVER.LR_DECAY_STAGES: [6] never act: SOLVER.EPOCHS is 6"
    )
    assert lines[-1] == "resnet8: DKD, EAT, LP: are the same run, for nothing that acts differs"
    assert [line.split(": ")[1] for line in lines[1:-1]] == ["DKD", "EAT", "EAT", "LP", "LP"]


def test_the_runner_and_the_report_agree_on_what_is_finished(study):
    built = study()
    stub_runs(built)
    jobs = {(job.arm, job.seed): job for job in built.jobs}
    shutil.rmtree(jobs["DKD", 5].folder)
    shutil.copytree(jobs["DKD", 6].folder, jobs["DKD", 5].folder)
    edit(jobs["DKD", 3], config=plain(jobs["LP", 3].cfg))
    edit(jobs["DKD", 2], status="interrupted", config=plain(jobs["EAT", 2].cfg))
    edit(jobs["LP", 0], status="interrupted")
    before = {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file()}

    def launcher(jobs, together):
        raise AssertionError("something runs")

    wrong = run_jobs(built.jobs, launcher)
    assert wrong.keys() == {f"resnet8,DKD,seed{seed}" for seed in (2, 3, 5)}
    way_on = "remove out/stub/runs/{}, or give the study another `name:` or --output"
    assert wrong["resnet8,DKD,seed5"] == (
        f"a copy of resnet8,DKD,seed6; {way_on.format('resnet8,DKD,seed5')}"
    )
    reason = wrong["resnet8,DKD,seed3"]
    assert reason.startswith("made with another config: DISTILLER.TYPE 'DKD_LP' -> 'DKD'; ")
    assert reason.endswith(way_on.format("resnet8,DKD,seed3"))
    for name in wrong:
        shutil.rmtree(built.folder / "runs" / name)
    left = []
    run_jobs(built.jobs, lambda jobs, together: left.extend(jobs) or iter(()))
    records, _ = collect(built)
    assert {job.name for job in left} == {job.name for job in built.jobs} - records.keys()
    assert {f: f.read_bytes() for f in before if f.exists()} == {
        file: content for file, content in before.items() if file.parent.name not in wrong
    }


def test_a_finished_study_is_not_another_ones(study, tool):
    """Its runs have three epochs; four are asked for."""
    stub_runs(study(seeds=[0]))
    words = ["run", "stub.yaml", "--output", "out", "--device", "cpu"]
    status, output, error = tool("compare", *words)
    assert status == 0 and "4 runs: 4 finished already, 0 to go" in output
    assert output.count("warning: resnet8: DKD, EAT, LP: are the same run") == 1
    assert output.endswith("finished: python tools/compare.py report stub.yaml --output out\n")
    status, output, error = tool("compare", *words, "SOLVER.EPOCHS", "4")
    assert status == 1 and "finished" not in output
    lines = error.splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        "compare.py: error: resnet8,student_alone,seed0: made with another config: "
        "SOLVER.EPOCHS 3 -> 4; remove out/stub/runs/resnet8,student_alone,seed0, or give the "
        "study another `name:` or --output"
    )


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
    assert eat.verdict.endswith("contains 0 and excludes the claimed +0.55")
    assert lp.verdict.startswith("better than DKD") and lp.corrected_p == 2 * 2 / 2**8
    assert "excludes 0" in lp.verdict and "carry" not in lp.beside  # all seeds do


def test_too_few_pairs_are_said_to_be_too_few(study):
    built = study(seeds=list(range(5)))
    stub_runs(built)
    findings = analyse(built, table(built, collect(built)[0]))
    (warning,) = findings.warnings
    assert warning.startswith(
        "resnet8, EAT; resnet8, LP: 5 pairs cannot reach significance whatever happens: p is at "
        "least 0.0625"
    )
    few = "5 pairs can show no difference to DKD: the interval is unbounded"
    assert all(claim.verdict == few and claim.low is None for claim in findings.claims)


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
    edit(job, environments=[{**SESSION, "torch": "3"}])
    records, _ = collect(built)
    message = r'resnet8: torch differs between runs: "2" in 31 runs, .* "3" in 1 run, as resnet8,LP'
    with pytest.raises(ConfigError, match=message):
        check_conditions(built, records, [])
    check_conditions(built, records, ["torch"])
    edit(job, teacher={**record["teacher"], "sha256": "other"})
    with pytest.raises(ConfigError, match="resnet8: teacher differs between runs"):
        check_conditions(built, collect(built)[0], ["torch"])


@pytest.mark.parametrize(
    ("key", "usual"), [("SOLVER.EPOCHS", 3), ("LOG.EVAL_EVERY", 1), ("DATASET.LIMIT", 0)]
)
def test_arms_trained_or_evaluated_unequally_are_not_mixed(study, key, usual):
    arms = TREE["arms"] | {"LP": {"cfg": "dkd_lp.yaml", "options": {key: 4}}}
    built = study(arms=arms)
    stub_runs(built)
    with pytest.raises(ConfigError, match=rf"{key} differs between runs: {usual} in 24 runs"):
        check_conditions(built, collect(built)[0], [])


@pytest.mark.parametrize("action", ["list", "run"])
def test_what_a_report_will_refuse_is_said_before_the_first_run(study, tool, action):
    """Also a claim without pairs, and one of too few to be shown; what is allowed is not said."""
    arms = TREE["arms"] | {
        "LP": {"cfg": "dkd_lp.yaml", "options": {"SOLVER.LR": 0.05}},
        "EAT": {**TREE["arms"]["EAT"], "seeds": [0, 9]},
        "other": {"cfg": "kd.yaml", "options": {"DISTILLER.TEACHER": "resnet14"}, "seeds": [9]},
    }
    claims = {"resnet8": {"EAT": 0.5, "other": 0.5}}
    study(arms=arms, claims=claims)
    Path("file").write_text("so that nothing is run")
    words = [action, "stub.yaml", "--output", "file"]
    _, output, _ = tool("compare", *words)
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    for message in (
        "report will refuse these runs: resnet8: SOLVER.LR differs between runs: 0.02 in 19 runs, "
        "as resnet8,student_alone,seed0; 0.05 in 8 runs, as resnet8,LP,seed0; --allow SOLVER.LR",
        'report will refuse these runs: resnet8: teacher differs between runs: "resnet20" in 18 ',
        "resnet8, other: no seed has both it and DKD",
        "resnet8, EAT: 1 pair cannot reach significance whatever happens: p is at least 1, and 1",
    ):
        assert sum(f"warning: {message}" in line for line in warnings) == 1, output
    _, output, _ = tool("compare", *words, "--allow", "SOLVER.LR", "--allow", "teacher")
    assert "will refuse" not in output


def test_a_study_runs_goes_on_and_survives_a_failure(study, workdir, capsys):
    """With processes of its own; what is finished is not run again."""
    arms = {
        "student alone": {"cfg": "vanilla.yaml", "seeds": [0]},
        "DKD": {"cfg": "dkd.yaml"},
        "broken": {"cfg": "kd.yaml", "options": {"SOLVER.LR": 1e30}, "seeds": [0]},
    }
    options = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    built = study(*options, arms=arms, seeds=[0, 1], claims={}, options={"SOLVER.EPOCHS": 1})
    assert progress(built).endswith("\nepochs left: 4")  # at a pace that nothing shows yet
    failed = run_jobs(built.jobs, partial(processes, device=CPU, count=2))
    assert list(failed) == ["resnet8,broken,seed0"]
    assert "not finite" in failed["resnet8,broken,seed0"]
    done = [job for job in built.jobs if job.arm != "broken"]
    times = [(job.folder / "record.json").stat().st_mtime_ns for job in done]
    weights = [torch.load(job.folder / "student_last", weights_only=True) for job in done]
    assert len(weights) == 3
    run_jobs(built.jobs, partial(processes, device=CPU, count=1), together=3)
    assert times == [(job.folder / "record.json").stat().st_mtime_ns for job in done]
    output = capsys.readouterr().out
    assert "4 runs: 3 finished already, 1 to go" in output
    assert "resnet8,DKD,seed1: finished after epoch 1" in output
    assert "resnet8,broken,seed0: failed after epoch 0" in output
    record = json.loads((done[0].folder / "record.json").read_text())
    record["epochs"][0]["seconds"] = 1e6  # the machine was asleep
    write_record(done[0].folder / "record.json", record)
    listed = progress(built)
    assert "resnet8, DKD: DKD, 2 of 2 runs finished, 2 of 2 epochs\n" in listed
    assert "epochs left: 1, 0.0 hours of one process at the pace so far" in listed
    records, left_out = collect(built)
    assert len(records) == 3 and len(left_out) == 1


def test_the_parts_of_a_study_are_all_of_it(study, workdir, tool, monkeypatch):
    names, ran = [job.name for job in study().jobs], []
    monkeypatch.setattr(launch, "run_jobs", lambda jobs, *_: ran.append([j.name for j in jobs]))
    words = ["run", "stub.yaml", "--device", "cpu", "--part"]
    outputs = [tool("compare", *words, f"{number}/5")[1] for number in range(1, 6)]
    assert "all 7 runs of part 2/5 are finished: python tools/compare.py report" in outputs[1]
    assert {len(part) for part in ran} == {6, 7} and ran[1][:2] == [names[1], names[6]]
    assert sorted(name for part in ran for name in part) == sorted(names)
    status, _, error = tool("compare", *words, "33/99")
    assert status == 2 and "--part: 33/99: the study has 32 runs" in error


def test_a_folder_that_cannot_be_made_is_one_line_before_anything_runs(study, workdir):
    built = study(seeds=[0])
    Path("out").write_text("a file")
    with pytest.raises(RunError, match=r"out/stub/runs/resnet8,student_alone,seed0: cannot be"):
        run_jobs(built.jobs, lambda *_: pytest.fail("it ran"))

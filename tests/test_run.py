"""Runs: what they write, that seeds repeat them, and that they resume to the same weights."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    TIMES,
    assert_same_run,
    same_weights,
    scalars,
    signal_at,
    untrained_teacher,
    weights,
)
from filelock import FileLock

from mdistiller_ext import config, distiller_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import (
    default_name,
    events,
    facts,
    run,
    train,
    train_many,
    trainer,
    training,
)
from mdistiller_ext.engine import folder as folder_module
from mdistiller_ext.engine.record import read_record
from mdistiller_ext.errors import ConfigError, RunError


def test_a_run_leaves_its_record_checkpoints_and_events(digits_cfg):
    cfg = digits_cfg("dkd_eat_dat_lp", "LOG.SAVE_CHECKPOINT_FREQ", "2")
    record, folder = train(cfg, "r", CPU)
    assert record == json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished" and record["seed"] == 0
    assert record["config"]["DKD_EAT_DAT_LP"]["LP"]["RATIOS"] == [0.0, 0.13, 0.27, 0.4]
    (session,) = record["environments"]
    assert session["device"] == "cpu" and session["device_name"]
    assert session["torch"] == torch.__version__ and session["first_epoch"] == 1
    assert len(record["teacher"]["sha256"]) == 64 and 0 <= record["teacher"]["test_top1"] <= 100
    assert record["peak_memory_bytes"] > 1e6 and record["wall_seconds"] > 0
    assert len(record["epochs"]) == 3
    assert {
        *("epoch", "lr", "warmup", "temperature", "pruned_ratio", "loss", "loss_ce", "loss_kd"),
        *("dat_raised_kl", "dat_lowered_kl", "dat_kl", "dat_images"),
        *("train_top1", "dat_raised", "dat_lowered", "test_top1", "test_top5", "test_nll"),
        *("test_ece", "test_agreement", "test_kl", "test_l2_probabilities", "test_l2_logits"),
        *TIMES,
    } == set(record["epochs"][0])
    # 539 images in batches of 64: 8 batches that raise 6 each, and one of 27 that raises 2.
    assert record["epochs"][0]["dat_raised"] == record["epochs"][0]["dat_lowered"] == 8 * 6 + 2
    assert record["last_epoch_top1"] == record["epochs"][-1]["test_top1"]
    assert record["best_epoch_top1_selected_on_test"] == max(
        e["test_top1"] for e in record["epochs"]
    )
    files = {"latest", "latest.previous", "record.json", "train.events"}
    files |= {"student_last", "student_best", "student_2"}
    assert {p.name for p in folder.iterdir()} - {"lock"} == files
    written = scalars(folder)
    for epoch in record["epochs"]:
        for name in set(epoch) - {"epoch"}:
            assert written[name, epoch["epoch"]] == pytest.approx(epoch[name], rel=1e-6)
    best = torch.load(folder / "student_best", weights_only=True)
    assert set(best) == {"model"}


def test_two_runs_of_one_seed_are_identical_and_another_seed_is_not(digits_cfg, trained):
    first = trained("dkd_eat_dat_lp")
    torch.rand(5)  # what was drawn before a run must not matter
    _, second = train(digits_cfg("dkd_eat_dat_lp"), "second", CPU)
    assert_same_run(first, second)
    other = trained("dkd_eat_dat_lp", "SOLVER.SEED", "1")
    assert not torch.equal(weights(first)["fc.weight"], weights(other)["fc.weight"])


def test_methods_of_one_seed_share_initial_weights(digits_cfg):
    still = ["SOLVER.LR", "0.0", "SOLVER.EPOCHS", "1"]
    fc = [
        weights(train(digits_cfg(name, *still), name, CPU)[1])["fc.weight"]
        for name in ("vanilla", "kd", "dkd_lp")
    ]
    assert torch.equal(fc[0], fc[1]) and torch.equal(fc[0], fc[2])


@pytest.mark.parametrize(
    ("where", "call", "time"),
    [
        (run.Run, "_evaluate", 2),
        (run.Run, "_save", 2),
        (run.Events, "add", 2),
        # These in the thread that writes.
        (run, "save", 2),
        (run, "save_state", 2),
        (run, "write_record", 3),
    ],
)
def test_resume_equals_uninterrupted(digits_cfg, trained, monkeypatch, where, call, time):
    """Stopped in epoch 2 at each place where something is written or measured."""
    cfg = digits_cfg("dkd_dat")

    class Stop(Exception):
        pass

    original, calls = getattr(where, call), []

    def stopping(*args):
        calls.append(args)
        if len(calls) == time:
            raise Stop
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(where, call, stopping)
        train(cfg, "parts", CPU)
    record, parts = train(cfg, "parts", CPU, resume=True)
    assert record["status"] == "finished"
    assert_same_run(trained("dkd_dat"), parts)
    assert not list(parts.glob(".*.part"))


class Scaled(distiller_dict["KD"]):
    """With scales of its own of one shape, which weight decay leaves alone."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.scales = torch.nn.ParameterList(torch.ones(()) for _ in range(12))

    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.scales]

    def get_undecayed_parameters(self):
        return list(self.scales)

    def forward_train(self, **kwargs):
        logits, losses = super().forward_train(**kwargs)
        pulls = [place * (scale - place).square() for place, scale in enumerate(self.scales)]
        return logits, {**losses, "loss_scales": 1e-3 * torch.stack(pulls).sum()}


def test_each_parameter_goes_on_with_its_own_momentum(digits_cfg, monkeypatch):
    monkeypatch.setitem(distiller_dict, "KD", Scaled)
    cfg = digits_cfg("kd", "SOLVER.EPOCHS", "1")
    _, whole = train(cfg, "whole", CPU)
    with signal_at(1, 5):
        train(cfg, "parts", CPU)
    _, parts = train(cfg, "parts", CPU, resume=True)
    assert_same_run(whole, parts)
    states = [torch.load(folder / "latest", weights_only=True) for folder in (whole, parts)]
    one, other = ([v for k, v in s["model"].items() if "scales" in k] for s in states)
    assert one == other and len(one) == 12


KILLED = """
import os, runpy, signal, sys
from mdistiller_ext.engine.loop import Meter

sys.path.insert(0, "TESTS")
import conftest

count = Meter.count

def counted(self, images):
    if (self.epoch, self.step) == (3, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    count(self, images)

Meter.count = counted
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_resume_of_a_killed_process(workdir, tool):
    """Killed in a step of epoch 3; it goes on in another process."""
    words = ["--device", "cpu", "--cfg", str(ROOT / "configs" / "digits" / "dkd_lp.yaml")]
    words += ["SOLVER.EPOCHS", "4", "DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    assert tool("train", *words, "EXPERIMENT.NAME", "whole")[0] == 0
    words += ["EXPERIMENT.NAME", "killed"]
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED.replace("TESTS", str(ROOT / "tests")),
            str(ROOT / "tools/train.py"),
            *words,
        ]
    )
    assert process.returncode == -signal.SIGKILL
    folder = workdir / "output" / "digits" / "killed"
    assert json.loads((folder / "record.json").read_text())["status"] == "running"
    status, output, _ = tool("train", *words, "--resume")
    assert status == 0 and "killed: going on after epoch 2\n" in output
    assert_same_run(folder.parent / "whole", folder)


def test_resume_of_a_finished_run_changes_nothing(digits_cfg):
    cfg = digits_cfg("vanilla", "SOLVER.EPOCHS", "1")
    record, folder = train(cfg, "r", CPU)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    again, _ = train(cfg, "r", CPU, resume=True)
    assert again == record
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_many_runs_at_once_are_the_runs_alone(digits_cfg, workdir, monkeypatch):
    """Each with its own record; one that fails and one that is finished stop no other."""
    jobs = [
        (digits_cfg(method, "SOLVER.SEED", str(seed)), f"{method}-{seed}")
        for method, seed in (
            ("dkd_eat_dat_lp", 0),
            ("dkd_eat_dat_lp", 1),
            ("kd", 0),
            ("vanilla", 0),
        )
    ]
    alone = [train(cfg, f"{name}-alone", CPU)[1] for cfg, name in jobs]
    train(*jobs[3], CPU)
    broken = digits_cfg("dkd", "SOLVER.LR", "1e30"), "broken"
    records = train_many([broken, *jobs], CPU, resume=True)
    assert "the loss is not finite in epoch" in str(records[0])
    for record, (_, name), folder in zip(records[1:], jobs, alone, strict=True):
        assert record["status"] == "finished" and record["name"] == name
        assert_same_run(folder.parent / name, folder)
    assert not list(workdir.rglob("*.part"))


def test_a_folder_with_a_run_is_not_reused(digits_cfg):
    with signal_at(2, 3):
        train(digits_cfg(), "r", CPU)
    before = {p: p.read_bytes() for p in Path("output/digits/r").rglob("*") if p.is_file()}
    for options in ([], ["SOLVER.LR", "0.1"]):
        with pytest.raises(ConfigError, match=r"output/digits/r holds a run already: .* --resume"):
            train(digits_cfg("vanilla", *options), "r", CPU)
    assert before == {p: p.read_bytes() for p in Path("output/digits/r").rglob("*") if p.is_file()}


def test_the_same_command_on_a_finished_run_ends_with_what_is_there(digits_cfg, tool, monkeypatch):
    words = ["--cfg", str(ROOT / "configs/digits/vanilla.yaml"), "SOLVER.EPOCHS", "2"]
    words += ["--device", "cpu"]
    first, second = tool("train", *words), tool("train", *words)
    assert first[0] == second[0] == 0 and "finished already" in second[1]
    assert first[1].splitlines()[-2:] == second[1].splitlines()[-2:]
    (latest,) = Path("output/digits").glob("*/latest")
    latest.unlink()  # as of a run that was packed
    assert tool("train", *words)[0] == 0
    monkeypatch.setattr(folder_module, "CODE", "edited")
    status, _, error = tool("train", *words)
    assert status == 2 and "holds a finished run of other code (sha256 " in error
    assert tool("train", *words, "--resume")[0] == 0


def test_an_epoch_that_is_not_evaluated_has_no_test_metrics(digits_cfg, trained, monkeypatch):
    """Of 3 epochs the second and the last are; the training is the same."""
    tops = Tops(90.0, 80.0)
    cfg = digits_cfg("dkd_lp", "LOG.EVAL_EVERY", "2")
    with monkeypatch.context() as patch:
        patch.setattr(run, "performance", tops)
        record, folder = train(cfg, "r", CPU)
    assert not tops.left
    assert [e["epoch"] for e in record["epochs"] if "test_top1" in e] == [2, 3]
    assert len({len(e) for e in record["epochs"]}) == 2
    expected = {"last_epoch_top1": 80.0, "mean_last_10_top1": 85.0, "best_epoch": 2}
    assert record.items() >= expected.items() and read_record(folder / "record.json") == record
    assert sorted(n for tag, n in scalars(folder) if tag == "test_top1") == [2, 3]
    assert sorted(n for tag, n in scalars(folder) if tag == "loss") == [1, 2, 3]
    assert same_weights(folder, trained("dkd_lp"))
    twice = trained("dkd_lp", "SOLVER.EPOCHS", "2")
    best = torch.load(folder / "student_best", weights_only=True)["model"]
    assert all(torch.equal(v, best[k]) for k, v in weights(twice).items())


class Tops:
    """Stands in for `performance`: the accuracies of the epochs."""

    def __init__(self, *left):
        self.left = list(left)

    def __call__(self, logits, targets):
        return {"top1": torch.tensor(self.left.pop(0))}


def test_a_run_that_is_seldom_evaluated_stops_and_goes_on(digits_cfg):
    every = ["LOG.EVAL_EVERY", "3"]
    _, whole = train(digits_cfg("vanilla", *every, "SOLVER.EPOCHS", "5"), "whole", CPU)
    with signal_at(2, 3):  # no epoch was evaluated yet
        train(digits_cfg("vanilla", *every), "parts", CPU)
    stopped = read_record(Path("output/digits/parts/record.json"))
    assert stopped["status"] == "interrupted" and "last_epoch_top1" not in stopped
    train(digits_cfg("vanilla", *every, "SOLVER.EPOCHS", "4"), "parts", CPU, resume=True)
    record, folder = train(
        digits_cfg("vanilla", *every, "SOLVER.EPOCHS", "5"), "parts", CPU, resume=True
    )
    # The fourth was the last one once.
    assert [e["epoch"] for e in record["epochs"] if "test_top1" in e] == [3, 4, 5]
    assert same_weights(folder, whole)


@pytest.mark.parametrize("method", ["vanilla", "dkd_lp"])
def test_a_finished_run_goes_on_to_more_epochs(digits_cfg, trained, method):
    train(digits_cfg(method, "SOLVER.EPOCHS", "2"), "longer", CPU)
    record, folder = train(digits_cfg(method), "longer", CPU, resume=True)
    assert_same_run(folder, trained(method))
    assert [session["first_epoch"] for session in record["environments"]] == [1, 3]


def test_a_run_that_would_have_begun_otherwise_does_not_go_on(digits_cfg):
    eat = ["DKD_EAT.STEP_EPOCHS", "1"]
    train(digits_cfg("dkd_eat", *eat), "r", CPU)
    message = r"cannot go on: in a run of so many epochs the temperature of epoch 2 is 4.53"
    with pytest.raises(ConfigError, match=message):
        train(digits_cfg("dkd_eat", *eat, "SOLVER.EPOCHS", "4"), "r", CPU, resume=True)
    with pytest.raises(ConfigError, match=r"another config: SOLVER\.EPOCHS 3 -> 2"):
        train(digits_cfg("dkd_eat", *eat, "SOLVER.EPOCHS", "2"), "r", CPU, resume=True)
    stages = ["SOLVER.LR_DECAY_STAGES", "[1]"]
    with pytest.raises(ConfigError, match=r"another config: SOLVER\.LR_DECAY_STAGES"):
        train(digits_cfg("dkd_eat", *eat, *stages), "r", CPU, resume=True)


def test_resume_finds_the_run_of_other_epochs_and_says_where_there_is_none(workdir, tool):
    words = ["--cfg", str(ROOT / "configs/digits/vanilla.yaml"), "--device", "cpu"]
    _, output, _ = tool("train", *words, "--resume", "SOLVER.EPOCHS", "1")
    assert "EPOCHS=1,seed0: nothing to resume, so it starts with epoch 1" in output
    status, output, _ = tool("train", *words, "--resume", "SOLVER.EPOCHS", "2")
    assert status == 0 and "EPOCHS=2,seed0: going on after epoch 1" in output
    assert "EPOCHS=1,seed0: is called vanilla,digits,EPOCHS=2,seed0 from now on" in output
    (folder,) = Path("output/digits").iterdir()
    assert folder.name == read_record(folder / "record.json")["name"]
    assert folder.name == "vanilla,digits,EPOCHS=2,seed0"
    refused = ["SOLVER.EPOCHS", "3", "SOLVER.LR_DECAY_STAGES", "[1]", "EXPERIMENT.NAME"]
    refused.append("vanilla,digits,EPOCHS=3,seed0")
    assert tool("train", *words, "--resume", *refused)[0] == 2
    assert [*Path("output/digits").iterdir()] == [folder]
    Path("output/digits/vanilla,digits,EPOCHS=7,seed0").mkdir()
    status, _, error = tool("train", *words, "--resume", "SOLVER.EPOCHS", "3")
    assert status == 2 and "EPOCHS=7,seed0: name one of them with EXPERIMENT.NAME" in error


def test_resume_with_another_config_is_refused(digits_cfg):
    train(digits_cfg("vanilla", "SOLVER.EPOCHS", "1"), "r", CPU)
    with pytest.raises(ConfigError, match=r"another config: SOLVER\.LR 0\.02 -> 0\.1"):
        train(
            digits_cfg("vanilla", "SOLVER.EPOCHS", "1", "SOLVER.LR", "0.1"), "r", CPU, resume=True
        )


def test_resume_with_another_teacher_is_refused(digits_cfg, workdir):
    train(digits_cfg("dkd"), "r", CPU)
    state = torch.load(untrained_teacher(workdir), weights_only=True)["model"]
    teacher = {key: value + 1 for key, value in state.items()}
    torch.save({"model": teacher}, workdir / "teacher.pth")
    with pytest.raises(ConfigError, match="digits/r holds a finished run of another teacher"):
        train(digits_cfg("dkd"), "r", CPU, resume=True)


def test_a_folder_in_use_is_refused(digits_cfg, workdir, monkeypatch):
    monkeypatch.setattr(training, "LOCK_WAIT", 0.1)
    (workdir / "output/digits/r").mkdir(parents=True)
    with FileLock(workdir / "output/digits/r/lock"), pytest.raises(RunError, match="is in use"):
        train(digits_cfg(), "r", CPU)


def test_a_non_finite_loss_stops_and_keeps_the_last_good_state(digits_cfg, monkeypatch):
    cfg = digits_cfg("dkd")
    original = trainer.train_epoch

    def poisoned(distiller, optimizer, data, epoch, *rest):
        def batches(*keys):
            for step, batch in enumerate(data.batches(*keys)):
                if epoch.number == 2 and step == 4:
                    batch.image[0, 0, 0, 0] = torch.nan
                yield batch

        original(distiller, optimizer, SimpleNamespace(batches=batches), epoch, *rest)

    monkeypatch.setattr(trainer, "train_epoch", poisoned)
    message = r"epoch 2, step 5 of 9: loss_ce nan, loss_kd nan; .*r keeps the state after epoch 1"
    with pytest.raises(RunError, match=message):
        train(cfg, "r", CPU)
    folder = run.Path("output/digits/r")
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "failed" and "epoch 2, step 5" in record["error"]
    assert torch.load(folder / "latest", weights_only=True)["epoch"] == 1


DIVERGES = ["SOLVER.EPOCHS", "4", "SOLVER.LR_DECAY_STAGES", "[2]", "SOLVER.LR_DECAY_RATE", "1e30"]


def test_a_diverging_run_stops_and_goes_on_from_the_last_good_state(
    workdir, digits_cfg, tool, monkeypatch
):
    """Its learning rate explodes after epoch 2, which no rule would allow."""
    rules = config.rules()
    monkeypatch.setattr(
        config, "rules", lambda: rules | {"SOLVER.LR_DECAY_RATE": rules["SOLVER.LR"]}
    )
    options = [*DIVERGES, "DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    file = str(ROOT / "configs" / "digits" / "dkd_lp.yaml")
    words = ["--device", "cpu", "--cfg", file, *options, "EXPERIMENT.NAME", "r"]
    status, _, stderr = tool("train", *words)
    assert status == 1
    (line,) = stderr.splitlines()
    facts = (
        r"epoch 3, step \d of 9: loss_ce \S+, loss_kd \S+; output/digits/r keeps the state after"
    )
    assert re.search(f"error: the loss is not finite in {facts} epoch 2$", line)
    folder = workdir / "output" / "digits" / "r"
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "failed" and record["error"] in line and len(record["epochs"]) == 2
    state = torch.load(folder / "latest", weights_only=True)
    assert state["epoch"] == 2 and all(v.isfinite().all() for v in state["model"].values())
    assert all(torch.equal(v, state["model"][f"student.{k}"]) for k, v in weights(folder).items())
    # It is the same run, so that going on comes to the same end and loses nothing.
    kept = {name: (folder / name).read_bytes() for name in ("latest", "student_last")}
    with pytest.raises(RunError, match=facts):
        train(digits_cfg("dkd_lp", *DIVERGES), "r", CPU, resume=True)
    assert kept == {name: (folder / name).read_bytes() for name in kept}
    assert json.loads((folder / "record.json").read_text())["error"] == record["error"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda net: net.bn1.running_var.fill_(torch.inf),
            r"1 of \d+ weights are not finite, as s",
        ),
        (lambda net: net.fc.weight.data.fill_(3e38), "evaluation: not finite: nll nan,"),
        (lambda net: net.fc.bias.data.fill_(1e30), "evaluation: not finite: l2_logits inf;"),
    ],
)
def test_what_the_last_step_breaks_is_never_kept(digits_cfg, monkeypatch, damage, fault):
    """All losses of the epoch are finite."""
    original = trainer.train_epoch

    def damaged(distiller, optimizer, data, epoch, *rest):
        original(distiller, optimizer, data, epoch, *rest)
        if epoch.number == 2:
            damage(distiller.student)

    monkeypatch.setattr(trainer, "train_epoch", damaged)
    with pytest.raises(RunError, match=f"after epoch 2: {fault}.* the state after epoch 1$"):
        train(digits_cfg("dkd"), "r", CPU)
    assert torch.load("output/digits/r/latest", weights_only=True)["epoch"] == 1


OUT_OF_MEMORY = {
    "torch's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
    "CUDA's": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    "a CPU's": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "Python's": MemoryError(),
}
WAY_OUT = r"take a smaller SOLVER.BATCH_SIZE .*--together"


def test_out_of_memory_in_a_step_is_one_line(digits_cfg, monkeypatch):
    class Late(distiller_dict["NONE"]):
        def forward_train(self, **kwargs):
            calls.append(0)
            if len(calls) == 10:
                raise OUT_OF_MEMORY["torch's"]
            return super().forward_train(**kwargs)

    calls = []
    monkeypatch.setitem(distiller_dict, "NONE", Late)
    with pytest.raises(RunError, match=rf"{WAY_OUT}.*; \S*r keeps the state after epoch 1$"):
        train(digits_cfg(), "r", CPU)
    record = read_record(Path("output/digits/r/record.json"))
    assert record["status"] == "failed" and record["error"].startswith("out of memory")


def test_a_run_that_diverges_at_once_keeps_nothing_and_starts_again(digits_cfg, workdir):
    cfg = digits_cfg("vanilla", "SOLVER.LR", "1e30")
    for resume in (False, True):
        with pytest.raises(RunError, match=r"epoch 1, step .*digits/r keeps no state"):
            train(cfg, "r", CPU, resume=resume)
        assert not (workdir / "output/digits/r/latest").exists()
    record, _ = train(digits_cfg("vanilla", "SOLVER.EPOCHS", "1"), "r", CPU)
    assert record["status"] == "finished"


def test_bf16_trains_with_losses_in_float32(digits_cfg, trained):
    record, folder = train(digits_cfg("dkd_lp", "SOLVER.AMP", "bf16"), "r", CPU)
    exact = read_record(trained("dkd_lp") / "record.json")
    first, expected = record["epochs"][0]["loss"], exact["epochs"][0]["loss"]
    assert first != expected and first == pytest.approx(expected, rel=0.1)
    assert all(v.dtype in (torch.float32, torch.int64) for v in weights(folder).values())


def test_what_gains_nothing_here_is_said(digits_cfg, monkeypatch, capsys):
    class Features(distiller_dict["KD"]):
        def forward_train(self, *, image, **kwargs):
            self.student(image)[1]["pooled_feat"]
            return super().forward_train(image=image, **kwargs)

    monkeypatch.setitem(distiller_dict, "KD", Features)
    monkeypatch.setattr(facts, "cpu_facts", lambda: {"flags": "avx2 avx512f"})
    settings = dict.fromkeys(("TF32", "SYNC_BN", "COMPILE"), "True")
    settings |= {"AMP": "bf16", "STACK": "grouped"}
    options = [word for key, value in settings.items() for word in (f"SOLVER.{key}", value)]
    train(digits_cfg("kd", *options, "SOLVER.EPOCHS", "1"), "r", CPU)
    output = capsys.readouterr().out
    for key, value in settings.items():
        assert f"warning: SOLVER.{key}: {value} " in output, key


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.slow
def test_a_compiled_student_trains_alike(digits_cfg):
    options = ["SOLVER.EPOCHS", "1", "SOLVER.LR", "0.0001"]
    plain, _ = train(digits_cfg("dkd_lp", *options), "plain", CPU)
    compiled, _ = train(digits_cfg("dkd_lp", *options, "SOLVER.COMPILE", "True"), "compiled", CPU)
    before, after = plain["epochs"][0], compiled["epochs"][0]
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert after["test_nll"] == pytest.approx(before["test_nll"], rel=1e-5)


def test_a_student_that_cannot_be_compiled_is_one_line(digits_cfg, monkeypatch):
    def fails(*_):
        raise torch._dynamo.exc.TorchDynamoException("No working compiler\nSet TORCH_LOGS")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    message = "^SOLVER.COMPILE: True, but it fails here: No working compiler$"
    with pytest.raises(ConfigError, match=message):
        train(digits_cfg("vanilla", "SOLVER.COMPILE", "True"), "r", CPU)


def test_a_missing_teacher_is_trained_once_and_kept(digits_cfg, workdir, capsys):
    (workdir / "teacher.yaml").write_text(
        "DATASET: {TYPE: digits}\nDISTILLER: {STUDENT: resnet8}\nSOLVER: {EPOCHS: 1}\n"
    )
    (workdir / "dkd.yaml").write_text(
        "DATASET: {TYPE: digits}\nSOLVER: {EPOCHS: 1}\n"
        "DISTILLER: {TYPE: DKD, STUDENT: resnet8, TEACHER: resnet8, TEACHER_CFG: teacher.yaml}\n"
    )
    cfg = load_cfg("dkd.yaml")
    first, _ = train(cfg, "first", CPU)
    assert "no weights of resnet8 on digits yet: training it first" in capsys.readouterr().out
    assert first["teacher"]["file"] == "checkpoints/digits/resnet8.pth"
    kept = json.loads((workdir / "checkpoints/digits/resnet8.json").read_text())
    assert kept["last_epoch_top1"] == first["teacher"]["test_top1"]
    second, _ = train(cfg, "second", CPU)
    assert "training it first" not in capsys.readouterr().out
    assert second["teacher"] == first["teacher"]


TEACHER_OF_RESNET8 = (
    "DATASET: {TYPE: digits}\n"
    "DISTILLER: {TYPE: DKD, STUDENT: resnet8, TEACHER: resnet8, TEACHER_CFG: teacher.yaml}\n"
)


@pytest.mark.parametrize(
    ("teacher", "faults"),
    [
        (
            "DISTILLER: {STUDENT: resnet20}",
            [": teacher.yaml trains resnet20 on cifar100, expected "],
        ),
        (
            "SOLVER: {EPOCHS: 0, LR: x}",
            [" teacher.yaml: SOLVER.LR: 'x'", " teacher.yaml: SOLVER.E"],
        ),
        ("a: [", [" teacher.yaml: no valid YAML"]),
        (TEACHER_OF_RESNET8, [": teacher.yaml has a DISTILLER.TEACHER_CFG too, expected"]),
    ],
)
def test_a_teacher_config_that_cannot_train_the_teacher_is_refused(workdir, teacher, faults):
    """The last one would wait for itself."""
    (workdir / "teacher.yaml").write_text(teacher)
    (workdir / "dkd.yaml").write_text(TEACHER_OF_RESNET8)
    with pytest.raises(ConfigError) as error:
        train(load_cfg("dkd.yaml"), "r", CPU)
    lines = str(error.value).splitlines()
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(f"DISTILLER.TEACHER_CFG{fault}")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "dkd,digits,seed0"),
        (["SOLVER.SEED", "7"], "dkd,digits,seed7"),
        (["SOLVER.EPOCHS", "2", "DKD.T", "2.0"], "dkd,digits,EPOCHS=2,T=2.0,seed0"),
        (["DATASET.ROOT", "../x", "LOG.PREFIX", "/tmp"], "dkd,digits,seed0"),
        (["EXPERIMENT.NAME", "mine"], "mine"),
        (["SOLVER.EPOCHS", "2", "SOLVER.EPOCHS", "3"], "dkd,digits,EPOCHS=3,seed0"),
        (["SOLVER.LR_DECAY_STAGES", "[1, 2]"], "dkd,digits,LR_DECAY_STAGES=_1,_2_,seed0"),
        # One config has one name.
        (["DKD.T", "20e-1", "SOLVER.EPOCHS", " 2"], "dkd,digits,EPOCHS=2,T=2.0,seed0"),
        # It names what runs.
        (["DISTILLER.STUDENT", "resnet14"], "dkd,resnet20,resnet14,digits,seed0"),
        (
            ["DISTILLER.TEACHER", "resnet8", "DATASET.TYPE", "cifar100", "DKD.T", "2.0"],
            "dkd,resnet8,resnet8,cifar100,T=2.0,seed0",
        ),
        (
            ["DISTILLER.STUDENT", "resnet14", "EXPERIMENT.TAG", "mine"],
            "mine,STUDENT=resnet14,seed0",
        ),
        (
            ["DISTILLER.TYPE", "DKD", "EXPERIMENT.TAG", "mine"],
            "mine,DISTILLER.TYPE=DKD,seed0",
        ),
    ],
)
def test_default_name(options, name):
    cfg = load_cfg(ROOT / "configs" / "digits" / "dkd.yaml", options)
    assert default_name(cfg, options) == name


def test_default_name_of_a_student_alone():
    options = ["DISTILLER.STUDENT", "resnet14"]
    cfg = load_cfg(ROOT / "configs" / "digits" / "vanilla.yaml", options)
    assert default_name(cfg, options) == "none,resnet14,digits,seed0"


def test_default_name_of_a_method_of_the_toolkit(toolkit):
    options = ["DISTILLER.STUDENT", "resnet20"]
    cfg = load_cfg(ROOT / "configs" / "cifar100" / "toolkit" / "kd.yaml", options)
    assert default_name(cfg, options) == "kd,mdistiller,resnet110,resnet20,cifar100,seed0"


def test_another_teacher_file_is_another_name_wherever_it_lies(workdir):
    def name(file):
        options = ["DISTILLER.TEACHER_CKPT", file]
        return default_name(load_cfg(ROOT / "configs/digits/dkd.yaml", options), options)

    Path("a.pth").write_bytes(b"one")
    Path("b.pth").write_bytes(b"another")
    shutil.copy("a.pth", "c.pth")
    digest = hashlib.sha256(b"one").hexdigest()[:8]
    assert name("a.pth") == name("c.pth") == f"dkd,digits,TEACHER_CKPT={digest},seed0"
    assert name("b.pth") != name("a.pth")
    with pytest.raises(ConfigError, match=r"DISTILLER\.TEACHER_CKPT: no such file: no\.pth"):
        name("no.pth")


def test_names_too_long_for_a_folder_are_still_different():
    names = set()
    for start in ("a", "b"):
        options = ["EXPERIMENT.TAG", start + 100 * "한"]
        cfg = load_cfg(ROOT / "configs" / "digits" / "dkd.yaml", options)
        names.add(default_name(cfg, options))
    assert len(names) == 2
    assert all(name.endswith("한,seed0") and 190 < len(name.encode()) <= 200 for name in names)


def test_the_time_left_leaves_the_tables_filling_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(events.time, "perf_counter", lambda: now[0])
    progress = events.Progress(steps=9, epochs=2, first_epoch=1, show=False)
    with progress.filling(5):
        now[0] += 70
    now[0] += 10  # for half an epoch
    assert progress.left(0.5).total_seconds() == 30

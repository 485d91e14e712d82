"""The commands as a user runs them: their output, one line an error, and the exit status."""

import argparse
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, first, untrained_teacher
from methods import parts

from mdistiller_ext import cifar_model_dict, command, packaged
from mdistiller_ext.command import run
from mdistiller_ext.commands import compare
from mdistiller_ext.data import cifar100
from mdistiller_ext.distillers import distiller_dict
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.teacher import TeacherTable

DIGITS = str(ROOT / "configs" / "digits" / "vanilla.yaml")


def test_train_then_eval(tool, workdir):
    output = tool("train", "--cfg", DIGITS, "SOLVER.EPOCHS", "2", "--device", "cpu")[1]
    assert "EPOCHS: 2" in output and "epoch   2/2  loss" in output
    assert "selected on the test set" in output and "% mean of the last 2 evaluated, " in output
    record = Path(output.rsplit("record: ", 1)[1].strip())
    assert record == Path("output/digits/vanilla,digits,EPOCHS=2,seed0/record.json")
    expected = json.loads(record.read_text())["last_epoch_top1"]
    words = ["-m", "resnet8", "-c", str(record.parent / "student_last"), "-d", "digits"]
    measured = json.loads(tool("eval", *words, "--json")[1])
    assert measured["top1"] == expected
    assert f"top-1 {expected:.2f} %" in tool("eval", *words)[1]
    Path("checkpoints/digits").mkdir(parents=True)
    (record.parent / "student_last").rename("checkpoints/digits/resnet8.pth")
    for word in ("pretrain", "pretrained"):  # of eval, of DISTILLER.TEACHER_CKPT
        assert json.loads(tool("eval", *words[:3], word, *words[4:], "--json")[1]) == {
            **measured,
            "file": "checkpoints/digits/resnet8.pth",
        }


def test_a_run_begins_with_what_is_not_the_default_alone(tool, workdir):
    words = ["--cfg", DIGITS, "--device", "cpu", "SOLVER.EPOCHS", "1", "SOLVER.LR_DECAY_STAGES"]
    output = tool("train", *words, "[]")[1]
    before, _, _ = output.partition("device: cpu")
    assert "EPOCHS: 1" in before and "STUDENT: resnet8" in before
    assert "MOMENTUM" not in before and "DKD" not in before


def test_negative_numbers_are_values_in_every_command(tool, workdir):
    for value in ("-5e-2", "-.5", "-1_0", "-0.1"):
        status, _, error = tool("train", "--cfg", DIGITS, "SOLVER.LR", value)
        assert status == 2 and "SOLVER.LR: -" in error and "is not allowed" in error
        for words in (
            ["eval", "-m", "resnet8", "-d", "digits", "DATASET.HOLDOUT", value],
            ["teacher_table", "--cfg", DIGITS, "SOLVER.LR", value],
            ["compare", "list", "digits", "SOLVER.LR", value],
            ["anatomy", "--cfg", DIGITS, "SOLVER.LR", value],
        ):
            status, _, error = tool(*words)
            assert status == 2 and ": -" in error and "is not allowed" in error, words


def test_help_of_a_part_of_a_command_is_its_own(tool):
    for action, has, lacks in (("run", "--jobs", "--allow"), ("report", "--allow", "--jobs")):
        status, output, _ = tool("compare", action, "--help")
        assert status == 0 and has in output and lacks not in output
    output = tool("compare", "--help")[1]
    assert "--jobs" in output and "--allow" in output


def test_the_flags_of_forks_are_told_what_does_it_here(tool):
    status, _, error = tool("train", "--cfg", DIGITS, "--logit-stand", "--kd-weight", "9")
    assert status == 2 and "here logit standardisation is DISTILLER.TYPE KD_LS" in error
    assert "as KD_LS.KD_WEIGHT" in error


def test_methods_lists_and_shows_what_a_module_registers(workdir, monkeypatch, capsys):
    (workdir / "own_methods.py").write_text(
        "from dataclasses import dataclass\n"
        "from mdistiller_ext import register_method\n"
        "from mdistiller_ext.distillers import Vanilla\n"
        "from mdistiller_ext.losses import Loss\n"
        "from mdistiller_ext.settings import setting, number\n"
        "@dataclass(frozen=True)\n"
        "class OWN_LOSS(Loss):\n"
        '    "The page of a loss."\n'
        "    POWER: float = setting(2.0, number(1), 'an exponent')\n"
        "@register_method('OWN_METHOD')\n"
        "class Own(Vanilla):\n"
        '    "The page of a method."\n'
    )
    words = ["EXPERIMENT.IMPORT", "['own_methods']"]

    def shown(*more):
        with pytest.raises(SystemExit) as end:
            run("methods", "methods", more)
        assert end.value.code == 0
        return capsys.readouterr().out

    registries = LOSSES, distiller_dict
    before = [dict(registry) for registry in registries]
    try:
        lines = shown(*words).splitlines()
        assert any(re.fullmatch(r"DKD_HYPERGRADIENT +DKD \+ HYPERGRADIENT", x) for x in lines)
        assert any(re.fullmatch(r"OWN_METHOD +The page of a method\.", x) for x in lines)
        assert "an exponent" in shown("OWN_LOSS", *words)
        assert "The page of a method." in shown("OWN_METHOD", *words)
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)
        sys.modules.pop("own_methods", None)


@pytest.mark.parametrize(
    ("images", "expected"), [(1000, 69.2), pytest.param(10_000, 68.83, marks=pytest.mark.slow)]
)
def test_a_teacher_file_in_the_toolkits_layout_is_pretrained(
    tool, workdir, shared, monkeypatch, images, expected
):
    """Of the test images the first; what it has on all is what its authors say."""
    load = cifar100.load
    monkeypatch.setattr(cifar100, "load", lambda root: [first(s, images) for s in load(root)])
    place = workdir / "download_ckpts/cifar_teachers/resnet20_vanilla/ckpt_epoch_240.pth"
    place.parent.mkdir(parents=True)
    place.symlink_to(shared / "teachers" / "cifar100_resnet20.pth")
    _, output, _ = tool("eval", "-m", "resnet20", "--root", str(shared), "-bs", "250", "--json")
    assert json.loads(output)["top1"] == expected


def test_a_teacher_table_is_filled_once(tool, workdir):
    words = ["--cfg", str(ROOT / "configs" / "digits" / "dkd.yaml"), "--device", "cpu"]
    words += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    words += ["DISTILLER.TEACHER_TABLE_ROOT", str(workdir / "tables")]
    for computed in ("4,851", "0"):
        status, output, _ = tool("teacher_table", *words)
        assert status == 0 and "4,851 of 4,851 views" in output and f"; {computed} comp" in output
    cfg = ["--cfg", DIGITS]
    assert tool("teacher_table", *cfg)[2] == (
        "teacher_table.py: error: DISTILLER.TYPE: NONE has no teacher\n"
    )
    status, _, error = tool("teacher_table", *words, "DISTILLER.TEACHER_TABLE", "off")
    assert status == 2 and "DISTILLER.TEACHER_TABLE: off, so that no run would read" in error


def test_a_teacher_table_that_is_stopped_says_what_is_kept(tool, workdir, monkeypatch):
    words = ["--cfg", str(ROOT / "configs" / "digits" / "dkd.yaml"), "--device", "cpu"]
    words += ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(workdir))]
    words += ["DISTILLER.TEACHER_TABLE_ROOT", str(workdir / "tables")]
    compute, calls = TeacherTable._compute, []

    def computed(self, position):
        calls.append(position)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, position)

    monkeypatch.setattr(TeacherTable, "_compute", computed)
    status, output, error = tool("teacher_table", *words)
    assert (status, error) == (143, "teacher_table.py: error: stopped by SIGTERM\n")
    kept, computed = re.search(r": ([\d,]+) of 4,851 views, .*; ([\d,]+) computed", output).groups()
    assert kept == computed not in ("0", "4,851")


TEACHER = ["--cfg", str(ROOT / "configs" / "digits" / "dkd.yaml"), "DISTILLER.TEACHER_CKPT"]
ERRORS = [
    (2, "train", ["--cfg", "no.yaml"], ["--cfg: no.yaml: No such file or directory"]),
    (2, "bench", ["--json", "no/x.json"], ["--json: no: No such file or directory"]),
    (2, "bench", ["--rounds", "0"], ["--rounds: 0 is not allowed, expected at least 1"]),
    (2, "compare", ["run", "no.yaml"], ["no.yaml: No such file or directory"]),
    (2, "compare", ["run", DIGITS, "--jobs", "0"], ["--jobs: 0 is not allowed"]),
    (2, "compare", ["run", DIGITS, "--gpus", "1"], ["--gpus: has no effect with --launcher p"]),
    (
        2,
        "compare",
        ["run", DIGITS, "--launcher", "ray", "--jobs", "2"],
        ["--jobs: has no effect with --launcher ray"],
    ),
    (2, "compare", ["run", DIGITS, "--part", "4/3"], ["--part: 4/3: expected as 3/10"]),
    (2, "compare", ["list", DIGITS, "--part", "1/3"], ["--part: has no effect with list"]),
    (2, "train", [], ["the following arguments are required: --cfg"]),
    (2, "train", ["--cfg", DIGITS, "SOLVER.EPOCH", "2"], ["did you mean SOLVER.EPOCHS?"]),
    (2, "train", ["--cfg", DIGITS, "SOLVER.LR", "x"], ["SOLVER.LR: 'x'", "expected float"]),
    (
        2,
        "train",
        ["--cfg", DIGITS, "SOLVER.EPOCHS", "0", "SOLVER.MOMENTUM", "2.0"],
        ["SOLVER.EPOCHS: 0", "SOLVER.MOMENTUM: 2.0"],
    ),
    (2, "train", ["--cfg", DIGITS, "--device", "nope"], ["--device nope: not usable here"]),
    (2, "train", ["--cfg", DIGITS, "--device", "meta"], ["--device meta: not usable here"]),
    (2, "train", [*TEACHER, "no.pth"], ["DISTILLER.TEACHER_CKPT: no such file: no.pth"]),
    (1, "train", [*TEACHER, "wrong.pth"], ["wrong.pth: does not fit resnet"]),
    (2, "eval", ["-m", "resnet8", "-c", "no.pth"], ["--ckpt: no.pth: No such file or directory"]),
    (1, "eval", ["-m", "resnet8", "-c", "."], ["record.json: cannot be read: No such file"]),
    (1, "eval", ["-m", "resnet8", "-d", "digits"], ["no weights", "Tried: checkpoints/digits"]),
    (2, "eval", ["-m", "resnet8", "-bs", "0"], ["--batch-size: 0 is not allowed"]),
    (2, "eval", ["-m", "resnet8", "-bs", "9" * 30], ["--batch-size: 9", "below 1e+06"]),
    (2, "teacher_table", [*TEACHER[:2], "DKD.T", "0.0"], ["DKD.T: 0.0 is not allowed"]),
    (2, "train", ["--cfg", DIGITS, "DKD.T", "2.0"], ["DKD.T: does nothing with DISTILLER.TYPE NO"]),
    (2, "train", ["--cfg", ""], ["argument --cfg: '': No such file"]),
    (2, "train", ["--cfg", "/dev/null"], ["--cfg /dev/null: sets nothing, expected sections"]),
    (2, "mdistiller_train", ["--cfg", DIGITS], ["MDISTILLER_ROOT: nowhere holds no"]),
    (2, "eval", ["-m", "vgg7"], ["--model: 'vgg7' is not allowed, expected one of resnet8, "]),
    (2, "eval", ["-m", "resnet8", "-d", "mnist"], ["--dataset: 'mnist' is not allowed"]),
    (2, "pack", ["pack", "nowhere", "a.tar.xz"], ["SOURCE: nowhere: No such file or directory"]),
]


@pytest.mark.parametrize(("status", "name", "words", "parts"), ERRORS)
def test_errors_are_one_line_and_lose_nothing(
    tool, workdir, monkeypatch, status, name, words, parts
):
    monkeypatch.setenv("MDISTILLER_ROOT", "nowhere")
    torch.save({"model": {"fc.weight": torch.zeros(10, 64)}}, "wrong.pth")
    found, _, stderr = tool(name, *words)
    assert found == status
    assert all(part in stderr for part in parts)
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if "error: " in line]
    assert len(errors) == (2 if "SOLVER.MOMENTUM" in words else 1)
    assert not list(workdir.rglob("lock"))  # nor a folder that looks like a run


def test_home_is_home_where_no_shell_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    here = tmp_path / "c.yaml"
    here.touch()
    for kind in (command.path, command.existing, packaged.config, packaged.study):
        assert kind("~/c.yaml") == here
    parser = argparse.ArgumentParser()
    compare.arguments(parser)
    args = parser.parse_args(["list", "~/c", "--output=~/studies"])
    assert (args.study, args.output) == (here, tmp_path / "studies")


@pytest.mark.parametrize(("given", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_images_of_a_few_pixels_take_one_thread(tool, monkeypatch, given, threads):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    try:
        torch.set_num_threads(2)
        assert tool("train", "--cfg", DIGITS, "--device", "nope")[0] == 2
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_debug_shows_the_traceback(tool):
    status, _, stderr = tool("train", "--cfg", DIGITS, "SOLVER.EPOCH", "2", "--debug")
    assert status == 2 and "Traceback" in stderr


def test_an_interrupted_run_says_how_to_go_on(tool, workdir, monkeypatch):
    def interrupt(run):
        if run.history:
            raise KeyboardInterrupt
        return {"top1": torch.tensor(10.0)}

    monkeypatch.setattr("mdistiller_ext.engine.run.Run._evaluate", interrupt)
    status, _, stderr = tool("train", "--cfg", DIGITS, "EXPERIMENT.NAME", "r")
    assert status == 130 and stderr == (
        "train.py: error: interrupted; output/digits/r keeps the state after epoch 1; "
        "go on with --resume\n"
    )
    record = json.loads((workdir / "output/digits/r/record.json").read_text())
    assert record["status"] == "interrupted" and len(record["epochs"]) == 1


def test_wandb_that_is_not_installed(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, _, stderr = tool("train", "--cfg", DIGITS, "LOG.WANDB", "True", "SOLVER.EPOCHS", "1")
    assert status == 2
    assert "LOG.WANDB: True, but wandb is not installed: pip install wandb" in stderr


def test_a_folder_that_cannot_be_made(tool, workdir):
    (workdir / "output").write_text("a file where the folder should be")
    status, _, stderr = tool("train", "--cfg", DIGITS)
    assert status == 1 and "output" in stderr and "unexpected" not in stderr


def test_an_unexpected_error_is_one_line_too(tool, monkeypatch):
    monkeypatch.setattr("mdistiller_ext.engine.shared.get_dataset", lambda cfg: 1 / 0)
    status, _, stderr = tool("train", "--cfg", DIGITS)
    expected = "error: unexpected ZeroDivisionError: division by zero (--debug shows where)"
    assert status == 1 and expected in stderr and "Traceback" not in stderr


# In a process where Ctrl-C comes as soon as anything wants to import a module.
BARE = """
import runpy, sys

class Interrupt:
    def find_spec(self, name, *rest):
        if name == module:
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
_, module, *sys.argv = sys.argv
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STARTS = {
    "bench": ["--student", "resnet9"],
    "compare": ["run", "file.yaml"],
    "eval": ["-m", "resnet8"],
    "export": ["-c", "."],
    "export_upstream": ["."],
    "mdistiller_train": ["--cfg", "file.yaml"],
    "pack": ["pack", ".", "a.tar.xz"],
    "show": ["."],
    "teacher_table": ["--cfg", "file.yaml"],
    "train": ["--cfg", "file.yaml"],
}


def bare(name: str, *words: str, module: str = "torch") -> tuple[int, str, str]:
    """(status, stdout, stderr) of a tool in such a process."""
    command = [sys.executable, "-c", BARE, module, str(ROOT / "tools" / f"{name}.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("name", STARTS)
def test_help_and_slips_need_no_torch(name, workdir):
    status, text, _ = bare(name, "--help")
    assert status == 0 and f"python tools/{name}.py" in text and "--debug" in text
    status, _, stderr = bare(name, *STARTS[name], "--nope")
    assert status == 2 and "Traceback" not in stderr and stderr.count("error: ") == 1


@pytest.mark.parametrize(
    ("name", "module"), [*((name, "torch") for name in STARTS), ("train", "numpy.linalg")]
)
def test_an_interrupt_while_it_is_imported_is_one_line(name, module, workdir):
    Path("file.yaml").write_text("")
    found = bare(name, *STARTS[name], module=module)
    assert found == (130, "", f"{name}.py: error: interrupted\n")


def test_all_rungs_of_the_bench_have_one_arithmetic():
    """The first of them in its own process."""
    names, found = runpy.run_path(str(ROOT / "tools" / "ladder.py"))["climb"].__globals__, []
    names["set_arithmetic"] = lambda device, tf32: found.append(tf32)
    names["Bench"] = lambda *_: SimpleNamespace(grow=lambda: None)
    args = {"device": "cpu", "grow": True, "tf32": True, "root": None, "batch": 1, "method": "KD"}
    args |= {"teacher": "resnet8", "student": "resnet8"}
    names["climb"](argparse.Namespace(**args))
    pipe = SimpleNamespace(send=lambda name: None, recv=lambda: None)
    names["plain_steps"] = names["toolkit_steps"] = lambda *_: (_ for _ in ())
    names["serve"](pipe, argparse.Namespace(**args), 0)
    assert found == [True, True]


def test_the_rung_of_many_runs_is_called_their_sum(workdir, capsys):
    """Each step of each run counts, so the rate is no run's own."""
    tool = runpy.run_path(str(ROOT / "tools" / "ladder.py"))
    cls = tool["Bench"]
    bench = cls.__new__(cls)
    bench.device, bench.generator = torch.device("cpu"), torch.Generator()
    bench.args = SimpleNamespace(batch=8, eager=True, method="DKD", tf32=False)
    *_, bench.data = parts("DKD")
    network = cifar_model_dict["resnet8"][0]
    bench.networks = lambda: (network(num_classes=100), network(num_classes=100))
    assert bench.exact(1)(3) == 3
    assert bench.exact(3, form="grouped")(10) == 12
    first = SimpleNamespace(name="first", rate=lambda steps: 10.0, end=lambda: None)
    fake = SimpleNamespace(first=lambda: ("first", first), engine=lambda table: 10.0)
    fake.exact = lambda runs, amp="", form="none": (20.0 if form == "dense64" else 10.0) * runs
    fake.rate, fake.floor = float, lambda: 100.0
    tool["climb"].__globals__["Bench"] = lambda *_: fake
    args = dict.fromkeys(("batch", "steps", "rounds", "runs"), 2)
    args |= dict.fromkeys(("grow", "at_once", "json"), None) | {"device": "cpu", "tf32": False}
    args["forms"] = ["grouped", "dense64"]
    tool["climb"](argparse.Namespace(**args, teacher="t", student="s", method="m"))
    output = capsys.readouterr().out
    assert re.search(r"\(g\) 2 runs at once, grouped, their sum +20 images/s +2\.00 x", output)
    assert re.search(r"\(h\) 2 runs at once, dense64, their sum +40 images/s +4\.00 x", output)


def test_training_imports_nothing_that_only_others_need():
    """Each of these takes as long as torch, or half as long."""
    code = "import sys, mdistiller_ext.engine; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch._dynamo", "torchvision", "torchmetrics", "sklearn", "scipy", "pandas"}
    assert "torch" in found and not heavy & set(found)


def test_streams_that_are_closed_narrow_or_read_no_more_cost_no_run(workdir):
    words = [sys.executable, str(ROOT / "tools" / "train.py"), "--cfg", DIGITS, "--device", "cpu"]
    words += ["SOLVER.EPOCHS", "1", "EXPERIMENT.TAG", "\ud55c\uae00"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = ["bash", "-c", f"exec {shlex.join(words)} 2>&-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert any(b"\\ud55c" in line for line in iter(process.stdout.readline, b""))
        process.stdout.close()
        assert process.wait() == 0
    (record,) = Path("output").rglob("record.json")
    assert json.loads(record.read_text())["status"] == "finished"


@pytest.mark.parametrize("command", ["configs", "train"])
def test_output_that_finds_no_room_is_said_at_the_end(workdir, capfd, monkeypatch, command):
    """Of a run it costs nothing else."""
    train = ["--cfg", DIGITS, "--device", "cpu", "SOLVER.EPOCHS", "1"]
    with open("/dev/full", "w") as full, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", full)
        run(command, command, train if command == "train" else [])
    assert end.value.code == 1
    lost = f"{command}: error: the output from here on is lost: No space left on device\n"
    assert capfd.readouterr().err == lost
    assert len(list(Path("output").rglob("student_last"))) == (command == "train")


SPINS = """
import os, sys
from mdistiller_ext import command
command.run_tool = lambda *_: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
command.run("pack", "pack")
"""


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "10000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_threads_that_wait_spin_shortly_unless_told_otherwise(workdir, given, expected):
    """Set before torch is imported, where its thread library reads it."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | given
    words = [sys.executable, "-c", SPINS]
    result = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert result.stdout == f"{expected} False\n", result.stderr

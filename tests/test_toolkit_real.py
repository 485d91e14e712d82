"""Against the real mdistiller: our methods in it, and the same numbers from both."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, batches, first, networks, theirs, train_on

from mdistiller_ext import cifar_model_dict, distiller_dict
from mdistiller_ext.config import load_cfg
from mdistiller_ext.data import cifar100
from mdistiller_ext.engine.build import build_optimizer
from mdistiller_ext.engine.loop import Meter
from mdistiller_ext.teacher import TeacherTable
from mdistiller_ext.toolkit.compat import mend
from mdistiller_ext.toolkit.export import METHODS

OURS = ["DKD_EAT", "DKD_DAT", "DKD_LP", "DKD_EAT_DAT_LP", "LOGIT"]
# What the toolkit itself does on a recent PyTorch, Python or Pillow.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda f: f.stem)
def test_every_config_loads_there(toolkit, file):
    _, config = theirs("KD")
    config.merge_from_file(str(file))


@pytest.mark.parametrize("name", ["KD", "DKD"])
def test_losses_equal_the_toolkits(toolkit, shared, name):
    cls, config = theirs(name)
    student, teacher = networks(shared)
    pair = [c(student, teacher, config).train() for c in (cls, distiller_dict[name])]
    for epoch, batch in enumerate(batches(shared, 5), start=1):
        results = [d(image=batch.image, target=batch.target, epoch=epoch)[1] for d in pair]
        assert results[0].keys() == results[1].keys()
        for key, value in results[0].items():
            torch.testing.assert_close(results[1][key], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["KD", "DKD"])
def test_20_steps_of_both_engines_end_with_the_same_student(
    toolkit, shared, workdir, monkeypatch, name, accelerated
):
    """In float64: in float32 the toolkit's own 20 steps turn 1e-7 into 4e-3.

    With the teacher table and channels-last too; the table is float32, and what that rounds off
    grows as well, so there the learning rate is small.
    """
    lr, tolerance = ("0.0002", 1e-5) if accelerated else ("0.05", 1e-10)
    plain = batches(shared, 20, 8)
    pairs = [networks(shared, "resnet20") for _ in range(2)]
    (student, teacher), (own, own_teacher) = pairs
    answers = None
    if accelerated:
        table = TeacherTable(workdir, own_teacher, cifar100.load(shared)[0])
        answers = [table.logits(batch.index, batch.view) for batch in plain]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    mend()
    cls, config = theirs(name)
    file = ROOT / "configs" / "cifar100" / f"{name.lower()}.yaml"
    config.merge_from_file(str(file))
    config.SOLVER.LR = float(lr)
    cfg = load_cfg(file, ["SOLVER.LR", lr])
    steps = [replace(batch, image=batch.image.double()) for batch in plain]
    for network in (student, teacher, own, own_teacher):
        network.double()
    start = own.fc.weight.clone()

    distiller = torch.nn.DataParallel(cls(student, teacher, config))
    loader = [(batch.image, batch.target, batch.index) for batch in steps]
    trainer_class = importlib.import_module("mdistiller.engine").trainer_dict["base"]
    trainer_class("parity", distiller, loader, [loader[0][:2]], config).train_epoch(1)
    mine = distiller_dict[name](own, own_teacher, cfg)
    if answers:
        mine.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg.SOLVER, mine)
    train_on(steps, mine, optimizer, Meter(1, 20), mine.schedule(1), answers)

    for key, value in student.state_dict().items():
        torch.testing.assert_close(own.state_dict()[key], value, rtol=0, atol=tolerance)
    assert (own.fc.weight - start).abs().max() > 20 * tolerance


@pytest.mark.parametrize("name", OURS)
def test_our_methods_train_in_the_toolkits_trainer(toolkit, shared, workdir, name):
    mend()
    cls, config = theirs(name)
    base = importlib.import_module("mdistiller.distillers._base").Distiller
    assert issubclass(cls, base)
    config.merge_from_file(str(ROOT / "configs" / "cifar100" / f"{name.lower()}.yaml"))
    student, teacher = networks(shared)
    distiller = cls(student, teacher, config)
    loader = [(b.image, b.target, b.index) for b in batches(shared, 2)]
    trainer_class = importlib.import_module("mdistiller.engine").trainer_dict["base"]
    before = student.fc.weight.clone()
    wrapped = torch.nn.DataParallel(distiller)
    trainer_class("ours", wrapped, loader, [loader[0][:2]], config).train_epoch(1)
    assert not torch.equal(student.fc.weight, before)
    assert not teacher.training and Path("output/ours/student_best").exists()


@pytest.fixture
def checkout(toolkit, shared, tmp_path) -> tuple[Path, dict[str, str]]:
    """A copy of the toolkit with 128 real images and a real teacher, and an environment for it."""
    copy = tmp_path / "checkout"
    for name in ("mdistiller", "tools", "configs"):
        shutil.copytree(toolkit / name, copy / name)
    folder = copy / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, source in zip(("train", "test"), cifar100.BINARY, strict=True):
        images, labels = cifar100.read_binary(shared / "cifar-100-binary" / source)
        content = {"data": images[:128].flatten(1).numpy(), "fine_labels": labels[:128].tolist()}
        (folder / split).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    weights = copy / "download_ckpts/cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
    weights.parent.mkdir(parents=True)
    shutil.copy(shared / "teachers" / "cifar100_resnet56.pth", weights)
    # torchvision asks for the official checksums, which a part of the data cannot have.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "from torchvision import datasets\n"
        "datasets.CIFAR100._check_integrity = lambda self: True\n"
        "import torchvision.datasets.cifar as c\nc.check_integrity = lambda *a: True\n"
    )
    paths = [str(tmp_path / "site"), str(copy), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    found = os.pathsep.join(filter(None, paths))
    return copy, {**os.environ, "MDISTILLER_ROOT": str(copy), "PYTHONPATH": found}


def python(environment, script: Path | str, *words: str) -> str:
    result = subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


# Runs a script of the toolkit's, mended for a CPU, once with each line of words: each time in a
# process of its own, for the toolkit has one config. It imports no method of ours.
MENDED = """
import os, runpy, sys
import mdistiller.engine
from mdistiller_ext.toolkit.compat import mend

mend()
script, *lines = sys.argv[1:]
for line in lines:
    child = os.fork()
    if not child:
        sys.argv = [script, *line.split()]
        runpy.run_path(script, run_name="__main__")
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {line}")
"""


@pytest.mark.parametrize("name", ["dkd_eat_dat_lp", "logit"])
def test_train_there_resume_there_and_checkpoints_cross_both_ways(
    checkout, shared, workdir, tool, monkeypatch, name
):
    copy, environment = checkout
    text = (ROOT / "configs" / "cifar100" / f"{name}.yaml").read_text()
    text = text.replace("resnet110", "resnet56").replace("[50, 60, 70]", "[1]")
    train = ROOT / "tools" / "mdistiller_train.py"
    # Two epochs with a decay between them, then a third by --resume, which the toolkit alone
    # cannot do on a recent PyTorch.
    for epochs, resume in ((2, []), (3, ["--resume"])):
        Path("short.yaml").write_text(text.replace("EPOCHS: 80", f"EPOCHS: {epochs}"))
        output = python(environment, train, "--compat", "--cfg", "short.yaml", *resume)
        assert "--compat: --resume may read the numpy float" in output
    (folder,) = Path("output/cifar100_baselines").iterdir()
    log = (folder / "worklog.txt").read_text()
    assert [f"epoch: {n}" in log for n in (1, 2, 3, 4)] == [True, True, True, False]

    some = [first(images, 2000) for images in cifar100.load(shared)]
    monkeypatch.setattr(cifar100, "load", lambda root: some)
    words = ["-m", "resnet8", "--json", "-c", str(folder / "student_best")]
    assert 0 < json.loads(tool("eval", *words)[1])["top1"] < 10

    own = cifar_model_dict["resnet8"][0](num_classes=100)
    torch.save({"model": own.state_dict()}, "student_last")
    their_eval = str(copy / "tools" / "eval.py")
    Path("mended.py").write_text(MENDED)
    output = python(environment, "mended.py", their_eval, "-m resnet8 -c student_last")
    assert "Top-1:" in output


def test_the_exported_methods_train_by_the_checkouts_own_train_py(checkout, workdir, tool):
    copy, environment = checkout
    assert tool("export_upstream", str(copy), "--methods", *METHODS)[0] == 0
    for name in METHODS:
        exported = copy / "configs" / "cifar100" / name.lower() / "res110_res8.yaml"
        text = exported.read_text().replace("resnet110", "resnet56")
        Path(f"{name}.yaml").write_text(text.replace("EPOCHS: 80", "EPOCHS: 2"))
    lines = [f"--cfg {name}.yaml LOG.WANDB False" for name in METHODS]
    Path("mended.py").write_text(MENDED)
    output = python(environment, "mended.py", str(copy / "tools" / "train.py"), *lines)
    assert output.count("Extra parameters") == len(METHODS)
    logs = [log.read_text() for log in Path("output").rglob("worklog.txt")]
    assert ["epoch: 2" in log for log in logs] == [True] * len(METHODS)

"""Which run a folder holds: one whose inputs are others is never handed out for it."""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CPU, signal_at
from PIL import Image
from torch import nn

from mdistiller_ext import distill
from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import train, train_many
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.study.plan import read_study

NETS = """import torch
from sides import CHANNELS

def tiny(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(CHANNELS * 64, num_classes))
"""


@pytest.fixture
def nets(workdir, monkeypatch):
    """A working folder with images of one's own, a module of networks, a teacher and configs."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("nets", None)  # of another test
    sys.modules.pop("sides", None)
    Path("sides.py").write_text("CHANNELS = 3")
    Path("nets.py").write_text(NETS)
    arrays(0)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            for number in range(4):
                file = Path("pictures", split, str(label), f"{number}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    for kind, classes in (("arrays", 4), ("folder", 2)):
        Path(kind).mkdir()
        teacher(kind, 0, classes)
        tree = {
            "EXPERIMENT": {"NAME": "r"},
            "DATASET": {"TYPE": kind, "SIDE": 8 if kind == "folder" else 0},
            "DISTILLER": {"TYPE": "KD", "TEACHER": "nets:tiny", "STUDENT": "nets:tiny"},
            "SOLVER": {"EPOCHS": 1, "LR_DECAY_STAGES": []},
        }
        tree["DATASET"]["ROOT"] = "d.npz" if kind == "arrays" else "pictures"
        tree["DISTILLER"]["TEACHER_CKPT"] = f"{kind}/t.pth"
        Path(f"{kind}.yaml").write_text(yaml.safe_dump(tree))
    yield workdir
    sys.modules.pop("nets", None)
    sys.modules.pop("sides", None)


def arrays(seed):
    rng = np.random.default_rng(seed)
    sizes = {"train": 20, "test": 8}
    found = {f"{k}_images": rng.integers(0, 256, (n, 3, 8, 8), np.uint8) for k, n in sizes.items()}
    np.savez("d.npz", **found, **{f"{k}_labels": np.arange(n) % 4 for k, n in sizes.items()})


def teacher(kind, seed, classes):
    torch.manual_seed(seed)
    torch.save(linear(classes).state_dict(), f"{kind}/t.pth")


def linear(classes=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


def another_image():
    Image.new("RGB", (8, 8), "red").save("pictures/train/0/9.png")


CHANGES = {
    "a file of other images": ("arrays", lambda: arrays(1), "other images or labels"),
    "an image more": ("folder", another_image, "other images or labels"),
    "a teacher": ("arrays", lambda: teacher("arrays", 1, 4), "another teacher (sha256 "),
    "a module": ("arrays", lambda: Path("nets.py").write_text(f"x = 1\n{NETS}"), "code of nets"),
    "a module beside it": (
        "arrays",
        lambda: Path("sides.py").write_text("CHANNELS = 3 + 0"),
        "code of nets",
    ),
}


@pytest.mark.parametrize(("kind", "change", "phrase"), CHANGES.values(), ids=CHANGES)
def test_a_finished_run_of_other_inputs_is_refused_and_fresh_keeps_it(
    nets, tool, kind, change, phrase
):
    words = ["--cfg", f"{kind}.yaml", "--device", "cpu"]
    folder, aside = Path("output/distill/r"), Path("output/distill/r,old1")
    assert tool("train", *words)[0] == 0
    record = (folder / "record.json").read_bytes()
    Path("nets.py").write_text(f"# a comment\n{NETS}")
    assert "finished already" in tool("train", *words)[1]
    change()
    for more in ([], ["--resume"]):
        status, _, error = tool("train", *words, *more)
        assert (status, len(error.splitlines())) == (2, 1), error
        assert f"{folder} holds a finished run of " in error and phrase in error
        assert "EXPERIMENT.NAME" in error and "--fresh" in error
    assert (folder / "record.json").read_bytes() == record
    status, output, error = tool("train", *words, "--fresh")
    assert status == 0 and "epoch   1/1" in output and str(aside) in output, error
    assert (aside / "record.json").read_bytes() == record
    assert "finished already" in tool("train", *words)[1]
    assert tool("train", *words, "--fresh", "--resume")[0] == 2


@pytest.mark.parametrize("change", ["a file of other images", "a teacher"])
def test_a_stopped_run_of_other_inputs_does_not_go_on(nets, change):
    cfg = load_cfg("arrays.yaml", ["SOLVER.BATCH_SIZE", "4"])
    with signal_at(1, 2):
        train(cfg, "r", CPU)
    _, changed, phrase = CHANGES[change]
    changed()
    with pytest.raises(ConfigError, match="holds a stopped run of ") as error:
        train(cfg, "r", CPU, resume=True)
    assert phrase in str(error.value)


def test_a_run_that_left_nothing_begins_again_by_the_same_command(nets, tool):
    words = ["--cfg", "arrays.yaml", "--device", "cpu", "SOLVER.LR"]
    assert tool("train", *words, "1e30", "SOLVER.BATCH_SIZE", "4")[0] == 1
    assert json.loads(Path("output/distill/r/record.json").read_text())["status"] == "failed"
    status, output, error = tool("train", *words, "0.01")
    assert status == 0 and "epoch   1/1" in output, error


@pytest.mark.parametrize("change", CHANGES)
def test_a_study_says_which_finished_runs_do_not_belong(nets, tool, change):
    kind, changed, phrase = CHANGES[change]
    tree = {"name": "s", "students": {"nets:tiny": "."}, "seeds": [0, 1]}
    tree |= {"baseline": "KD", "alone": "alone", "options": {"EXPERIMENT.IMPORT": ["nets"]}}
    tree["arms"] = {"KD": {"cfg": f"{kind}.yaml"}, "alone": {"cfg": "alone.yaml"}}
    alone = yaml.safe_load(Path(f"{kind}.yaml").read_text())
    alone["DISTILLER"] = {"TYPE": "NONE", "STUDENT": "nets:tiny"}
    for file, content in (("alone.yaml", alone), ("s.yaml", tree)):
        Path(file).write_text(yaml.safe_dump(content))
    study = read_study(Path("s.yaml"), Path("output/studies"))
    for job in study.jobs[:3]:
        train(job.cfg, job.name, CPU)
    words = ["s.yaml", "--device", "cpu", "--jobs", "1"]
    assert "warning" not in tool("compare", "list", *words[:3])[1]
    changed()
    runs = [job.name for job in study.jobs[:3] if change != "a teacher" or job.arm == "KD"]
    said = f"{', '.join(runs)}: made with "
    status, output, _ = tool("compare", "list", *words[:3])
    (line,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert status == 0 and line.startswith(f"warning: {said}") and phrase in line
    status, output, error = tool("compare", "run", *words)
    assert status == 1 and "finished already" not in output
    assert error.startswith(f"compare.py: error: {said}") and len(error.splitlines()) == 1
    assert not study.jobs[3].folder.exists()


def test_a_chain_is_the_same_run_wherever_it_is_asked_for(nets, tool, monkeypatch):
    """Its link, of another network, is found too; teacher and link lie beside the config."""
    Path("nets.py").write_text(
        f"{NETS}def small(num_classes):\n    return torch.nn.Sequential("
        "tiny(7), torch.nn.Linear(7, num_classes))\n"
    )
    tree = yaml.safe_load(Path("arrays.yaml").read_text())
    link = tree | {"KD": {"TEMPERATURE": 2}}
    link["DISTILLER"] = tree["DISTILLER"] | {"STUDENT": "nets:small"}
    tree["DISTILLER"] |= {"TEACHER_CKPT": "t.pth", "ASSISTANTS": ["link.yaml"]}
    for name, content in (("chain", tree), ("link", link)):
        Path("arrays", f"{name}.yaml").write_text(yaml.safe_dump(content))
    words = ["--cfg", "arrays/chain.yaml", "--device", "cpu"]
    status, output, error = tool("train", *words)
    assert status == 0, error
    folders = sorted(Path("output/distill").iterdir())
    Path("elsewhere").mkdir()
    shutil.copy("d.npz", "elsewhere")  # the same images
    monkeypatch.chdir("elsewhere")
    words = ["--cfg", "../arrays/chain.yaml", "--device", "cpu", "LOG.PREFIX", "../output"]
    words += ["DATASET.TEST.BATCH_SIZE", "7", "DISTILLER.TEACHER_TABLE_ROOT", "tables"]
    words += ["DATASET.ROOT", "../d.npz"]
    assert "r: finished already" in tool("train", *words, "--resume")[1]
    status, output, error = tool("train", *words, "EXPERIMENT.NAME", "s")
    assert status == 0 and "finished already" in output and "epoch   1/1" in output, error
    assert sorted(Path("../output/distill").iterdir()) == sorted(
        Path("..", folder) for folder in [*folders, Path("output/distill/s")]
    )
    status, output, error = tool("teacher_table", *words)
    assert status == 0 and "360 of 360 views" in output, error
    Path("../arrays/link.yaml").write_text(yaml.safe_dump(link | {"KD": {"TEMPERATURE": 3}}))
    status, _, error = tool("train", *words, "--resume")
    assert status == 2 and "another assistant nets:small (KD.TEMPERATURE 2 -> 3)" in error


class Sharp(nn.Module):
    """What it says of an image is in its code, beside its weights."""

    def __init__(self, classes=4):
        super().__init__()
        self.linear = nn.Linear(192, classes)

    def forward(self, image):
        return 2 * self.linear(image.flatten(1))


class Sharper(Sharp):
    def forward(self, image):
        return 3 * self.linear(image.flatten(1))


def test_each_call_of_distill_is_a_run_of_its_own(nets):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (20, 3, 8, 8), np.uint8))
    split, turned = (images, torch.arange(20) % 4), (images, torch.arange(20).flip(0) % 4)
    options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", []]

    def network(seed, cls=Sharp):
        torch.manual_seed(seed)
        return cls()

    def run(student=0, taught_by=1, data=split, code=Sharp, **more):
        net, kind = network(student, code), {"options": options, "device": "cpu"} | more
        before = {key: value.clone() for key, value in net.state_dict().items()}
        try:
            _, folder = distill(net, network(taught_by), data, split, **kind)
        except ConfigError:
            after = net.state_dict()
            assert all(torch.equal(value, after[key]) for key, value in before.items())
            raise
        trained = torch.load(folder / "student_last", weights_only=True)["model"]
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in trained.items())
        return folder

    others = {"student": 2}, {"taught_by": 3}, {"data": turned}, {"code": Sharper}
    others += ({"options": [*options, "KD.TEMPERATURE", 2], "method": "KD"},)
    folders = [run(), *(run(**other) for other in others)]
    assert len(set(folders)) == 6
    assert run() == run(resume=True) == folders[0]
    run(name="one")
    phrases = "another student network", "another teacher", "other images or labels"
    for other, phrase in zip(others, (*phrases, phrases[0]), strict=False):
        for resume in (False, True):
            with pytest.raises(ConfigError, match=f"finished run of {phrase}") as error:
                run(**other, name="one", resume=resume)
            assert "fresh=True" in str(error.value) and "--" not in str(error.value)
    aside = folders[0].with_name("one,old1")
    assert run(name="one", taught_by=3, fresh=True).name == "one" and aside.is_dir()
    with pytest.raises(ConfigError, match="one holds a run already: continue it with resume=True"):
        run(name="one", taught_by=3, options=[*options, "SOLVER.LR", 0.1])


def frozen(net):
    net.linear.weight.requires_grad_(False)


CHANGED = {
    "a frozen weight": frozen,
    "a plain attribute": lambda net: setattr(net, "scale", 3),
    "a buffer that is not saved": lambda net: net.register_buffer(
        "shift", torch.ones(()), persistent=False
    ),
    "a hook": lambda net: net.register_forward_hook(lambda module, images, logits: -logits),
}


class Scaled(Sharp):
    scale = 1

    def forward(self, image):
        shift = getattr(self, "shift", 0)
        return self.scale * self.linear(image.flatten(1)) + shift


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_what_no_state_dict_shows_makes_another_run(nets, change):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (20, 3, 8, 8), np.uint8))
    split, folders = (images, torch.arange(20) % 4), []
    for changed in (False, True):
        torch.manual_seed(0)
        student, teacher = Scaled(), Scaled()
        if changed:
            change(student)
        options = ["SOLVER.EPOCHS", 1, "SOLVER.LR_DECAY_STAGES", []]
        folders.append(distill(student, teacher, split, split, options=options, device="cpu")[1])
    assert folders[0] != folders[1]


WANDB = """import json
ACTIVE = []  # as of wandb: without reinit="create_new" the run that goes on is returned

class Run:
    def __init__(self, **told):
        self.told, self.done = told, False
        self.write("init", told["id"])

    def write(self, what, value):
        with open("wandb.log", "a") as file:
            file.write(json.dumps([self.told["id"], self.told["name"], what, value]) + "\\n")

    def log(self, values, step):
        assert not self.done, "Run is finished"
        self.write("step", step)

    def finish(self, exit_code=None):
        self.done = True
        ACTIVE.remove(self)
        self.write("exit", exit_code)

def init(reinit="default", **told):
    run = ACTIVE[-1] if ACTIVE and reinit != "create_new" else Run(**told)
    ACTIVE.append(run)
    return run
"""


def test_each_folder_has_a_run_of_its_own_in_wandb(nets, monkeypatch):
    Path("wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(nets))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def cfg(*options):
        options = ["LOG.WANDB", True, "SOLVER.BATCH_SIZE", 4, "SOLVER.EPOCHS", 2, *options]
        return load_cfg("arrays.yaml", options)

    def logged():
        return [json.loads(line) for line in Path("wandb.log").read_text().splitlines()]

    broken = cfg("SOLVER.LR", 1e30), "broken"
    jobs = [(cfg("SOLVER.SEED", seed), f"r{seed}") for seed in range(2)]
    train_many([*jobs, broken], CPU, together=2)
    train(cfg("LOG.PREFIX", "other"), "r0", CPU)
    train(cfg(), "r0", CPU, fresh=True)
    with signal_at(2, 2):
        train(cfg(), "s", CPU)
    record, _ = train(cfg(), "s", CPU, resume=True)
    lines = logged()
    by_id = {}
    for number, name, what, value in lines:
        by_id.setdefault(number, []).append((name, what, value))
    inits = [(name, value) for _, name, what, value in lines if what == "init"]
    assert [name for name, _ in inits].count("r0") == 3 and len(by_id) == len(inits) - 1 == 6
    for number, told in by_id.items():
        (name,) = {name for name, *_ in told}
        steps = [value for _, what, value in told if what == "step"]
        status = [value for _, what, value in told if what == "exit"]
        assert steps == ([] if name == "broken" else [1, 2]), name
        expected = {"broken": [1], "s": [128 + signal.SIGTERM, 0]}
        assert status == expected.get(name, [0]), name
        assert (number == record["environments"][0]["wandb"]) == (name == "s")
    sys.modules.pop("wandb")

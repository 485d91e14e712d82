"""The export for upstream: what it writes, what it refuses, and that its losses are ours."""

import pytest
import torch
from conftest import ROOT, theirs

from mdistiller_ext import distiller_dict, get_cfg
from mdistiller_ext.toolkit.export import CONFIG, CONTROLS, METHODS, REGISTRY, SOURCES, plan

OURS = ROOT / "configs" / "cifar100"
EVERY = ["--methods", *METHODS]
STUB = {
    "mdistiller/__init__.py": "",
    "mdistiller/distillers/_base.py": "import torch\n\n\nclass Distiller(torch.nn.Module):\n"
    "    def __init__(self, student, teacher):\n        super().__init__()\n"
    "        self.student, self.teacher = student, teacher\n",
    "mdistiller/distillers/DKD.py": "DKD = object\n",
    REGISTRY: 'from .DKD import DKD\n\ndistiller_dict = {\n    "DKD": DKD,\n}\n',
    CONFIG: "from yacs.config import CfgNode as CN\n\nCFG = CN()\nCFG.DKD = CN()\n"
    "CFG.DKD.WARMUP = 20\n\n\n# DOT CFG\n",
    "configs/cifar100/dkd/res56_res20.yaml": "",
}


@pytest.fixture
def checkout(tmp_path):
    """A small stand-in for a checkout of the toolkit."""
    for name, text in STUB.items():
        file = tmp_path / "checkout" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "checkout"


@pytest.fixture
def export(tool, checkout):
    def export(*options, status=0):
        found, *output = tool("export_upstream", str(checkout), *options)
        assert found == status, output
        return "".join(output)

    return export


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_by_default_it_is_one_method_and_others_can_follow(checkout, export):
    export()
    files = [name for name in contents(checkout) if "eat" in name.lower()]
    new = {"mdistiller/distillers/dkd_loss.py", *files}
    assert set(contents(checkout)) == {*STUB, *new} and len(files) == 3
    assert "DAT" not in (checkout / REGISTRY).read_text() + (checkout / CONFIG).read_text()
    export(*EVERY)
    assert export(*EVERY) == export() == "nothing to change\n"
    other = "--methods: 'DKD' is none of DKD_EAT, DKD_DAT, DKD_LP"
    assert other in export("--methods", "DKD_LP", "DKD", status=2)


def test_check_writes_nothing_export_writes_once(checkout, export):
    before = contents(checkout)
    text = export(*EVERY, "--check", status=1)
    assert "would write mdistiller/distillers/DKD_LP.py" in text
    assert '+    "DKD_LP": DKD_LP,' in text and "+CFG.DKD_LP.STEP_EPOCHS = 20" in text
    assert contents(checkout) == before
    export(*EVERY)
    after = contents(checkout)
    assert set(after) - set(before) == {
        *(f"mdistiller/distillers/{name}.py" for name in ("dkd_loss", *METHODS)),
        *(
            f"configs/cifar100/{name.lower()}/{pair}.yaml"
            for name in METHODS
            for pair in ("res110_res8", "res110_res20")
        ),
    }
    assert {name for name in before if before[name] != after[name]} == {REGISTRY, CONFIG}
    assert export(*EVERY) == export(*EVERY, "--check") == "nothing to change\n"
    assert contents(checkout) == after


def test_an_export_that_broke_off_is_completed(checkout, export):
    export(*EVERY)
    whole = contents(checkout)
    (checkout / REGISTRY).write_text(STUB[REGISTRY])
    (checkout / "mdistiller/distillers/DKD_DAT.py").unlink()
    export(*EVERY)
    assert contents(checkout) == whole


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (REGISTRY, "distiller_dict = {}\n", "0 lines 'from .DKD import DKD', expected 1"),
        (CONFIG, STUB[CONFIG] * 2, "2 lines 'CFG.DKD.WARMUP = 20', expected 1"),
        (CONFIG, STUB[CONFIG].replace("\n", "\r\n"), "0 lines 'CFG.DKD.WARMUP = 20'"),
        (CONFIG, STUB[CONFIG] + "CFG.DKD_LP = CN()\n", "something else of the name DKD_LP"),
        (REGISTRY, STUB[REGISTRY] + 'x = {"DKD_EAT": 1}\n', 'else of the name "DKD_EAT"'),
        ("mdistiller/distillers/DKD_DAT.py", "mine\n", "is there already and differs"),
        (CONFIG, None, "not a checkout of mdistiller"),
    ],
)
def test_what_does_not_look_as_expected_is_refused_untouched(checkout, export, file, text, message):
    if text is None:
        (checkout / file).unlink()
    else:
        (checkout / file).write_bytes(text.encode())
    before = contents(checkout)
    assert message in export(*EVERY, status=2)
    assert contents(checkout) == before


def test_the_files_are_complete_and_of_the_toolkits_style(checkout):
    """They import nothing of this project, run on old Pythons, and `black` would keep them."""
    changes = plan(checkout, OURS, METHODS)
    for name in ("dkd_loss", *METHODS):
        text = changes[checkout / f"mdistiller/distillers/{name}.py"]
        imports = [line for line in text.splitlines() if "import" in line.split()]
        assert set(imports) <= {
            "import math",
            "import torch",
            "import torch.nn.functional as F",
            "from ._base import Distiller",
            "from .dkd_loss import dkd_loss",
        }
        assert text.count("def dkd_loss(") == (name == "dkd_loss")
        assert max(map(len, text.splitlines())) <= 88
        assert "->" not in text and ":=" not in text and ' f"' not in text
    assert {file.stem for file in SOURCES.glob("*.py")} == {*METHODS, "dkd_loss"}


class Logits(torch.nn.Module):
    """A network that has its logits already."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, image):
        return self.logits, {}


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_equal_ours(checkout, monkeypatch, no_toolkit_imported, name, scale):
    """In every stage of the schedules, in float64, with equal teacher logits among others."""
    for file, text in plan(checkout, OURS, METHODS).items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(checkout))
    cls, config = theirs(name)
    cfg = get_cfg()
    cfg.SOLVER.EPOCHS = 80
    assert {k: v for k, v in cfg[name].items() if k not in CONTROLS} == config[name]
    torch.manual_seed(0)
    teacher = scale * torch.randn(64, 100, dtype=torch.float64)
    teacher[:8, 10:60] = -scale
    target = torch.randint(100, (64,))
    student = scale * torch.randn(64, 100, dtype=torch.float64)
    for epoch in (1, 10, 11, 21, 41, 61, 80):
        results = []
        for method in (cls, distiller_dict[name]):
            distiller = method(Logits(student.clone()), Logits(teacher), cfg)
            step = distiller.forward_train if method is cls else distiller.train()
            _, losses = step(image=target, target=target, epoch=epoch)
            losses["loss_kd"].backward()
            results.append((*losses.values(), distiller.student.logits.grad))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)

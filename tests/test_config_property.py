"""Any config, right or wrong, trains or is refused with one line a fault, never a traceback.

The suite tries the same few hundred each time. The long form tries 6,000 new ones of each kind;
the statistics say how many were trained and how many refused:

    HYPOTHESIS_PROFILE=long python -m pytest tests/test_config_property.py \
        --hypothesis-show-statistics
"""

import os
import runpy
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from datetime import date
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from conftest import ROOT, first
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

from mdistiller_ext import cifar_model_dict, engine, get_cfg
from mdistiller_ext.config import load_cfg, rule_of
from mdistiller_ext.data import ImageSet, digits, get_dataset
from mdistiller_ext.distillers import RECIPES
from mdistiller_ext.engine import facts, shared, training
from mdistiller_ext.errors import ConfigError, Stopped, bare
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.policies import POLICIES
from mdistiller_ext.settings import leaves
from mdistiller_ext.study.plan import read_study
from mdistiller_ext.toolkit.locate import import_toolkit
from mdistiller_ext.toolkit.methods import toolkit_node

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
many = settings(
    max_examples=6000 if LONG else 120,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# What the toolkit itself does on a recent PyTorch.
pytestmark = pytest.mark.filterwarnings("default")

METHODS = [
    "NONE",
    "AT",
    "CRD",
    "FITNET",
    "KDSVD",
    "NST",
    "OFD",
    "PKT",
    "REVIEWKD",
    "RKD",
    "SP",
    "VID",
]
METHODS += [*RECIPES, *["LOGIT"] * len(RECIPES)]
FIT = {  # for methods whose defaults fit other networks or images
    "CRD": {"CRD.FEAT.STUDENT_DIM": 64, "CRD.FEAT.TEACHER_DIM": 64, "CRD.NCE.K": 32},
    "REVIEWKD": {
        "REVIEWKD.SHAPES": [1, 2, 4, 8],
        "REVIEWKD.OUT_SHAPES": [1, 2, 4, 8],
        "REVIEWKD.IN_CHANNELS": [16, 32, 64, 64],
        "REVIEWKD.OUT_CHANNELS": [16, 32, 64, 64],
    },
}
SMALL = ["resnet8"] * 4 + ["resnet14", "resnet8x4"]
CLASSES = {"digits": 10, "cifar100": 100, "arrays": 2}
NAMES = {
    "DATASET.TYPE": ["digits"] * 3 + ["cifar100", "arrays"],
    "DISTILLER.TYPE": METHODS,
    "DISTILLER.TEACHER": SMALL,
    "DISTILLER.STUDENT": [*SMALL, "own_networks:linear"],
    "DISTILLER.TEACHER_TABLE": ["auto", "on", "off"],
    "DISTILLER.TEACHER_TABLE_DTYPE": ["float32", "float16"],
    "DISTILLER.TEACHER_TABLE_TF32": [True],
    "DISTILLER.SOURCE": ["auto", "ext", "mdistiller"],
    "SOLVER.TRAINER": ["base", "crd"],
    "SOLVER.TYPE": ["SGD", "AdamW", "RMSprop", "Adafactor"],
    "SOLVER.OPTIMIZER_ARGS": ["eps=1e-6", "nesterov=True", "betas=(0.8, 0.9), amsgrad=True", "=1"],
    "SOLVER.LR_WARMUP": [0.0, 0.3, 1.0],
    "SOLVER.AMP": ["none", "bf16"],
    "SOLVER.COMPILE": [False],  # it takes seconds
    "CRD.MODE": ["exact", "relax"],
}
NASTY = ["", ".", "..", "../x", "a/b", "a\\b", "a\nb", "a\0b", "\u2028", "\ud800", "x" * 300]
NASTY += ["None", "True", "nan", "1e999", "0", "1_0", "[1, 2]", "{'a': 1}", "{[]: 1}", "'", "1if"]
NASTY += ["(" * 400, "+" * 9000 + "1", "9" * 5000, "0x" + "f" * 5000, "!!int x", "*a", "{a: b}"]

EDGES = [-1, 0, 1, 10**6, 2**31, 2**63, 2**64, 10**400, -0.0, 1e-320, 1e37, 1e38]
EDGES += [float("inf"), float("-inf"), float("nan")]

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=8)
    | st.just(date(2024, 1, 1)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
wild = st.one_of(anything, st.sampled_from(NASTY), st.sampled_from(EDGES))


@cache
def known() -> dict:
    """key -> default, of all methods that are here; without the toolkit its own are refused."""
    keys = dict(leaves(get_cfg()))
    try:
        for name in import_toolkit().registry:
            keys |= dict(leaves(toolkit_node(name)))
    except ConfigError:
        pass
    return keys


def plausible(key: str) -> st.SearchStrategy:
    """Values like the default, of which most are allowed."""
    default = known()[key]
    if key in NAMES:
        return st.sampled_from(NAMES[key])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.sampled_from([default, 1, 2, 3, 5])
    if isinstance(default, float):
        return st.sampled_from([default, default / 2, 0.0, 0.1, 0.5, 1.0])
    if isinstance(default, str):
        choices = rule_of(key)[1].partition("one of ")[2]
        return st.sampled_from(choices.split(", ") if choices else [default, "b", "5"])
    return st.sampled_from([default, [1, 2], [0, 0.5, 0.8]])


@st.composite
def misspelt(draw, key: str) -> str:
    place = draw(st.integers(0, len(key) - 1))
    instead = draw(st.sampled_from(["", "X", ".", "\n", "é", key[place] * 2]))
    return draw(st.sampled_from([f"{key[:place]}{instead}{key[place + 1 :]}", key.lower()]))


@st.composite
def configs(draw) -> dict:
    """key -> value: a method, a pair and some more settings, of which some are wrong."""
    method = draw(st.sampled_from(METHODS))
    values = {"DISTILLER.TYPE": method, **FIT.get(method, {})}
    for key in ("DATASET.TYPE", "DISTILLER.TEACHER", "DISTILLER.STUDENT"):
        values[key] = draw(st.sampled_from(NAMES[key]))
    sections = {method, "DISTILLER", "DATASET", "SOLVER"}
    if method == "LOGIT":
        loss = values["LOGIT.LOSS"] = draw(st.sampled_from(sorted(LOSSES)))
        chosen = st.lists(st.sampled_from(sorted(POLICIES)), max_size=3, unique=True)
        policies = values["LOGIT.POLICIES"] = draw(chosen)
        sections = sections - {"LOGIT"} | {f"LOGIT.{name}" for name in (loss, *policies)}
    keys = [key for key in known() if key.rpartition(".")[0] in sections]
    for _ in range(draw(st.integers(0, 5))):
        key = draw(st.sampled_from(keys) | st.sampled_from([*known()]))
        fault = draw(st.sampled_from([None] * 8 + ["value", "value", "spelling", "section"]))
        if fault == "spelling":
            values[draw(misspelt(key))] = known()[key]
        elif fault == "section":
            values[key.rsplit(".", 1)[0]] = draw(wild)
        else:
            values[key] = draw(wild if fault else plausible(key))
    return values


def words(value) -> str | None:
    """How a value is written as an option, if it can be one."""
    text = value if isinstance(value, str) else repr(value)
    return None if text.startswith("-") else text


class Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data) -> bool:
        return True


def as_yaml(values: dict) -> str:
    """Nested in sections, or below a section that is none, as a dotted key."""
    tree: dict = {}
    for key in sorted(values, key=lambda key: key.count(".")):  # sections first
        *sections, last = key.split(".")
        value, node = values[key], tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                tree[key] = value
                break
        else:
            node[last] = value
    return yaml.dump(tree, Dumper=Dumper)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder for each config, where two steps are trained on a few images."""
    home = tmp_path_factory.mktemp("configs")
    few = {"digits": digits.load()[0], "cifar100": None}
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    targets = torch.arange(8) * 12
    few["cifar100"] = ImageSet.build(images, targets, (0.5,) * 3, (0.25,) * 3, 4, True)
    few["digits"] = first(few["digits"], 8)
    own = {"images": torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)}
    own["labels"] = torch.arange(20) % 2
    arrays = {f"{split}_{what}": own[what] for split in ("train", "test") for what in own}
    torch.save(arrays, home / "arrays.pt")
    networks = ModuleType("own_networks")
    networks.linear = lambda num_classes: nn.Sequential(
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes)
    )
    trained = []

    def two_steps(cfg, name, device, *, resume, world, **again):
        trained.append(name)
        own = shared.Shared(device, engine.StopSignals(), world)
        with training.opened(cfg, name, None, own, resume) as one:
            with suppress(Stopped), one.recorded():
                one.trainer.train_epoch(one.plan(), lambda: None)
                raise Stopped("", signal.SIGTERM)
            tops = dict.fromkeys(("last_epoch_top1", "mean_last_10_top1"), 0.0)
            return {
                **tops,
                "best_epoch_top1_selected_on_test": 0.0,
                "best_epoch": 1,
                "epochs": [{}],
            }, one.folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train", two_steps)
        patch.setattr(
            shared,
            "get_dataset",
            lambda node: (few[node.TYPE],) * 2 if node.TYPE in few else get_dataset(node),
        )
        patch.setitem(sys.modules, "own_networks", networks)
        patch.setattr(facts, "environment", lambda device: {})  # asks git
        patch.setitem(sys.modules, "wandb", None)
        patch.setenv("MDISTILLER_EXT_CACHE", str(home / "cache"))
        yield home, trained, patch


@cache
def weights(home: Path, name: str, dataset: str) -> str:
    """A file of random weights."""
    file = home / f"{name}_{dataset}.pth"
    net = cifar_model_dict[name][0](num_classes=CLASSES[dataset])
    torch.save({"model": net.state_dict()}, file)
    return str(file)


def train(patch, *options: str) -> tuple[int, str]:
    """(exit status, stderr) of tools/train.py."""
    patch.setattr(sys, "argv", ["train.py", "--cfg", "c.yaml", "--device", "cpu", *options])
    stderr = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "train.py"), run_name="__main__")
    return end.value.code, stderr.getvalue()


@many
@given(values=configs(), data=st.data())
def test_any_config_trains_or_is_refused(place, values, data):
    home, trained, patch = place
    shutil.rmtree(home / "work", ignore_errors=True)
    (home / "work").mkdir()
    patch.chdir(home / "work")
    trained.clear()
    ckpt = values.get("DISTILLER.TEACHER_CKPT", "")
    pair = str(values["DISTILLER.TEACHER"]), str(values["DATASET.TYPE"])
    if ckpt in ("", b"") and pair[0] in SMALL and pair[1] in CLASSES:
        values["DISTILLER.TEACHER_CKPT"] = weights(home, *pair)
    if pair[1] == "arrays":
        values.setdefault("DATASET.ROOT", str(home / "arrays.pt"))
    options = {k: words(v) for k, v in values.items() if data.draw(st.booleans(), label=k)}
    options = {k: v for k, v in options.items() if v is not None and not k.startswith("-")}
    in_file = {k: v for k, v in values.items() if k not in options}
    Path("c.yaml").write_text(as_yaml(in_file))

    status, stderr = train(patch, *(word for pair in options.items() for word in pair))

    lines = stderr.splitlines()
    event({0: "trained", 1: "failed", 2: "refused"}[status])
    assert all(line.startswith("train.py: error: ") for line in lines), stderr
    assert "unexpected" not in stderr
    if status == 0:
        assert trained and not lines
        return
    assert lines and len(set(lines)) == len(lines)
    if status == 1:  # the values were allowed and much too large
        assert "not finite" in stderr or "KDSVD in epoch" in stderr
        return
    if not trained:
        assert os.listdir() == ["c.yaml"]  # nothing was begun
    fitted = {key for fit in FIT.values() for key in fit}  # of methods that may not be here
    for key in values.keys() - fitted:
        if key not in known() and not any(k.startswith(f"{key}.") for k in known()):
            named = [line for line in lines if line.startswith(f"train.py: error: {bare(key)}: ")]
            assert len(named) == 1, (key, stderr)


yaml_like = st.text("{}[]:,&*!?|>%-#'\"\n <=abAB12.\t", max_size=60)


@many
@given(content=st.binary(max_size=100) | st.text().map(str.encode) | yaml_like.map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    for read in (load_cfg, lambda file: read_study(file, Path("out"))):
        try:
            read(file)
        except ConfigError as error:
            event("refused")
            assert str(error)
            assert str(error).splitlines() == str(error).split("\n")
        else:
            event("read")

"""What a module from outside the package registers is allowed, trains, goes on, and is recorded."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CPU, ROOT, untrained_teacher

from mdistiller_ext import distiller_dict, plugins
from mdistiller_ext.config import get_cfg, load_cfg, rules
from mdistiller_ext.data import DATASETS
from mdistiller_ext.engine import train
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.losses import LOSSES
from mdistiller_ext.models.zoo import OWN
from mdistiller_ext.plugins import versions
from mdistiller_ext.policies import POLICIES

TEXT = (ROOT / "docs" / "own_names.md").read_text()
MODULE, CONFIG = (re.findall(rf"```{kind}\n(.*?)```", TEXT, re.S)[0] for kind in ("python", "yaml"))
REGISTRIES = LOSSES, POLICIES, OWN, DATASETS, distiller_dict


@pytest.fixture
def mine(workdir, monkeypatch):
    """The module of the document in the working folder; what it registers goes with the test."""
    (workdir / "mine.py").write_text(MODULE)
    (workdir / "mine.yaml").write_text(CONFIG)
    before, path = [dict(registry) for registry in REGISTRIES], list(sys.path)
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in ("mine", "other"):
        sys.modules.pop(name, None)
    sys.path[:] = path


def options(folder, *more):
    teacher = ["DISTILLER.TEACHER_CKPT", str(untrained_teacher(folder)), "DISTILLER.TEACHER"]
    return [*teacher, "resnet20", *more]


def test_the_documents_module_trains_resumes_and_is_recorded(mine, tool, workdir):
    words = ["--cfg", "mine.yaml", "--device", "cpu", "EXPERIMENT.NAME", "r"]
    words += options(workdir, "SOLVER.EPOCHS", "1")
    status, output, errors = tool("train", *words)
    assert status == 0, errors
    status, output, errors = tool("train", *words, "--resume", "SOLVER.EPOCHS", "2")
    assert status == 0 and "epoch   2/2" in output, errors
    folder = workdir / "output" / "mine" / "r"
    record = json.loads((folder / "record.json").read_text())
    config, session = record["config"], record["environments"][-1]
    assert config["EXPERIMENT"]["IMPORT"] == ["mine"] and config["LOGIT"]["LOSS"] == "SQUARED"
    assert config["DATASET"]["TYPE"] == "stripes" and record["student"]["name"] == "tiny"
    assert config["LOGIT"]["LATE"] == {"FROM": 2}
    assert session["imported"].keys() == {"mine"} and len(session["imported"]["mine"]) == 64
    assert [epoch["mean_kd_weight"] for epoch in record["epochs"]] == [0, 1]


def test_a_whole_method_with_settings_of_its_own(mine, workdir):
    more = ["DISTILLER.TYPE", "HINTS", "HINTS.WEIGHT", "3.0", "SOLVER.EPOCHS", "1"]
    tree = yaml.safe_load(CONFIG)
    del tree["LOGIT"]
    Path("hints.yaml").write_text(yaml.safe_dump(tree))
    record, _ = train(load_cfg("hints.yaml", options(workdir, *more)), "r", CPU)
    assert record["method"] == {"type": "HINTS", "source": "ext"}
    assert record["config"]["HINTS"] == {"WEIGHT": 3.0}
    assert record["teacher_table"] is not None and "loss_hint" in record["epochs"][0]
    with pytest.raises(ConfigError, match=r"HINTS\.WEIGHT: -1\.0 is not allowed, expected a num"):
        load_cfg("hints.yaml", options(workdir, *more, "HINTS.WEIGHT", "-1.0"))


def test_a_process_that_did_not_read_the_config_imports_too(mine, workdir):
    cfg = load_cfg("mine.yaml", options(workdir, "SOLVER.EPOCHS", "1"))
    for registry in REGISTRIES:
        for name in ("SQUARED", "LATE", "tiny", "stripes", "HINTS"):
            registry.pop(name, None)
    del sys.modules["mine"]
    record, _ = train(cfg, "r", CPU)
    assert record["status"] == "finished"


def test_without_the_module_its_names_are_refused(mine, workdir):
    with pytest.raises(ConfigError) as error:
        load_cfg("mine.yaml", options(workdir, "EXPERIMENT.IMPORT", "[]"))
    for name in ("tiny", "stripes", "SQUARED", "LATE"):
        assert name in str(error.value)
    assert "mine" not in sys.modules


def test_an_installed_package_names_its_module_in_an_entry_point(mine, workdir, monkeypatch):
    (workdir / "mine-1.dist-info").mkdir()
    (workdir / "mine-1.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1\n")
    (workdir / "mine-1.dist-info" / "entry_points.txt").write_text("[mdistiller_ext]\nany = mine\n")
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.setattr(plugins, "_installed", plugins._installed.__wrapped__)  # read once else
    assert load_cfg("mine.yaml", options(workdir, "EXPERIMENT.IMPORT", "[]"))
    assert versions([]).keys() == {"mine"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise RuntimeError('no\\nsuch')", r"module other: RuntimeError: 'no\\nsuch'"),
        ("import nowhere_at_all", "module other: ModuleNotFoundError: .*nowhere_at_all"),
        (
            "from mdistiller_ext.losses import Loss\nclass DKD(Loss): ...",
            "module other: ValueError: 'DKD: is taken by mdistiller_ext.losses.dkd'",
        ),
        (
            "from mdistiller_ext.policies import Policy\nclass EAT(Policy): ...",
            "EAT: is taken by mdistiller_ext.policies.eat",
        ),
        (
            "from mdistiller_ext import register_network as r\n@r('resnet8')\ndef f(n): ...",
            "resnet8: is taken by mdistiller_ext.models.resnet",
        ),
        (
            "from mdistiller_ext import register_dataset as r\n@r('digits')\ndef f(s): ...",
            "digits: is taken by mdistiller_ext.data",
        ),
        (
            "from mdistiller_ext import register_method as r\n@r('KD')\nclass M: ...",
            "KD: is taken by mdistiller_ext.distillers.logit",
        ),
    ],
)
def test_modules_that_are_refused(mine, workdir, text, message):
    (workdir / "other.py").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_cfg(None, ["EXPERIMENT.IMPORT", "['other']"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["mine", "[1]", "['a b']", "['../mine']", "{}"])
def test_what_names_no_module_imports_none(mine, value):
    with pytest.raises(ConfigError, match=r"EXPERIMENT\.IMPORT: .* expected (list: )?a list of mo"):
        load_cfg(None, ["EXPERIMENT.IMPORT", value])
    assert "mine" not in sys.modules


def test_a_class_that_is_typed_again_takes_the_place_of_the_first(mine):
    for _ in range(2):
        exec(MODULE, {"__name__": "mine"})
    assert rules()["LOGIT.LOSS"][0]("SQUARED") and "HINTS" in get_cfg()


def test_code_that_changed_between_two_sessions_is_said(mine, workdir, capsys):
    cfg = load_cfg("mine.yaml", options(workdir, "SOLVER.EPOCHS", "1"))
    train(cfg, "r", CPU)
    with (workdir / "mine.py").open("a") as file:
        file.write("changed = True\n")
    longer = load_cfg("mine.yaml", options(workdir, "SOLVER.EPOCHS", "2"))
    train(longer, "r", CPU, resume=True)
    assert "goes on under other conditions" in (text := capsys.readouterr().out)
    assert "imported {'mine': " in text


def test_a_folder_is_a_module_of_all_its_files(workdir, monkeypatch):
    (workdir / "package").mkdir()
    for name in ("__init__", "a"):
        (workdir / "package" / f"{name}.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(workdir))
    importlib.import_module("package")
    before = versions(["package"])
    (workdir / "package" / "a.py").write_text("x = 2\n")
    assert before.keys() == {"package"} and versions(["package"]) != before
    library = importlib.import_module("torchvision")
    assert versions(["torchvision", "nowhere"]) == {"torchvision": library.__version__}

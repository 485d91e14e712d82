"""Registration against a small stand-in for mdistiller: what it adds, and when it refuses."""

import importlib
from pathlib import Path

import pytest

from mdistiller_ext import register
from mdistiller_ext.config import get_cfg
from mdistiller_ext.errors import ConfigError

OURS = {"DKD_EAT", "DKD_DAT", "DKD_LP", "DKD_EAT_DAT_LP", "LOGIT"}
FILES = {
    "__init__.py": "",
    "distillers/__init__.py": "distiller_dict = {'NONE': object}",
    "distillers/_base.py": "import torch\nclass Distiller(torch.nn.Module):\n    pass",
    "engine/__init__.py": "",
    "engine/cfg.py": "from yacs.config import CfgNode as CN\n"
    "CFG = CN({'DISTILLER': CN({'TYPE': 'NONE'}), 'DKD': CN({'T': 4.0})})",
}


@pytest.fixture
def stub(tmp_path, monkeypatch, no_toolkit_imported):
    """A package `mdistiller` that MDISTILLER_ROOT names; returns its folder."""
    for name, text in FILES.items():
        file = tmp_path / "mdistiller" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MDISTILLER_ROOT", str(tmp_path))
    return tmp_path / "mdistiller"


def parts():
    registry = importlib.import_module("mdistiller.distillers").distiller_dict
    base = importlib.import_module("mdistiller.distillers._base").Distiller
    return registry, base, importlib.import_module("mdistiller.engine.cfg").CFG


@pytest.mark.parametrize("imported_before", [True, False])
def test_adds_our_methods_and_nodes_and_nothing_else(stub, imported_before):
    if imported_before:
        parts()
    register()
    registry, base, config = parts()
    assert set(registry) == {"NONE", *OURS}
    assert set(config) == {"DISTILLER", "DKD", *OURS}
    assert set(config.DISTILLER) == {"TYPE", "SOURCE", "TEACHER_CFG"}
    for name in OURS:
        assert issubclass(registry[name], base) and registry[name].__name__ == name
        assert config[name] == get_cfg()[name]


def test_a_second_call_changes_nothing(stub):
    register()
    registry, _, config = parts()
    before = dict(registry)
    config.DKD_EAT.RANGE = 0.1
    config.freeze()
    register()
    assert dict(registry) == before and config.DKD_EAT.RANGE == 0.1


@pytest.mark.parametrize("taken", ["class", "node"])
def test_a_name_that_is_taken_is_refused_and_nothing_added(stub, taken):
    registry, _, config = parts()
    if taken == "class":
        registry["DKD_LP"] = dict
    else:
        config["DKD_LP"] = get_cfg().KD
    before = set(registry), set(config)
    with pytest.raises(ConfigError, match=r"something else of the name DKD_LP: .* tools/export_up"):
        register()
    assert before == (set(registry), set(config))


def test_a_frozen_config_is_refused_and_nothing_added(stub):
    registry, _, config = parts()
    config.freeze()
    with pytest.raises(ConfigError, match=r"config is frozen: call register\(\) before"):
        register()
    assert set(registry) == {"NONE"}


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("distillers/__init__.py", "import scipy_is_missing", "No module named 'scipy_is_missing'"),
        ("engine/cfg.py", "", "has no attribute 'CFG'"),
    ],
)
def test_a_broken_install_is_named(stub, file, text, message):
    (stub / file).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        register()
    assert str(stub.parent) in str(error.value)


def test_no_mdistiller_at_all(stub, monkeypatch):
    (stub / "__init__.py").unlink()
    with pytest.raises(ConfigError, match=r"MDISTILLER_ROOT: .* holds no mdistiller/__init__\.py"):
        register()
    monkeypatch.delenv("MDISTILLER_ROOT")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"github\.com/megvii-research/mdistiller, or name"):
        register()


def test_what_its_own_train_does_not_know_is_one_line(stub, tool):
    """The stand-in's script says that it has no such data set, as the toolkit's does."""
    (stub.parent / "tools").mkdir()
    (stub.parent / "tools" / "train.py").write_text("raise NotImplementedError('digits')")
    Path("own.yaml").write_text("DISTILLER: {TYPE: DKD_LP}\nDKD_LP: {BETA: 2.0}\n")
    for options, message in (
        (["SOLVER.SEED", "1"], "mdistiller does not take this config: Non-existent key: SOLVER."),
        (["DKD.T", "four"], "mdistiller does not take this config: Type mismatch"),
        ([], "mdistiller does not have digits"),
    ):
        status, _, error = tool("mdistiller_train", "--cfg", "own.yaml", *options)
        assert status == 2 and error.startswith(f"mdistiller_train.py: error: {message}")
        assert error.count("\n") == 1

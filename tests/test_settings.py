"""The rules of the config: every key has one, and they are neither too strict nor too loose."""

import pytest
from conftest import ROOT

from mdistiller_ext import get_cfg
from mdistiller_ext.config import load_cfg, rule_of, rules
from mdistiller_ext.data import facts, get_dataset
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.settings import leaves
from mdistiller_ext.toolkit.locate import import_toolkit
from mdistiller_ext.toolkit.methods import toolkit_node
from mdistiller_ext.toolkit.rules import RULES as TOOLKIT_RULES


def keys_of_the_toolkit() -> dict:
    """key -> default of every method of the toolkit."""
    nodes = [toolkit_node(name) for name in import_toolkit().registry]
    return {key: value for node in nodes for key, value in leaves(node)}


def test_every_key_of_ours_has_a_rule_and_every_rule_a_key():
    assert set(dict(leaves(get_cfg()))) == set(rules())


def test_every_key_of_the_toolkit_has_a_rule_and_every_rule_a_key(toolkit):
    keys = keys_of_the_toolkit().keys() - rules().keys()
    used = {key if key in TOOLKIT_RULES else key.rsplit(".", 1)[-1] for key in keys}
    assert used == set(TOOLKIT_RULES)


def test_the_toolkits_defaults_are_allowed(toolkit):
    assert [k for k, v in keys_of_the_toolkit().items() if not rule_of(k)[0](v)] == []


@pytest.mark.parametrize("name", ["cifar100", "digits"])
def test_the_facts_are_those_of_the_data(name, request):
    cfg = get_cfg()
    cfg.DATASET.TYPE = name
    if name == "cifar100":
        cfg.DATASET.ROOT = str(request.getfixturevalue("shared"))
    train, _ = get_dataset(cfg.DATASET)
    assert (len(train), train.classes, train.side) == facts(cfg.DATASET)


BAD = [
    ("EXPERIMENT.NAME", "../escaped"),
    ("EXPERIMENT.NAME", ".."),
    ("EXPERIMENT.NAME", r"a\b"),
    ("EXPERIMENT.NAME", "a\nb"),
    ("EXPERIMENT.NAME", "a\udcff"),
    ("EXPERIMENT.NAME", "한" * 70),  # 210 bytes
    ("EXPERIMENT.PROJECT", "/tmp"),
    ("EXPERIMENT.PROJECT", ""),
    ("EXPERIMENT.PROJECT", "."),
    ("EXPERIMENT.TAG", ""),
    ("LOG.PREFIX", ""),
    ("LOG.PREFIX", "a\0b"),
    ("DATASET.ROOT", "x" * 256),
    ("DISTILLER.TEACHER_CKPT", "a/" * 600),
    ("SOLVER.BATCH_SIZE", 10**400),
    ("SOLVER.LR", float("nan")),
    ("SOLVER.LR", float("inf")),
    ("SOLVER.LR_DECAY_RATE", 10.0),
    ("SOLVER.WEIGHT_DECAY", 1e30),
    ("SOLVER.LR_DECAY_STAGES", [70, 50]),
    ("SOLVER.LR_DECAY_STAGES", [50, 50]),
    ("SOLVER.LR_DECAY_STAGES", [True]),
    ("SOLVER.LR_DECAY_STAGES", [float("nan")]),
    ("DKD.T", 1e-300),
    ("DKD_LP.RATIOS", [None]),
    ("DKD_LP.RATIOS", [[0.1]]),
    ("AT.P", 0),
    ("RKD.PDIST.EPSILON", 0.0),
    ("FITNET.INPUT_SIZE", (32,)),
    ("FITNET.INPUT_SIZE", (32.0, 32.0)),
    ("VID.INIT_PRED_VAR", 90.0),
    ("CRD.NCE.TEMPERATURE", 0.001),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_values_that_no_run_could_use(key, value):
    assert not rule_of(key)[0](value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("EXPERIMENT.NAME", ""),
        ("EXPERIMENT.NAME", "실험 1, b=2"),
        ("LOG.PREFIX", "/tmp/../out put"),
        ("SOLVER.SEED", 2**63 - 1),
        ("SOLVER.LR_DECAY_STAGES", []),
        ("SOLVER.LR_DECAY_STAGES", [0, 1.5]),
        ("SOLVER.LR_DECAY_RATE", 1.0),
        ("DKD_LP.RATIOS", [0, 0.5]),
        ("DKD_DAT.FRACTION", 0.5),
    ],
)
def test_values_at_the_edge_of_what_is_allowed(key, value):
    assert rule_of(key)[0](value)


@pytest.mark.parametrize(
    ("method", "options", "fault"),
    [
        (
            "crd",
            ["DISTILLER.STUDENT", "resnet8x4"],
            "CRD.FEAT.STUDENT_DIM: 64 is not allowed, expected 256, as resnet8x4 has",
        ),
        (
            "crd",
            ["DISTILLER.TEACHER", "resnet32x4"],
            "CRD.FEAT.TEACHER_DIM: 64 is not allowed, expected 256, as resnet32x4 has",
        ),
        (
            "reviewkd",
            ["DISTILLER.STUDENT", "resnet8x4"],
            "REVIEWKD.IN_CHANNELS: [16, 32, 64, 64] is not allowed, expected [64, 128, 256, 256], "
            "as resnet8x4 has",
        ),
        (
            "reviewkd",
            ["REVIEWKD.OUT_CHANNELS", "[16, 32, 64, 65]"],
            "REVIEWKD.OUT_CHANNELS: [16, 32, 64, 65] is not allowed, expected [16, 32, 64, 64], "
            "as resnet110 has",
        ),
        (
            "reviewkd",
            ["REVIEWKD.SHAPES", "[1, 2, 4, 8]"],
            "REVIEWKD.SHAPES: [1, 2, 4, 8] is not allowed, expected [1, 8, 16, 32], as resnet8 has",
        ),
        ("kdsvd", ["KDSVD.K", "9"], "KDSVD.K: 9 is not allowed, expected a number from 1 to 8"),
        (
            "rkd",
            ["SOLVER.BATCH_SIZE", "1"],
            "SOLVER.BATCH_SIZE: 1 is not allowed, expected a number that leaves no batch of one "
            "image of 50000, as RKD needs two",
        ),
    ],
)
def test_values_that_do_not_fit_each_other(toolkit, method, options, fault):
    with pytest.raises(ConfigError) as error:
        load_cfg(ROOT / f"configs/cifar100/toolkit/{method}.yaml", options)
    assert str(error.value) == fault


def test_an_unknown_source_is_no_fault_of_the_method(toolkit):
    with pytest.raises(ConfigError) as error:
        load_cfg(ROOT / "configs/cifar100/toolkit/at.yaml", ["DISTILLER.SOURCE", "x"])
    assert str(error.value) == (
        "DISTILLER.SOURCE: 'x' is not allowed, expected one of auto, ext, mdistiller"
    )


def test_what_a_method_needs_binds_no_other_method(toolkit):
    file = ROOT / "configs/cifar100/toolkit/at.yaml"
    assert load_cfg(file, ["SOLVER.BATCH_SIZE", "1", "DISTILLER.STUDENT", "resnet8x4"])

"""Reading configs: what loads, and how each fault is named."""

import pytest

from mdistiller_ext import get_cfg
from mdistiller_ext.config import check, load_cfg
from mdistiller_ext.errors import ConfigError


@pytest.fixture
def load(tmp_path):
    def load(text: str, *options: str):
        (tmp_path / "c.yaml").write_text(text)
        return load_cfg(tmp_path / "c.yaml", options)

    return load


def faults(load, text, *options) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load(text, *options)
    return str(error.value).splitlines()


def test_each_config_is_fresh():
    get_cfg().SOLVER.EPOCHS = 1
    get_cfg().DKD_LP.RATIOS.append(0.5)
    assert get_cfg().SOLVER.EPOCHS == 240
    assert get_cfg().DKD_LP.RATIOS == [0.0, 0.13, 0.27, 0.4]


def test_the_defaults_are_valid():
    assert check(get_cfg()) == []


def test_options_come_over_the_file(load):
    cfg = load("SOLVER: {EPOCHS: 3, LR: 0.1}", "SOLVER.EPOCHS", "5", "KD.TEMPERATURE", "2")
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR, cfg.KD.TEMPERATURE) == (5, 0.1, 2)
    assert cfg.is_frozen()


def test_teacher_cfg_is_beside_the_file(load, tmp_path):
    cfg = load("DISTILLER: {TEACHER_CFG: t.yaml}")
    assert str(tmp_path / "t.yaml") == cfg.DISTILLER.TEACHER_CFG


def test_all_faults_at_once(load):
    text = "SOLVER: {EPOCH: 3, LR: '1'}\nDKD: {T: 4}\nNOTHING: {LIKE: 1}"
    assert faults(load, text) == [
        "SOLVER.EPOCH: no such key; did you mean SOLVER.EPOCHS?",
        "SOLVER.LR: '1' is of the wrong type, expected float (write 4.0 for 4)",
        "DKD.T: 4 is of the wrong type, expected float (write 4.0 for 4)",
        "NOTHING.LIKE: no such key",
    ]


@pytest.mark.parametrize(
    ("method", "key", "value", "expected"),
    [
        ("NONE", "SOLVER.EPOCHS", "0", "a number at least 1"),
        ("NONE", "SOLVER.LR", "-0.1", "a number at least 0"),
        ("NONE", "SOLVER.MOMENTUM", "1.0", "a number at least 0 and below 1"),
        ("NONE", "SOLVER.SEED", "-1", "a number at least 0 and below 9.22337e+18"),
        ("NONE", "SOLVER.AMP", "fp8", "one of none, bf16"),
        ("NONE", "SOLVER.TRAINER", "dot", "one of base"),
        ("NONE", "SOLVER.LR_DECAY_STAGES", "[10, 'x']", "a list of at least 0, each a number"),
        ("NONE", "DATASET.TYPE", "imagenet", "one of cifar100, digits"),
        ("NONE", "DISTILLER.STUDENT", "vgg8", "one of resnet8, resnet14"),
        ("DKD", "DISTILLER.TEACHER", "ResNet50", "one of resnet8, resnet14"),
        ("DKDX", "DISTILLER.TYPE", "DKDX", "one of NONE, KD, DKD"),
        ("KD", "KD.TEMPERATURE", "0", "a number above 0"),
        ("DKD", "DKD.WARMUP", "0", "a number at least 1"),
        ("DKD_EAT", "DKD_EAT.RANGE", "1.0", "a number above -1 and below 1"),
        ("DKD_EAT", "DKD_EAT.STEP_EPOCHS", "0", "a number at least 1"),
        ("DKD_DAT", "DKD_DAT.FRACTION", "0.6", "a number from 0 to 0.5"),
        ("DKD_LP", "DKD_LP.RATIOS", "[]", "a list of at least 1"),
        ("DKD_LP", "DKD_LP.RATIOS", "[0.1, 1.5]", "a number at least 0 and below 1"),
        ("DKD_LP", "DKD_LP.RATIOS", "[0.1, 0.99]", "the target and one other class must stay"),
        ("DKD_EAT_DAT_LP", "DKD_EAT_DAT_LP.LP.RATIOS", "[0.995]", "one other class must stay"),
    ],
)
def test_values_outside_their_range(load, method, key, value, expected):
    teacher = "" if key == "DISTILLER.TEACHER" else ", TEACHER: resnet20"
    text = f"DISTILLER: {{TYPE: {method}{teacher}}}"
    (fault,) = faults(load, text, key, value)
    assert key.rsplit(".", 1)[1] in fault and value.split(",")[0] in fault and expected in fault


@pytest.mark.parametrize("value", ["nan", "1e999"])
def test_nan_and_infinity_are_refused(load, value):
    text = f"SOLVER: {{LR: .{value}}}" if value == "nan" else "SOLVER: {LR: .inf}"
    assert "SOLVER.LR" in faults(load, text)[0]


def test_an_empty_value_is_refused(load):
    assert faults(load, "SOLVER:\n  LR:\n") == [
        "SOLVER.LR: None is not allowed, expected a number at least 0"
    ]


def test_options_without_a_value(load):
    assert "come as KEY VALUE pairs, found 1 words" in faults(load, "", "SOLVER.EPOCHS")[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1", "found a list, expected sections of keys"),
        ("a: [", "no valid YAML"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
    ],
)
def test_files_that_are_no_config(load, text, expected):
    assert expected in faults(load, text)[0]


def test_missing_file():
    with pytest.raises(ConfigError, match=r"--cfg nowhere\.yaml: No such file"):
        load_cfg("nowhere.yaml")

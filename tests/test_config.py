"""Reading configs: what loads, and how each fault is named."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mdistiller_ext import get_cfg
from mdistiller_ext.config import check, load_cfg, shown
from mdistiller_ext.errors import ConfigError
from mdistiller_ext.settings import leaves

NONE = "DISTILLER: {TYPE: NONE}"


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


@pytest.mark.parametrize(
    ("written", "there", "found"),
    [
        ("yaml", ["conf", "."], "conf/t"),
        ("yaml", ["."], "t"),
        ("option", ["conf", "."], "t"),
        ("option", ["conf"], "conf/t"),
        ("yaml", [], "t"),
    ],
)
def test_a_path_is_looked_for_where_it_was_written_first(workdir, written, there, found):
    for folder in ("conf", *there):
        Path(folder).mkdir(exist_ok=True)
    files = {"TEACHER_CKPT": "t.pth", "TEACHER_CFG": "t.yaml", "ASSISTANTS": ["t.yaml", "resnet8"]}
    for folder in there:
        for name in ("t.pth", "t.yaml"):
            Path(folder, name).touch()
    tree = {"DISTILLER": files} if written == "yaml" else {"SOLVER": {"EPOCHS": 1}}
    Path("conf/c.yaml").write_text(yaml.safe_dump(tree))
    options = {f"DISTILLER.{key}": value for key, value in files.items()}
    words = [word for pair in options.items() for word in pair]
    node = load_cfg("conf/c.yaml", words if written == "option" else []).DISTILLER
    assert [f"{found}.pth", f"{found}.yaml"] == [node.TEACHER_CKPT, node.TEACHER_CFG]
    assert [f"{found}.yaml", "resnet8"] == node.ASSISTANTS


def test_each_config_is_fresh():
    get_cfg().SOLVER.EPOCHS = 1
    get_cfg().DKD_LP.RATIOS.append(0.5)
    assert get_cfg().SOLVER.EPOCHS == 240
    assert get_cfg().DKD_LP.RATIOS == [0.0, 0.13, 0.27, 0.4]


def test_what_is_shown_is_in_the_order_of_the_sections(load):
    text = "DISTILLER: {TYPE: DKD, TEACHER: resnet20, STUDENT: resnet8}"
    sections = ["EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG", "DKD"]
    assert list(shown(load(text))) == sections


def test_the_defaults_are_valid():
    assert check(get_cfg()) == {}


def test_options_come_over_the_file(load):
    cfg = load("SOLVER: {EPOCHS: 3, LR: 0.1}", "SOLVER.EPOCHS", "5", "LOG.PREFIX", "o")
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR, cfg.LOG.PREFIX) == (5, 0.1, "o")
    assert cfg.is_frozen()


def test_all_faults_at_once(load):
    text = "SOLVER: {EPOCH: 3, LR: 'a', BATCH_SIZE: 0}\nDKD: {T: true}\nNOTHING: {LIKE: 1}\n"
    text += "DISTILLER: {TYPE: DKD, TEACHER: resnet20}"
    assert faults(load, text) == [
        "SOLVER.EPOCH: no such key; did you mean SOLVER.EPOCHS?",
        "SOLVER.LR: 'a' is of the wrong type, expected float: a number at least 0 and below 1e+38",
        "DKD.T: True is of the wrong type, expected float: a number at least 0.01 and below 1000",
        "NOTHING.LIKE: no such key",
        "SOLVER.BATCH_SIZE: 0 is not allowed, expected a number at least 1 and below 1e+06",
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
        ("NONE", "DATASET.TYPE", "imagenet", "one of cifar100, cifar10"),
        ("NONE", "DISTILLER.STUDENT", "vgg7", "one of resnet8, resnet14"),
        ("DKD", "DISTILLER.TEACHER", "ResNet51", "one of resnet8, resnet14"),
        ("DKDX", "DISTILLER.TYPE", "DKDX", "one of NONE, KD, DKD"),
        ("KD", "KD.TEMPERATURE", "0", "a number at least 0.01"),
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
        "SOLVER.LR: None is of the wrong type, expected float: a number at least 0 and below 1e+38"
    ]


def test_options_without_a_value(load):
    assert "come as KEY VALUE pairs, found 1 words" in faults(load, NONE, "SOLVER.EPOCHS")[0]


def test_the_last_of_two_options_counts(load):
    assert load(NONE, "SOLVER.EPOCHS", "3", "SOLVER.EPOCHS", "4").SOLVER.EPOCHS == 4


def test_text_that_looks_like_a_number_is_text(load):
    cfg = load(NONE, "EXPERIMENT.NAME", "5", "EXPERIMENT.TAG", "None", "LOG.PREFIX", "'quoted'")
    assert (cfg.EXPERIMENT.NAME, cfg.EXPERIMENT.TAG, cfg.LOG.PREFIX) == ("5", "None", "quoted")


@pytest.mark.filterwarnings("default")
def test_text_that_is_nearly_a_number_makes_no_noise(load, recwarn):
    assert load(NONE, "EXPERIMENT.NAME", "1if").EXPERIMENT.NAME == "1if"
    assert [str(warning.message) for warning in recwarn] == []


def test_text_that_is_a_literal_is_that(load):
    cfg = load("SOLVER: {LR: 1e-3}", "SOLVER.LR_DECAY_STAGES", "(1, 2)")
    assert (cfg.SOLVER.LR, cfg.SOLVER.LR_DECAY_STAGES) == (0.001, [1, 2])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("SOLVER: {EPOCHS: true}", "SOLVER.EPOCHS: True is of the wrong type, expected int: "),
        ("SOLVER: {CUDA_GRAPH: 1}", "SOLVER.CUDA_GRAPH: 1 is of the wrong type, expected bool: "),
        ("SOLVER: {LR: {}}", "SOLVER.LR: {} is of the wrong type, expected float: "),
        ("SOLVER: {LR: {A: 1}}", "SOLVER.LR.A: no such key; did you mean SOLVER.LR?"),
        ("SOLVER: 3", "SOLVER: 3 is not allowed, expected keys in it, as SOLVER.TRAINER"),
        ("SOLVER:", "SOLVER: None is not allowed, expected keys in it, as SOLVER.TRAINER"),
        ("KD: {LOSS: 1}", "KD.LOSS: 1 is not allowed, expected keys in it, as KD.LOSS.CE_WEIGHT"),
        ("1: {2: 3}", "1.2: no such key"),
        ("null: 1", "None: no such key"),
        ("'a\n b': 1".replace("\n", "\\n").replace("'", '"'), r"'a\n b': no such key"),
        ("SOLVER.LR: 0.1\nSOLVER: {LR: 0.2}", "SOLVER.LR: is given 2 times in "),
        ("DATASET: {TYPE: digits, HOLDOUT: .nan}", "DATASET.HOLDOUT: nan is not allowed, expected"),
        ("DISTILLER: {TYPE: [1]}", "DISTILLER.TYPE: [1] is of the wrong type, expected text: "),
        ("DISTILLER: {SOURCE: x}", "DISTILLER.SOURCE: 'x' is not allowed, expected one of auto"),
        ("SOLVER: {SEED: 0x" + "f" * 5000 + "}", "SOLVER.SEED: int of thousands of digits is not"),
    ],
)
def test_one_line_for_a_fault_of_a_file(load, text, fault):
    (line,) = faults(load, text)
    assert line.startswith(fault)


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("", "3", "'': no such key"),
        ("SOLVER", "{}", "SOLVER: '{}' is not allowed, expected keys in it"),
        ("SOLVER..LR", "3", "SOLVER..LR: no such key; did you mean SOLVER.LR?"),
        ("SOLVER.LR", "", "SOLVER.LR: '' is of the wrong type, expected float"),
        ("SOLVER.LR", "{'a': 1}", "SOLVER.LR: \"{'a': 1}\" is of the wrong type, expected float"),
        ("SOLVER.LR", "{[]: 1}", "SOLVER.LR: '{[]: 1}' is of the wrong type, expected float"),
        ("SOLVER.LR", "-" * 30_000 + "1", f"SOLVER.LR: '{'-' * 119}... is of the wrong type"),
        ("SOLVER.LR", "(" * 3000, "SOLVER.LR: '((("),
        ("SOLVER.LR", "1\0", r"SOLVER.LR: '1\x00' is of the wrong type, expected float"),
        ("SOLVER.LR", "9" * 400, "SOLVER.LR: '999"),
    ],
)
def test_one_line_for_a_fault_of_an_option(load, key, value, fault):
    (line,) = faults(load, NONE, key, value)
    assert line.startswith(fault) and len(line) < 400


@pytest.mark.parametrize("key", [key for key, _ in leaves(get_cfg())])
def test_a_misspelt_key_comes_with_the_right_one(load, key):
    last = key.rsplit(".", 1)[1]
    wrong = [key.lower(), f"{key}S", key[:-1], f"{key[0]}{key[2:]}"]
    if len(last) > 3:
        wrong.append(f"{key[:-3]}{key[-2]}{key[-3]}{key[-1]}")
    known = dict(leaves(get_cfg()))
    words = [w for w in wrong if w not in known and not any(k.startswith(f"{w}.") for k in known)]
    found = faults(load, NONE, *(part for word in words for part in (word, "1")))
    for word, fault in zip(words, found, strict=True):
        near = fault.partition("did you mean ")[2].rstrip("?")
        assert near == key or near_in_spelling(word, near), fault


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("DKD.TEMPERATURE", "; did you mean DKD.T?"),
        ("KD.T", "; did you mean KD.TEMPERATURE?"),
        ("LOGIT.TAU", "; did you mean LOGIT.T?"),
        ("SOLVER.EPOCH", "; did you mean SOLVER.EPOCHS?"),
        ("EPOCHS", "; did you mean SOLVER.EPOCHS?"),
        ("SOLVER.EMA", ""),
        ("SOLVER.NESTEROV", ""),
        (
            "EXPERIMENT.LOGIT_STAND",
            "; here logit standardisation is DISTILLER.TYPE KD_LS or DKD_LS",
        ),
        ("EXPERIMENT.BASE_TEMP", "; here the base temperature is T of the method, as KD_LS.T"),
        ("KD.KD_WEIGHT", "; did you mean KD.LOSS.KD_WEIGHT?"),
        ("LR", "; did you mean SOLVER.LR?"),
    ],
)
def test_a_hint_names_what_does_it_here_and_nothing_far_fetched(load, key, hint):
    (fault,) = faults(load, NONE, key, "1")
    assert fault.startswith(f"{key}: no such key{hint}") and (hint or fault.endswith("key"))


def test_an_integer_is_a_float_where_one_is_expected(load):
    text = "DISTILLER: {TYPE: DKD, TEACHER: resnet20}\nDKD: {ALPHA: 2}"
    cfg = load(text, "DKD.T", "3", "DKD.BETA", 8)
    assert [repr(cfg.DKD[key]) for key in ("ALPHA", "T", "BETA")] == ["2.0", "3.0", "8.0"]


def near_in_spelling(word: str, key: str) -> bool:
    """Whether one letter makes the difference: another key can be as near as the one meant."""
    short, long = sorted((word, key), key=len)
    return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1", "found a list, expected sections of keys"),
        ("false", "found a bool, expected sections of keys"),
        ("a: [", "no valid YAML"),
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
    ],
)
def test_files_that_are_no_config(load, text, expected):
    assert expected in faults(load, text)[0]


@pytest.mark.parametrize("text", ["", "# a comment", "---", "{}", "null"])
def test_a_file_that_sets_nothing_is_refused(load, text):
    (fault,) = faults(load, text, "SOLVER.EPOCHS", "3")
    assert fault.endswith("c.yaml: sets nothing, expected sections of keys")


UNUSED = [
    ("DKD_LP", "DKD.BETA", "16.0", "; DKD_LP.BETA does"),
    ("DKD_LP", "DKD_EAT.STEP_EPOCHS", "3", "; DKD_LP.STEP_EPOCHS does"),
    ("DKD_LP", "KD.TEMPERATURE", "2", ""),
    ("NONE", "DKD.T", "2.0", ""),
    (
        "DKD_EAT_DAT_LP",
        "DKD_EAT.RANGE",
        "0.2",
        "; DKD_EAT_DAT_LP.EAT.RANGE, DKD_EAT_DAT_LP.DAT.RANGE do",
    ),
    ("DKD", "DKD_EAT_DAT_LP.EAT.RANGE", "0.2", ""),
    ("DKD_LP", "DKD.BETA", "x", "; DKD_LP.BETA does"),  # whatever its value
]


@pytest.mark.parametrize(("method", "key", "value", "instead"), UNUSED)
def test_a_key_of_a_method_that_does_not_run_is_refused(load, method, key, value, instead):
    expected = f"{key}: does nothing with DISTILLER.TYPE {method}{instead}"
    text = f"DISTILLER: {{TYPE: {method}, TEACHER: resnet20}}"
    assert faults(load, text, key, value) == [expected]
    assert faults(load, f"{text}\n{key}: {value}") == [expected]


def test_the_settings_of_a_file_do_not_vanish_with_another_method(load):
    text = "DISTILLER: {TYPE: DKD, TEACHER: resnet20}\nDKD: {T: 2.0}"
    assert faults(load, text, "DISTILLER.TYPE", "DKD_EAT") == [
        "DKD.T: does nothing with DISTILLER.TYPE DKD_EAT; DKD_EAT.T does"
    ]


def test_of_a_method_that_is_none_only_the_name_is_said(load):
    (fault,) = faults(load, "DISTILLER: {TYPE: DKDX, TEACHER: resnet20}\nDKD: {T: 2.0}")
    assert fault.startswith("DISTILLER.TYPE: 'DKDX' is not allowed")


def test_what_several_configs_share_is_passed_over_where_it_does_nothing(load, tmp_path):
    load("DISTILLER: {TYPE: DKD, TEACHER: resnet20}\nDKD: {T: 2.0, BETA: 1.0}")
    shared = {"DKD.T": 3.0, "KD.TEMPERATURE": 2, "AT.P": 3, "SOLVER.EPOCHS": 5}
    cfg = load_cfg(tmp_path / "c.yaml", ["SOLVER.EPOCHS", 6], shared)
    assert (cfg.DKD.T, cfg.DKD.BETA, cfg.KD.TEMPERATURE, cfg.SOLVER.EPOCHS) == (3.0, 1.0, 4, 6)
    with pytest.raises(ConfigError, match=r"\ASOLVER\.EPOCH: no such key; .*\Z"):
        load_cfg(tmp_path / "c.yaml", shared={"SOLVER.EPOCH": 5, "KD.TEMPERATURE": 0})


def test_missing_file():
    with pytest.raises(ConfigError, match=r"--cfg nowhere\.yaml: No such file"):
        load_cfg("nowhere.yaml")


def test_home_is_what_a_shell_makes_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["LOG.PREFIX", "~/out", "DATASET.ROOT", "$HOME/data"]
    cfg = load_cfg(ROOT / "configs" / "digits" / "dkd.yaml", options)
    assert (f"{tmp_path}/out", f"{tmp_path}/data") == (cfg.LOG.PREFIX, cfg.DATASET.ROOT)
    with pytest.raises(ConfigError, match=r"DATASET\.ROOT: 'https://x.y/z' .* and no URL"):
        load_cfg(ROOT / "configs" / "digits" / "dkd.yaml", ["DATASET.ROOT", "https://x.y/z"])

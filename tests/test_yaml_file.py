"""YAML files: what is read, and which files are refused, each with one line."""

from pathlib import Path

import pytest

from mdistiller_ext.errors import ConfigError
from mdistiller_ext.yaml_file import LARGEST, read_yaml

BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{{', '.join(f'k{i}: *{old}' for i in range(9))}}}\n"
    for old, new in zip("abcdefg", "bcdefgh", strict=True)
)


def test_plain_types(tmp_path):
    (tmp_path / "c.yaml").write_bytes("\ufeffA: {B: [1, 2.5, true, é], C: }".encode())
    assert read_yaml(tmp_path / "c.yaml", "c") == {"A": {"B": [1, 2.5, True, "é"], "C": None}}


def test_an_integer_is_written_in_decimal_digits(tmp_path):
    text = "[010, 1:30, 0x1F, 1_0, 0b1, 0, -7, +3, 42]"
    (tmp_path / "c.yaml").write_text(text)
    expected = ["010", "1:30", "0x1F", "1_0", "0b1", 0, -7, 3, 42]
    assert read_yaml(tmp_path / "c.yaml", "c") == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: [", "no valid YAML: while parsing a flow node"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        (BOMB, "found an alias, expected the value itself"),
        ("&a {x: *a}", "found an alias"),
        ("SOLVER: {EPOCHS: 3, EPOCHS: 4}", "found the key EPOCHS a second time"),
        ("SOLVER: {LR: 1.0}\nSOLVER: {EPOCHS: 4}", "found the key SOLVER a second time"),
        ("[" * 3000, "nested too deeply"),
        ("{a: " * 3000, "nested too deeply"),
        ("a: 2001-13-41", "month must be in 1..12"),
        ("a: !!int x", "invalid literal for int"),
        ("a: !!bool x", "no valid YAML: 'x'"),
        ("a: !!int ''", "no valid YAML: string index out of range"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("? [1, 2]\n: 3", "found unhashable key"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: \x01", "special characters are not allowed"),
        (b"a: \xff", "can't decode byte 0xff"),
        ("a: 1".encode("utf-16"), "can't decode byte 0xff"),
        ("#" * (LARGEST + 1), f"more than {LARGEST} bytes"),
    ],
)
def test_files_that_are_refused(tmp_path, content, reason):
    file = tmp_path / "c.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_yaml(file, "--cfg c.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith("--cfg c.yaml: ") and reason in line


@pytest.mark.parametrize(
    ("name", "reason"),
    [(".", "Is a directory"), ("no.yaml", "No such file"), ("/dev/zero", "more than")],
)
def test_paths_that_are_no_file(name, reason):
    with pytest.raises(ConfigError, match=f"study {name}: {reason}"):
        read_yaml(Path(name), f"study {name}")

"""What a wheel holds, and the command that it installs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

import mdistiller_ext
from mdistiller_ext import packaged
from mdistiller_ext.__main__ import COMMANDS
from mdistiller_ext.commands.configs import key_table
from mdistiller_ext.commands.methods import markdown
from mdistiller_ext.study.plan import read_study


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing but this project's wheel, unpacked."""
    source = tmp_path_factory.mktemp("source")
    for name in ("mdistiller_ext", "configs", "studies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel as b; print(b('.'))"
    words = [sys.executable, "-c", build]
    output = subprocess.run(words, cwd=source, check=True, capture_output=True, text=True).stdout
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(source / output.split()[-1]) as wheel:
        wheel.extractall(site)
    return site


@pytest.fixture
def command(site, workdir):
    def command(*words):
        environment = os.environ | {"PYTHONPATH": str(site)}
        words = [sys.executable, "-m", "mdistiller_ext", *words]
        return subprocess.run(words, env=environment, capture_output=True, text=True)

    return command


def test_two_epochs_from_a_wheel_in_an_empty_folder(command, workdir):
    words = ["--cfg", "digits/vanilla", "--device", "cpu", "SOLVER.EPOCHS", "2"]
    result = command("train", *words)
    assert result.returncode == 0, result.stderr
    assert "epoch   2/2" in result.stdout
    assert list(workdir.glob("output/digits/*/record.json"))


def test_a_wheel_is_typed_versioned_and_has_its_configs_and_studies(command, site):
    assert (site / "mdistiller_ext" / "py.typed").exists()
    assert command("--version").stdout == f"mdistiller-ext {mdistiller_ext.__version__}\n"
    assert command("configs").stdout.split() == packaged.names()
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "mdistiller-ext = mdistiller_ext.__main__:main" in entry.read_text()


def test_every_package_of_the_checkout_is_in_the_wheel(site):
    there, here = (
        {file.relative_to(root).as_posix() for file in (root / "mdistiller_ext").rglob("*.py")}
        for root in (site, ROOT)
    )
    assert there == here


def test_each_command_is_a_tool_of_the_checkout_and_says_what_it_does(tool):
    for name in set(COMMANDS) - {"configs", "methods"}:
        status, output, _ = tool(name.replace("-", "_"), "--help")
        assert status == 0 and f"usage: python tools/{name.replace('-', '_')}.py" in output
        assert "%" not in output.replace("%)", "")


def test_configs_are_listed_shown_and_copied(workdir, monkeypatch, capsys):
    from mdistiller_ext.__main__ import main

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mdistiller-ext", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code, *capsys.readouterr())

    assert "digits/dkd_lp\n" in run("configs")[1] and "studies/digits\n" in run("configs")[1]
    text = (ROOT / "configs" / "digits" / "kd.yaml").read_text()
    assert run("configs", "digits/kd")[1] == text
    assert run("configs", "digits/kd", "own.yaml")[0] == 0
    assert Path("own.yaml").read_text() == text
    status, _, error = run("configs", "digits/kd", "own.yaml")
    assert status == 2 and "own.yaml: is there already" in error
    status, _, error = run("configs", "digits/k")
    assert status == 2 and "digits/k: not packaged, expected one of cifar100/" in error
    assert "COMMAND --help says more" in run()[1]


def test_a_study_that_was_copied_elsewhere_finds_the_packaged_configs(workdir):
    shutil.copyfile(packaged.study("digits"), "own.yaml")
    here, there = (
        [job.cfg for job in read_study(file, workdir).jobs]
        for file in (packaged.study("studies/digits"), Path("own.yaml"))
    )
    for one, other in zip(here, there, strict=True):
        first, second = (Path(cfg.DISTILLER.TEACHER_CFG).resolve() for cfg in (one, other))
        assert first == second


def test_the_reference_of_keys_is_that_of_the_code():
    """python -m mdistiller_ext configs --keys > the table of docs/config_keys.md."""
    assert (ROOT / "docs" / "config_keys.md").read_text().endswith(f"\n\n{key_table()}\n")


def test_the_pages_of_the_methods_are_those_of_the_code():
    """python -m mdistiller_ext methods --markdown > docs/methods.md"""
    assert (ROOT / "docs" / "methods.md").read_text() == markdown()

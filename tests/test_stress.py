"""A short form of stress.py, in a process of its own: it forks, which wants no threads."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones(workdir):
    script = Path(__file__).with_name("stress.py")
    command = [sys.executable, script, "--kills", "6", "--folder", workdir / "runs"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 kills" in result.stdout

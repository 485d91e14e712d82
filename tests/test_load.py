"""Many runs at once and a long one, in the short form."""

import subprocess
import sys

from conftest import ROOT


def test_short_form():
    command = [sys.executable, str(ROOT / "tests" / "load.py"), "--runs", "4", "--epochs", "60"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 runs: 0 faults" in result.stdout

"""Windows and Macs, by stand-ins: what they lack is asked for nowhere."""

import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdistiller_ext.engine.evaluation import fidelity, performance
from mdistiller_ext.engine.loop import Meter

# Imports everything and trains, without what Windows has not.
WINDOWS = """
import importlib, multiprocessing, os, pkgutil, signal, sys
import pandas, scipy.stats, sklearn.model_selection, torch._dynamo, tqdm, yacs.config, filelock

for name in ("SIGHUP", "SIGUSR1", "SIGKILL"):
    delattr(signal, name)
for name in ("fork", "getuid", "setpgid", "sysconf", "pread"):
    delattr(os, name)
for name in ("fcntl", "pwd", "resource"):
    sys.modules[name] = None
multiprocessing.get_all_start_methods = lambda: ["spawn"]

import mdistiller_ext
for module in pkgutil.walk_packages(mdistiller_ext.__path__, "mdistiller_ext."):
    # Ray's, which has a Windows of its own; the toolkit's own code; the command itself.
    if not any(part in module.name for part in ("cluster", "upstream", "__main__")):
        importlib.import_module(module.name)
from mdistiller_ext.config import load_cfg
from mdistiller_ext.engine import train
cfg = load_cfg(sys.argv[1], ["SOLVER.EPOCHS", "1"])
train(cfg, "r", torch.device("cpu"))
"""


def test_everything_is_imported_and_trains_without_what_windows_lacks(workdir):
    words = [sys.executable, "-c", WINDOWS, str(ROOT / "configs" / "digits" / "vanilla.yaml")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "epoch   1/1" in result.stdout


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors on the stand-in."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            assert tensor.device == CPU or tensor.dtype != torch.float64, operation
        return result


@pytest.mark.parametrize("measure", ["evaluation", "meter"])
def test_nothing_is_measured_in_float64_where_there_is_none(measure):
    """On a device without values, as Apple's has none of that type."""
    student, teacher = torch.empty(2, 12, 10, device="meta")
    target = torch.empty(12, dtype=torch.int64, device="meta")
    with NoFloat64():
        if measure == "evaluation":
            assert performance(student, target) and fidelity(student, teacher)
            return
        meter = Meter(1, 1)
        meter.update(target, student, {"loss_ce": student.mean()}, {})
        meter.count(12)
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
            meter.read()

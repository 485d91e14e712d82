"""Mends, in this process alone, for what stops the toolkit on a CPU or on today's PyTorch."""

import getpass
import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch


def mend() -> list[str]:
    """Apply every mend that is needed here.

    Returns:
        One sentence for each mend that was applied.
    """
    mends: tuple[Callable[[], str | None], ...] = (_cuda, _resume, _wandb, _user)
    return [text for text in (apply() for apply in mends) if text]


def _cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    for cls in (torch.Tensor, torch.nn.Module):
        cls.cuda = wraps(cls.cuda)(lambda self, *args, **kwargs: self)  # type: ignore[method-assign]
    return ".cuda() stays on the CPU: no GPU here"


def _resume() -> str | None:
    # After its first learning-rate decay the optimizer state holds a numpy float.
    harmless: list[Any] = [
        np.float64(0).__reduce__()[0],
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    torch.serialization.add_safe_globals(harmless)
    return "--resume may read the numpy float in an optimizer's state"


def _wandb() -> str | None:
    config = importlib.import_module("mdistiller.engine.cfg").CFG
    if importlib.util.find_spec("wandb") or not config.LOG.WANDB:
        return None
    config.LOG.WANDB = False
    return "LOG.WANDB is off by default: wandb is not installed"


def _user() -> str | None:
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):  # the first on Windows
        uid = os.getuid() if hasattr(os, "getuid") else 0
        os.environ["LOGNAME"] = str(uid)
        return f"the user's name is {uid}: this uid has none"
    return None

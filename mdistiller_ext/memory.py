"""What fits into memory, said before it is tried."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from .errors import RunError


def check_memory(nbytes: int, what: str, advice: str, device: str | torch.device = "cpu") -> None:
    """Refuse what does not fit.

    Args:
        nbytes: that it takes.
        advice: what makes it smaller.

    Raises:
        RunError: it says both sizes.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else free_memory()
    if nbytes > free:
        raise RunError(
            f"{what}: {nbytes / 1e9:,.2f} GB of {'the GPU' if cuda else 'memory'}, where "
            f"{free / 1e9:,.2f} GB are free: {advice}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something found no memory, of a device or of the machine."""
    known = r"out of memory|can't allocate memory|ALLOC_FAILED"
    theirs = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    return isinstance(error, MemoryError) or (theirs and bool(re.search(known, str(error))))


def out_of_memory(error: BaseException) -> RunError:
    """What a run says of it, in one line."""
    asked = re.search(r"[Tt]ried to allocate ([\d.,]+ \w+)", str(error))
    return RunError(
        f"out of memory{f': {asked[1]} more were asked for' if asked else ''}: take a smaller "
        f"SOLVER.BATCH_SIZE or DATASET.TEST.BATCH_SIZE, fewer runs at once (--together, --jobs), "
        f"or DISTILLER.TEACHER_TABLE off"
    )


def free_memory() -> int:
    """Bytes that processes may still take: what Linux says, within a container's limit; elsewhere
    all that the machine has, or no limit where it does not say."""
    amounts = [sys.maxsize]
    with suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        amounts.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, LookupError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines)
        amounts.append(int(facts["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # "max": no limit
        amounts.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(amounts)

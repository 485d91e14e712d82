"""Every random state that a run depends on."""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of every global random number generator, in types that load safely."""
    algorithm, keys, *position = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (algorithm, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position),
        "torch": torch.get_rng_state(),
        # Asking would initialise CUDA in a process that trains on the CPU.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned; CUDA's only where the devices are as many."""
    random.setstate(state["python"])
    algorithm, keys, *position = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def host_state() -> tuple[Any, ...]:
    """What differs after a random number was drawn on the host."""
    _, keys, position, *_ = np.random.get_state(legacy=True)
    own = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), np.asarray(keys).tobytes(), position, own


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_draws(seed: int, epoch: int, *stream: int) -> np.random.Generator:
    """As `epoch_generator`, with NumPy's distributions."""
    return np.random.default_rng([seed, epoch, *stream])


def epoch_generator(
    seed: int, epoch: int, *stream: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of an epoch's draws: the same whatever was drawn before it.

    The order and the views of the images come from the one without `stream`.
    """
    entropy = np.random.SeedSequence([seed, epoch, *stream]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(entropy[0]))

"""Finding, downloading and loading the weights of pretrained networks."""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import packaged
from ..errors import ConfigError, RunError, brief
from ..files import check_finite, download_folder, load, read
from ..models import cifar_model_dict
from ..models.resnet import CHECKPOINTS

URL = (
    "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar"
)
IN_ARCHIVE = ("resnet32x4", "resnet56", "resnet110", "ResNet50", "wrn_40_2", "vgg13")
TOOLKIT_FOLDER = Path("download_ckpts")
TOOLKIT_FILES = {
    "cifar100": "cifar_teachers/{}_vanilla/ckpt_epoch_240.pth",
    "tiny_imagenet": "tiny_imagenet_teachers/{}_vanilla/ti_res18",
}
PRETRAINED = "pretrained"  # as DISTILLER.TEACHER_CKPT: what timm or torchvision have


class Weights(NamedTuple):
    """A network's state dict, with the file it came from and that file's sha256.

    Attributes:
        network: its name, where it is not the config's teacher.
    """

    state: dict[str, Tensor]
    file: Path
    sha256: str
    network: str = ""


def find_weights(name: str, dataset: str, checkpoint: str = "") -> Path | None:
    """The file of a network's pretrained weights, or None.

    Looked for in this order: `checkpoint`; `checkpoints/<dataset>/<name>.pth` in the working
    folder and in this project; for CIFAR-100 and Tiny-ImageNet the toolkit's `download_ckpts/` in
    the working folder and in an installed mdistiller.

    Args:
        dataset: as `data.identity` names the images.
        checkpoint: DISTILLER.TEACHER_CKPT; "pretrained" is in no file.

    Raises:
        ConfigError: `checkpoint` is named and does not exist.
    """
    if checkpoint == PRETRAINED:
        return None
    if checkpoint:
        if not Path(checkpoint).is_file():
            raise ConfigError(f"DISTILLER.TEACHER_CKPT: no such file: {checkpoint}")
        return Path(checkpoint)
    return next((place for place in _places(name, dataset) if place.is_file()), None)


def fetch_weights(name: str, dataset: str) -> Path:
    """Download the toolkit's teachers into `download_ckpts/` of the working folder.

    Raises:
        RunError: the weights are not among them, or cannot be had; it lists what was tried.
    """
    tried = [str(place) for place in _places(name, dataset)]
    if dataset == "cifar100" and name in IN_ARCHIVE:
        try:
            download_folder(URL, "cifar_teachers", into=TOOLKIT_FOLDER)
            return _toolkit_file(name, dataset)
        except RunError as error:
            tried.append(str(error))
    config = f"{dataset}/teacher_{name}"
    trained = f", or train one: mdistiller-ext train --cfg {config}"
    raise RunError(
        f"no weights for the teacher {name} on {dataset}. Tried: {'; '.join(tried)}. Name a file "
        f"with DISTILLER.TEACHER_CKPT (of eval, with --ckpt)"
        f"{trained if config in packaged.names() else ''}"
    )


def load_weights(file: Path) -> Weights:
    """Read a state dict without running any of the file's code.

    It is the file's content, or its entry "model", as the toolkit writes it, or "state_dict". The
    prefix "module." of a network that was trained in parallel is taken off.

    Raises:
        RunError: the file cannot be read, holds no state dict, or a NaN or an infinity.
    """
    content = load(file)
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected a state dict, found a {type(content).__name__}")
    state = next((content[key] for key in ("model", "state_dict") if key in content), content)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        keys = ", ".join(brief(key) for key in [*content][:5])
        raise RunError(
            f'{file}: expected a state dict, or one as its entry "model" or "state_dict", found a '
            f"dict of {keys or 'nothing'}"
        )
    check_finite(file, state)
    if state and all(key.startswith("student.") for key in state):
        raise RunError(f"{file}: holds the state of a run; its network is student_last beside it")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return Weights(dict(state), file, hashlib.sha256(read(file)).hexdigest())


def load_into(model: nn.Module, weights: Weights, name: str) -> None:
    """Strictly load weights into a network.

    Raises:
        RunError: names or shapes differ; it says which, on both sides, and what the file holds.
    """
    expected, found = _shapes(model.state_dict()), _shapes(weights.state)
    if expected != found:
        key = next(k for k in [*expected, *found] if expected.get(k) != found.get(k))
        raise RunError(
            f"{weights.file}: does not fit {name}: {key} has shape {found.get(key, 'none')} in "
            f"the file ({len(found)} tensors) and {expected.get(key, 'none')} in {name} "
            f"({len(expected)} tensors){_holds(found)}"
        )
    model.load_state_dict(weights.state)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _holds(found: dict[str, tuple[int, ...]]) -> str:
    """Which of our networks has tensors of these shapes, for a message."""
    classes = max((1, *found.get("fc.bias", ())))
    for name, (build, _) in cifar_model_dict.items():
        with torch.device("meta"):  # shapes without memory
            network = build(num_classes=classes)
        if _shapes(network.state_dict()) == found:
            return f"; the file holds a {name} for {classes} classes"
    return ""


def kept_at(name: str, dataset: str) -> Path:
    """Where a trained teacher is kept, in the working folder: of nets:big in nets_big.pth, as some
    file systems know no colon."""
    return Path("checkpoints", dataset, f"{name.replace(':', '_').replace('/', '_')}.pth")


def _places(name: str, dataset: str) -> Iterator[Path]:
    yield kept_at(name, dataset)
    yield CHECKPOINTS / dataset / f"{name}.pth"
    if dataset in TOOLKIT_FILES:
        yield _toolkit_file(name, dataset)
        spec = importlib.util.find_spec("mdistiller")
        for package in (spec and spec.submodule_search_locations) or ():
            yield Path(package).parent / _toolkit_file(name, dataset)


def _toolkit_file(name: str, dataset: str) -> Path:
    return TOOLKIT_FOLDER / TOOLKIT_FILES[dataset].format(name)

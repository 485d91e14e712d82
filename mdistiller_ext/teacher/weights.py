"""Finding, downloading and loading the weights of pretrained networks."""

import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import packaged
from ..errors import ConfigError, RunError, brief
from ..files import check_finite, download_folder, parse, read
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


State = Mapping[str, Tensor]
# Entries of a file that hold a state dict, in the order in which they are tried: the raw weights
# before their moving averages.
RAW = ("model", "state_dict", "model_state_dict", "net")
ENTRIES = (*RAW, "ema", "model_ema", "state_dict_ema", "ema_state_dict")
# What wrappers put before the names in a state dict: DataParallel, torch.compile, Lightning, and a
# distiller before its student's.
PREFIXES = ("module.", "_orig_mod.", "model.", "student.")
AVERAGED = "n_averaged"  # beside the weights of torch's AveragedModel
# Entries of a checkpoint that say its top-1 accuracy, in percent or as a share.
CLAIMS = ("top1", "test_top1", "test_acc", "acc1", "acc", "accuracy", "best_acc", "best_acc1")


class Weights(NamedTuple):
    """A network's state dict, with the file it came from and that file's sha256.

    Attributes:
        network: its name, where it is not the config's teacher.
        entry: the entry of the file that is the state dict, or "" where it is the whole file.
        others: the state dicts in the file's other entries.
        claim: (top-1 in percent, what says it) of the file or of the record beside it, or None.
    """

    state: State
    file: Path
    sha256: str
    network: str = ""
    entry: str = ""
    others: Mapping[str, State] = {}
    claim: tuple[float, str] | None = None


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
    """Read a state dict, of torch.save or of safetensors, without running any of the file's code.

    It is the file's content, or the first of its ENTRIES that is one. The names in it stay as they
    are: `load_into` knows which a network has.

    Raises:
        RunError: the file cannot be read, holds no state dict, or a NaN or an infinity.
    """
    raw = read(file)
    content = _safetensors(file, raw) if file.suffix == ".safetensors" else parse(file, raw)
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected a state dict, found a {type(content).__name__}")
    found = {key: content[key] for key in ENTRIES if _is_state(content.get(key))}
    if _is_state(content):
        found = {"": content}
    if not found:
        keys = ", ".join(brief(key) for key in [*content][:5])
        names = ", ".join(f'"{key}"' for key in ENTRIES)
        raise RunError(
            f"{file}: expected a state dict, or one as one of its entries {names}, found a dict of "
            f"{keys or 'nothing'}"
        )
    entry, *others = found
    check_finite(file, found[entry])
    return Weights(
        found[entry],
        file,
        hashlib.sha256(raw).hexdigest(),
        entry=entry,
        others={key: found[key] for key in others},
        claim=_claim(file, content),
    )


def _safetensors(file: Path, raw: bytes) -> State:
    """The tensors of a file of safetensors, by name.

    Raises:
        ConfigError: safetensors is not installed.
        RunError: it is damaged.
    """
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise ConfigError(f"{file}: {error}: pip install 'mdistiller-ext[export]'") from error
    try:
        return load(raw)
    except Exception as error:  # an untrusted file can raise anything
        raise RunError(f"{file}: not a readable checkpoint: {brief(str(error))}") from error


def load_into(model: nn.Module, weights: Weights, name: str) -> None:
    """Strictly load weights into a network, as torch does.

    Names are tried as they are, then without each of PREFIXES that all of them, or those of one
    part of the file, begin with; then with those of the network's own. What was taken off, or left,
    is printed.

    Raises:
        RunError: nothing in the file fits the network, or two parts of it do; it says the names
            and shapes on both sides, and what the file holds.
    """
    expected = model.state_dict()
    tried: list[_Form] = []
    for entry, state in {weights.entry: weights.state, **weights.others}.items():
        for form in _forms(state):
            tried.append(form)
            for wrap, _ in _stripped(expected):
                if _accepts(model, {wrap + key: value for key, value in form.state.items()}):
                    _check_alone(model, weights.file, form, name)
                    if entry != weights.entry:
                        check_finite(weights.file, form.state)
                    _say(weights, entry, form, wrap)
                    return
    # The nearest: the one with the most names that the network has.
    form = max(tried, key=lambda form: len(form.state.keys() & expected.keys()))
    shapes, found = _shapes(expected), _shapes(form.state)
    key = next((k for k in [*shapes, *found] if shapes.get(k) != found.get(k)), "nothing")
    raise RunError(
        f"{weights.file}: does not fit {name}: {key} has shape {found.get(key, 'none')} in "
        f"the file ({len(found)} tensors{_parts(form)}) and {shapes.get(key, 'none')} in {name} "
        f"({len(shapes)} tensors){_holds(found)}"
    )


class _Form(NamedTuple):
    """A state dict as a network may have it.

    Attributes:
        taken: the prefixes that were taken off its names.
        rest: what else the file has beside this part, by what their names begin with.
    """

    state: State
    taken: str = ""
    rest: Mapping[str, State] = {}


def _forms(state: State) -> Iterator[_Form]:
    """A state dict as it is, then without prefixes, then its parts that have one."""
    for taken, bare in _stripped(state):
        yield _Form(bare, taken)
    for prefix in PREFIXES:
        if part := _under(prefix, bare):
            heads = dict.fromkeys(f"{key.split('.', 1)[0]}." for key in bare)
            rest = {taken + head: _under(head, bare) for head in heads if head != prefix}
            for more, inner in _stripped(part):
                yield _Form(inner, taken + prefix + more, rest)


def _stripped(state: State) -> Iterator[tuple[str, State]]:
    """(what was taken off, the rest): as it is, then without each of PREFIXES that all have."""
    taken = ""
    yield taken, state
    while True:
        bare = {key: value for key, value in state.items() if key != AVERAGED}
        prefix = next((p for p in PREFIXES if bare and all(k.startswith(p) for k in bare)), "")
        if not prefix:
            return
        taken, state = taken + prefix, _under(prefix, bare)
        yield taken, state


def _under(prefix: str, state: State) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _accepts(model: nn.Module, state: State) -> bool:
    """Load a state dict if the network takes it; it stays as it was if not."""
    before = copy.deepcopy(model.state_dict())
    floats = [key for key, value in before.items() if value.is_floating_point() and key in state]
    if not all(state[key].is_floating_point() for key in floats):
        return False  # integers would be cast, as those of a quantised network
    try:
        model.load_state_dict(state)
    except Exception:  # names or shapes differ; a network may have checks of its own
        model.load_state_dict(before)
        return False
    return True


def _check_alone(model: nn.Module, file: Path, form: _Form, name: str) -> None:
    """Refuse a part of a file beside which another fits as well."""
    for head, part in form.rest.items():
        if any(_accepts(model, bare) for _, bare in _stripped(part)):
            raise RunError(
                f"{file}: holds several networks that fit {name}: {form.taken}* and {head}*: save "
                f"the one that is meant as a file of its own"
            )


def _say(weights: Weights, entry: str, form: _Form, wrap: str) -> None:
    """One line on what was taken of a file, where it was not all or not as it is."""
    lines = []
    if weights.others:
        others = [f'"{key}"' for key in (weights.entry, *weights.others) if key != entry]
        left = ", ".join(others)
        lines.append(f'takes the entry "{entry}", not {left} (a file of that alone gives it)')
    if form.taken:
        lines.append(f"takes the prefix {form.taken} off its names")
    if wrap:
        lines.append(f"puts the prefix {wrap} before its names")
    if form.rest:
        lines.append(f"leaves {', '.join(f'{head}*' for head in form.rest)}")
    if lines:
        print(f"{weights.file}: {'; '.join(lines)}")


def _parts(form: _Form) -> str:
    heads = [f"{form.taken}*", *(f"{head}*" for head in form.rest)]
    return f" as {heads[0]}, beside {', '.join(heads[1:])}" if form.rest else ""


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _claim(file: Path, content: Mapping[str, Any]) -> tuple[float, str] | None:
    """The top-1 that a checkpoint claims, or the record beside it."""
    for key in CLAIMS:
        top1 = content.get(key)
        if isinstance(top1, Tensor) and top1.numel() == 1:
            top1 = top1.item()
        if isinstance(top1, (int, float)) and 0 < top1 <= 100:
            return (100.0 if top1 <= 1 else 1.0) * top1, key
    of_run = file.name.startswith("student_")
    record = file.with_name("record.json") if of_run else file.with_suffix(".json")
    with suppress(RunError, ValueError, LookupError, TypeError):  # it need not be a record
        found = json.loads(read(record))
        return float(_recorded(file.stem, found)), f"{record}, of {found['data']['evaluated_on']}"
    return None


def _recorded(name: str, record: Any) -> Any:
    """The top-1 of a file of a run, in percent, as the run's record has it."""
    _, _, which = name.partition("student_")
    if which.isdigit():
        return record["epochs"][int(which) - 1]["test_top1"]
    kinds = {"best": "best_epoch_top1_selected_on_test", "ema": "last_epoch_ema_top1"}
    return record[kinds.get(which, "last_epoch_top1")]


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
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

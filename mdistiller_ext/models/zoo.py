"""Networks by name: ours, the toolkit's, timm's, torchvision's and one's own, with one contract."""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, brief
from ..plugins import check_free, import_module
from .resnet import ARCHITECTURES, ResNet, cifar_model_dict

EXPECTED = (
    f"one of {', '.join(ARCHITECTURES)}, a network of mdistiller where it is installed, timm:NAME, "
    f"torchvision:NAME, package.module:factory or a registered one"
)
OWN: dict[str, Callable[..., nn.Module]] = {}


def register_network(name: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """A decorator: `factory(num_classes)` is the network of this name.

    Raises:
        ValueError: another network has the name.
    """

    def add(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        check_free(name, ResNet if name in ARCHITECTURES else OWN.get(name), factory)
        OWN[name] = factory
        return factory

    return add


class NoFeatures(dict):
    """The features of a network that has none."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise ConfigError(
            f"the method takes features ({key}) of {self.name}, which gives logits alone: take a "
            f"method of logits, or a network whose forward returns (logits, features)"
        )


class LogitsOnly(nn.Module):
    """A network that returns logits, with the contract of ours: (logits, features).

    Its state dict is that of the network in it.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.features = network, NoFeatures(name)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, image: Tensor) -> tuple[Tensor, dict]:
        logits = self.network(image)
        if not isinstance(logits, Tensor):  # as of those with further heads
            raise ConfigError(f"in training {self.features.name} gives {_kind(logits)}, not logits")
        return logits, self.features

    def get_stage_channels(self) -> list[int]:
        return self.features["stage channels"]

    def get_bn_before_relu(self) -> list[nn.Module]:
        return self.features["batch norms"]


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}network."
    keys = [key for key in state if key.startswith(inner)]
    # All at once: the network in it may have a part called network, too.
    state.update({prefix + key.removeprefix(inner): state.pop(key) for key in keys})


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    keys = [key for key in state if key.startswith(prefix)]
    inner = f"{prefix}network."
    state.update({inner + key.removeprefix(prefix): state.pop(key) for key in keys})


def is_network(name: str) -> bool:
    """Whether a name is that of a network, as far as can be told without building it."""
    if name in ARCHITECTURES or name in OWN or re.fullmatch(r"[\w.]+:[\w./:\-]+", name):
        return True
    try:
        return bool(name) and any(name in zoo for zoo in _toolkit_zoos())
    except ConfigError:
        return False


def build_network(
    name: str, num_classes: int, side: int, dataset: str = "cifar100", key: str = "network"
) -> nn.Module:
    """A network with random weights, whose call gives (logits (B, C), features).

    It is shown two black images, for what it answers to them.

    Args:
        side: of the images, in pixels.
        dataset: for the toolkit's networks, some of which are others for Tiny-ImageNet.
        key: what names the network, for messages.

    Raises:
        ConfigError: there is no such network here, it cannot be built, takes no such images, or
            gives no finite logits of shape (B, num_classes).
    """
    return _checked(_built(name, num_classes, dataset), name, num_classes, side, key)


def _checked(network: nn.Module, name: str, num_classes: int, side: int, key: str) -> nn.Module:
    """A network with the contract of ours, if that is what it answers with.

    Raises:
        ConfigError: it takes no such images, or gives no finite logits of shape (B, num_classes).
    """
    answer = _answer(network, name, key, side)
    if isinstance(answer, Tensor):
        network = LogitsOnly(network, name)
        answer = answer, {}
    if not _is_pair(answer):
        raise ConfigError(
            f"{key}: {name} gives {_kind(answer)}, expected logits or (logits, dict of features)"
        )
    logits = answer[0]
    if logits.shape != (2, num_classes) or not logits.is_floating_point():
        raise ConfigError(
            f"{key}: {name} gives {logits.dtype} of shape {tuple(logits.shape)} for 2 images, "
            f"expected logits of shape (2, {num_classes})"
        )
    if not logits.isfinite().all():
        raise ConfigError(f"{key}: {name} gives logits that are not finite for black images")
    return network


def _built(name: str, num_classes: int, dataset: str) -> nn.Module:
    if name in cifar_model_dict:
        return cifar_model_dict[name][0](num_classes=num_classes)
    try:
        network = _factory(name, dataset)(num_classes=num_classes)
    except ConfigError:
        raise
    except Exception as error:  # another library's, or the user's own
        raise ConfigError(f"network {name}: cannot be built: {brief(str(error))}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network {name}: gave {_kind(network)}, expected a Module")
    return network


def _answer(network: nn.Module, name: str, key: str, side: int) -> Any:
    try:
        with untouched(network):
            return network(torch.zeros(2, 3, side, side))
    except Exception as error:  # whatever a network does with images that it is not made for
        reason = brief(str(error).split("\n", 1)[0])
        raise ConfigError(f"{key}: {name} takes no images of {side} x {side}: {reason}") from error


@contextmanager
def untouched(network: nn.Module) -> Iterator[None]:
    """For a look at what a network answers, in evaluation mode and without gradients: afterwards
    the modes of its parts and its buffers are what they were."""
    modes = {module: module.training for module in network.modules()}
    kept = {k: b.clone() for k, b in network.named_buffers() if not is_lazy(b)}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, buffer in network.named_buffers():
            if name in kept:
                buffer.data = kept[name]
        for module, mode in modes.items():
            module.training = mode


def _is_pair(answer: Any) -> bool:
    kinds = Tensor, Mapping
    return isinstance(answer, tuple) and [*map(isinstance, answer, kinds)] == [True, True]


def _kind(thing: Any) -> str:
    if isinstance(thing, tuple):
        return f"({', '.join(type(part).__name__ for part in thing)})"
    return f"a {type(thing).__name__}"


def set_layout(network: nn.Module, layout: torch.memory_format) -> None:
    """Lay the weights of convolutions out in memory, and with them the maps: channels-last is
    faster, but a network that flattens maps with `view` takes only torch's own layout."""
    network.to(memory_format=layout)  # type: ignore[call-overload]


def pretrained(name: str, num_classes: int, side: int) -> dict[str, Tensor]:
    """The state dict that timm or torchvision has for a network; it may be downloaded.

    Args:
        side: of the images that it is for, in pixels.

    Raises:
        ConfigError: it has none, it cannot be had, or it is none for such images and classes.
    """
    library, _, rest = name.partition(":")
    try:
        if library == "timm":
            network = _library("timm", name).create_model(rest, pretrained=True)
        elif library == "torchvision":
            network = _library("torchvision", name).models.get_model(rest, weights="DEFAULT")
        else:
            raise ConfigError("only timm:NAME and torchvision:NAME come with weights of their own")
    except Exception as error:
        raise ConfigError(
            f"DISTILLER.TEACHER_CKPT pretrained, DISTILLER.TEACHER {name}: "
            f"{brief(str(error))}; where there is no network, name a file of its weights"
        ) from error
    key = "DISTILLER.TEACHER_CKPT pretrained"
    return _checked(network, name, num_classes, side, key).state_dict()


def feature_shapes(name: str, num_classes: int, side: int, dataset: str) -> dict[str, Any]:
    """The shapes of a network's features for an image, as `shapes_of` gives them; {} if it fails,
    for a check before training says why."""
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            network = build_network(name, num_classes, side, dataset).eval()
            return shapes_of(network(torch.zeros(1, 3, side, side))[1])
    except Exception:  # whatever a network does with images that it is not made for
        return {}


def shapes_of(maps: Any) -> Any:
    """The shape of a map without the batch, (C, H, W); of a list or a dict of maps alike; of
    anything else the type's name."""
    if isinstance(maps, Tensor):
        return tuple(maps.shape[1:])
    if isinstance(maps, Mapping):
        return {key: shapes_of(part) for key, part in maps.items()}
    if isinstance(maps, (list, tuple)):
        return [shapes_of(part) for part in maps]
    return type(maps).__name__


def home(name: str) -> str:
    """The module that a network comes from."""
    if name in OWN:
        return OWN[name].__module__
    library, colon, _ = name.partition(":")
    return library if colon else "mdistiller_ext" if name in ARCHITECTURES else "mdistiller"


def _factory(name: str, dataset: str) -> Callable[..., nn.Module]:
    library, colon, rest = name.partition(":")
    if name in OWN:
        return OWN[name]
    if not colon:
        cifar, tiny = _toolkit_zoos()
        zoo = {**cifar, **tiny} if dataset == "tiny_imagenet" else {**tiny, **cifar}
        if name not in zoo:
            raise ConfigError(f"network {name}: mdistiller has none of this name")
        return _silent(zoo[name][0])
    if library == "timm":
        timm = _library("timm", name)
        return lambda num_classes: timm.create_model(rest, num_classes=num_classes)
    if library == "torchvision":
        models = _library("torchvision", name).models
        return lambda num_classes: models.get_model(rest, weights=None, num_classes=num_classes)
    try:
        return getattr(import_module(library), rest)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"network {name}: {error}") from error


def _silent(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """MobileNetV2 of the toolkit prints its width."""

    def built(num_classes: int) -> nn.Module:
        with redirect_stdout(StringIO()):
            return build(num_classes=num_classes)

    return built


def _library(library: str, name: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ConfigError(
            f"network {name}: {library} is not installed: pip install 'mdistiller-ext[zoo]'"
        ) from error


def _toolkit_zoos() -> tuple[dict[str, Any], dict[str, Any]]:
    """The toolkit's networks for CIFAR and for Tiny-ImageNet."""
    from ..toolkit.locate import find_toolkit

    root = find_toolkit()
    try:
        models = importlib.import_module("mdistiller.models")
        return models.cifar_model_dict, models.tiny_imagenet_model_dict
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"mdistiller in {root}: its networks cannot be used: {error}") from error

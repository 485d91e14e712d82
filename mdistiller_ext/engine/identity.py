"""What decides a run's numbers beside its config: the teacher's weights, networks that were given,
images and labels, code from outside this package."""

import copy
import hashlib
import inspect
import re
import textwrap
import tokenize
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from ..data import facts, identity, is_own, trained_on
from ..distillers import source
from ..files import bare_code
from ..models.zoo import OWN
from ..teacher import Weights, digest, find_weights
from ..toolkit.methods import toolkit_hash
from . import chain
from .environment import imported
from .folder import differences, plain
from .shared import Shared

GIVEN = "given:"  # begins the name of a network that was given as an object


def inputs(cfg: CfgNode, shared: Shared) -> dict[str, Any]:
    """Hashes of what a run takes in, the teacher's weights apart, as its record's session has them.

    Raises:
        ConfigError, RunError: as `get_dataset`.
    """
    names = {role: cfg.DISTILLER[role.upper()] for role in ("student", "teacher")}
    given = {role: _own_hash(name, cfg) for role, name in names.items() if name in OWN}
    return {
        "toolkit": toolkit_hash() if source(cfg.DISTILLER) == "mdistiller" else None,
        "imported": imported(cfg),
        "data": shared.fingerprint(cfg.DATASET) if is_own(cfg.DATASET.TYPE) else None,
        "given": given or None,
    }


def _own_hash(name: str, cfg: CfgNode) -> str:
    """sha256 of a network that was given, or of the layers and shapes of a registered one."""
    known = facts(cfg.DATASET)
    with torch.random.fork_rng([]):
        network = OWN[name](num_classes=known.classes)
        if name.startswith(GIVEN):
            return network_hash(network, known.side)
        with suppress(Exception), torch.no_grad():  # lazy layers learn their shapes
            network.eval()(torch.zeros(2, 3, known.side, known.side))
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    return hashlib.sha256(f"{_layers(network)} {shapes}".encode()).hexdigest()


def network_hash(network: nn.Module, side: int) -> str:
    """sha256 of what decides how a network trains.

    That is its weights, which of them are trained or shared, its layers, the code of its classes,
    and what it answers to two fixed images, on which plain attributes, buffers that are not saved,
    hooks and helper functions act.

    Args:
        side: of the images, in pixels.
    """
    text = [digest(network.state_dict()), _layers(network), _answers(network, side)]
    weights = list(network.named_parameters(remove_duplicate=False))
    places = [id(weight) for _, weight in weights]
    text += [f"{name} {w.requires_grad} {places.index(id(w))}" for name, w in weights]
    classes = {type(part) for part in network.modules()}
    for cls in sorted(classes, key=lambda cls: cls.__qualname__):
        if cls.__module__.split(".")[0] != "torch":
            with suppress(OSError, TypeError):  # typed into a session that keeps no source
                code = textwrap.dedent(inspect.getsource(cls))
                with suppress(SyntaxError, tokenize.TokenError):
                    code = bare_code(code)
                text.append(code)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _layers(network: nn.Module) -> str:
    return re.sub(r" at 0x\w+", "", repr(network))


def _answers(network: nn.Module, side: int) -> str:
    """A network's logits for two fixed images in evaluation mode, to three digits, which are the
    same on other machines; "" if it fails."""
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with suppress(Exception), torch.no_grad(), torch.random.fork_rng([]):
        found = copy.deepcopy(network).cpu().eval()(images)
        logits = found if isinstance(found, Tensor) else found[0]
        return " ".join(f"{value:.2e}" for value in logits.flatten().tolist())
    return ""


def other_inputs(
    cfg: CfgNode, before: Mapping[str, Any], shared: Shared, weights: Weights | None = None
) -> list[str]:
    """What a run took in that it would not take in now: phrases, as "other images or labels".

    What is not there to be compared, as a teacher that is still to be trained, counts as equal. Of
    a run that is not finished code may change: its record names each session's.

    Args:
        before: a record, or what `latest` holds.
        weights: of the teacher, where they are given.
    """
    session, now = before["environments"][-1], inputs(cfg, shared)
    state = "teacher_sha256" in before
    phrases = other_links(cfg, before.get("chain", []))
    teacher = before["teacher_sha256"] if state else (before.get("teacher") or {}).get("sha256")
    found = weights or teacher_here(cfg, shared)
    if teacher and found and found.sha256 != teacher and not phrases:
        phrases.append(
            f"another teacher (sha256 {teacher[:12]}, {found.file} has {found.sha256[:12]})"
        )
    if _differ(session, now, "data"):
        phrases.append("other images or labels")
    if _differ(session, now, "given"):
        phrases += [
            f"another {role} network"
            for role in _keys(session["given"], now["given"])
            if not (role == "teacher" and phrases)
        ]
    if not state:
        if _differ(session, now, "imported"):
            names = _keys(session["imported"], now["imported"])
            phrases.append(f"other code of {', '.join(names)}")
        if _differ(session, now, "toolkit"):
            phrases.append("other code of mdistiller")
    return phrases


def other_links(cfg: CfgNode, before: list[dict[str, Any]]) -> list[str]:
    """What differs between the assistants of a record and those of a config."""
    if not before or not cfg.DISTILLER.ASSISTANTS:
        return []
    pairs = zip(before, chain.links(cfg), strict=False)
    return [
        f"another assistant {link['student']} ({'; '.join(apart)})"
        for link, own in pairs
        if (apart := differences(link["config"], plain(own)))
    ]


def teacher_here(cfg: CfgNode, shared: Shared) -> Weights | None:
    """The teacher's weights if they are in a file that is there."""
    node = cfg.DISTILLER
    if node.TYPE == "NONE":
        return None
    if node.ASSISTANTS:
        file: Path | None = chain.folder(cfg) / "student_last"
    elif node.TEACHER_CKPT and not Path(node.TEACHER_CKPT).is_file():
        return None
    else:
        file = found_weights(cfg)
    return shared.weights(file) if file and file.is_file() else None


def found_weights(cfg: CfgNode) -> Path | None:
    """The file of the teacher's weights that is there: the named one, or one in the usual places.

    Where DISTILLER.TEACHER_CFG can train one without the images that are held out, only that one.
    """
    node = cfg.DISTILLER
    names = [trained_on(cfg.DATASET), *([] if node.TEACHER_CFG else [identity(cfg.DATASET)])]
    found = (find_weights(node.TEACHER, name, node.TEACHER_CKPT) for name in names)
    return next(filter(None, found), None)


def _keys(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """The keys whose values differ."""
    one, other = before or {}, now or {}
    return [key for key in {**one, **other} if one.get(key) != other.get(key)]


def _differ(session: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    """Whether a session says something else; older records do not name everything."""
    return key in session and session[key] != now[key]

"""Our methods in the toolkit's registry and config."""

from ..config import get_cfg
from ..distillers import DKD, DKD_DAT, DKD_EAT, DKD_EAT_DAT_LP, DKD_LP
from ..errors import ConfigError
from .locate import import_toolkit

METHODS: tuple[type[DKD], ...] = (DKD_EAT, DKD_DAT, DKD_LP, DKD_EAT_DAT_LP)
FOR_FILES = ("SOURCE", "TEACHER_CFG")  # keys of DISTILLER that some of our YAML files have


def register() -> None:
    """Add DKD_EAT, DKD_DAT, DKD_LP and DKD_EAT_DAT_LP to the importable mdistiller.

    Afterwards its `distiller_dict` has a class for each, a subclass of its own `Distiller`, and its
    `CFG` a node for each. DISTILLER.SOURCE and DISTILLER.TEACHER_CFG are added too, for the files
    that have them; the toolkit does nothing with them. A second call changes nothing.

    Raises:
        ConfigError: mdistiller is missing or cannot be imported, one of the names is taken by
            something else, or its config is frozen. Nothing was changed then.
    """
    _, base, registry, config = import_toolkit()
    ours = get_cfg()
    missing = []
    for method in METHODS:
        found = registry.get(method.TYPE)
        if found is None and method.TYPE not in config:
            missing.append(method)
        elif found is None or not issubclass(found, method):
            raise ConfigError(
                f"mdistiller has something else of the name {method.TYPE}: "
                f"{found or 'a config node'}; where tools/export_upstream.py wrote it, use the "
                f"checkout's own tools/train.py"
            )
    if not missing:
        return
    if config.is_frozen():
        raise ConfigError("mdistiller's config is frozen: call register() before it is")
    for method in missing:
        # Ours comes first: the toolkit's base gives its type, and nothing of its behaviour.
        registry[method.TYPE] = type(
            method.__name__, (method, base), {"__doc__": method.__doc__, "__module__": __name__}
        )
        config[method.TYPE] = ours[method.TYPE]
    for key in FOR_FILES:
        config.DISTILLER.setdefault(key, ours.DISTILLER[key])

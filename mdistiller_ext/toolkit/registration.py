"""Our methods in the toolkit's registry and config."""

from ..distillers import METHODS, RECIPES
from ..errors import ConfigError
from .locate import import_toolkit

NAMES = ("DKD_EAT", "DKD_DAT", "DKD_LP", "DKD_EAT_DAT_LP", "LOGIT")
# Keys of DISTILLER that some of our YAML files have, and what they are by default.
FOR_FILES = {"SOURCE": "auto", "TEACHER_CFG": ""}


def register() -> None:
    """Add DKD_EAT, DKD_DAT, DKD_LP, DKD_EAT_DAT_LP and LOGIT to the importable mdistiller.

    Afterwards its `distiller_dict` has a class for each, a subclass of its own `Distiller`, and its
    `CFG` a node for each. DISTILLER.SOURCE and DISTILLER.TEACHER_CFG are added too, for the files
    that have them; the toolkit does nothing with them. A second call changes nothing.

    Raises:
        ConfigError: mdistiller is missing or cannot be imported, one of the names is taken by
            something else, or its config is frozen. Nothing was changed then.
    """
    _, base, registry, config = import_toolkit()
    missing = []
    for name in NAMES:
        found = registry.get(name)
        if found is None and name not in config:
            missing.append(name)
        elif found is None or not issubclass(found, METHODS[name]):
            raise ConfigError(
                f"mdistiller has something else of the name {name}: {found or 'a config node'}; "
                f"where tools/export_upstream.py wrote it, use the checkout's own tools/train.py"
            )
    if not missing:
        return
    if config.is_frozen():
        raise ConfigError("mdistiller's config is frozen: call register() before it is")
    for name in missing:
        # Ours comes first: the toolkit's base gives its type, and nothing of its behaviour.
        ours = METHODS[name]
        registry[name] = type(name, (ours, base), {"__doc__": ours.__doc__, "__module__": __name__})
        config[name] = RECIPES[name].node()
    for key, default in FOR_FILES.items():
        config.DISTILLER.setdefault(key, default)

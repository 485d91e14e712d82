"""YAML files that users write: configs and studies."""

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

INTEGER = "tag:yaml.org,2002:int"
LARGEST = 100_000  # bytes; a file of another kind, named by mistake, would be parsed for minutes


def read_yaml(file: Path, name: str) -> Any:
    """The content of a YAML file in plain types, None where it is empty.

    Raises:
        ConfigError: it cannot be read or is no valid YAML; the message starts with `name`.
    """
    try:
        with file.open("rb") as source:
            content = source.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    return parse_yaml(content, name)


def parse_yaml(content: bytes, name: str) -> Any:
    """As `read_yaml`, of a file's bytes."""
    if len(content) > LARGEST:
        raise ConfigError(f"{name}: more than {LARGEST} bytes, expected a YAML file of settings")
    try:
        return yaml.load(content.decode(), Loader)
    except RecursionError as error:
        raise ConfigError(f"{name}: no valid YAML: nested too deeply") from error
    except Exception as error:  # a malformed number or date can raise anything
        raise ConfigError(f"{name}: no valid YAML: {' '.join(str(error).split())}") from error


class Loader(yaml.SafeLoader):
    """Without aliases, which let a few lines grow without limit, and without keys given twice.

    An integer has decimal digits: 010 is not 8, 1:30 not 90.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self._refuse("an alias, expected the value itself", self.peek_event())
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    self._refuse(f"the key {key.value} a second time", key)
                seen.add(key.value)
        super().flatten_mapping(node)

    def _refuse(self, found: str, where: Any) -> None:
        raise yaml.MarkedYAMLError(problem=f"found {found}", problem_mark=where.start_mark)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != INTEGER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))

"""Settings declared where they act: key, default, what it may be and what it means."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from itertools import pairwise
from typing import Any, TypeVar

Rule = tuple[Callable[[Any], bool], str]  # is a value of the key's type allowed? what is allowed
Own = TypeVar("Own", bound="Settings")


def setting(default: Any, rule: Rule | Callable[[], Rule], meaning: str = "") -> Any:
    """A field of a `Settings`; the rule of what others may register is asked for when it counts."""
    metadata = {"rule": rule, "meaning": meaning}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of frozen dataclasses whose fields are the keys of a config node, made by `setting`."""

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        own = cls()
        return {key: getattr(own, key) for key in cls.meanings()}

    @classmethod
    def rules(cls) -> dict[str, Rule]:
        rules = {f.name: f.metadata["rule"] for f in fields(cls)}  # type: ignore[arg-type]
        return {name: rule() if callable(rule) else rule for name, rule in rules.items()}

    @classmethod
    def meanings(cls) -> dict[str, str]:
        return {f.name: f.metadata["meaning"] for f in fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def read(cls: type[Own], node: Mapping[str, Any]) -> Own:
        """From a mapping that has at least these keys."""
        return cls(**{key: node[key] for key in cls.meanings()})


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a tree of sections; an empty section is a leaf too."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def number(low: float, high: float = 1e38, *, open_low: bool = False) -> Rule:
    # 1e38: no float32 is much larger.
    text = f"a number {'above' if open_low else 'at least'} {low:g} and below {high:g}"
    return lambda v: (low < v if open_low else low <= v) and v < high, text


def count(low: int) -> Rule:
    return number(low, 1e6)


def number_to(low: float, high: float) -> Rule:
    return lambda v: low <= v <= high, f"a number from {low:g} to {high:g}"


def one_of(*values: str) -> Rule:
    return lambda v: v in values, "one of " + ", ".join(values)


def list_of(item: Rule, least: int, *, rising: bool = False) -> Rule:
    """A list of numbers."""

    def allowed(values: Sequence) -> bool:
        return (
            least <= len(values)
            and all(type(v) in (int, float) and item[0](v) for v in values)
            and (not rising or all(a < b for a, b in pairwise(values)))
        )

    order = " and above the one before" if rising else ""
    return allowed, f"a list of at least {least}, each {item[1]}{order}"


def names_of(*values: str) -> Rule:
    """A list of some of the values, each once."""
    return (
        lambda v: all(type(n) is str and n in values for n in v) and len(set(v)) == len(v),
        "a list of different ones of " + ", ".join(values),
    )


def sizes(counts: range, least: int, most: int) -> Rule:
    few, many = counts[0], counts[-1]
    return (
        lambda v: len(v) in counts and all(type(n) is int and least <= n <= most for n in v),
        f"a list of {few if few == many else f'{few} to {many}'}, each an int from {least} to "
        f"{most}",
    )


def only(value: Any, reason: str) -> Rule:
    return lambda v: v == value, f"{value!r}, {reason}"


def or_empty(rule: Rule) -> Rule:
    return lambda v: v == "" or rule[0](v), f"{rule[1]}, or ''"


def _is_path(text: str) -> bool:
    if not text or not text.isprintable() or "://" in text:
        return False
    return len(text.encode()) <= 1000 and all(len(n.encode()) <= 255 for n in text.split("/"))


# What file systems take, with room for the names that a run adds.
PATH: Rule = (
    _is_path,
    "a path in printable characters and no URL, of at most 1000 bytes, each name in it 255",
)
NAME: Rule = (
    lambda v: (
        _is_path(v) and v not in (".", "..") and not {*"/\\"} & {*v} and len(v.encode()) <= 200
    ),
    "a folder's name in printable characters without / and \\, of at most 200 bytes",
)
TEXT: Rule = (lambda v: v != "" and v.isprintable(), "printable characters on one line")
SWITCH: Rule = (lambda v: True, "True or False")  # the type says it all

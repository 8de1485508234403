"""Strict and bounded parsers for YAML and JSON from outside.

Duplicate keys are an error here, whereas the standard parsers silently keep the last value. Very long numbers, unpaired
surrogates, and values that are nested too deeply are errors too. YAML's aliases and merge keys may not repeat more than
MAX_REPEATED values, because a few lines of them can expand to billions. Python's JSON parser accepts NaN and infinity,
so readers check for them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import yaml

MAX_DEPTH = 64
"""Maximum nesting of lists and mappings. No file of this project or its sources has more than ten levels."""

MAX_DIGITS = 40
"""Maximum digits of a whole number. Ids from annotation tools, which are 128-bit hashes, have up to 39."""

MAX_REPEATED = 100_000
"""Number of values that aliases and merge keys may repeat in one YAML file."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_CONSTRUCTOR_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""The errors of PyYAML (6.0) for scalars that its constructors cannot read, such as `!!bool x` or `2026-13-01`."""


class DuplicateKeyError(ValueError):
    """Raised for a key that occurs twice in an object."""


def read_yaml(text: str) -> Any:
    """Parse YAML within the bounds of this module. Raises yaml.YAMLError."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except _CONSTRUCTOR_ERRORS as error:
        raise yaml.YAMLError(f"a value cannot be read ({error})") from error
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Raise yaml.YAMLError for a faulty key, and for anything that exceeds the bounds once aliases are expanded."""
    sizes: dict[int, int] = {}
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    open_nodes: set[int] = set()
    while stack:
        node, done = stack.pop()
        children = _children(node)
        if done:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
        elif id(node) in open_nodes:
            raise yaml.constructor.ConstructorError(
                problem="an alias refers to a value that contains it", problem_mark=node.start_mark
            )
        elif id(node) not in sizes:
            open_nodes.add(id(node))
            if len(open_nodes) > MAX_DEPTH:
                raise yaml.constructor.ConstructorError(
                    problem=f"it has more than {MAX_DEPTH} levels", problem_mark=node.start_mark
                )
            if isinstance(node, yaml.ScalarNode):
                _check_scalar(node)
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
            stack += [(node, True), *((child, False) for child in children)]
    repeated = sizes[id(root)] - len(sizes)
    if repeated > MAX_REPEATED:
        raise yaml.YAMLError(f"its aliases and merge keys repeat {repeated:,} values; write them out")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _check_keys(node: yaml.MappingNode) -> None:
    """Raise ConstructorError for a duplicate key and for a key that is not a scalar.

    PyYAML (6.0) adds merged keys to the node itself while it builds values, so a later check would find duplicates.
    """
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                problem="a key is a list or a mapping; quote names that start with a bracket or a brace",
                problem_mark=key.start_mark,
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
        seen.add(key.value)


def _check_scalar(node: yaml.ScalarNode) -> None:
    if not node.value.isascii():
        try:
            node.value.encode()
        except UnicodeEncodeError as error:
            raise yaml.constructor.ConstructorError(
                problem="a string contains an unpaired surrogate", problem_mark=node.start_mark
            ) from error


def read_json(text: str, unique_keys: bool = True) -> Any:
    """Parse JSON within the bounds of this module. Raises ValueError and, with `unique_keys`, DuplicateKeyError."""
    try:
        value = (_UNIQUE if unique_keys else _ANY).decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if "\\u" in text and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a string contains an unpaired surrogate") from error
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            if one.__class__ in (dict, list)
            for child in (one.values() if one.__class__ is dict else one)
            if child.__class__ in (dict, list)
        ]
        if not level:
            return
    raise ValueError(f"it has more than {MAX_DEPTH} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise DuplicateKeyError(f"duplicate key {next(name for name, count in counts.items() if count > 1)!r}")
    return mapping


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


_ANY = json.JSONDecoder(parse_int=_whole)
_UNIQUE = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_unique_keys)

"""YAML's plain scalars as they are written, until a model says what they are meant to be.

YAML guesses: `no` is a truth value, `12:30` is 750, `010` is 8. Where a key takes text, the guess
is wrong, so it is kept beside what is written, and each key's type chooses between them. Owns
reading and that choice. Knows nothing of which keys there are.
"""

import re
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from yaml.constructor import ConstructorError

NUMBER = re.compile(
    r"""[-+]?(?:0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*
    |(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))
    |\.(?:nan|NaN|NAN)""",
    re.VERBOSE,
)
BASES = {"0x": 16, "0o": 8, "0b": 2}
NO_COMMENT = "\ue000"
"""Stands for # where that begins no comment."""


class Twice(ValueError):
    """A key is in a mapping twice, of which YAML would keep the last silently."""


@dataclass(frozen=True)
class Written:
    """What is written without quotes, and what YAML takes it for."""

    text: str
    value: Any


def load(text: str) -> Any:
    """A YAML document of mappings with text as keys, lists, text and `Written`.

    Raises YAMLError when it is not YAML, Twice when a key is.
    """
    return yaml.load(text, _Loader)


def load_value(text: str) -> Any:
    """The value of `key=value`: quoted text, or `Written`. Nothing in it is a comment."""
    text = text.strip()
    try:
        value = yaml.load(text.replace("#", NO_COMMENT), _ValueLoader)
    except yaml.YAMLError:
        return text
    if isinstance(value, Written):
        return value if value.text == text else text
    if isinstance(value, str):
        return value if text[0] in "'\"" or "\n" in text else text
    return Written(text, value)


def settle(value: Any, kind: Any) -> Any:
    """The value with all that is `Written` chosen as `kind`, a type, takes it."""
    kinds = _alternatives(kind)
    if isinstance(value, Written):
        value = _choose(value, kinds)
    if isinstance(value, dict):
        return _settle_mapping(value, kinds)
    if isinstance(value, list):
        inside = next((_inside(kind) for kind in kinds if _is_list(kind)), Any)
        return [settle(_word(child, inside), inside) for child in value]
    return value


def _settle_mapping(values: dict[str, Any], kinds: list[Any]) -> dict[str, Any]:
    model = next((kind for kind in kinds if _is_model(kind)), None)
    if model is None:
        inside = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        return {key: settle(child, inside) for key, child in values.items()}
    settled = {}
    for key, child in values.items():
        field = model.model_fields.get(key)
        kind = Any if field is None else field.annotation
        chosen = settle(child, kind)
        # Null for what cannot be null is the default: so a command line undoes what a file sets.
        if chosen is not None or type(None) in _alternatives(kind) or kind is Any:
            settled[key] = chosen
    return settled


def _choose(written: Written, kinds: list[Any]) -> Any:
    value, text = written.value, written.text
    if Any in kinds or value is None:
        return value
    if isinstance(value, dict):
        return value if any(_is_model(k) or get_origin(k) is dict for k in kinds) else text
    if isinstance(value, list):
        # "- a dog" on one line is text.
        is_list = text[:1] == "[" or "\n" in text
        return value if is_list and any(map(_is_list, kinds)) else text
    if any(_is_text(k) or (_is_list(k) and _is_text(_inside(k))) for k in kinds):
        return value if type(value) in kinds else text
    return value


def _word(value: Any, kind: Any) -> Any:
    """In a list of text, `null` and `~` are words like others."""
    kinds = _alternatives(kind)
    if isinstance(value, Written) and value.value is None and type(None) not in kinds:
        return value.text if value.text and any(map(_is_text, kinds)) else value
    return value


def _alternatives(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in _alternatives(part)]
    return [kind]


def _is_text(kind: Any) -> bool:
    (kind,) = _alternatives(kind)[:1]
    return kind is str or (get_origin(kind) is Literal and str in map(type, get_args(kind)))


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple)


def _inside(kind: Any) -> Any:
    return get_args(kind)[0]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


class _Loader(yaml.SafeLoader):
    """Numbers as YAML 1.2 has them: no octal 010, no sexagesimal 12:30, no dates, but 1e-4."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if (name := str(key.value)) in lines:
                raise Twice(
                    f"line {line}: the key {name!r} is there twice, first in line {lines[name]}; "
                    "remove one"
                )
            lines[name] = line
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        self.flatten_mapping(node)
        pairs = [(self.construct_scalar(key), value) for key, value in node.value]
        return {str(key): self.construct_object(value, deep=True) for key, value in pairs}

    def plain(self, node: yaml.ScalarNode) -> Any:
        """A scalar that is not plainly text."""
        text = str(self.construct_scalar(node))
        if node.tag.endswith("null"):
            return Written(text, None)
        try:
            is_bool = node.tag.endswith("bool")
            return Written(text, self.bool_values[text.lower()] if is_bool else number_of(text))
        except (KeyError, ValueError):
            raise ConstructorError(
                None, None, f"{text!r} is no {node.tag.rpartition(':')[2]}", node.start_mark
            ) from None


class _ValueLoader(_Loader):
    def construct_scalar(self, node: Any) -> Any:
        return str(super().construct_scalar(node)).replace(NO_COMMENT, "#")


def number_of(text: str) -> int | float:
    """The number that YAML 1.2 (and, with _ between digits, 1.1) writes so."""
    sign, digits = (-1, text[1:]) if text[:1] == "-" else (1, text.removeprefix("+"))
    plain = digits.replace("_", "")
    if (base := BASES.get(plain[:2])) is not None:
        return sign * int(plain[2:], base)
    if plain.isdecimal():
        return sign * int(plain)
    return sign * float(plain.removeprefix(".") if plain[1:].isalpha() else plain)


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.removeprefix(_TAG) in ("bool", "null", "merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}float", re.compile(rf"^(?:{NUMBER.pattern})$", re.X), None)
for _name in ("bool", "null", "int", "float"):
    _Loader.add_constructor(_TAG + _name, _Loader.plain)

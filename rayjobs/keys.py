"""The keys of every configuration, described by the models that check them.

Owns which model belongs to which kind of file, and how a model becomes text: the key reference and
a commented starting configuration. Models are named, not imported: one of them is serving's.
"""

import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from rayjobs.config import BadInput, Config, read_config, read_values

MODELS = {
    "generate": "rayjobs.generation.config:GenerateConfig",
    "prior": "rayjobs.generation.prior:PriorConfig",
    "dreambooth": "rayjobs.dreambooth.config:DreamBoothConfig",
    "evaluate": "rayjobs.dreambooth.config.evaluate:EvaluateConfig",
    "serve": "serve.config:ServeConfig",
    "export": "rayjobs.generation.tools.export_config:ExportConfig",
    "build_processor": "rayjobs.generation.worker.processor:ProcessorConfig",
}
"""Where each kind's model is defined; the last two are never a file of their own."""
WIDTH = 100
TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any value"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def model_of(kind: str) -> type[Config]:
    """The model that checks a configuration of this kind."""
    module, _, name = MODELS[kind].partition(":")
    model: type[Config] = getattr(import_module(module), name)
    return model


FILES = ("generate", "prior", "dreambooth", "evaluate")
"""Kinds that are a job's file of their own."""


def load(path: str, overrides: list[str]) -> tuple[str, Config]:
    """The kind of any configuration file, and what is in it; of a serving file its arguments.

    Raises BadInput naming every key that is wrong.
    """
    return of_values(read_values(path), overrides, path)


def of_values(values: dict[str, Any], overrides: list[str], path: str) -> tuple[str, Config]:
    """The same of values that were read already, from what is called `path`."""
    if "applications" in values:
        applications = values["applications"]
        if not isinstance(applications, list) or len(applications) != 1:
            raise BadInput(f"{path}: applications must be a list of one application")
        arguments = applications[0].get("args") or {}
        where = f"{path}: applications.0.args."
        return "serve", read_config(model_of("serve"), arguments, overrides, where)
    kind = min(FILES, key=lambda kind: _strange(model_of(kind), values))
    return kind, read_config(model_of(kind), values, overrides, f"{path}: ")


def _strange(model: type[Config], values: dict[str, Any]) -> int:
    """How many top-level keys of a file are not the model's, or required and missing."""
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    return len(values.keys() - model.model_fields.keys()) + len(required - values.keys())


@dataclass(frozen=True)
class Key:
    """One key of a configuration, by its full path, such as sampler.steps."""

    path: str
    type: str
    default: str
    """As YAML; empty for a key that must be given."""
    text: str


def keys(model: type[Config], prefix: str = "") -> Iterator[Key]:
    """Every key that holds a value, in order; `[]` in a path stands for each item of a list."""
    for name, field in _fields(model):
        path = f"{prefix}{name}"
        section = _section(field)
        item = _item(field)
        if section is not None:
            yield from keys(section, f"{path}.")
            continue
        default = "" if field.is_required() else as_yaml(_default(field))
        yield Key(path, describe_type(field), default, " ".join((field.description or "").split()))
        if item is not None:
            yield from keys(item, f"{path}[].")


def reference(model: type[Config]) -> str:
    """The keys as a Markdown table."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys(model):
        default = f"`{key.default}`" if key.default else "**required**"
        cells = (f"`{key.path}`", key.type, default, key.text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def template(model: type[Config], values: dict[str, Any], indent: int = 0) -> list[str]:
    """Lines of YAML with every key: those of `values` set, the others commented out.

    Above each key stands its description (`# text`). A key that is commented out has no space
    after its `#`; taking the `#` away sets the key to its default.
    """
    return list(_lines(model, values, " " * indent, ""))


def _lines(
    model: type[Config], values: dict[str, Any] | None, margin: str, offset: str
) -> Iterator[str]:
    """`offset` is the further indentation of keys that are commented out with their section."""
    for name, field in _fields(model):
        given = values is not None and name in values
        start = margin + offset if given else f"{margin}#{offset}"
        section, item = _section(field), _item(field)
        yield from _comment(field, margin, offset)
        if section is not None:
            yield f"{start}{name}:"
            if given and values is not None:
                yield from _lines(section, values[name], f"{margin}  ", offset)
            else:
                yield from _lines(section, None, margin, f"{offset}  ")
        elif item is not None and given and values is not None:
            yield f"{start}{name}:"
            for each in values[name]:
                yield f"{margin}  -"
                yield from _lines(item, each, f"{margin}    ", "")
        else:
            value = values[name] if given and values is not None else _default(field)
            yield f"{start}{name}: {as_yaml(value)}"


def _comment(field: FieldInfo, margin: str, offset: str) -> list[str]:
    text = " ".join((field.description or "").split())
    lead = f"{margin}# {offset}"
    return textwrap.wrap(text, WIDTH, initial_indent=lead, subsequent_indent=lead)


def describe_type(field: FieldInfo) -> str:
    """A field's type and bounds in words, such as `integer ≥ 1`."""
    bounds = [
        f"{sign} {_number(getattr(rule, name))}"
        for rule in field.metadata
        for name, sign in BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return " ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return ", ".join(_type(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "mappings"
    return TYPES[annotation]


def _number(bound: float) -> str:
    return "2**63" if bound == 2**63 else f"{bound:g}" if bound < 1e6 else f"{bound:,}"


def as_yaml(value: Any) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
    )
    return text.strip().removesuffix("...").strip()


def _fields(model: type[Config]) -> list[tuple[str, FieldInfo]]:
    """A model's own keys, then those that it shares with other models."""
    own = model.__annotations__
    return sorted(model.model_fields.items(), key=lambda item: item[0] not in own)


def _default(field: FieldInfo) -> Any:
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _section(field: FieldInfo) -> type[Config] | None:
    """The model of a key that has keys of its own."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Config) else None


def _item(field: FieldInfo) -> type[Config] | None:
    """The model of each item of a key that is a list of mappings."""
    arguments = get_args(field.annotation)
    is_list = get_origin(field.annotation) is tuple and isinstance(arguments[0], type)
    return arguments[0] if is_list and issubclass(arguments[0], Config) else None

"""Mistakes of a value against a JSON schema, each in a line that names the key and the way out.

Knows nothing of what the values mean. A Kubernetes API drops a field that it does not know without
a word, so here such a field is a mistake.
"""

import difflib
import gzip
import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parent / "schemas"
"""Of KubeRay 1.7.0's own resources, pods in them (Apache-2.0, without descriptions)."""


@cache
def of_kuberay(kind: str) -> dict[str, Any]:
    """The schema of a kind such as RayJob, without room for unknown fields."""
    data = gzip.decompress((SCHEMAS / f"{kind}.v1.schema.json.gz").read_bytes())
    schema: dict[str, Any] = json.loads(data)
    _close(schema)
    return schema


@cache
def of_launcher() -> dict[str, Any]:
    """The schema of a cluster file, as Ray ships it."""
    found = find_spec("ray")  # to import it would take a second
    assert found is not None
    places = list(found.submodule_search_locations or ())
    path = Path(places[0], "autoscaler", "ray-schema.json")
    schema: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return schema


def has_shape(value: Any, schema: dict[str, Any]) -> bool:
    """Whether everything is of its type, so that code may read it, whatever else is wrong."""
    from jsonschema import Draft7Validator

    return all(error.validator != "type" for error in Draft7Validator(schema).iter_errors(value))


def mistakes(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    from jsonschema import Draft7Validator

    for error in sorted(Draft7Validator(schema).iter_errors(value), key=lambda e: list(e.path)):
        key = ".".join(map(str, error.path))
        if error.validator == "additionalProperties":
            yield from _unknown(key, error.instance, error.schema)
        elif error.validator == "required":
            lacking = [name for name in error.validator_value if name not in error.instance]
            yield from (f"{_join(key, name)}: required, but not given" for name in lacking)
        elif error.validator == "enum":
            yield f"{key} is {error.instance!r}; it must be one of {_listed(error.validator_value)}"
        elif error.validator == "type":
            yield f"{key} is {error.instance!r:.80}; it must be of type {error.validator_value}"
        else:
            yield f"{key} is {error.instance!r:.80}: {error.message:.120}"


def _unknown(key: str, value: dict[str, Any], schema: Any) -> Iterator[str]:
    known = list(schema.get("properties", {}))
    for name in value:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {_listed(sorted(known))}"
            yield f"{_join(key, str(name))}: unknown key; {hint}"


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _listed(names: list[Any]) -> str:
    return ", ".join(map(str, names[:12])) + (", ..." if len(names) > 12 else "")


def _close(schema: Any) -> None:
    """No other keys than those that are named. What has none named may have any."""
    if not isinstance(schema, dict):
        return
    if schema.get("properties") and "additionalProperties" not in schema:
        schema["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    for part in (*schema.get("properties", {}).values(), schema.get("items")):
        _close(part)
    _close(schema.get("additionalProperties"))

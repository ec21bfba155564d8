"""Configuration files: YAML and dotted overrides in, checked models out.

Owns the loader, the error messages of bad values, and the keys that several programs share. A job's
own keys are in a model beside its code.
"""

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayjobs import written
from rayjobs.written import Written


class Config(BaseModel):
    """Base of every configuration model: unknown keys are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Workers(Config):
    """How many workers a job has, and what each of them gets."""

    min: int = Field(default=1, ge=1)
    """Workers to start with."""
    max: int | None = Field(default=None, ge=1)
    """Workers to grow to; without it as many as min."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs of a worker; a fraction puts several workers on one."""
    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs of a worker; on a CPU also its threads."""
    max_stall_s: float | None = Field(default=3600.0, gt=0)
    """Seconds without progress of any worker after which the job ends, naming where they are; with
    null it only tells."""

    @property
    def max_workers(self) -> int:
        return self.max or self.min

    @property
    def shared(self) -> dict[str, Any]:
        """These keys alone, for another job's workers."""
        return {name: getattr(self, name) for name in Workers.model_fields}

    @model_validator(mode="after")
    def _ordered(self) -> "Workers":
        if self.max is not None and self.max < self.min:
            raise ValueError(f"workers.max is {self.max}, below workers.min, {self.min}")
        return self


class BadInput(ValueError):
    """A value of the user's cannot be used; the message names it and says what to do."""


class JobFailed(RuntimeError):
    """The job cannot go on; what is finished stays, and the same command continues."""


def differences(before: Any, after: Any, now: str = "now", key: str = "") -> list[str]:
    """A line for each value that differs between two nested mappings, named by its dotted key."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line
            for name in sorted(before.keys() | after.keys())
            for line in differences(
                before.get(name), after.get(name), now, f"{key}.{name}" if key else name
            )
        ]
    if _are_tables(before) and _are_tables(after) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [x for n, pair in pairs for x in differences(*pair, now, f"{key}[{n}]")]
    if before == after:
        return []
    texts = [json.dumps(value, ensure_ascii=False, default=str) for value in (before, after)]
    letters = enumerate(zip(*texts, strict=False))
    same = next((at for at, (one, other) in letters if one != other), 0)
    was, is_now = (_short(text, max(0, same - 20)) for text in texts)
    return [f"  {key}: {was} there, {is_now} {now}"]


def _are_tables(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, dict) for v in values)


def _short(text: str, start: int) -> str:
    """A text, of a long one what is near `start`."""
    if len(text) <= 80:
        return text
    cut = text[start : start + 77]
    return ("..." if start else "") + cut + ("..." if text[start + 77 :] else "")


C = TypeVar("C", bound=Config)


def load_config(model: type[C], path: str, overrides: list[str] | None = None) -> C:
    """Read the YAML at `path` (local), apply `a.b=value` overrides in order, and check it all.

    Text is what is written, whatever YAML takes it for; null stands for a key's default.
    Raises BadInput naming every key that is wrong.
    """
    return read_config(model, read_values(path), overrides or [], f"{path}: ")


def changed(config: C, overrides: list[str]) -> C:
    """The configuration with these overrides. Raises BadInput naming every key that is wrong."""
    return read_config(type(config), config.model_dump(mode="json"), overrides)


def read_config(model: type[C], values: dict[str, Any], overrides: list[str], where: str = "") -> C:
    """The model of these values and overrides; errors say `where` the values are from."""
    _check_overrides(overrides)
    for override in overrides:
        _apply(values, override)
    try:
        return model.model_validate(written.settle(values, model))
    except ValidationError as error:
        lines = [_describe(model, problem) for problem in error.errors()]
        raise BadInput("\n".join(f"{where}{line}" for line in lines)) from None


def read_values(path: str) -> dict[str, Any]:
    """What a YAML file holds, unchecked. Raises BadInput where it cannot be read."""
    try:
        values = written.load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except written.Twice as error:
        raise BadInput(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected keys and values")
    return values


def _check_overrides(overrides: list[str]) -> None:
    """Raise BadInput when one override would undo another."""
    keys = [override.partition("=")[0] for override in overrides]
    for number, key in enumerate(keys):
        for earlier in keys[:number]:
            if earlier == key:
                raise BadInput(f"override {key} is given twice; remove one")
            if earlier.startswith(f"{key}."):
                raise BadInput(f"override {key} would undo {earlier}; give it first, or remove it")


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"override {override!r} is not of the form key=value")
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if isinstance(child, Written):
            child = values[parent] = {} if child.value is None else child.value
        if not isinstance(child, dict):
            raise BadInput(f"override {override!r}: {parent} is a value, it has no keys")
        values = child
    try:
        values[last] = written.load_value(text)
    except written.Twice as error:
        raise BadInput(f"override {override!r}: {error}") from None


def _describe(model: type[BaseModel], problem: Any) -> str:
    """One line for one pydantic error: where, what was there, what would do."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(model, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        if message.startswith("it is "):
            return f"{key} {message.removeprefix('it ')}"
        return f"{key}: {message}" if key else message
    # Python's type names as YAML calls them.
    message = message.replace("valid tuple", "list").replace("valid dictionary", "mapping")
    return f"{key} is {problem['input']!r}: {message}"


def _known_keys(model: type[BaseModel], parents: tuple[Any, ...]) -> list[str]:
    for parent in parents:
        if isinstance(parent, int):  # the place of an item in a list, whose model is known
            continue
        field = model.model_fields.get(str(parent))
        annotation = field.annotation if field else None
        if get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)

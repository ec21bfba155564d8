"""A record: one image and how it was made, as a row of a data set.

Owns the columns, their types and `image_id`. Knows nothing of how images are made or stored.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

ENGINE_VERSION = 1
"""Raised whenever a change to the engine may move a bit of a picture."""

Row = dict[str, Any]
"""A record's columns by name."""
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""The image feature of Hugging Face data sets."""

COLUMNS = {
    "image": IMAGE,
    "image_id": pa.string(),
    "image_sha256": pa.string(),
    "record": pa.int64(),
    "prompt": pa.string(),
    "negative_prompt": pa.string(),
    "seed": pa.int64(),
    "sampler": pa.string(),
    "steps": pa.int32(),
    "guidance_scale": pa.float64(),
    "guidance_rescale": pa.float64(),
    "clip_skip": pa.int32(),
    "strength": pa.float64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "init_image": pa.string(),
    "model": pa.string(),
    "model_sha256": pa.string(),
    "blank": pa.bool_(),
    "sharpness": pa.float32(),
    "phash": pa.string(),
    "colours": pa.string(),
    "warnings": pa.string(),
    "status": pa.string(),
    "error": pa.string(),
}
DTYPES = {
    "double": "float64",
    "float": "float32",
    "halffloat": "float16",
    "date32[day]": "date32",
    "date64[ms]": "date64",
}
"""Hugging Face's names of types that have another name in arrow."""
SCORES = {
    "clip": ("clip_score", pa.float32()),
    "aesthetic": ("aesthetic_score", pa.float32()),
    "safety": ("unsafe_score", pa.float32()),
    "pick": ("pick_score", pa.float32()),
    "hps": ("hps_score", pa.float32()),
    "embedding": ("embedding", pa.list_(pa.float32())),
    "caption": ("caption", pa.string()),
}
"""Columns that are there only when they were asked for, by their key under `quality`."""
SYNTAX = pa.field("prompt_syntax", pa.string())
OPTIONAL = {
    SYNTAX.name: SYNTAX.type,
    "guidance_interval": pa.list_(pa.float64()),
    "cache_interval": pa.int32(),
    "timesteps": pa.list_(pa.int32()),
    "sigmas": pa.list_(pa.float64()),
    "control_images": pa.list_(pa.string()),
    "ip_adapter_images": pa.list_(pa.string()),
}
"""Columns that are there only where a job may give them: many data sets are older."""
CONDITIONING = "conditioning_image"
"""The column of the picture that an image follows, where a job stores it: as diffusers' training of
ControlNets names it. Those of further ones are numbered, from 2."""
OURS = {b"rayjobs": b"picture"}
"""What arrow keeps with those columns."""
OVERRIDES = {
    "negative_prompt": pa.string(),
    SYNTAX.name: SYNTAX.type,
    "seed": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
    "sampler": pa.string(),
    "steps": pa.int32(),
    "guidance_scale": pa.float64(),
    "guidance_rescale": pa.float64(),
    **{name: OPTIONAL[name] for name in ("guidance_interval", "cache_interval")},
    "clip_skip": pa.int32(),
    "init_image": pa.string(),
    "strength": pa.float64(),
}
"""Columns of a prompt file that override the job's settings for their row."""


def image_id(decides: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything that decides the pixels."""
    return hashlib.sha256(canonical_json(decides)).hexdigest()


def scores_asked(quality: Mapping[str, Any]) -> list[str]:
    """Which of SCORES the keys under `quality` ask for."""
    return [name for name in SCORES if quality.get(name)]


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def schema(
    passed_through: Sequence[pa.Field] = (),
    scores: Sequence[str] = (),
    optional: Collection[str] = (),
    stored: Sequence[str] = (),
) -> pa.Schema:
    """The records' schema, with scores and a prompt file's other columns at the end.

    `stored` are the columns of control pictures.

    Its metadata makes Hugging Face `datasets` load the `image` column as images.
    """
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items()]
    fields += [pa.field(name, kind) for name, kind in OPTIONAL.items() if name in optional]
    fields += [pa.field(name, IMAGE, metadata=OURS) for name in stored]
    fields += [pa.field(*SCORES[score]) for score in scores]
    fields += [field.with_type(_known(field.type)) for field in passed_through]
    whole = pa.schema(fields)
    features = {field.name: feature(field.type) for field in whole}
    return whole.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def conditioning(number: int) -> list[str]:
    """The columns of so many control pictures."""
    return [f"{CONDITIONING}_{n}" if n > 1 else CONDITIONING for n in range(1, number + 1)]


def pictures(whole: pa.Schema) -> list[str]:
    """The columns that formats keep as files of their own where they can, the image first; a prompt
    file's are values like others."""
    return [field.name for field in whole if field.name == "image" or field.metadata == OURS]


def is_conditioning(name: str) -> bool:
    """Whether a column of that name may hold a control picture."""
    number = name.removeprefix(CONDITIONING)
    return name.startswith(CONDITIONING) and (
        not number or (number[0] == "_" and number[1:].isdigit())
    )


def _known(kind: pa.DataType) -> pa.DataType:
    """The same type with decimals of 128 bits for those of 32 and 64, which few readers know."""
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_known(field.type)) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_known(kind.value_type)), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_known(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_known(kind.value_type)))
    return kind


def feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type as a feature of Hugging Face `datasets`."""
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        return {"_type": "List", "feature": feature(kind.value_type), "length": kind.list_size}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return {"_type": "List", "feature": feature(kind.value_type)}
    if pa.types.is_struct(kind):
        return {field.name: feature(field.type) for field in kind}
    return {"_type": "Value", "dtype": DTYPES.get(str(kind), str(kind))}

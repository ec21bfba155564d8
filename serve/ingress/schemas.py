"""The OpenAI Images API as served here: request and response bodies.

Owns the fields, their bounds and their error messages. Knows nothing of models, of the limits of
one installation, or of HTTP. Fields of our own stand beside OpenAI's.
"""

import base64
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from starlette.datastructures import UploadFile

from rayjobs.diffusion.text.syntax import PromptSyntax
from serve.errors import ApiError

NONE: Mapping[str, UploadFile] = MappingProxyType({})
DATA_URL = re.compile(r"data:[^,]{0,100};base64,")
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
EXAMPLES = {
    "loras": '[{"name": "sks-dog", "scale": 0.8}]',
    "controls": '[{"name": "edges", "image": "iVBORw0KGgo..."}]',
    "ip_adapters": '[{"name": "style", "image": "iVBORw0KGgo..."}]',
    "guidance_interval": "[0.2, 0.8]",
    "timesteps": "[999, 845, 730, 587, 443, 310, 193, 116, 53, 13]",
    "sigmas": "[14.6, 2.2, 0.6, 0]",
}
"""Of fields that are lists."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Neutral = Annotated[Any, Field(description="accepted; changes nothing here")]
"""A field of OpenAI's API that has no meaning for diffusion: any value will do, future ones too."""


class LoraUse(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    scale: Finite = 1.0


class IpAdapterUse(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    image: bytes = Field(
        description="a PNG, JPEG or WebP file in base64, or its data: URL; in a form also the name "
        "of a file that is sent as control_image"
    )
    scale: Finite = 1.0

    @field_validator("image", mode="before")
    @classmethod
    def _decoded(cls, text: Any, info: ValidationInfo) -> bytes:
        if not isinstance(text, str):
            raise ValueError("it must be the text of a picture in base64")
        if text in (files := info.context or {}):
            files[text].file.seek(0)
            content: bytes = files[text].file.read()
            return content
        try:
            return base64.b64decode(DATA_URL.sub("", text), validate=True)
        except ValueError:
            raise ValueError("it is not base64") from None


class ControlUse(IpAdapterUse):
    start: Finite = Field(default=0.0, ge=0, le=1)
    end: Finite = Field(default=1.0, ge=0, le=1)
    preprocess: Literal["canny"] | None = Field(
        default=None, description="draw the picture's edges first, and follow those"
    )


class GenerateBody(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(min_length=1)
    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=10)
    size: str | None = Field(default=None, description="WIDTHxHEIGHT in pixels, or auto")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    background: Literal["transparent", "opaque", "auto"] | None = None
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)

    quality: Neutral = None
    style: Neutral = None
    moderation: Neutral = None
    user: Neutral = None
    safety_identifier: Neutral = None
    prompt_cache_key: Neutral = None
    service_tier: Neutral = None
    metadata: Neutral = None
    store: Neutral = None

    negative_prompt: str | None = None
    prompt_syntax: PromptSyntax | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    num_inference_steps: int | None = Field(default=None, ge=1, le=1000)
    guidance_scale: Finite | None = Field(default=None, ge=0)
    guidance_rescale: Finite | None = Field(default=None, ge=0, le=1)
    guidance_interval: list[Finite] | None = None
    cache_interval: int | None = Field(default=None, ge=1, le=1000)
    timesteps: list[int] | None = None
    sigmas: list[Finite] | None = None
    clip_skip: int | None = Field(default=None, ge=0, le=32)
    sampler: str | None = None
    loras: list[LoraUse] | None = None
    controls: list[ControlUse] | None = None
    ip_adapters: list[IpAdapterUse] | None = None
    deadline_s: Finite | None = Field(default=None, gt=0)
    progress: bool | None = Field(
        default=None, description="with stream: also send waiting and step events"
    )

    @field_validator("prompt", "negative_prompt", "model", "sampler")
    @classmethod
    def _is_text(cls, text: str | None) -> str | None:
        if text is not None and ("\0" in text or (not text.isascii() and not _encodes(text))):
            raise ValueError("it has characters that are not valid text")
        return text

    @field_validator("size")
    @classmethod
    def _is_size(cls, size: str | None) -> str | None:
        if size is not None and size != "auto" and not SIZE.fullmatch(size):
            raise ValueError("it must be WIDTHxHEIGHT, such as 1024x1024, or auto")
        return size

    @field_validator(*EXAMPLES, mode="before")
    @classmethod
    def _as_json(cls, value: Any, info: ValidationInfo) -> Any:
        """Form fields are text."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            example = EXAMPLES[str(info.field_name)]
            raise ValueError(f"it must be JSON, such as {example}") from None

    @property
    def width_height(self) -> tuple[int, int] | None:
        """None for the model's default."""
        match = None if self.size in (None, "auto") else SIZE.fullmatch(str(self.size))
        return None if match is None else (int(match[1]), int(match[2]))


class EditBody(GenerateBody):
    """The form fields of `POST /v1/images/edits`, besides the images."""

    strength: Finite | None = Field(default=None, gt=0, le=1)
    input_fidelity: Neutral = None


class TokenDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Tokens: the text encoder's, and one for every 16 x 16 pixels."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImageOut(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    seed: int
    image_id: str | None = None
    warnings: list[str] = []


class ImagesOut(BaseModel):
    created: int
    data: list[ImageOut]
    background: str = "opaque"
    output_format: str
    size: str
    usage: Usage


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorOut(BaseModel):
    error: ErrorDetail


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """A model's schema without references: it is put inside an OpenAPI document."""
    schema = model.model_json_schema()
    known = schema.pop("$defs", {})

    def inlined(part: Any) -> Any:
        if isinstance(part, list):
            return [inlined(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return inlined(known[part["$ref"].rpartition("/")[2]])
        return {name: inlined(value) for name, value in part.items()}

    whole: dict[str, Any] = inlined(schema)
    return whole


def parse(model: type[GenerateBody], values: Any, files: Mapping[str, UploadFile] = NONE) -> Any:
    """A body from JSON or from form fields, with the files that these name.

    Raises ApiError naming the first wrong field.
    """
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return model.model_validate(values, context=files)
    except ValidationError as error:
        raise translate_error(error, model) from None


def translate_error(error: ValidationError, model: type[BaseModel]) -> ApiError:
    problem = error.errors()[0]
    param = ".".join(str(part) for part in problem["loc"]) or None
    if problem["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        message = f"Unknown parameter: '{param}'. Known are {known}."
        return ApiError(400, message, param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return ApiError(400, message, param=param, code="missing_required_parameter")
    reason = problem["msg"].removeprefix("Value error, ")
    given = repr(problem["input"])
    given = given if len(given) <= 80 else f"{given[:77]}..."
    message = f"Invalid value for '{param}': {given}. {reason[:1].upper()}{reason[1:]}."
    return ApiError(400, message, param=param, code="invalid_value")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""The keys of an export."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rayjobs import storage
from rayjobs.config import Config
from rayjobs.generation.tools import hub
from rayjobs.generation.tools.filters import parse
from rayjobs.provenance.keys import Provenance
from rayjobs.quality import duplicates, semantic


class ExportOutput(Config):
    uri: str
    """The new data set's folder, local or s3://, or hf://datasets/OWNER/NAME on the Hugging Face
    Hub."""
    staging: str | None = None
    """Of hf://: the local folder in which the export is made before it is uploaded. Keep it until
    the command has ended well: run again, it goes on there."""
    private: bool = True
    """Whether a repository on the Hub that is not there yet is made a private one."""
    format: Literal["parquet", "webdataset", "folder", "lance"] = "parquet"
    """The shards' format; lance makes a Lance data set of the folder, once all is there."""
    image_format: Literal["png", "webp", "webp-lossless", "jpeg"] | None = None
    """The pictures' format; without it, and without size, their bytes stay as they are."""
    quality: int = Field(default=95, ge=1, le=100)
    """Of jpeg and webp pictures that are encoded again."""
    size: int | None = Field(default=None, ge=1)
    """Pixels of the longer side; the other one keeps the picture's shape."""
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _has_staging(self) -> "ExportOutput":
        if hub.is_hub(self.uri):
            hub.repository(self.uri)
            if self.staging is None or storage.is_remote(self.staging):
                raise ValueError(f"{self.uri} needs output.staging, a local folder to make it in")
        elif self.staging is not None:
            raise ValueError("staging is for hf:// only; leave it out")
        return self


class ExportConfig(Config):
    output: ExportOutput
    where: tuple[str, ...] = ()
    """Conditions such as `clip_score >= 0.25`, all of which must hold. Failed records are left out
    unless one of them asks for `status`."""
    splits: dict[str, float] = Field(default_factory=dict)
    """Shares by name, such as {train: 0.9, test: 0.1}; an image is always in the same one."""
    columns: tuple[str, ...] = ()
    """Keep only these, and image, record and prompt; without any, all."""
    drop_duplicates: bool | Literal["semantic"] = False
    """Keep only the first picture of each group in the source's duplicates.parquet; with semantic
    of each in its semantic.parquet, where it has embeddings."""

    @property
    def duplicates(self) -> str | None:
        """The source's table of those that are to be dropped."""
        tables = {True: duplicates.FILE, "semantic": semantic.FILE}
        return tables.get(self.drop_duplicates)

    @field_validator("where", "columns", mode="before")
    @classmethod
    def _one_or_more(cls, texts: Any) -> Any:
        return (texts,) if isinstance(texts, str) else texts

    @field_validator("where")
    @classmethod
    def _readable(cls, where: tuple[str, ...]) -> tuple[str, ...]:
        for text in where:
            parse(text)
        return where

    @field_validator("splits")
    @classmethod
    def _whole(cls, splits: dict[str, float]) -> dict[str, float]:
        for name, share in splits.items():
            if not re.fullmatch(r"\w+", name):
                raise ValueError(f"{name!r} is no name of a split; use letters, digits and _")
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {share:g}; a share is above 0 and at most 1")
        if splits and abs(sum(splits.values()) - 1) > 1e-9:
            raise ValueError(f"the shares sum to {sum(splits.values()):g}, not to 1")
        return splits

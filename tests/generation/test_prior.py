"""Class images: only what is missing is made, and what is no use is replaced."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.config import BadInput
from rayjobs.dataset.manifest import Manifest
from rayjobs.dataset.records import schema
from rayjobs.generation import prior
from rayjobs.generation.tools.verify import verify

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("in_process")]


def configure(output: Path, templates: list[str], num_images: int, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"templates": templates, "axes": {"colour": ["red"]}},
        "num_images": num_images,
        "sampler": {"name": "euler", "steps": 6},
        "output": {"uri": str(output), "images_per_shard": 4},
        "engine": {"batch_size": 4},
    }
    return prior.PriorConfig.model_validate(values | changes)


def rows(output: Path) -> list[dict[str, Any]]:
    manifest = Manifest(str(output))
    return [r for e in manifest.entries() for r in manifest.format.read(manifest.data, e["shard"])]


def test_what_is_missing_is_made_and_what_is_no_use_replaced(tmp_path: Path) -> None:
    output, star, ring = tmp_path / "out", "a photo of a {colour} star", "a {colour} ring"
    first = prior.run(configure(output, [star], 6))
    assert (first.num_made - sum(first.refused.values()), first.num_images) == (6, 6)
    before = {row["image_id"] for row in rows(output)}

    more = prior.run(configure(output, [star, ring], 10))
    assert more.num_made - sum(more.refused.values()) == 4 + 10
    after = rows(output)
    assert Counter(row["prompt"] for row in after) == {
        "a photo of a red star": 10,
        "a red ring": 10,
    }
    assert before < {row["image_id"] for row in after}
    assert len({row["image_id"] for row in after}) == 20
    assert prior.run(configure(output, [star, ring], 10)).num_made == 0

    plant(output, after)
    mended = prior.run(configure(output, [star, ring], 10))
    assert mended.refused["blank"] == 1
    assert mended.refused["near-duplicate"] >= 1
    assert mended.num_made == sum(mended.refused.values())
    found = rows(output)
    assert len({row["image_id"] for row in found}) == 20
    assert [row["seed"] == old["seed"] for row, old in zip(found, after, strict=True)].count(
        False
    ) == mended.num_made
    assert verify(str(output), regenerate=4).faults == []
    assert 0 < mended.diversity <= 1

    with pytest.raises(BadInput, match=r"other settings; .*\n  sampler.steps: 6 there, 7 now"):
        prior.run(configure(output, [star], 6, sampler={"name": "euler", "steps": 7}))
    weighted = {"templates": [star], "axes": {"colour": ["red"]}, "syntax": "a1111"}
    with pytest.raises(BadInput, match=r"\n  prompts.syntax: .plain. there, .a1111. now"):
        prior.run(configure(output, [star], 6, prompts=weighted))


def test_class_prompts_are_written_in_one_syntax(tmp_path: Path) -> None:
    prompts = {"inline": ["a (red:1.3) star"], "syntax": "a1111"}
    prior.run(configure(tmp_path / "out", [], 1, prompts=prompts))
    assert {row["prompt_syntax"] for row in rows(tmp_path / "out")} == {"a1111"}
    (tmp_path / "p.csv").write_text("prompt,prompt_syntax\na star,a1111\n")
    with pytest.raises(BadInput, match=r"p.csv has settings for each prompt"):
        prior.run(configure(tmp_path / "other", [], 1, prompts={"uri": str(tmp_path / "p.csv")}))


def plant(output: Path, after: list[dict[str, Any]]) -> None:
    """Make record 1 blank and record 2 nearly a copy of record 0."""
    manifest = Manifest(str(output))
    shard = [dict(row) for row in after[:4]]
    grey, nearly = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64), (127, 127, 127)).save(grey, "PNG")
    picture = Image.open(io.BytesIO(shard[0]["image"]["bytes"]))
    picture.save(nearly, "JPEG", quality=95)
    shard[1]["image"] = {"bytes": grey.getvalue(), "path": None}
    shard[2]["image"] = {"bytes": nearly.getvalue(), "path": None}
    for name, data in manifest.format.encode(0, shard, schema()).items():
        (output / "data" / name).write_bytes(data)


def test_a_key_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="latents"):
        configure(tmp_path, ["a ring"], 1, latents=True)

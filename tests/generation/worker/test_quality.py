"""What a data set carries: scores, the embedding and a caption, in every format."""

import tarfile
from pathlib import Path

import pytest

from rayjobs.config import BadInput
from rayjobs.dataset.formats import FORMATS
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.lock import data_set_schema
from rayjobs.generation.worker.shards import ShardWorker
from rayjobs.quality import semantic
from tests.quality.test_captions import make
from tests.quality.test_scores import save_clip

pytestmark = pytest.mark.model


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_columns_that_were_asked_for_are_there(form: str, tmp_path: Path) -> None:
    for name in ("clip", "words"):
        (tmp_path / name).mkdir()
    clip, uri = save_clip(tmp_path / "clip"), str(tmp_path / "set")
    quality = {"clip": clip, "pick": clip, "hps": clip, "embedding": True}
    values = {
        "model": {"uri": "starter"},
        "prompts": {"inline": ["a red star"]},
        "seeds": {"count": 2},
        "sampler": {"name": "euler", "steps": 1, "guidance_scale": 1.0},
        "quality": quality | {"caption": make("blip", tmp_path / "words")},
        "output": {"uri": uri, "format": form},
        "engine": {"batch_size": 2},
    }
    config = GenerateConfig.model_validate(values)
    lock = job.prepare(config)
    list(ShardWorker(config, lock).make([0]))
    manifest, columns = Manifest(uri, form), data_set_schema(uri, lock)
    rows = list(FORMATS[form].read(manifest.data, 0, schema=columns))
    assert columns.names[-5:] == ["clip_score", "pick_score", "hps_score", "embedding", "caption"]
    for row in rows:
        assert sum(value**2 for value in row["embedding"]) == pytest.approx(1, abs=1e-5)
        assert row["hps_score"] == row["clip_score"]
        assert row["caption"]
    assert semantic.write(uri)["pictures"] == 2
    if form == "webdataset":
        with tarfile.open(tmp_path / "set" / "data" / "shard-00000000.tar") as tar:
            assert tar.extractfile("000000000000.txt").read() == b"a red star"
    less = config.quality.model_copy(update={"embedding": False})
    with pytest.raises(BadInput, match=r"have a embedding: give quality\.embedding, or choose"):
        job.prepare(config.model_copy(update={"quality": less}), extend=True)

"""A job's scoring models: refused before anything is made, hashed, and absent where not asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayjobs.config import BadInput
from rayjobs.dataset.records import SCORES, schema
from rayjobs.generation.config import GenerateConfig, QualityConfig
from rayjobs.generation.resolved import resolve
from rayjobs.generation.spec import scorers
from rayjobs.generation.spec.lock import job_part


def folder(path: Path, **config: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_models_of_another_kind_are_refused_by_key(tmp_path: Path) -> None:
    vit, empty = folder(tmp_path / "vit", model_type="vit"), tmp_path / "empty"
    empty.mkdir()
    for values, told in [
        ({"pick": vit}, f"quality.pick: {vit} is a model of type vit; expected is type clip"),
        ({"hps": vit}, "quality.hps: .* expected is type clip"),
        ({"caption": vit}, "quality.caption: .* expected is type blip or blip-2 or git"),
        ({"pick": str(empty)}, "quality.pick: .* is no folder of a transformers model"),
        ({"caption": "/no/such"}, "quality.caption: /no/such does not exist"),
    ]:
        with pytest.raises(BadInput, match=told) as error:
            scorers.check(QualityConfig(**values))
        assert "\n" not in str(error.value)


def test_hashes_and_a_name_on_the_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = folder(tmp_path / "clip", model_type="clip")
    config = QualityConfig(clip=clip, pick=clip, caption="some/captioner", embedding=True)
    found = scorers.check(config)
    assert list(found) == ["clip", "pick", "caption"]
    assert found["clip"] == found["pick"] != found["caption"]
    assert capsys.readouterr().err == (
        "warning: quality.caption: some/captioner may change on the hub; a folder with its files "
        "does not\n"
    )


def test_keys_that_need_another_are_told() -> None:
    with pytest.raises(ValueError, match=r"quality\.embedding needs quality\.clip"):
        QualityConfig(embedding=True)
    with pytest.raises(ValueError, match=r"quality\.alike needs quality\.embedding"):
        QualityConfig(clip="a", alike=0.9)


def test_older_jobs_and_data_sets_stay_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"inline": ["a"]},
        "output": {"uri": "out"},
    }
    old = job_part(resolve(GenerateConfig.model_validate(values)))
    assert old["quality"] == {"clip": None, "aesthetic": None, "safety": None}
    (tmp_path / "words").mkdir()
    asked = {"quality": {"clip": "org/clip", "caption": "words", "embedding": True}}
    new = job_part(resolve(GenerateConfig.model_validate(values | asked)))
    assert new["quality"].items() >= {"embedding": True, "caption": f"{tmp_path}/words"}.items()
    assert set(schema(scores=SCORES).names) - set(schema().names) == {
        *("clip_score", "aesthetic_score", "unsafe_score"),
        *("pick_score", "hps_score", "embedding", "caption"),
    }

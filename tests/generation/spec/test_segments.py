"""A data set that grows: more prompts, more seeds, another job; and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, Segment, read_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.diffusion.weights import Weights
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.resolved import resolve
from rayjobs.generation.spec.lock import config_of
from rayjobs.generation.spec.segments import open_draft
from rayjobs.generation.tools.verify import verify
from rayjobs.generation.worker.shards import ShardWorker
from tests import headers

pytestmark = pytest.mark.model


def configure(folder: Path, texts: list[str], numbers: dict[str, Any], **changes: Any) -> Any:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"inline": texts},
        "seeds": numbers,
        "sampler": {"name": "euler", "steps": 1, "guidance_scale": 3.0},
        "output": {"uri": str(folder), "images_per_shard": 2},
        "engine": {"batch_size": 4},
    }
    return GenerateConfig.model_validate(values | changes)


def grow(config: GenerateConfig) -> Lock:
    lock = job.prepare(config, extend=True)
    for number, segment in enumerate(lock.segments):
        mine = config_of(segment, config.output.uri, config)
        list(ShardWorker(mine, lock, number).make(segment.shards))
    return lock


def made(output: Path) -> list[tuple[str, int, int]]:
    manifest = Manifest(str(output))
    rows = [r for e in manifest.entries() for r in manifest.format.read(manifest.data, e["shard"])]
    return [(row["prompt"], row["seed"], row["record"]) for row in rows]


def test_more_prompts_then_more_seeds_then_another_job(tmp_path: Path) -> None:
    output = tmp_path / "out"
    grow(configure(output, ["a"], {"count": 3}))
    grow(configure(output, ["a", "b"], {"count": 3}))
    grow(configure(output, ["a", "b"], {"count": 4}))
    wanted = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2), ("a", 3), ("b", 3)]
    assert made(output) == [(prompt, seed, k) for k, (prompt, seed) in enumerate(wanted)]
    lock = grow(configure(output, ["c"], {"values": [9, 7]}))
    assert made(output)[8:] == [("c", 9, 8), ("c", 7, 9)]
    assert [s.first_shard for s in lock.segments] == [0, 2, 4, 5]
    assert verify(str(output), regenerate=5).faults == []
    # Each of the jobs is found again, and none is appended twice.
    for config in (
        configure(output, ["a"], {"count": 3}),
        configure(output, ["c"], {"values": [9, 7]}),
    ):
        assert job.prepare(config, extend=True) == lock


def test_what_cannot_be_appended_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    lock = grow(configure(output, ["a"], {"values": [1, 2]}))
    for config, told in [
        (configure(output, ["a", "b"], {"values": [1, 2, 3]}), "more prompts or more seeds"),
        (configure(output, ["a"], {"values": [1, 3, 4]}), "must begin with the old ones"),
        (configure(output, ["a"], {"values": [1]}), "must begin with the old ones"),
        (
            configure(output, ["b"], {"count": 1}, output={"uri": str(output), "format": "folder"}),
            "cannot change output",
        ),
    ]:
        with pytest.raises(BadInput, match=told):
            job.prepare(config, extend=True)
    with pytest.raises(BadInput, match=r"--extend, or go back to:\n"):
        job.prepare(configure(output, ["a", "b"], {"values": [1, 2]}))
    assert read_lock(str(output)) == lock


def test_a_job_moved_elsewhere_is_the_same_job(tmp_path: Path) -> None:
    output = tmp_path / "out"
    prompts = tmp_path / "a" / "prompts.txt"
    prompts.parent.mkdir()
    prompts.write_text("a red star\n")
    config = configure(output, [], {"count": 1}, prompts={"uri": str(prompts)})
    lock = job.prepare(config)
    moved = prompts.rename(tmp_path / "elsewhere.txt")
    assert job.prepare(configure(output, [], {"count": 1}, prompts={"uri": str(moved)})) == lock
    moved.write_text("a blue star\n")
    with pytest.raises(BadInput, match="prompts_sha256"):
        job.prepare(configure(output, [], {"count": 1}, prompts={"uri": str(moved)}))


def test_too_many_images_need_a_confirmation(tmp_path: Path) -> None:
    output = {"uri": str(tmp_path / "out"), "most_images": 10}
    with pytest.raises(BadInput, match=r"set output.most_images=11 to confirm"):
        job.prepare(configure(tmp_path, ["a"], {"count": 11}, output=output))
    assert not (tmp_path / "out").exists()


def test_another_class_is_refused_or_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    config = configure(output, ["a"], {"count": 2})
    lock = job.prepare(config)
    older = lock.model_copy(update={"determinism": lock.determinism | {"torch": "1.0"}})
    with pytest.raises(BadInput, match=r'torch: "1.0" there'):
        ShardWorker(config, older)
    allowed = config.model_copy(
        update={"engine": config.engine.model_copy(update={"allow_class_change": True})}
    )
    (entry,) = ShardWorker(allowed, older).make([0])
    assert entry["class_changed"]


def asked_for(folder: Path, **changes: Any) -> Any:
    return configure(folder, ["a"], {"count": 1}, **{"sampler": {}, **changes})


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where configurations would come from."""
    monkeypatch.setattr(Weights, "load_config_folder", lambda _: None)


def draft(config: GenerateConfig) -> Segment:
    with open_draft(resolve(config)) as found:
        return found.segment


def single(path: Path, shapes: headers.Shapes, **metadata: str) -> dict[str, Any]:
    return {"uri": headers.write(path, shapes, {f"modelspec.{k}": v for k, v in metadata.items()})}


def test_a_sampler_that_does_not_fit_the_models_file_is_refused_before_anything_is_written(
    tmp_path: Path, no_hub: None
) -> None:
    model = single(tmp_path / "v.safetensors", headers.XL | headers.V | headers.ZERO)
    for changes in ({"sampler": {"name": "heun"}}, {"parameters": {"sampler": ["euler", "lms"]}}):
        config = asked_for(tmp_path / "out", model=model, **changes)
        with pytest.raises(BadInput, match=r"does not fit a model of zero .*; use one of ddim"):
            draft(config)
    assert not (tmp_path / "out").exists()
    locked = draft(asked_for(tmp_path / "out", model=model, sampler={"name": "euler"})).job
    assert (locked["sampler"]["steps"], locked["sampler"]["guidance_scale"]) == (30, None)
    assert "prediction_type" not in locked["model"]  # a lock of before this key is the same


def test_a_distilled_model_has_defaults_of_its_own_and_a_warning(
    tmp_path: Path, no_hub: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = single(tmp_path / "few.safetensors", headers.XL, title="SDXL Lightning 8-step")
    usual = draft(asked_for(tmp_path / "out", model=model)).job["sampler"]
    assert (usual["steps"], usual["guidance_scale"]) == (8, 1.0)
    assert "a Lightning model: 8 steps and guidance 1 where" in capsys.readouterr().err
    given = {"steps": 30, "guidance_scale": 7}
    locked = draft(asked_for(tmp_path / "out", model=model, sampler=given)).job["sampler"]
    assert {key: locked[key] for key in given} == given
    assert (
        "30 steps and guidance 7 spoil the pictures of Lightning models" in capsys.readouterr().err
    )
    lora = headers.write(tmp_path / "lora.safetensors", {"a": (1,)}, {"ss_output_name": "sd_lcm"})
    model = single(tmp_path / "plain.safetensors", headers.XL) | {"loras": [{"uri": lora}]}
    draft(asked_for(tmp_path / "out", model=model))
    assert "30 steps and guidance 5 spoil the pictures of LCM models" in capsys.readouterr().err
    model = single(tmp_path / "few.safetensors", headers.XL, title="SDXL Lightning 8-step")
    weak = {"uri": str(tmp_path), "strength": 0.1}
    with pytest.raises(BadInput, match=r"init\.strength: strength 0\.1 of 8 steps leaves no step"):
        draft(asked_for(tmp_path / "out", model=model, init=weak))

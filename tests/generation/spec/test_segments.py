"""A data set that grows: more prompts, more seeds, another job; and what is refused."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import Lock, Segment, lock_uri, read_lock, replace_lock
from rayjobs.dataset.manifest import Manifest
from rayjobs.diffusion.weights import Weights
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.resolved import resolve
from rayjobs.generation.spec.draft import open_draft
from rayjobs.generation.spec.lock import config_of, data_set_schema
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
        (configure(output, ["c", "d", "c"], {"count": 1}), "prompts.inline has 'c' twice"),
        (
            configure(output, ["b"], {"count": 1}, output={"uri": str(output), "format": "folder"}),
            "cannot change output",
        ),
        (
            configure(output, ["b"], {"count": 1}, sampler={"cache_interval": 2, "steps": 1}),
            "have a cache_interval: leave out sampler.cache_interval",
        ),
    ]:
        with pytest.raises(BadInput, match=told):
            job.prepare(config, extend=True)
    with pytest.raises(BadInput, match=r"--extend, or go back to:\n"):
        job.prepare(configure(output, ["a", "b"], {"values": [1, 2]}))
    assert read_lock(str(output)) == lock


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {"lora_down": torch.zeros(2, 640), "lora_up": torch.zeros(640, 2)}
    lora = tmp_path / "wide.safetensors"
    save_file({f"{layer}.{name}.weight": each for name, each in factors.items()}, lora)
    output = tmp_path / "out"
    model = {"uri": "starter", "loras": [{"uri": str(lora)}]}
    told = r"^model.loras: LoRA wide.safetensors: .* for another model: .*640.* do not fit"
    with pytest.raises(BadInput, match=told):
        job.prepare(configure(output, ["a"], {"count": 1}, model=model))
    assert not output.exists()


def from_file(folder: Path, name: str, text: str) -> GenerateConfig:
    path = folder / name
    path.write_text(text)
    return configure(folder / "out", [], {"count": 1}, prompts={"uri": str(path)})


def test_all_segments_have_the_columns_of_the_first(tmp_path: Path) -> None:
    first = from_file(tmp_path, "1.jsonl", '{"prompt": "a", "k": 1, "t": "x"}\n')
    grow(first)
    table = pa.table({"t": ["y"], "prompt": ["b"], "k": pa.array([2], pa.int8())})
    pq.write_table(table, tmp_path / "2.parquet")
    other = configure(tmp_path / "out", [], {"count": 1}, prompts={"uri": f"{tmp_path}/2.parquet"})
    grow(other)
    grow(configure(tmp_path / "out", ["c"], {"count": 1}))
    more = from_file(tmp_path, "4.jsonl", '{"prompt": "c"}\n{"prompt": "d", "k": null, "t": "z"}\n')
    lock = grow(more)
    assert [segment.first_prompt for segment in lock.segments] == [0, 0, 0, 1]
    files = sorted((tmp_path / "out" / "data").iterdir())
    schemas = [pq.read_schema(file) for file in files]
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)
    rows = pa.concat_tables(map(pq.read_table, files)).select(["prompt", "k", "t"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        *(("a", 1, "x"), ("b", 2, "y"), ("c", None, None), ("d", None, "z"))
    ]
    for config in (first, other, more):  # with and without --extend each is found again
        assert job.prepare(config) == job.prepare(config, extend=True) == lock
    for text, told in [
        ('{"prompt": "e", "new": 1}', "cannot add the column 'new'.* they have k, t"),
        ('{"prompt": "e", "k": "3"}', "the column 'k' is string, but int64 in the data set's"),
        ('{"prompt": "e", "k": 1.5}', "the column 'k' is double, but int64"),
        ('{"prompt": "e", "t": {"a": 1}}', "the column 't' is struct<a: int64>, but string"),
    ]:
        with pytest.raises(BadInput, match=told):
            job.prepare(from_file(tmp_path, "5.jsonl", text), extend=True)
    scored = configure(tmp_path / "out", ["e"], {"count": 1}, quality={"safety": "a/hub-id"})
    with pytest.raises(BadInput, match=r"unsafe_score: leave quality\.safety out"):
        job.prepare(scored, extend=True)
    assert read_lock(str(tmp_path / "out")) == lock


def test_a_caption_of_the_prompt_file_stays_what_it_is(tmp_path: Path) -> None:
    first = from_file(tmp_path, "1.jsonl", '{"prompt": "a", "k": 1, "caption": "x"}\n')
    lock = job.prepare(first)
    assert data_set_schema(first.output.uri, lock).names[-2:] == ["k", "caption"]
    asked = {"quality": first.quality.model_copy(update={"caption": "a/hub-id"})}
    with pytest.raises(BadInput, match=r"has a column 'caption', which quality\.caption writes"):
        job.prepare(first.model_copy(update=asked), extend=True)


def test_a_job_that_made_nothing_gives_way_to_another(tmp_path: Path) -> None:
    output = tmp_path / "out"
    begun = job.prepare(from_file(tmp_path, "a.csv", "prompt,k\na,1\n"))
    config = configure(output, ["b"], {"count": 2})
    lock = job.prepare(config)
    assert len(lock.segments) == 1
    with pytest.raises(BadInput, match="another run began"):  # whose workers were loading the model
        list(ShardWorker(configure(output, ["a"], {"count": 1}), begun).make([0]))
    job.prepare(config, extend=True)
    assert verify(str(output)).faults == []
    (output / "attempts" / "00000000.json").unlink()
    grow(config)
    assert made(output) == [("b", 0, 0), ("b", 1, 1)]
    with pytest.raises(BadInput, match="holds another job"):
        job.prepare(from_file(tmp_path, "a.csv", "prompt,k\na,1\n"))
    (output / "spec.lock.json").unlink()
    with pytest.raises(BadInput, match=r"holds shards, but .*spec\.lock\.json.* is gone"):
        job.prepare(config)


def test_a_job_that_made_nothing_takes_other_workers(tmp_path: Path) -> None:
    """Threads decide bits; a first try may have asked for more CPUs than there are."""
    config = configure(tmp_path / "out", ["a"], {"count": 1}, workers={"num_cpus": 8})
    begun = job.prepare(config)
    smaller = configure(tmp_path / "out", ["a"], {"count": 1})
    assert job.prepare(smaller).determinism["threads"] == 1
    with pytest.raises(BadInput, match="another run began"):
        list(ShardWorker(config, begun).make([0]))
    grow(smaller)
    assert job.prepare(config).determinism["threads"] == 1


def test_a_job_moved_elsewhere_is_the_same_job(tmp_path: Path) -> None:
    output = tmp_path / "out"
    prompts = tmp_path / "a" / "prompts.txt"
    prompts.parent.mkdir()
    prompts.write_text("a red star\n")
    config = configure(output, [], {"count": 1}, prompts={"uri": str(prompts)})
    lock = grow(config)
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
    uri = str(output)
    assert replace_lock(older, storage.etag(lock_uri(uri)) or "", uri)
    with pytest.raises(BadInput, match=r'torch: "1.0" there'):
        ShardWorker(config, older)
    allowed = config.model_copy(
        update={"engine": config.engine.model_copy(update={"allow_class_change": True})}
    )
    (entry,) = ShardWorker(allowed, older).make([0])
    assert entry["class_changed"]


def test_every_local_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have other working directories, and no shell that knows `~`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("model.safetensors", "configs", "clip", "head.safetensors", "guard"):
        (tmp_path / name).touch()
    config = configure(
        Path("out"),
        [],
        {"count": 1},
        model={"uri": "model.safetensors", "config": "./configs", "loras": [{"uri": "~/a"}]},
        prompts={"uri": "p.csv"},
        init={"uri": "~/photos", "strength": 1.0},
        quality={"clip": "clip", "aesthetic": "~/head.safetensors", "safety": "org/classifier"},
    )
    found = resolve(config)
    uris = [found.model.uri, found.model.config, found.model.loras[0].uri, found.prompts.uri]
    uris += [found.init.uri, found.quality.clip, found.quality.aesthetic, found.output.uri]
    names = ["model.safetensors", "configs", "a", "p.csv", "photos", "clip", "head.safetensors"]
    assert uris == [str(tmp_path / name) for name in [*names, "out"]]
    assert found.quality.safety == "org/classifier"


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
    own = {"name": "ddim", "timesteps": [9, 3]}
    with pytest.raises(BadInput, match=r"sampler: .*'ddim' takes no timesteps; use one of ddpm"):
        draft(asked_for(tmp_path / "out", model=model, sampler=own))
    one_step = single(tmp_path / "Hyper-SDXL-1step-Unet.safetensors", headers.XL)
    for changes in ({"sampler": {"name": "ddim"}}, {"parameters": {"sampler": ["lcm", "ddim"]}}):
        with pytest.raises(BadInput, match=r"made for a step at 800, but sampler 'ddim' takes no"):
            draft(asked_for(tmp_path / "out", model=one_step, **changes))
    draft(asked_for(tmp_path / "out", model=one_step, sampler={"name": "ddim", "steps": 2}))
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
    usual = draft(asked_for(tmp_path / "out", model=model)).job["sampler"]
    assert (usual["steps"], usual["guidance_scale"]) == (4, 1.0)
    assert "a LCM model: 4 steps and guidance 1 where" in capsys.readouterr().err
    draft(asked_for(tmp_path / "out", model=model, sampler=given))
    assert "30 steps and guidance 7 spoil the pictures of LCM models" in capsys.readouterr().err
    model = single(tmp_path / "few.safetensors", headers.XL, title="SDXL Lightning 8-step")
    weak = {"uri": str(tmp_path), "strength": 0.1}
    with pytest.raises(BadInput, match=r"init\.strength: strength 0\.1 of 8 steps leaves no step"):
        draft(asked_for(tmp_path / "out", model=model, init=weak))

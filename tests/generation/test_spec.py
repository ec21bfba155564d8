"""The job's arithmetic against plain nested loops."""

import itertools
from pathlib import Path

import pytest

from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.source import Snapshot, write_snapshot
from rayjobs.generation.spec import Spec


def build(tmp_path: Path, prompts: dict, init_images: tuple[str, ...] = (), **parts: dict) -> Spec:
    config = GenerateConfig.model_validate(
        {"model": {"uri": "m"}, "output": {"uri": "o", "images_per_shard": 5}, "prompts": prompts}
        | parts
    )
    path = str(tmp_path / "snapshot.parquet")
    write_snapshot(config.prompts, path)
    return Spec(config, Snapshot(path), init_images)


def test_every_combination_once_in_order(tmp_path: Path) -> None:
    prompts = {
        "inline": ["star", "ring"],
        "templates": ["a {prompt}", "a {colour} {prompt} on {ground}"],
        "axes": {"colour": ["red", "blue"], "ground": ["sand", "sea", "ice"]},
    }
    inits = ("a.png", "b.png")
    spec = build(tmp_path, prompts, inits, seeds={"start": 7, "count": 2}, init={"uri": "pics"})
    expected = [
        (text, init, seed)
        for prompt in prompts["inline"]
        for text in [
            f"a {prompt}",
            *(f"a {c} {prompt} on {g}" for c, g in itertools.product(*prompts["axes"].values())),
        ]
        for init in inits
        for seed in (7, 8)
    ]
    records = [spec.record(k) for k in range(len(spec))]
    assert [(r.prompt, r.init_image, r.seed) for r in records] == expected
    assert records[0].init_uri == "pics/a.png"
    assert [k for s in range(spec.num_shards) for k in spec.shard(s)] == list(range(len(spec)))
    with pytest.raises(IndexError):
        spec.record(len(spec))


def test_rows_override_and_pass_through(tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text(
        "prompt,seed,steps,width,guidance_scale,negative_prompt,init_image,category\n"
        "one,5,9,128,2.5,blurry,x.png,first\n"
        "two,,,,,,,\n"
    )
    spec = build(tmp_path, {"uri": str(file)}, sampler={"steps": 3}, seeds={"count": 2})
    first, second, third, _ = (spec.record(k) for k in range(len(spec)))
    assert (first.seed, first.steps, first.width, first.guidance_scale) == (5, 9, 128, 2.5)
    assert (first.negative_prompt, first.init_uri) == ("blurry", str(tmp_path / "x.png"))
    assert first.init_image == "x.png"
    assert first.passed_through == {"category": "first"}
    assert second.seed == 6
    assert (third.seed, third.steps, third.width, third.init_image) == (0, 3, None, None)


def test_a_record_of_a_huge_job_costs_nothing(tmp_path: Path) -> None:
    axes = {name: [str(n) for n in range(100)] for name in "abcd"}
    spec = build(tmp_path, {"templates": ["{a} {b} {c} {d}"], "axes": axes}, seeds={"count": 100})
    assert len(spec) == 10**10
    assert spec.record(10**10 - 1).prompt == "99 99 99 99"
    assert spec.record(1_02_03_04_05).prompt == "1 2 3 4"
    assert spec.record(1_02_03_04_05).seed == 5

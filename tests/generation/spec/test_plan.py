"""The plan: what it counts, and that it costs nothing to make one."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rayjobs.config import BadInput
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.plan import describe, plan, record


def job(**parts: Any) -> GenerateConfig:
    base = {"model": {"uri": "starter"}, "prompts": {"inline": "x"}, "output": {"uri": "o"}}
    return GenerateConfig.model_validate(base | parts)


def test_counts_and_cost(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    config = job(
        prompts={
            "inline": ["x", "y", "x"],
            "templates": ["{prompt} {c}"],
            "axes": {"c": ["1", "2"]},
        },
        parameters={"steps": [10, 20], "width": [64, 128], "height": [64, 64]},
        init={"uri": str(tmp_path)},
        seeds={"count": 5},
        workers={"max": 3},
        output={"uri": "o", "images_per_shard": 10, "most_images": 1},
    )
    found = plan(config, rate=0.5, price=4.0)
    factors = (found.num_prompts, found.num_texts, found.num_parameters, found.num_inits)
    assert factors == (3, 2, 4, 2)
    assert (found.num_seeds, found.num_records, found.num_shards) == (5, 240, 24)
    assert found.num_workers == 3
    assert found.device_hours == pytest.approx(240 / 0.5 / 3600)
    assert found.cost == pytest.approx(4 * 240 / 0.5 / 3600)
    told = describe(found)
    assert "240" in told
    assert "3 prompts x 2 texts" in told
    assert "5 seeds" in told


def test_without_a_rate_there_are_no_hours() -> None:
    found = plan(job())
    assert found.device_hours is found.cost is None
    for rate in (0, -1, math.nan, math.inf):
        with pytest.raises(BadInput, match="rate is"):
            plan(job(), rate=rate)


def test_lossy_pictures_are_smaller() -> None:
    sizes = [
        plan(job(output={"uri": "o", "image_format": name})).num_bytes
        for name in ("webp", "jpeg", "webp-lossless", "png")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0


def test_one_record_as_json(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "tags": ["x"]}\n{"prompt": "b", "steps": 7}\n')
    config = job(prompts={"uri": str(file)}, seeds={"start": 4, "count": 2})
    found = record(config, 1)
    assert json.loads(json.dumps(found)) == found
    assert (found["prompt"], found["seed"], found["passed_through"]) == ("a", 5, {"tags": ["x"]})
    assert record(config, 3)["steps"] == 7
    for number in (4, -1):
        with pytest.raises(BadInput, match=r"records 0 \.\. 3"):
            record(config, number)
    assert plan(config).num_records == 4


BIG = """
import sys
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.plan import describe, plan, record
config = GenerateConfig.model_validate({
    "model": {"uri": "some/model"}, "output": {"uri": "o"},
    "prompts": {"inline": [f"p{n}" for n in range(10)]}, "seeds": {"count": 10**8},
})
assert plan(config, rate=1.0, price=1.0).num_records == 10**9
assert "1,000,000,000" in describe(plan(config))
assert record(config, 987654321)["prompt"] == "p9"
assert record(config, 987654321)["seed"] == 87654321
assert not {"torch", "ray", "diffusers", "transformers"} & set(sys.modules)
# From /proc: getrusage counts the memory of the process that this one was forked from.
high = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
assert int(high.split()[1]) < 300 * 1024, high
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_plan_of_a_billion_images_takes_no_time() -> None:
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sizes_hours_and_what_is_assumed() -> None:
    config = job(
        prompts={"inline": ["x", "y", "x"]},
        parameters={"width": [64, 128], "height": [64, 64]},
        workers={"max": 8, "num_gpus": 0.5},
        output={"uri": "o", "images_per_shard": 2},
    )
    found = plan(config, rate=0.5)
    assert found.num_unique_prompts == 2
    assert found.num_bytes == 6 * round(1.3 * 64 * 96)
    assert found.device_hours == pytest.approx(6 / 0.5 / 3600 / 2)
    assert (found.num_workers, found.wall_hours) == (3, pytest.approx(2 / 0.5 / 3600))
    own, elsewhere = plan(job()), plan(job(model={"uri": "some/model"}))
    assert "images of 1024 pixels where no size is given" in describe(elsewhere)
    assert own.num_bytes < elsewhere.num_bytes == round(1.3 * 1024**2)


def test_rows_that_will_fail_and_texts_that_repeat_are_told(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    rows = ["a,171,,", "a,64,0,", "b,64,4,nan", "b,64,4,inf", "b,64,4,2"]
    path.write_text("\n".join(["prompt,width,steps,guidance_scale", *rows]))
    told = describe(plan(job(prompts={"uri": str(path)})))
    assert "the records of 4 rows will fail, such as row 1: width is 171; it must be a" in told
    assert "2 different of 5: the same text and seed make the same image again" in told

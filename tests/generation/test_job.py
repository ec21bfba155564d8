"""The job on a real Ray cluster of one machine."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.worker import pool
from tests.conftest import jobs_in_process

# Ray Data 2.60 reads its own deprecated switches.


def configure(output: Path, workers: int) -> GenerateConfig:
    values: dict[str, Any] = {
        "model": {"uri": "starter"},
        "prompts": {"templates": ["a {colour} star"], "axes": {"colour": ["red", "blue", "pink"]}},
        "seeds": {"count": 4},
        "sampler": {"name": "euler_a", "steps": 2, "guidance_scale": 3.0},
        "output": {"uri": str(output), "images_per_shard": 3},
        "engine": {"batch_size": 4},
        "workers": {"min": workers},
    }
    return GenerateConfig.model_validate(values)


def bar_rate(told: str) -> float:
    """The images/s at the end of the last bar."""
    rate, unit = re.findall(r"([\d.]+)( images/s|s/ images)\]", told)[-1]
    return float(rate) if unit == " images/s" else 1 / float(rate)


@pytest.fixture
def two_cpus(ray_cluster: None) -> Iterator[None]:
    """The cluster with all CPUs but two taken by another."""
    other = ray.remote(Other).options(num_cpus=ray.cluster_resources()["CPU"] - 2).remote()
    ray.get(other.ready.remote())
    yield
    ray.kill(other)


class Other:
    def ready(self) -> None:
        pass


@pytest.mark.ray
def test_any_number_of_workers_makes_the_same_bytes(
    tmp_path: Path, two_cpus: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """One without Ray, a preview before it, and more than there are CPUs for."""
    with jobs_in_process():
        assert job.run(configure(tmp_path / "1", 1), limit=3).num_made == 3
        job.run(configure(tmp_path / "1", 1))
    summary = job.run(configure(tmp_path / "4", 4))
    assert (summary.num_made, summary.num_failed) == (12, 0)
    assert bar_rate(capfd.readouterr().err) == pytest.approx(12 / summary.making_s, rel=0.01)
    hashes = []
    for output in (tmp_path / "1", tmp_path / "4"):
        hashes.append([entry["sha256"] for entry in Manifest(str(output)).entries()])
        assert (output / "index.html").is_file()
        assert sorted(p.name for p in output.iterdir() if p.is_dir()) == [
            "data",
            "manifest",
            "prompts",
            "report",
        ]
    assert len(hashes[0]) == 4
    assert hashes[0] == hashes[1]


@pytest.mark.model
def test_a_limit_makes_the_first_records_and_more_later(tmp_path: Path, in_process: None) -> None:
    config = configure(tmp_path / "out", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayjobs.generation.worker.pool.make", None)  # a preview needs no Ray
        assert job.run(config, limit=4).num_made == 6  # whole shards
    assert job.run(config).num_made == 6
    assert job.run(config).num_made == 0


@pytest.mark.model
def test_two_drivers_at_once_share_what_they_claim(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second begins while the first is making shards, and is done before it goes on."""
    config = configure(tmp_path / "out", 1)
    make: Any = pool.make
    others: list[job.Summary] = []

    def make_beside(*args: Any) -> Iterator[Any]:
        entries = make(*args)
        yield next(entries)
        monkeypatch.setattr(pool, "make", make)
        others.append(job.run(config))
        yield from entries

    monkeypatch.setattr(pool, "make", make_beside)
    made = [job.run(config).num_made, others[0].num_made]
    assert sum(made) == 12
    assert min(made) > 0


@pytest.mark.model
def test_one_rate_is_told_everywhere(
    tmp_path: Path, in_process: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Images over the time in which they were made: on the bar, at the end, on page and card."""
    output, written = tmp_path / "out", tmp_path / "job.yaml"
    values = configure(output, 1).model_dump(mode="json", exclude_unset=True)
    written.write_text(yaml.safe_dump(values))
    assert main(["generate", str(written), "--limit", "6"]) == 0
    out, err = capfd.readouterr()
    (said,) = re.findall(r"made 6 images in [\d.]+ s \(([\d.]+)/s\); \d+ s with the start", out)
    assert bar_rate(err) == pytest.approx(float(said), rel=0.01)
    assert f"<b>{said}</b><span>images/s" in (output / "index.html").read_text()
    assert f"Made at {said} images/s in " in (output / "README.md").read_text()


@pytest.mark.ray
def test_failed_records_are_told_again_and_made_again(
    tmp_path: Path, ray_cluster: None, picture: Any
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,init_image\na red star,good.png\na blue star,bad.png\n")
    picture(1).save(tmp_path / "good.png")
    values = configure(tmp_path / "out", 1).model_dump()
    values |= {"prompts": {"uri": str(prompts)}, "seeds": {"count": 2}}
    config = GenerateConfig.model_validate(values)
    with jobs_in_process():
        assert job.run(config).num_failed == 2
        again = job.run(config)
    assert (again.num_made, again.num_failed) == (0, 2)
    picture(2).save(tmp_path / "bad.png")
    mended = job.run(config, retry_failed=True)
    assert (mended.num_made, mended.num_failed) == (2, 0)
    assert [entry["generation"] for entry in Manifest(str(tmp_path / "out")).entries()] == [1, 1]

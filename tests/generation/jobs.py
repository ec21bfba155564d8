"""A job as short as can be, for tests of what goes wrong around it."""

from pathlib import Path
from typing import Any

import yaml


def values(output: str, images: int, workers: int = 1) -> dict[str, Any]:
    return {
        "model": {"uri": "starter"},
        "prompts": {"templates": ["a {colour} star"], "axes": {"colour": ["red", "blue"]}},
        "seeds": {"count": images // 2},
        "sampler": {"name": "euler_a", "steps": 1, "guidance_scale": 1.0},
        "output": {"uri": output, "images_per_shard": 8},
        "engine": {"batch_size": 4},
        "workers": {"min": workers},
    }


def write_job(folder: Path, job_values: dict[str, Any]) -> list[str]:
    """The arguments of `rayjobs` that run this job."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_values))
    return ["generate", str(path)]

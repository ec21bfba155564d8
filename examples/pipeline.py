"""A pipeline of your own on Ray Data: rows with prompts in, the same rows with pictures out.

.venv/bin/python examples/pipeline.py
"""

import ray.data

from rayjobs import build_processor
from rayjobs.generation import ProcessorConfig

CONFIG = {
    "model": {"uri": "starter"},
    "sampler": {"name": "euler", "steps": 8},
    "engine": {"batch_size": 4},
}


def main() -> None:
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"prompt": f"a photo of a {colour} star", "seed": 1} for colour in ("red", "blue")]
    processor = build_processor(ProcessorConfig.model_validate(CONFIG))
    for row in processor(ray.data.from_items(rows)).take_all():
        print(f"{row['prompt']}: {row['status']}, {len(row['image']['bytes']):,} bytes of PNG")


if __name__ == "__main__":
    main()

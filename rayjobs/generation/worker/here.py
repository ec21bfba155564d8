"""A worker in this process: for jobs so small that starting a cluster takes longer than they do.

Owns which jobs those are. A record that ends its process ends this one; once it has left its marker
behind, the job is for workers on Ray, which find it out.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np

from rayjobs import storage
from rayjobs.bar import Bar
from rayjobs.config import BadInput, JobFailed
from rayjobs.dataset.lock import Lock
from rayjobs.dataset.manifest import Entry
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec.records import Redo
from rayjobs.reports.history import Activity

MAX_IMAGES = 64


def is_enough(config: GenerateConfig, num_images: int) -> bool:
    """Whether this process alone is to make so many images."""
    import torch

    workers = config.workers
    fits = workers.num_gpus <= 1 and (not workers.num_gpus or torch.cuda.is_available())
    attempts = storage.join(config.output.uri, "attempts")
    return fits and num_images <= MAX_IMAGES and not storage.list_files(attempts)


def make(
    config: GenerateConfig,
    lock: Lock,
    segment: int,
    shards: np.ndarray,
    redo: Redo | None,
    num_images: int,
) -> Iterator[Entry]:
    """As `pool.make`, without Ray."""
    from rayjobs.generation.worker.shards import ShardWorker

    print(f"{num_images:,} images to make; loading the model", file=sys.stderr, flush=True)
    try:
        worker = ShardWorker(
            config, lock, segment, redo=redo, report=lambda images, _: bar.update(images)
        )
        with Bar(num_images, "images", time.time()) as bar:
            made = Activity()
            for entry in worker.make(map(int, shards)):
                if entry["made"]:
                    made.add(entry)
                yield entry
            bar.worked_s = made.active_s or None
    except (BadInput, JobFailed):
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise JobFailed(f"{type(error).__name__}: {reason}") from error

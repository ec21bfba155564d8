"""How fast one worker is, measured with a few of the job's own images, which are thrown away.

Owns the measurement. Knows nothing of shards; writes nothing.
"""

import time
from itertools import cycle

from rayjobs.config import BadInput
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.prompts.snapshot import Names, Snapshot
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.draft import Draft, check
from rayjobs.generation.spec.records import Spec
from rayjobs.generation.worker.generator import Maker

BATCHES = 3
LEAST_S = 2.0


def rate(config: GenerateConfig) -> float:
    """Images per second of one worker in this process, once it is warm.

    Raises BadInput or StorageError when the job cannot be.
    """
    determinism.pin(config)
    with check(config, confirmed=True) as draft:
        return _measure(config, draft)


def _measure(config: GenerateConfig, draft: Draft) -> float:
    names = Names(str(draft.names)) if draft.names is not None else ()
    spec = Spec(config, Snapshot(str(draft.prompts)), names)
    maker = Maker(config, draft.segment.model_name, draft.segment.guided)
    size = config.engine.batch_size
    # Spread over the job, which may have slower parts; again and again when it is a small one.
    step = max(1, spec.num_records // (BATCHES * size))
    numbers = [n % spec.num_records for n in range(0, BATCHES * size * step, step)]
    good = sum(row["status"] == "ok" for _, row in maker.make(map(spec.record, numbers[:size])))
    if not good:
        raise BadInput("no image made for the measurement is good; try generate --limit 1")
    made, started = 0, time.monotonic()
    for _ in maker.make(map(spec.record, cycle(numbers))):
        made += 1
        seconds = time.monotonic() - started
        if made >= len(numbers) and seconds > LEAST_S:
            break
    return made / seconds

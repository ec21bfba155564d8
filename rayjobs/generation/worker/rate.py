"""How fast one worker is: a few images of the job are made in this process and thrown away.

Owns the measurement. Knows nothing of Ray: the job decides where this runs.
"""

import time
from dataclasses import replace
from itertools import cycle

from rayjobs.config import BadInput
from rayjobs.generation.resolved import ResolvedConfig
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.draft import JobDraft, open_draft
from rayjobs.generation.spec.records import Record

PROBE_BATCHES = 2
WARM_STEPS = 2
MIN_PROBE_S = 2.0


def measure_rate(config: ResolvedConfig) -> float:
    """Images per second of one worker in this process, once it is warm; they are thrown away.

    Raises BadInput or StorageError when the job cannot be.
    """
    determinism.pin(config.workers)
    with open_draft(config, confirmed=True) as draft:
        return _measure(draft)


def _measure(draft: JobDraft) -> float:
    from rayjobs.generation.worker.generator import RecordGenerator

    config, spec = draft.config, draft.spec()
    generator = RecordGenerator(config, draft.segment.model_name, draft.segment.guided)
    size = config.engine.batch_size
    # Spread over the job, which may have slower parts; again and again when it is a small one.
    step = max(1, spec.num_records // (PROBE_BATCHES * size))
    numbers = [n % spec.num_records for n in range(0, PROBE_BATCHES * size * step, step)]
    for _ in generator.generate(_shortened(spec.record(number)) for number in numbers[:size]):
        pass
    made, good, started = 0, 0, time.monotonic()
    for _, row in generator.generate(map(spec.record, cycle(numbers))):
        made += 1
        good += row["status"] == "ok"
        seconds = time.monotonic() - started
        if made >= len(numbers) and seconds > MIN_PROBE_S:
            break
    if not good:
        raise BadInput("no image made for the measurement is good; try generate --limit 1")
    return made / seconds


def _shortened(record: Record) -> Record:
    """What meets every shape of call in a few steps; an init image may leave none of so few."""
    return record if record.init_uri else replace(record, steps=WARM_STEPS)

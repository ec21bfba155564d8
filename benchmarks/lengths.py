"""Rows per UNet call for prompts of mixed lengths: in jobs and in serving, against plain prompts.

`python -m benchmarks.lengths [--model starter] [--rows 8]` prints a table. In a job, where bits may
not depend on neighbours, rows of one length share a call; in serving those of all lengths do, each
text said as often as gives them a length in common.
"""

import argparse
import random
import time
from collections import Counter
from typing import Any

from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Request
from serve.engine.fairness import FairBatcher, RowPriority

CHUNKS = (1, 1, 1, 1, 2, 2, 3, 4)
"""How long prompts are, in chunks of 75 tokens."""
NUM = 48


def requests(plain: bool) -> list[Request]:
    lengths = random.Random(0).choices(CHUNKS, k=NUM)
    return [
        Request(
            prompt="red star " * (1 if plain else 37 * length),
            prompt_syntax="plain" if plain else "a1111",
            seed=number,
            sampler="euler",
            steps=4 + number % 4,
        )
        for number, length in enumerate(lengths)
    ]


def measure(engine: Engine, asked: list[Request]) -> tuple[float, int, float]:
    """Rows of a call on average, the number of calls, and seconds."""
    calls: list[int] = []
    batch: Any = engine._unet_batch
    make = batch._call

    def counted(x_PCHW: Any, *rest: Any) -> Any:
        calls.append(len(x_PCHW))
        return make(x_PCHW, *rest)

    batch._call = counted
    started_s = time.perf_counter()
    failed = Counter(result.error for result in engine.generate(asked) if result.error)
    assert not failed, failed
    return sum(calls) / len(calls) / 2, len(calls), time.perf_counter() - started_s


def engines(model: Model, rows: int, asked: list[Request]) -> dict[str, Engine]:
    fair: FairBatcher[Any] = FairBatcher(rows, lambda shape: 2 * rows)
    fair.priorities.update({each: RowPriority("me", n, 1.0) for n, each in enumerate(asked)})
    return {
        "job": Engine(model, rows),
        "serving": Engine(model, rows, fixed_shape=False, batcher=fair),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="starter")
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    model = load_model(args.model)
    print(f"{'':22}{'rows per call':>14}{'calls':>8}{'seconds':>9}")
    for plain in (True, False):
        asked = requests(plain)
        for name, engine in engines(model, args.rows, asked).items():
            rows, num, seconds = measure(engine, asked)
            kind = "plain" if plain else "1 to 4 chunks"
            print(f"{name:9}{kind:13}{rows:14.2f}{num:8}{seconds:9.1f}")


if __name__ == "__main__":
    main()

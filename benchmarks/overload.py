"""The serving application above its capacity: which requests are refused, and how the others fare.

`python -m benchmarks.overload [--seconds 100]` measures what the application makes at saturation,
then plays Poisson arrivals at 0.95 and at 3 times that, prints a table and writes overload.json.
An answer's `retry-after` is compared with the truth: how long it then took until every request that
had been admitted before was answered.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load, serving
from benchmarks.load import Answer
from benchmarks.rivals import Setup

LOADS = (0.95, 3.0)
TARGETS = "only 200 and 429; retry-after / truth in 0.5 .. 2; p99 at 3 within 1.2 of that at 0.95"


def summarize(answers: list[Answer], moments: list[float]) -> dict[str, Any]:
    """The numbers of one open loop; a refused request is one that was answered 429."""
    good = [answer for answer in answers if answer.status == 200]
    seconds = [answer.seconds for answer in good]
    ends = sorted((moments[answer.number], answer.end_s) for answer in good)
    shares = []
    for answer in answers:
        if answer.status == 429 and answer.retry_after_s is not None:
            before = [end for came, end in ends if came < moments[answer.number]]
            truth_s = max(before, default=0.0) - answer.end_s
            if truth_s > 0:
                shares.append(answer.retry_after_s / truth_s)
    return {
        "requests": len(answers),
        "good": len(good),
        "refused": sum(answer.status == 429 for answer in answers),
        "other": sum(answer.status not in (200, 429) for answer in answers),
        "images_per_s": len(good) / max(answer.end_s for answer in answers),
        "p50_s": float(np.percentile(seconds, 50)),
        "p99_s": float(np.percentile(seconds, 99)),
        "retry_share": [float(np.percentile(shares, p)) for p in (10, 50, 90)] if shares else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=100, help="of arrivals at each load")
    parser.add_argument("--pending", type=float, default=4.0, help="engine.max_pending_s")
    parser.add_argument("--requests", type=int, default=80, help="at saturation")
    parser.add_argument(
        "--clients", type=int, default=8, help="at saturation: so few that none is refused"
    )
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    setup = Setup("starter", 1, 8, False, args.pending)
    sizes, rows = serving.SIZES["starter"], []
    with serving.running(["ours"], setup) as (urls, _):
        url = urls["ours"]
        load.play_closed(url, load.draw_requests(serving.NUM_WARM, sizes), 4)
        rate = saturated(url, args)
        print(f"{rate:.2f} images/s at saturation; {args.pending:g} s of work may wait")
        for times in LOADS:
            number = int(times * rate * args.seconds)
            moments = load.arrivals("poisson", number, times * rate)
            wanted = load.draw_requests(number, sizes, seed=1)
            row = {"load": times} | summarize(load.play(url, wanted, moments, False), moments)
            rows.append(row)
            shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
            print(shown, flush=True)
    print(f"p99 at {LOADS[1]:g} / at {LOADS[0]:g}: {rows[1]['p99_s'] / rows[0]['p99_s']:.2f}")
    print(f"targets: {TARGETS}")
    out = {"settings": vars(args), "capacity_per_s": rate, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(out, indent=2) + "\n")


def saturated(url: str, args: argparse.Namespace) -> float:
    """Images per second with callers that send the next request at once."""
    wanted = load.draw_requests(args.requests, serving.SIZES["starter"])
    answers = load.play_closed(url, wanted, args.clients)
    good = [answer for answer in answers if answer.status == 200]
    return len(good) / max(answer.end_s for answer in answers)


if __name__ == "__main__":
    main()

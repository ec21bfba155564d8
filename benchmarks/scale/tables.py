"""Tables of what was measured and computed, in Markdown, as docs/scale.md has them."""

from collections.abc import Sequence
from typing import Any

from benchmarks.scale import figures, schedule
from benchmarks.scale.driver import SHARD_BYTES
from rayjobs import progress

WRITES = ("PUT", "DELETE")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def requests(found: dict[str, dict[str, int]]) -> str:
    """Requests by who makes them; `found` has them by kind and folder."""
    rows = [
        [who, ", ".join(f"{count} {what}" for what, count in sorted(asked.items()))]
        for who, asked in found.items()
    ]
    return table(["who", "requests"], rows)


def storage_rates(per_shard: dict[str, int]) -> str:
    """Requests a second to the busiest folder, against the limit of one prefix."""
    rows = []
    for gpus in figures.GPUS:
        shards_per_s = gpus * figures.IMAGES_PER_S / figures.IMAGES_PER_SHARD
        reads, writes = busiest(per_shard)
        rows.append(
            [
                f"{gpus:,}",
                f"{shards_per_s:.2f}",
                f"{shards_per_s * sum(per_shard.values()):.1f}",
                f"{100 * shards_per_s * reads / figures.READS_PER_S:.2f} %",
                f"{100 * shards_per_s * writes / figures.WRITES_PER_S:.2f} %",
                f"{shards_per_s * SHARD_BYTES / 1e9:.2f}",
                f"{min(gpus / progress.report_every_s(gpus), gpus * figures.IMAGES_PER_S):.0f}",
                f"{gpus * figures.IMAGES_PER_S:,.0f}",
            ]
        )
    head = ["GPUs", "shards/s", "requests/s", "of 5,500 reads", "of 3,500 writes", "GB/s written"]
    return table([*head, "progress calls/s", "images/s"], rows)


def busiest(per_shard: dict[str, int]) -> tuple[int, int]:
    """Reads and writes for a shard, to the folder that gets most of each."""
    folders = {what.split()[1] for what in per_shard}
    sums = [
        (
            sum(n for what, n in per_shard.items() if what.endswith(f" {folder}") and is_write)
            if is_write
            else sum(
                n
                for what, n in per_shard.items()
                if what.endswith(f" {folder}") and what.split()[0] not in WRITES
            ),
            is_write,
        )
        for folder in folders
        for is_write in (False, True)
    ]
    return max(n for n, write in sums if not write), max(n for n, write in sums if write)


def drivers(measured: Sequence[dict[str, float]], per_block: dict[str, float] | None) -> str:
    rows = []
    for one in measured:
        gpus, images = int(one["gpus"]), int(one["images"])
        blocks = sum(1 for _ in schedule.blocks.spans(int(one["shards"]), gpus))
        ray_s = blocks * per_block["cpu_ms_per_block"] / 1e3 if per_block else 0.0
        ray_mb = blocks * max(0.0, per_block["bytes_per_block"]) / 1e6 if per_block else 0.0
        seconds = images / gpus / figures.IMAGES_PER_S
        waits_s = 2 * figures.REQUEST_S * (one["shards"] // 1000)
        rows.append(
            [
                f"{images:,}",
                f"{gpus:,}",
                f"{int(one['shards']):,}",
                f"{blocks:,}",
                f"{seconds / 3600:,.1f}",
                f"{one['loop_peak_mb']:.0f}",
                f"{ray_mb:.0f}",
                f"**{max(one['peak_mb'], one['loop_peak_mb'] + ray_mb):.0f}**",
                f"{int(one['most_open']):,}",
                f"{one['loop_cpu_s']:.0f}",
                f"{100 * one['loop_cpu_s'] / seconds:.2f} %",
                f"{100 * waits_s / seconds:.2f} %",
                f"{100 * ray_s / seconds:.2f} %",
                f"{one['report_cpu_s']:.0f}",
            ]
        )
    head = ["images", "GPUs", "shards", "blocks", "hours", "loop, MB", "Ray Data, MB", "peak, MB"]
    head += ["entries held", "loop, s", "its share", "waits for S3", "Ray Data", "report, s"]
    return table(head, rows)


def starts(found: Sequence[dict[str, float]]) -> str:
    rows = [
        [
            f"{int(one['gpus']):,}",
            f"{int(one['nodes']):,}",
            f"{int(one['requests']):,}",
            f"{int(one['refused']):,}",
            int(one["gave_up"]),
            f"{one['place_s']:.0f}",
            f"{figures.IMPORT_S:.0f}",
            f"{one['fetch_s']:.0f}",
            f"{one['load_s']:.0f}",
            f"{figures.FIRST_IMAGE_S:.0f}",
            f"**{one['total_s']:.0f}**",
        ]
        for one in found
    ]
    head = ["GPUs", "nodes", "GETs", "refused", "gave up", "placed, s", "imported", "fetched"]
    return table([*head, "loaded", "first image", "95 % generate, s"], rows)


def tails(found: Sequence[tuple[int, int, dict[str, float], dict[str, float]]]) -> str:
    rows = [
        [
            f"{images:,}",
            f"{gpus:,}",
            f"{calm['hours']:,.1f}",
            f"{calm['tail_s']:.0f}",
            f"{100 * calm['idle_share']:.1f} %",
            f"{lossy['hours']:,.1f}",
            f"{100 * lossy['idle_share']:.1f} %",
            f"{100 * lossy['wasted_share']:.2f} %",
        ]
        for images, gpus, calm, lossy in found
    ]
    head = ["images", "GPUs", "hours", "tail, s", "idle", "hours, spot", "idle", "made in vain"]
    return table(head, rows)

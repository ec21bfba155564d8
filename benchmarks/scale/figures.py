"""Published figures that stand for what is not here: GPUs, S3, a large Ray cluster.

Each with its source. Where a source gives a range, the end that is worse for us is taken.
"""

IMAGES = (10**5, 10**6, 10**8)
GPUS = (8, 64, 1024)

IMAGES_PER_S = 2.0
"""Of one GPU at 1024 px: MLPerf Inference v5.0, SDXL offline, 8 H200: 18.99/s, 2.37 each. A fast
worker is the harder case for driver and storage."""
IMAGES_PER_SHARD = 64
GPUS_PER_NODE = 8

READS_PER_S, WRITES_PER_S = 5_500, 3_500
"""GET or HEAD, and PUT, COPY, POST or DELETE, for each prefix of a bucket; this and the next two:
Amazon S3 User Guide, "Best practices design patterns: optimizing Amazon S3 performance"."""
REQUEST_S = 0.2
"""To the first byte: "roughly 100-200 milliseconds"."""
STREAM_BYTES_PER_S = 85e6
"""Of one connection: "85-90 MB/s"."""
NODE_BYTES_PER_S = 12.5e9 / 8
"""Of the network: 12.5 Gbit/s, the baseline of a small GPU instance; large ones have 100 and more.
"""
MODEL_BYTES = 7e9

GPU_SPREAD = 0.08
SLOWEST_GPU = 1.5
"""Between GPUs of one kind, and times the median's time: Sinha et al., SC22, arXiv 2208.11035."""
SHARD_SPREAD = 0.05
"""Between shards of one GPU; assumed, since prompts of one job cost the same."""
LOST_PER_HOUR = 0.05
"""Of spot workers: assumed, far more than "over 20 %" a month, AWS' most interrupted class."""
REPLACED_AFTER_S = 300.0
"""Until another worker has a lost one's place: assumed."""

ACTORS_PER_S = 550.0
"""Started by Ray on a cluster: its release test many_actors, 10,000 actors, perf_metrics."""
IMPORT_S = 30.0
"""From an actor's start to torch, diffusers and this code imported, on a disk that has never been
read: assumed, three times what it takes here."""
LOAD_BYTES_PER_S = 0.5e9
"""From a node's page cache into a GPU, hashed with SHA-256 on the way: assumed, one slow core."""
FIRST_IMAGE_S = 15.0
"""The first call with its kernels, and twenty steps: assumed; ten times a warm image."""

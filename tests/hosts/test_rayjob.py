"""KubeRay's RayJob on two hosts: its entrypoint as the manifest has it."""

import io

import botocore.session
import pandas as pd
import pytest
import yaml

from rayjobs import storage
from rayjobs.cli import main
from rayjobs.dataset.manifest import Manifest
from tests.hosts.cluster import Cluster
from tests.nodes import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS, SEEDS = 10, 40
# What the manifest takes for granted and these hosts lack: GPUs, the hub, and an hour.
HERE = (
    *("model.uri=starter", "model.dtype=float32", "model.device=cpu", "model.compile=no"),
    *("image.width=64", "image.height=64", "sampler.steps=2", "output.images_per_shard=4"),
    *("workers.num_gpus=0", "workers.num_cpus=1.9", f"seeds.count={SEEDS}"),
)


def test_the_rayjobs_entrypoint(cluster: Cluster, bucket: str) -> None:
    """With the bucket that it names, and the configuration where the image has it."""
    manifest = yaml.safe_load((ROOT / "deploy" / "kuberay" / "generate.yaml").read_text())
    entrypoint = manifest["spec"]["entrypoint"].split()
    places = dict(word.split("=") for word in entrypoint if "=" in word)
    botocore.session.get_session().create_client("s3").create_bucket(Bucket="bucket")
    table = io.BytesIO()
    pd.DataFrame({"prompt": [f"star {n}" for n in range(PROMPTS)]}).to_parquet(table)
    storage.write_bytes(places["prompts.uri"], table.getvalue())
    code, said = cluster.ray_job("submit", "--", *entrypoint, *HERE)
    assert code == 0, said
    output = places["output.uri"]
    entries = list(Manifest(output).entries())
    print("\n" + said.strip().splitlines()[-1])
    assert sum(entry["rows"] for entry in entries) == SEEDS * PROMPTS
    assert {entry["node"] for entry in entries} == {"host-1", "host-2"}
    assert main(["verify", output]) == 0

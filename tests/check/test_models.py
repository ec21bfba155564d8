"""What is known of a model, its memory and a machine before anything is fetched or started."""

import gzip
import json
from importlib.util import find_spec
from math import prod
from pathlib import Path

import pytest

from rayjobs import storage
from rayjobs.check import files, memory, model, nodes
from rayjobs.config import BadInput
from rayjobs.diffusion.weights import STARTER
from rayjobs.models.facts import find_weights
from rayjobs.models.options import SourceConfig
from tests import headers


def put(folder: Path, uri: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            storage.put_file(f"{uri}/{file.relative_to(folder)}", file)


def test_a_model_on_s3_is_judged_by_its_headers(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(STARTER, f"{bucket}/model")
    monkeypatch.setattr(model, "HEADER_BYTES", 64)  # real ones are longer than a first look
    local = find_weights("starter")
    with model.found(SourceConfig(uri=f"{bucket}/model")) as weights:
        assert weights is not None
        assert (weights.family, weights.variants) == (local.family, local.variants)
        counted = model.num_parameters(weights)
    assert counted == model.num_parameters(local)
    headers_bytes = 100_000  # of all files, and a little for their ends
    stored = sum(file.stat().st_size for file in STARTER.rglob("*.safetensors"))
    assert abs(2 * sum(counted.values()) - stored) < headers_bytes
    # A file that was cut off while it was copied.
    name = "unet/diffusion_pytorch_model.safetensors"
    data = storage.read_bytes(f"{bucket}/model/{name}")
    storage.write_bytes(f"{bucket}/model/{name}", data[:-100])
    cut = SourceConfig(uri=f"{bucket}/model")
    with pytest.raises(BadInput, match=rf"model.uri: {bucket}/model/{name}"), model.found(cut):
        pass


def test_what_is_on_s3(bucket: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{bucket}/prompts.csv", b"prompt,kind\na red star,1\n")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {{uri: starter}}\nprompts: {{uri: {bucket}/prompts.csv}}\n"
        f"output: {{uri: {bucket}/out}}\n"
    )
    before = storage.list_files(bucket)
    assert files.check(str(job), []).findings == []
    assert storage.list_files(bucket) == before
    planted = [f"model.uri={bucket}/model", "output.uri=s3://nowhere/out"]
    output, model_uri = files.check(str(job), planted).findings
    assert output.startswith("output.uri: s3://nowhere/out: bucket 'nowhere' does not exist")
    assert model_uri == f"{bucket}/model: nothing is there"


def test_parts_of_a_single_file(tmp_path: Path) -> None:
    uri = headers.write(tmp_path / "model.safetensors", headers.XL)
    with model.found(SourceConfig(uri=uri)) as weights:
        counted = model.num_parameters(weights)
    own = {name: prod(shape) for name, shape in headers.XL.items()}
    assert counted["vae"] == own["first_stage_model.decoder.conv_in.weight"]
    assert counted["text"] == sum(n for name, n in own.items() if name.startswith("conditioner"))
    assert sum(counted.values()) == sum(own.values())


def test_a_hub_s_model_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with model.found(SourceConfig(uri="somebody/something")) as weights:
        assert weights is None
    # The figures of docs/guides/sizing.md: 5, 1.6 and 0.2 GB.
    sizes = {part: round(2 * n / 1e9, 1) for part, n in model.num_parameters(None).items()}
    assert sizes == {"unet": 5.1, "text": 1.6, "vae": 0.2}


def test_memory_follows_what_was_measured() -> None:
    one = memory.of_drawing(model.SDXL, ("bfloat16", "auto"), 2, (2**20, 2**20))
    assert (one.calls, one.decoding) == (2 * 0.154, 1.75)
    wide = memory.of_drawing(model.SDXL, ("float32", "auto"), 16, (2**21, 2**18))
    assert (round(wide.calls, 3), wide.decoding) == (16 * 0.154 * 4, 1.75 / 4 * 2)
    assert wide.weights == 2 * one.weights
    assert memory.of_training(model.SDXL, "adamw", False, 4).total * 4 == pytest.approx(38.26, 1e-3)
    assert memory.of_lora(model.SDXL, "auto").total == pytest.approx(4.78, 1e-2)


def test_instances_are_those_of_ec2() -> None:
    """Against moto's copy of what EC2 tells of its instance types."""
    found = find_spec("moto")
    assert found is not None
    table = Path(str(found.origin)).parent / "ec2" / "resources" / "instance_types.json.gz"
    looked_at = 0
    for name, told in json.loads(gzip.decompress(table.read_bytes())).items():
        cards = [each for each in told.get("GpuInfo", {}).get("Gpus", ()) if "Name" in each]
        node = nodes.of_ec2("x", name, 1)
        family = name.partition(".")[0]
        if family not in nodes.FAMILIES or node.num_cpus is None:
            continue
        looked_at += 1
        assert node.num_cpus == told["VCpuInfo"]["DefaultVCpus"], name
        assert node.num_gpus == sum(card["Count"] for card in cards), name
        assert node.gpu_gib is not None
        assert 0.85 < node.gpu_gib * 1024 / cards[0]["MemoryInfo"]["SizeInMiB"] <= 1.01, name
    assert looked_at > 30


@pytest.mark.parametrize(
    ("product", "gib"),
    [
        ("NVIDIA-L40S", 44),
        ("NVIDIA-A100-SXM4-80GB", 80),
        ("nvidia-l4", 22),
        ("Tesla-T4", 15),
        ("nvidia-tesla-a100", 40),
        ("GeForce", None),
    ],
)
def test_cards_by_name(product: str, gib: float | None) -> None:
    assert nodes.memory_of(product) == gib

"""An export to the Hub: killed in the middle of its upload, run again, loaded from there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rayjobs.generation import job
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.tools.export_config import ExportConfig
from rayjobs.generation.worker.shards import ShardWorker
from tests.generation.jobs import values
from tests.hub import hub_server

pytestmark = pytest.mark.model

LOAD = """
import datasets
found = datasets.load_dataset("me/stars")
print({name: len(part) for name, part in found.items()}, found["train"][0]["image"].size)
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    config = values(str(tmp_path / "source"), images=8)
    config["output"]["images_per_shard"] = 2
    whole = GenerateConfig.model_validate(config)
    list(ShardWorker(whole, job.prepare(whole)).make(range(4)))
    return whole.output.uri


def test_killed_and_run_again(source: str, tmp_path: Path) -> None:
    with hub_server() as hub:
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test"}
        variables = os.environ | place | {"HF_HUB_DISABLE_XET": "1"}
        overrides = ["output.uri=hf://datasets/me/stars", f"output.staging={tmp_path / 'staging'}"]
        overrides.append("splits={train: 0.5, test: 0.5}")
        command = [sys.executable, "-m", "rayjobs", "export", source, *overrides]
        process = subprocess.Popen(command, env=variables)

        def kill(count: int) -> None:
            if count == 3:
                os.kill(process.pid, signal.SIGKILL)

        hub.on_upload = kill
        assert process.wait() == -signal.SIGKILL
        assert "README.md" not in hub.repositories["me/stars"]
        hub.on_upload = lambda count: None
        subprocess.run(command, env=variables, check=True)
        files = hub.repositories["me/stars"]
        shards = {name for name in files if name.startswith("data/")}
        assert shards == {f"data/{path.name}" for path in (tmp_path / "staging" / "data").iterdir()}
        assert len(hub.uploads) == len(set(hub.uploads))
        header = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert {part["split"] for part in header["configs"][0]["data_files"]} == {"train", "test"}
        assert {"export.lock.json", "manifest/00000000.json"} <= files.keys()
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD], env=variables, check=True, capture_output=True, text=True
        )
    counts = loaded.stdout.partition("}")[0]
    assert sum(int(text.split(": ")[1]) for text in counts.split(", ")) == 8
    assert "(64, 64)" in loaded.stdout


@pytest.mark.parametrize(
    ("output", "named"),
    [
        ({"uri": "hf://me/stars", "staging": "here"}, "hf://datasets/OWNER/NAME"),
        ({"uri": "hf://datasets/me/stars"}, "needs output.staging"),
        ({"uri": "out", "staging": "here"}, "for hf:// only"),
    ],
)
def test_places_that_are_none(output: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ExportConfig.model_validate({"output": output})

"""From photographs to a served model: trained onto S3, and answered for with no restart."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from rayjobs import storage
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model, load_model
from rayjobs.diffusion.request import Lora, Request
from rayjobs.models import exports
from tests.serving.calls import ask_all
from tests.serving.running import ROOT, get, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PROMPT = "a photo of a sks star"
METHODS = {"lora": {"learning_rate": 5e-3}, "full": {"learning_rate": 1e-3}}


def train(folder: Path, output: str, method: str) -> None:
    """The command, as a user gives it."""
    settings = {
        "model": {"uri": "starter"},
        "instance": {"uri": str(ROOT / "configs" / "demo" / "subject"), "prompt": PROMPT},
        "prior": {"mode": "none"},
        "train": {"method": method, "steps": 12, "global_batch_size": 4, **METHODS[method]},
        "run": {"name": method},
        "output": {"uri": output},
    }
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "rayjobs", "dreambooth", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def expected(place: str, method: str, starter: Model) -> np.ndarray:
    """The export's picture, by an engine with nothing else to do."""
    loras: tuple[Lora, ...] = ()
    model = starter
    if method == "lora":
        file = storage.to_local(storage.join(place, exports.LORA_FILE))
        loras = (Lora(path=str(file), scale=1.0),)
    else:
        model = load_model(str(storage.to_local(place)))
    (result,) = Engine(model, 1).generate([Request(prompt=PROMPT, seed=3, steps=8, loras=loras)])
    return np.asarray(result.image, int)


def test_what_is_trained_is_served(tmp_path: Path, bucket: str, starter: Model) -> None:
    keys = {
        "models": [{"name": "starter", "uri": "starter"}],
        "registry": {"uri": f"{bucket}/runs", "refresh_s": 1},
    }
    plain = {"model": "starter", "prompt": PROMPT, "seed": 3, "num_inference_steps": 8}
    with running(keys) as app:
        (base,) = ask_all(app.url, [plain])
        for method in METHODS:
            body = plain | {"model": f"sks-{method}"}
            (refused,) = ask_all(app.url, [body])
            assert refused.status == 404
            output = f"{bucket}/runs/sks-{method}"
            train(tmp_path, output, method)
            time.sleep(1.1)
            listed = json.loads(get(f"{app.url}/v1/models"))["data"]
            assert f"sks-{method}" in [each["id"] for each in listed]
            (answer,) = ask_all(app.url, [body])
            assert answer.status == 200, answer.body
            (made,) = answer.pictures()
            alone = expected(storage.join(output, "export"), method, starter)
            assert np.abs(made - alone).max() <= 1
            assert np.abs(made - base.pictures()[0]).mean() > 1  # training is seen

"""Replicas come with work and go without; two applications share the paths."""

import json
import threading
import time
import urllib.error

import pytest

from serve.errors import SPREAD
from tests.servers import free_ports
from tests.serving.calls import ask_all, mixed
from tests.serving.running import get, running

pytestmark = [pytest.mark.ray, pytest.mark.slow]
STARTER = [{"name": "starter", "uri": "starter"}]


def replicas(url: str) -> int:
    found: int = json.loads(get(f"{url}/ready"))["replicas"]
    return found


def wait_for(url: str, count: int, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while replicas(url) != count:
        assert time.monotonic() < end_s, f"{replicas(url)} replicas, not {count}"
        time.sleep(0.5)


def test_from_none_to_three_and_back_on_two_nodes() -> None:
    scaling = {"min": 0, "max": 3, "target_s": 1, "upscale_delay_s": 1, "downscale_delay_s": 4}
    keys = {"models": STARTER, "scaling": scaling, "engine": {"max_pending_s": 1000}}
    with running(keys, nodes=(3, 3)) as app:
        wait_for(app.url, 0, 60)
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                most[0] = max(most[0], replicas(app.url))

        watcher = threading.Thread(target=watch)
        watcher.start()
        # So long that the work outlasts the starting of replicas; some are there when they go.
        bodies = [body | {"num_inference_steps": 150, "n": 2} for body in mixed(24)]
        answers = ask_all(app.url, bodies)
        stop.set()
        watcher.join()
        assert {answer.status for answer in answers} == {200}
        assert most[0] == 3
        wait_for(app.url, 0, 90)
        (again,) = ask_all(app.url, mixed(1))
        assert again.status == 200


def test_two_applications_with_bounds_of_their_own() -> None:
    text = {"models": STARTER, "serves": ["text-to-image"]}
    image = {"models": STARTER, "serves": ["image-to-image"], "engine": {"max_rows": 2}}
    with running(text, nodes=(6,), edits=["/v1/images/edits", image]) as app:
        assert {each.status for each in ask_all(app.url, mixed(3))} == {200}
        (refused,) = ask_all(app.url, [{"image": b"none", "prompt": "a"}])
        assert refused.status == 400
        assert refused.body["error"]["param"] == "image"
    with running(text) as app:
        (missing,) = ask_all(app.url, [{"image": b"none", "prompt": "a"}])
        assert missing.status == 404


def test_an_open_door_without_keys_is_refused() -> None:
    import subprocess
    import sys

    from tests.serving.running import ROOT

    config = f"""
http_options: {{host: 0.0.0.0, port: {free_ports(1)[0]}}}
applications:
  - name: images
    import_path: serve.app:build
    args: {{models: [{{name: starter, uri: starter}}]}}
"""
    program = (
        "import sys, ray, yaml\n"
        "from ray import serve as ray_serve\n"
        "from serve.app import build\n"
        "from serve.config import ServeConfig\n"
        "config = yaml.safe_load(sys.argv[1])\n"
        "ray.init(address='local', num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "ray_serve.start(http_options=config['http_options'])\n"
        "build(ServeConfig.model_validate(config['applications'][0]['args']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, config], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "http_options.host is 0.0.0.0, which other machines can reach" in done.stderr


def test_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "a-long-enough-key-for-a-test"
    auth = {"keys": [{"name": "me", "key": key, "images_per_minute": 3, "max_concurrent": 2}]}
    with running({"models": STARTER, "auth": auth}) as app:
        for path in ("/v1/models", "/metrics"):
            with pytest.raises(urllib.error.HTTPError) as told:
                get(app.url + path)
            with told.value as answer:
                assert answer.code == 401
                assert json.loads(answer.read())["error"]["code"] == "invalid_api_key"
        assert json.loads(get(f"{app.url}/health"))["status"] == "ok"
        import openai

        client = openai.OpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0)
        assert client.models.list().data
        client.images.generate(prompt="a", n=3, extra_body={"num_inference_steps": 2})
        with pytest.raises(openai.RateLimitError) as limited:
            client.images.generate(prompt="a", n=2, extra_body={"num_inference_steps": 2})
        assert 10 < float(limited.value.response.headers["retry-after"]) <= 40 * SPREAD + 1
        wrong = openai.OpenAI(base_url=f"{app.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()

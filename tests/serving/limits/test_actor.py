"""A key's limits on a real application with two ingress replicas, and after their actor's death."""

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from serve.limits.actor import NAMESPACE, name_of
from tests.serving.running import Running, running, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KEY = "k" * 20
CONFIG = {
    "models": [{"name": "starter", "uri": "starter"}],
    "scaling": {"ingress": 2},
    "auth": {"keys": [{"name": "team", "key": KEY, "images_per_minute": 4}]},
}
BODY = {"prompt": "a cat", "size": "64x64", "num_inference_steps": 1}


def ask(app: Running) -> int:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    url, data = f"{app.url}/v1/images/generations", json.dumps(BODY).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_two_ingress_replicas_share_a_key_s_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.serving.running.get", with_key)
    with running(CONFIG) as app, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: ask(app), range(12)))
        assert sorted(answers) == [200] * 4 + [429] * 8
        ray.init(address=app.address, namespace=NAMESPACE, log_to_driver=False)
        try:
            first = ray.get_actor(name_of("images"))
            ray.kill(first)
            assert ask(app) in (200, 429)  # it is answered whatever is gone
            wait_until(app.url, lambda _: is_another(first))
            wait_until(app.url, lambda found: found["limits_shared"] == 1)
        finally:
            ray.shutdown()


def is_another(actor: Any) -> bool:
    """Whether the counts are in an actor again."""
    try:
        return bool(ray.get_actor(name_of("images")) != actor)
    except ValueError:
        return False


def with_key(url: str, timeout: float = 30) -> bytes:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        data: bytes = response.read()
        return data

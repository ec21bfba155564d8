"""Storage that is away or never answers, as callers of the API meet it."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from rayjobs import storage
from serve.config import ServeConfig
from serve.ingress import results
from tests.serving.asking import PROMPT, ask
from tests.serving.in_process import QuickEngines, serving


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An endpoint that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.MonkeyPatch.context() as patch:
        host, port = server.getsockname()[:2]
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        storage.forget_connections()
        yield f"http://{host}:{port}"
    storage.forget_connections()


def test_a_storage_that_never_answers_delays_only_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links are refused once it is known to be away; until then each keeps its deadline."""
    monkeypatch.setattr(results.ResultsStore, "_look", _nothing_wrong)
    with black_hole(), serving(results={"uri": "s3://bucket/served"}) as url:
        link = PROMPT | {"response_format": "url", "deadline_s": 0.5}
        answers: list[int] = []

        def ask_for_a_link() -> None:
            answers.append(ask(url, body=link)[0])

        waiting = [threading.Thread(target=ask_for_a_link) for _ in range(20)]
        for thread in waiting:
            thread.start()
        assert ask(url, body=PROMPT | {"deadline_s": 5})[0] == 200
        for thread in waiting:
            thread.join()
        assert answers == [504] * 20


def _nothing_wrong(store: results.ResultsStore) -> None:
    store._checked_s = time.monotonic()


# Ray Serve's own models.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_a_start_does_not_wait_long_for_results(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice: `serve run` asks, and Ray where it builds the application."""
    from serve import app

    assert 2 * app.RESULTS_ANSWER_S < 8
    monkeypatch.setattr(app, "RESULTS_ANSWER_S", 0.3)
    models = [{"name": "starter", "uri": "starter"}]
    config = ServeConfig.model_validate({"models": models, "results": {"uri": "s3://bucket/x"}})
    with black_hole():
        started = time.monotonic()
        app.check(config)
    assert time.monotonic() - started < 3
    assert "results.uri: s3://bucket/x: cannot reach" in caplog.text


def test_a_storage_that_is_away_is_told_before_an_image_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def away(uri: str, write: bool) -> None:
        raise storage.Unavailable("it does not answer")

    monkeypatch.setattr(storage, "check", away)
    monkeypatch.setattr(results, "CHECK_EVERY_S", 0.1)
    engines = QuickEngines()
    with serving(engines, results={"uri": "s3://bucket/served"}) as url:
        link = PROMPT | {"response_format": "url"}
        status, headers, body = ask(url, body=link)
        assert (status, body["error"]["code"]) == (503, "storage_unavailable")
        assert int(headers["retry-after"]) >= 1
        assert not engines.asked
        monkeypatch.setattr(storage, "check", lambda uri, write: None)
        monkeypatch.setattr(storage, "write_bytes", lambda uri, data: None)
        monkeypatch.setattr(storage, "link", lambda uri, seconds: "https://there")
        until_s = time.monotonic() + 10
        while status != 200 and time.monotonic() < until_s:
            time.sleep(0.05)
            status, _, body = ask(url, body=link)
        assert body["data"][0]["url"] == "https://there"


def test_a_storage_that_went_away_is_noticed_by_those_who_could_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_away, go = threading.Event(), threading.Event()

    def check(uri: str, write: bool) -> None:
        if is_away.is_set():
            raise storage.Unavailable("it does not answer")

    monkeypatch.setattr(storage, "check", check)
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: go.wait(30))
    monkeypatch.setattr(storage, "link", lambda uri, seconds: "https://there")
    monkeypatch.setattr(results, "CHECK_EVERY_S", 0.0)
    with serving(results={"uri": "s3://bucket/served"}) as url:
        link = PROMPT | {"response_format": "url", "deadline_s": 0.3}
        is_away.set()
        assert ask(url, body=link)[0] == 504
        until_s = time.monotonic() + 10
        while (status := ask(url, body=link)[0]) == 504 and time.monotonic() < until_s:
            time.sleep(0.05)
        assert status == 503
        go.set()


def test_a_registry_that_never_answers_delays_only_names_nobody_knows() -> None:
    with black_hole(), serving(registry={"uri": "s3://bucket/runs"}) as url:
        unknown = {"model": "nobody", "deadline_s": 0.3, **PROMPT}
        lost = [threading.Thread(target=ask, args=(url,), kwargs={"body": unknown}) for _ in "1234"]
        for thread in lost:
            thread.start()
        assert ask(url, body=PROMPT | {"deadline_s": 5})[0] == 200
        assert ask(url, "/v1/models", method="GET")[0] == 200

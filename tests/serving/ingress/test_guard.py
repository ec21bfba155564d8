"""Which web pages may use a server without keys."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from serve.config import AuthConfig
from serve.errors import ApiError
from serve.ingress.guard import PageGuard
from tests.serving.browser import Browser, find_chromium
from tests.serving.in_process import QuickEngines, serving
from tests.serving.ingress.test_api import ask

GENERATE = "/v1/images/generations"
HOST = "127.0.0.1:8000"
APP = "https://app.example.org"
CONFIG = AuthConfig(hosts=("images.example.org", "*.inner.org"), origins=(APP,))


def refusal(method: str = "POST", path: str = GENERATE, **sent: str) -> str | None:
    """The code of a refusal, or None."""
    headers = {name.replace("_", "-"): value for name, value in sent.items()}
    guard = PageGuard(lambda *_: None, CONFIG)  # type: ignore[arg-type,return-value]
    try:
        guard.check(method, path, Headers(headers))
    except ApiError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "[::1]:8000",
        "10.1.2.3",
        "localhost",
        "app.localhost:3000",
        "gpu-box:8000",
        "images.example.org",
        "IMAGES.example.org:443",
        "a.inner.org",
    ],
)
def test_names_that_no_stranger_can_point_here(host: str) -> None:
    assert refusal(host=host) is None


@pytest.mark.parametrize(
    "host",
    ["evil.test", "127.0.0.1.evil.test", "evil.test:8000", "images.example.org.evil.test", "[bad"],
)
def test_other_names_are_refused_on_every_route(host: str) -> None:
    for path in ("/", "/v1/models", GENERATE):
        assert refusal("GET", path, host=host) == "host_not_allowed"


@pytest.mark.parametrize(
    ("sent", "is_foreign"),
    [
        ({}, False),
        ({"origin": f"http://{HOST}"}, False),
        ({"origin": APP, "sec_fetch_site": "cross-site"}, False),
        ({"origin": "https://behind.a.proxy", "sec_fetch_site": "same-origin"}, False),
        ({"sec_fetch_site": "none"}, False),
        ({"origin": "http://127.0.0.1:3000"}, True),
        ({"origin": "http://evil.test", "sec_fetch_site": "cross-site"}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://[bad"}, True),
        ({"origin": ""}, True),
        ({"sec_fetch_site": "cross-site"}, True),
        ({"sec_fetch_site": "same-site"}, True),
    ],
)
def test_pages_of_other_origins_are_refused(sent: dict[str, str], is_foreign: bool) -> None:
    code = "origin_not_allowed" if is_foreign else None
    assert refusal(host=HOST, **sent) == code
    assert refusal("GET", "/v1/models", host=HOST, **sent) == code
    assert refusal("GET", "/", host=HOST, **sent) is None  # a link to the page


def test_keys_need_no_guard_and_only_they_may_open_to_all() -> None:
    key = {"name": "me", "key": "k" * 20}
    with pytest.raises(ValidationError, match="any web page"):
        AuthConfig(origins=("*",))
    with pytest.raises(ValidationError, match="no origin"):
        AuthConfig(origins=("app.example.org/",))
    with serving(auth={"keys": [key], "origins": ["*"]}) as url:
        sent = {"origin": "https://x.org", "host": "any.test"}
        status, headers, _ = ask(
            url, body={"prompt": "p"}, authorization=f"Bearer {'k' * 20}", **sent
        )
        assert (status, headers["access-control-allow-origin"]) == (200, "*")


def test_origins_named_in_the_config_may_ask() -> None:
    with serving(auth={"origins": [APP]}) as url:
        wanted = {"access_control_request_method": "POST", "content_type": ""}
        wanted["access_control_request_headers"] = "authorization,content-type,x-stainless-lang"
        status, headers, _ = ask(url, method="OPTIONS", origin=APP, **wanted)
        assert (status, headers["access-control-allow-origin"]) == (200, APP)
        status, headers, _ = ask(url, body={"prompt": "p"}, origin=APP)
        assert (status, headers["access-control-allow-origin"]) == (200, APP)
        assert ask(url, body={"prompt": "p"}, origin="https://other.org")[0] == 403
    with serving() as url:
        assert ask(url, method="OPTIONS", origin=APP, **wanted)[0] == 403


class EvilPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>free kittens</title>")

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed")
    with Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def evil() -> Iterator[str]:
    """A foreign page's address, without its host: port and path."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EvilPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{server.server_port}/"
        server.shutdown()


BODY = json.dumps(json.dumps({"prompt": "a star"}))
PNG = (
    "Uint8Array.from(atob('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhg"
    "GAWjR9awAAAABJRU5ErkJggg=='), (letter) => letter.charCodeAt(0))"
)
POST = f"url + '{GENERATE}', {{method: 'POST', mode: 'no-cors', body: "
ATTACKS = {
    "blob": f"fetch({POST} new Blob([{BODY}])}})",
    "text": f"fetch({POST} {BODY}}})",
    "json": f"fetch(url + '{GENERATE}', {{method: 'POST', body: {BODY}, "
    "headers: {'Content-Type': 'application/json'}})",
    "form": f"""(() => {{
        const form = new FormData();
        form.append("prompt", "p");
        form.append("image", new Blob([{PNG}], {{type: "image/png"}}), "a.png");
        return fetch(url + "/v1/images/edits", {{method: "POST", mode: "no-cors", body: form}});
    }})()""",
    "models": "fetch(url + '/v1/models', {mode: 'no-cors'})",
}


@pytest.mark.slow
@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1", "localhost"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_foreign_pages_in_a_real_browser(
    browser: Browser, evil: str, host: str, attack: str
) -> None:
    engines = QuickEngines()
    with serving(engines) as url:
        browser.open(f"http://{host}:{evil}")
        script = f"(async (url) => {{ try {{ await {ATTACKS[attack]} }} catch {{}} }})('{url}')"
        browser.evaluate(script)
        # The same by the page itself is served: it is the origin that is refused.
        browser.open(f"{url}/health")
        assert browser.evaluate(f"(async (url) => (await {ATTACKS['json']}).status)('')") == 200
    assert len(engines.asked) == 1


@pytest.mark.slow
def test_a_page_on_a_rebound_name_reads_and_makes_nothing(browser: Browser) -> None:
    engines = QuickEngines()
    with serving(engines) as url:
        port = url.rpartition(":")[2]
        browser.open(f"http://evil.test:{port}/health")
        statuses = f"""(async (url) => [
            (await fetch('/v1/models')).status, (await {ATTACKS["json"]}).status])('')"""
        assert browser.evaluate(statuses) == [403, 403]
    assert not engines.asked


@pytest.mark.slow
def test_no_page_may_frame_this_one(browser: Browser, evil: str) -> None:
    engines = QuickEngines()
    with serving(engines) as url:
        browser.open(f"http://evil.test:{evil}")
        browser.evaluate(f"""new Promise((done) => {{
            const frame = document.createElement("iframe");
            frame.src = "{url}/";
            frame.onload = () => setTimeout(done, 300);
            document.body.append(frame);
        }})""")
        assert engines.looks == 0  # the framed page would have asked for the models
        browser.open(f"{url}/")
        browser.wait_for("document.querySelectorAll('#model option').length > 0")
        assert engines.looks > 0

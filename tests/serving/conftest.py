"""The application on the starter model, started once for all tests that only request."""

from collections.abc import Iterator

import pytest

from tests.serving.running import Running, running

STARTER = {"models": [{"name": "starter", "uri": "starter"}], "scaling": {"num_cpus": 1}}


@pytest.fixture(scope="session")
def app() -> Iterator[Running]:
    with running(STARTER) as found:
        yield found


@pytest.fixture(scope="session")
def app_url(app: Running) -> str:
    return app.url

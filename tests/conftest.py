"""What every test shares: a Prefect home of the tests' own, and one Prefect API for all of them."""

import os
import tempfile
from collections.abc import Iterator

# Before Prefect is imported: no file of the user's is touched, and nothing is reported to anybody.
_home = tempfile.TemporaryDirectory(prefix="alpaca-prefect-")
os.environ["PREFECT_HOME"] = _home.name
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ.pop("PREFECT_API_URL", None)

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """Prefect's test API; starting it takes seconds, so there is one for the whole session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield

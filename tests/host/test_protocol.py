"""What a host is sent by mistake or malice: it says no in its own words, and goes on."""

import json
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alpaca_core import errors
from alpaca_core.errors import AlpacaError, RowRejected
from alpaca_core.host.application import application
from alpaca_core.host.protocol import MOST_BYTES, MOST_ROWS, read_error, read_result, write_error, write_result
from alpaca_core.model import ERROR_CODES, Completion, RowError, Scores
from tests.engines.conftest import wrapped
from tests.host.conftest import NativeModel, ThreadedWarm, served
from tests.waiting import until

GOOD = {"rows": [{"prompt_ids": [1, 2], "sampling": {"max_new_tokens": 2}, "adapter": None}]}
SCORE = {"rows": [{"prompt_ids": [1], "tokens": [1, 2], "parents": [-1, 0], "adapter": None}]}
PATHS = ["/v1/generate", "/v1/loglikelihood", "/v1/model", "/v1/stop"]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def warm(make_network: Callable[..., Any], tokenizer: Any) -> ThreadedWarm:
    return ThreadedWarm(wrapped(NativeModel, tokenizer, make_network()), 8, limit=2000)


@pytest.fixture(scope="module")
def url(warm: ThreadedWarm) -> Iterator[str]:
    with served(application(warm)) as url:  # type: ignore[arg-type]
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30.0) as client:
        yield client


@pytest.fixture(autouse=True)
def well(request: pytest.FixtureRequest) -> Iterator[None]:
    """The host answers right after every test, and has nothing left to do."""
    yield
    http, warm = request.getfixturevalue("http"), request.getfixturevalue("warm")
    check_well(http)
    until(lambda: not (warm.scheduler.running or warm.scheduler.waiting), 10.0)


def check_well(http: httpx.Client) -> None:
    lines = http.post("/v1/generate", json=GOOD).text.splitlines()
    assert len(json.loads(lines[0])["completion"]["token_ids"]) == 2


def check(reply: httpx.Response) -> None:
    """A refusal is typed, in JSON, and no fault of the host."""
    if reply.status_code == 200:
        return
    assert reply.status_code in (400, 401, 403, 404, 405, 408, 411, 413, 415, 421, 422, 429), reply.text
    told = reply.json()["error"]
    assert isinstance(getattr(errors, told["type"])(told["message"]), AlpacaError)
    assert len(told["message"]) < 1000


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud800", "\x00", "default", -1, 2**63, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["prompt_ids", "sampling", "sample_index", "adapter", "tokens", "parents", "temperature", "top_p", "more"]
ROWS = st.dictionaries(st.sampled_from(FIELDS), ANYTHING | st.lists(st.integers(-2, 300), max_size=6), max_size=6)


def mutated(draw: st.DrawFn) -> bytes:
    """Bodies that are nearly right."""
    kind = draw(st.sampled_from([GOOD, SCORE, {"spec": {}}]))
    body = json.loads(json.dumps(kind))
    if "rows" in body:
        row = body["rows"][0]
        row.update(draw(ROWS))
        for field in draw(st.lists(st.sampled_from(sorted(row)), max_size=1)):
            row.pop(field, None)
        if isinstance(row.get("sampling"), dict):
            row["sampling"]["max_new_tokens"] = 2
            key = draw(st.sampled_from(["temperature", "top_k", "top_p", "num_beams", "seed"]))
            row["sampling"][key] = draw(ANYTHING)
    else:
        body["spec"] = draw(ANYTHING | st.dictionaries(st.sampled_from(["base_model", "device", "adapters"]), ANYTHING))
    return json.dumps(body, ensure_ascii=True).encode()


BODIES = st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value).encode()) | st.composite(mutated)()
SETTINGS = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(body=BODIES, path=st.sampled_from(PATHS), kind=st.sampled_from(["application/json"] * 6 + ["text/plain", ""]))
def test_bodies_of_any_kind_are_answered_or_refused(http: httpx.Client, body: bytes, path: str, kind: str) -> None:
    reply = http.post(path, content=body, headers={"content-type": kind} if kind else {})
    check(reply)
    if reply.status_code == 200 and path in PATHS[:2]:
        for line in filter(None, reply.text.splitlines()):
            told = json.loads(line)
            if "error" in told:
                assert told["error"]["code"] in ERROR_CODES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"rows": [{"prompt_ids": [' + b"9" * 5000 + b"]}]}",
        b'{"rows": [{"prompt_ids": [1], "sampling": {"temperature": NaN}}]}',
        b'{"rows": [{"prompt_ids": [1], "sampling": {"temperature": Infinity}}]}',
        b'{"rows": [{"prompt_ids": [1], "sampling": {"temperature": 1e999}}]}',
        b'{"rows": [{"prompt_ids": [NaN]}]}',
        b'{"rows": [{"prompt_ids": [1], "adapter": "\\ud800"}]}',
        b'{"rows": [{"prompt_ids": [1], "\\ud800\\udfff\\ud800": 1}]}',
        b'{"\\udcff": 1}',
        b'{"rows": [{"prompt_ids": [1], "adapter": "' + b"x" * 10_000 + b'"}]}',
        b"\xff\xfe\x00",
        '{"rows": []}'.encode("utf-16"),
        json.dumps({"rows": [{"prompt_ids": [1], "tokens": [1, 2], "parents": [1, 0]}]}).encode(),
        json.dumps({"rows": [{"prompt_ids": [1], "tokens": [1], "parents": [0]}]}).encode(),
        json.dumps({"rows": [{"prompt_ids": [1], "tokens": [1, 1], "parents": [-1, -1]}]}).encode(),
        json.dumps({"rows": [{"prompt_ids": [1], "tokens": [1], "parents": [-2]}]}).encode(),
        json.dumps({"rows": [{"prompt_ids": [1], "tokens": [1], "parents": []}]}).encode(),
        json.dumps({"rows": GOOD["rows"] * (MOST_ROWS + 1)}).encode(),
        json.dumps({"rows": [{"prompt_ids": [1], "sampling": {"max_new_tokens": 10**9}}]}).encode(),
        json.dumps({"spec": {"base_model": "\x00"}}).encode(),
        json.dumps({"spec": {"base_model": "x" * 100_000}}).encode(),
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize("path", PATHS[:3])
def test_known_nasty_bodies_are_refused_in_the_hosts_own_words(http: httpx.Client, body: bytes, path: str) -> None:
    check(http.post(path, content=body, headers=JSON))


def test_bodies_that_are_too_large_are_refused_before_they_are_read(http: httpx.Client, url: str) -> None:
    reply = http.post("/v1/generate", content=b" " * (MOST_BYTES + 1), headers=JSON)
    assert reply.status_code == 413
    assert "bytes" in reply.json()["error"]["message"]

    def endless() -> Iterator[bytes]:
        for _ in range(2 * MOST_BYTES // 2**16):
            yield b" " * 2**16

    with suppress(httpx.TransportError):  # the host may hang up on it
        assert http.post("/v1/generate", content=endless(), headers=JSON).status_code == 413
    head = b"POST /v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    told = raw(url, head + b"content-length: 99999999999999\r\n\r\n")
    assert b" 413 " in told


def raw(url: str, *parts: bytes, wait: bool = True) -> bytes:
    """Send bytes as they are, and hang up after the first answer, or at once."""
    with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 80), timeout=20.0) as wire:
        for part in parts:
            wire.sendall(part)
        return wire.recv(65536) if wait else b""


def test_half_requests_and_clients_that_hang_up_leave_nothing(url: str, warm: ThreadedWarm) -> None:
    body = json.dumps({"rows": GOOD["rows"] * 500}).encode()
    head = b"POST /v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    whole = head + str(len(body)).encode() + b"\r\n\r\n" + body
    for end in (1, 20, len(head), len(head) + 10, len(whole) - len(body) // 2, len(whole) - 1, len(whole)):
        for _ in range(5):
            raw(url, whole[:end], wait=False)
    raw(url, whole, wait=True)
    until(lambda: not warm.scheduler.clients, 10.0)
    for part in (
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        raw(url, part)


@pytest.mark.parametrize("path", ["/", "/v2/generate", "/v1/generate/", "/docs", "/redoc", "/../etc/passwd", "/v1/%00"])
def test_paths_and_methods_that_are_not_there_are_refused_alike(http: httpx.Client, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        reply = http.request(method, path, headers=JSON)
        assert reply.status_code != 200
        check(reply)
    check(http.get("/v1/generate"))


def test_names_of_clients_may_be_anything_short(http: httpx.Client) -> None:
    for name in (b"", b"\xff\xfe", b"a" * 64, b"a" * 65, "é".encode(), b"%00"):
        check(http.post("/v1/generate", json=GOOD, headers=[(b"alpaca-client", name)]))  # type: ignore[list-item]


def test_a_full_queue_says_busy_and_when_to_come_back(http: httpx.Client, warm: ThreadedWarm) -> None:
    long = {"rows": [{"prompt_ids": [1], "sampling": {"max_new_tokens": 200}, "adapter": None}] * 1000}
    with http.stream("POST", "/v1/generate", json=long), http.stream("POST", "/v1/generate", json=long):
        reply = http.post("/v1/generate", json=long)
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["type"] == "HostBusy"
        check(reply)


@pytest.mark.parametrize("path", [*PATHS[:3], "/v1/status", "/metrics", "/v1/tokenizer", "/openapi.json"])
def test_a_token_is_wanted_for_all_but_health(warm: ThreadedWarm, make_network: Any, tokenizer: Any, path: str) -> None:
    mine = ThreadedWarm(wrapped(NativeModel, tokenizer, make_network()), 8)
    with served(application(mine, token="secret")) as url, httpx.Client(base_url=url) as http:  # type: ignore[arg-type]
        method = "POST" if path in PATHS else "GET"
        assert http.get("/health").status_code == 200
        for bad in ("", "secret", "Bearer", "Bearer secre", "Bearer secrets", "Basic secret", "Bearer \xff"):
            reply = http.request(method, path, headers=JSON | {"authorization": bad.encode("latin-1")}, json=GOOD)  # type: ignore[dict-item]
            assert reply.status_code == 401
            check(reply)
        good = {"authorization": "Bearer secret", "host": "models.example"}
        assert http.request(method, path, headers=JSON | good, json=GOOD).status_code in (200, 422)


def test_without_the_token_no_body_is_read(make_network: Any, tokenizer: Any) -> None:
    """The answer comes while the body is still to be sent: nothing of it is kept, on however many connections."""
    mine = ThreadedWarm(wrapped(NativeModel, tokenizer, make_network()), 8)
    with served(application(mine, token="secret")) as url:  # type: ignore[arg-type]
        for method, path, status in (
            *((method, "/health", 401) for method in ("POST", "PUT", "HEAD", "DELETE", "OPTIONS")),
            ("GET", "/health", 200),
            ("POST", "/v1/generate", 401),
        ):
            head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            told = raw(url, f"{head}content-length: {MOST_BYTES - 1}\r\n\r\n".encode(), b" " * 1000)
            assert f" {status} ".encode() in told.splitlines()[0], (method, path, told)


def test_a_body_that_does_not_end_is_given_up(url: str, warm: ThreadedWarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpaca_core.host.application._SLOWEST", 0.5)
    head = b"POST /v1/generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    for body in (b"content-length: 1000\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"):
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 80), timeout=20.0) as wire:
            wire.sendall(head + body)
            told = b"".join(iter(lambda: wire.recv(65536), b""))  # until the host closes the connection
        assert b" 408 " in told.splitlines()[0]
        error = read_error(json.loads(told.split(b"\r\n\r\n")[1])["error"])
        assert "comes in whole within 0.5 s" in str(error)


FOREIGN = ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1:1:x", ""]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", [*PATHS, "/v1/status", "/metrics", "/v1/tokenizer", "/health"])
def test_pages_of_the_web_cannot_reach_a_host_that_wants_no_token(http: httpx.Client, host: str, path: str) -> None:
    """Neither by a name that is made to mean this machine, nor by a form, which cannot send JSON."""
    method = "POST" if path in PATHS else "GET"
    reply = http.request(method, path, headers={"host": host}, json=GOOD if method == "POST" else None)
    assert reply.status_code in (403, 400)
    check(reply)


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:80", "alpaca"])
def test_names_of_this_machine_are_answered(http: httpx.Client, host: str) -> None:
    assert http.get("/v1/status", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("path", PATHS)
def test_what_a_form_can_send_is_refused(http: httpx.Client, path: str, kind: str) -> None:
    reply = http.post(path, content=json.dumps(GOOD), headers={"content-type": kind})
    assert reply.status_code == 415
    check(reply)


def test_no_answer_opens_the_host_to_other_origins(http: httpx.Client) -> None:
    for path in ("/v1/status", "/health", "/metrics"):
        reply = http.get(path, headers={"origin": "https://evil.example"})
        assert not [name for name in reply.headers if name.startswith("access-control")]


NUMBERS = st.floats(allow_nan=False) | st.just(-math.inf)


@given(st.lists(NUMBERS), st.text(max_size=9))
def test_scores_keep_every_bit_in_json(numbers: list[float], shape: str) -> None:
    told = read_result(json.loads(json.dumps(write_result(Scores(numbers, shape)), allow_nan=False)))
    assert isinstance(told, Scores)
    assert [number.hex() for number in told] == [number.hex() for number in numbers]
    assert told.shape == shape


def test_results_and_errors_come_back_as_they_went() -> None:
    completion = Completion(
        text="é\x00\u2028", token_ids=(1, 2), finish_reason="stop", prompt_tokens=1, completion_tokens=2, shape="8x64"
    )
    for result in (completion, RowError(code="not_finite", message="x")):
        assert read_result(json.loads(json.dumps(write_result(result)))) == result
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and kind is not RowRejected:
            back = read_error(json.loads(json.dumps(write_error(kind("why")))))
            assert type(back) is kind
            assert str(back) == "why"
    for strange in (None, [], {}, {"type": "SystemExit"}, {"type": "brief"}, {"type": 5}, {"type": "RowRejected"}):
        assert isinstance(read_error(strange), errors.HostUnavailable)

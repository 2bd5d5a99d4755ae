"""What stands before page and API, around an application that repeats what it is sent."""

import asyncio
import base64

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette", reason="the extra 'web' is not installed")

from starlette.requests import Request  # noqa: E402
from starlette.responses import Response  # noqa: E402

from digit.web.guard import Guard  # noqa: E402
from digit.web.limits import MIB, Budget, Limits  # noqa: E402

LIMITS = Limits(upload_mb=1)


async def echo(scope, receive, send):
    body = await Request(scope, receive).body()
    await Response(body)(scope, receive, send)


def ask(method="POST", path="/api/generate", budget=None, auth=None, hosts=("here",), **request):
    """The answer of a guarded application."""
    guard = Guard(echo, LIMITS, budget or Budget(10 * MIB), auth, hosts)

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://here:7860") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def test_a_request_goes_through_whole():
    body = bytes(range(256)) * 4000
    answer = ask(content=body)
    assert answer.status_code == 200
    assert answer.content == body
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_size_declared_or_not():
    async def pieces():
        for _ in range(30):
            yield bytes(100_000)

    budget = Budget(10 * MIB)
    for content in (bytes(2 * MIB), pieces()):
        answer = ask(content=content, budget=budget)
        assert answer.status_code == 413
        assert "files of up to 1 MiB" in answer.json()["error"]
    assert budget.held == 0


def test_what_others_hold_is_counted():
    budget = Budget(MIB)
    with budget.hold() as take:
        take(MIB - 10)
        answer = ask(content=bytes(11), budget=budget)
        assert answer.status_code == 429
        assert answer.headers["retry-after"]
        assert ask(content=bytes(10), budget=budget).status_code == 200
    assert ask(content=bytes(11), budget=budget).status_code == 200


def test_a_password_is_asked_for_everything():
    auth = ("me", "sécret")
    for path in ("/", "/api/model", "/gradio_api/queue/join", "/nowhere"):
        answer = ask("GET", path, auth=auth)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
    right = base64.b64encode("me:sécret".encode()).decode()
    assert ask("GET", "/", auth=auth, headers={"Authorization": f"Basic {right}"}).status_code == 200
    for wrong in (f"Basic {right[:-4]}", "Basic me", "Basic é", f"Bearer {right}", ""):
        assert ask("GET", "/", auth=auth, headers={"Authorization": wrong.encode()}).status_code == 401


def test_names_of_the_server():
    for host in ("here", "here:80", "HERE:1"):
        assert ask("GET", "/", headers={"Host": host}).status_code == 200
    for host in ("there", "here.evil.example", "[", ""):
        assert ask("GET", "/", headers={"Host": host}).status_code == 403
    assert ask("GET", "/", hosts=None, headers={"Host": "anything"}).status_code == 200


def test_pages_of_other_sites_cannot_ask():
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert ask(headers=headers).status_code == 403
    for headers in ({"Origin": "http://here:7860"}, {"Sec-Fetch-Site": "same-origin"}, {}):
        assert ask(headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/config", 200),
        ("/assets/index.js", 200),
        ("/gradio_api/queue/data", 200),
        ("/gradio_api/heartbeat/abc", 200),
        ("/gradio_api/upload", 404),
        ("/gradio_api/upload/", 404),
        ("/gradio_api/file=/etc/passwd", 404),
        ("/gradio_api/proxy=http://evil.example", 404),
        ("/gradio_api/call/x", 404),
        ("/upload", 404),
        ("/docs", 404),
        ("/login", 404),
    ],
)
def test_open_addresses(path, status):
    assert ask("GET", path).status_code == status

"""What stands before page and API, around an application that repeats what it is sent."""

import asyncio
import base64

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount

from digit.web import security
from digit.web.schema import Limits

MIB = 1 << 20


async def echo(scope, receive, send):
    await Response(await Request(scope, receive).body())(scope, receive, send)


def app(auth=None, hosts=("here",), memory=10):
    limits = Limits(upload_mb=1, memory_mb=memory)
    return Starlette(routes=[Mount("/", echo)], middleware=security.middleware(limits, auth, hosts))


def ask(method="POST", path="/api/generate", to=None, auth=None, hosts=("here",), **request):
    """The answer of a guarded application."""

    async def send():
        transport = httpx.ASGITransport(to or app(auth, hosts))
        async with httpx.AsyncClient(transport=transport, base_url="http://here:7860") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def test_a_request_goes_through_whole():
    body = bytes(range(256)) * 4000
    answer = ask(content=body)
    assert answer.status_code == 200
    assert answer.content == body
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_size_declared_or_not():
    async def pieces():
        for _ in range(30):
            yield bytes(100_000)

    one = app(memory=3)
    for _ in range(3):  # what a refused request held is given back
        for content in (bytes(2 * MIB), pieces()):
            answer = ask(to=one, content=content)
            assert answer.status_code == 413
            assert "files of up to 1 MiB" in answer.json()["error"]
    assert ask(to=one, content=base64.b64encode(bytes(MIB))).status_code == 200  # a whole file


def test_the_bodies_of_all_requests_are_bounded_together():
    async def scene():
        until = asyncio.Event()

        async def hold(scope, receive, send):
            await until.wait()
            await Response()(scope, receive, send)

        guard = security.Guard(hold, Limits(upload_mb=1, memory_mb=2))
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            first = [asyncio.ensure_future(client.post("/", content=bytes(MIB))) for _ in range(2)]
            while guard.held < 2 * MIB:
                await asyncio.sleep(0.01)
            refused = await client.post("/", content=b"x")
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            until.set()
            assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
            assert guard.held == 0
            assert (await client.post("/", content=b"x")).status_code == 200

    asyncio.run(scene())


def test_a_request_that_never_ends_is_dropped(monkeypatch):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.05)

    async def slow():
        yield b"x"
        await asyncio.sleep(10)

    answer = ask(content=slow())
    assert answer.status_code == 408
    assert "in time" in answer.json()["error"]


def test_a_password_is_asked_for_everything():
    auth = ("me", "sécret")
    for path in ("/", "/api/model", "/static/page.js", "/docs", "/nowhere"):
        answer = ask("GET", path, auth=auth)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
        assert "password" in answer.json()["error"]
    right = base64.b64encode("me:sécret".encode()).decode()
    assert ask("GET", "/", auth=auth, headers={"Authorization": f"Basic {right}"}).status_code == 200
    for wrong in (f"Basic {right[:-4]}", "Basic me", "Basic é", f"Bearer {right}", ""):
        assert ask("GET", "/", auth=auth, headers={"Authorization": wrong.encode()}).status_code == 401


def test_names_of_the_server():
    for host in ("here", "here:80", "HERE:1"):
        assert ask("GET", "/", headers={"Host": host}).status_code == 200
    for host in ("there", "here.evil.example", "[", ""):
        answer = ask("GET", "/", headers={"Host": host})
        assert answer.status_code == 403
        assert "is not called" in answer.json()["error"]
    assert ask("GET", "/", hosts=None, headers={"Host": "anything"}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://here:7860"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_cannot_ask(headers, status):
    assert ask(headers=headers).status_code == status

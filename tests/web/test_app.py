"""The API of a running `digit serve`: many clients at once, clients that leave, and clients that mean harm."""

import base64
import io
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

import tiny
from digit.core.images import encode_png, to_pil
from digit.pipeline.pipeline import DigitPipeline
from digit.web.schema import SETTINGS
from serving import BAD_UPLOADS, bad_upload, running

psutil = pytest.importorskip("psutil")
CLIENTS, LEAVING = 100, 40
IDLE_SHARE = 0.02  # of one core, that an idle server may use
MIB = 1 << 20
LONG = {"num": 16, "decoder": "masked", "steps": 256}


def ask(server, path, asked=None, headers=None, data=None, method=None):
    """(status, answer) of a request."""
    body = data if data is not None else None if asked is None else json.dumps(asked).encode()
    sent = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(server.url + path, body, sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=240) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text[:1] == b"{" else text


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(a, b):
    return a.size == b.size and encode_png(a.convert("RGB")) == encode_png(b)


@pytest.fixture(scope="module")
def pipe(model):
    return DigitPipeline.from_folder(model)


def test_the_model_is_described(server):
    status, about = ask(server, "/api/model")
    assert status == 200
    assert about["classes"] == ["cat", "dog", "ship"]
    assert about["decoders"] == ["ar", "masked"]
    assert about["grids"] == {"semantic": [4, 4], "vq": [4, 4]}
    assert about["limits"]["pictures"] == 16
    assert about["settings"]["masked"]["steps"] == 2


def leave(server, asked, accept="*/*"):
    """Send a request; the client leaves when the connection that is returned is closed."""
    address, body = urlsplit(server.url), json.dumps(asked).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: {address.netloc}\r\nAccept: {accept}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection((address.hostname, address.port))
    connection.sendall(head.encode() + body)
    return connection


def until_waiting(server, count):
    """Wait until so many requests wait or run."""
    while ask(server, "/health")[1]["waiting"] != count:
        time.sleep(0.01)


def test_a_hundred_clients_at_once_and_forty_that_leave(model, pipe, tmp_path):
    """None is lost, none gets another's images, and the server's memory hardly grows."""
    with running(model, tmp_path, "--waiting", str(CLIENTS + LEAVING)) as server:
        process = psutil.Process(server.pid)
        ask(server, "/api/generate", {"labels": [0], "num": 4})  # what the first request leaves stays
        before = process.memory_info().rss
        start = threading.Barrier(CLIENTS + LEAVING)

        def client(number):
            start.wait()
            return ask(server, "/api/generate", {"labels": [number % 3], "num": 1 + number % 4, "seed": number})

        def leaver(number):
            start.wait()
            with leave(server, {**LONG, "seed": number}):
                time.sleep(0.05 * (number % 4))

        with ThreadPoolExecutor(CLIENTS + LEAVING) as pool:
            leavers = [pool.submit(leaver, number) for number in range(LEAVING)]
            answers = list(pool.map(client, range(CLIENTS)))
            assert all(left.result() is None for left in leavers)
        grown = process.memory_info().rss - before
        assert [status for status, _ in answers] == [200] * CLIENTS
        for number, (_, answer) in enumerate(answers):
            assert answer["labels"] == [number % 3] * (1 + number % 4)
        for number in range(0, CLIENTS, 5):
            own = pipe([number % 3], num=1 + number % 4, seed=number)
            pictures = answers[number][1]["pictures"]
            assert all(same(opened(text), image) for text, image in zip(pictures, own, strict=True))
        until_waiting(server, 0)
        assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB"


def test_a_full_queue_says_so_and_a_client_that_leaves_frees_its_slot(model, tmp_path):
    with running(model, tmp_path, "--waiting", "2") as server:
        began = time.monotonic()
        assert ask(server, "/api/generate", LONG)[0] == 200
        whole = time.monotonic() - began
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda seed: ask(server, "/api/generate", {**LONG, "seed": seed}), range(8)))
        statuses = sorted(status for status, _ in answers)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3  # one that was worked on, and two that waited
        refused = next(answer for status, answer in answers if status == 429)
        assert "busy: 2 requests are waiting" in refused["error"]

        gone = [leave(server, LONG, accept) for accept in ("*/*", "text/event-stream", "text/event-stream")]
        until_waiting(server, 3)
        began = time.monotonic()
        for connection in gone:
            connection.close()
        until_waiting(server, 0)
        assert time.monotonic() - began < whole  # three whole requests would take three times as long
        assert ask(server, "/api/generate", {"num": 1})[0] == 200


def test_an_idle_server_does_nothing(server):
    """It may wake up, but must not poll: Gradio's queue, which was here before, took 5 to 7% of a core."""
    process = psutil.Process(server.pid)
    ask(server, "/health")
    used = sum(process.cpu_times()[:2])
    time.sleep(5)
    assert (sum(process.cpu_times()[:2]) - used) / 5 < IDLE_SHARE


def events(server, asked):
    """(kind, data) of the server-sent events of a request."""
    request = urllib.request.Request(server.url + "/api/generate", json.dumps(asked).encode())
    request.add_header("Accept", "text/event-stream")
    with urllib.request.urlopen(request, timeout=240) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for event in answer.read().decode().strip().split("\n\n"):
            kind, data = event.split("\n")
            yield kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_progress_as_events(server):
    asked = {"labels": [2], "num": 2, "seed": 5, "decoder": "masked", "steps": 6}
    *progress, (kind, result) = events(server, asked)
    assert {kind for kind, _ in progress} == {"progress"}
    assert {data["stage"] for _, data in progress} == {"prior", "masked"}
    assert kind == "result"
    assert result == ask(server, "/api/generate", asked)[1]
    (failed,) = events(server, {"labels": ["horse"]})
    assert failed[0] == "error"
    assert "neither a number nor a class" in failed[1]["error"]


def test_tokens_and_reconstructions(server, pipe, photo):
    status, answer = ask(server, "/api/tokenize", {"image": photo})
    assert status == 200
    picture = opened(answer["picture"]).convert("RGB")
    assert picture.size == (tiny.SIZE, tiny.SIZE)
    assert answer["semantic"] == pipe.tokenizer.encode([picture])[0].tolist()
    assert same(opened(answer["full"]), to_pil(pipe.reconstruct([picture])[0]))


def test_stability(server, photo):
    flips = {}
    for snr in (50, 0):
        status, answer = ask(server, "/api/stability", {"image": photo, "snr": snr})
        assert status == 200
        flips[snr] = {space: found["count"] for space, found in answer["flips"].items()}
        for found in answer["flips"].values():
            assert found["count"] == len(found["places"]) == round(found["share"] * found["of"])
    assert all(flips[50][space] < flips[0][space] for space in ("semantic", "vq"))


def test_edit(server, photo):
    status, answer = ask(server, "/api/edit", {"image": photo, "cells": [0, 1], "num": 2, "label": "cat"})
    assert status == 200
    before = ask(server, "/api/tokenize", {"image": photo})[1]["semantic"]
    assert len(answer["pictures"]) == 2
    for tokens in answer["semantic"]:
        assert tokens[2:] == before[2:]


@pytest.mark.parametrize(
    ("path", "asked", "status", "message"),
    [
        ("generate", {"num": 17}, 413, "at most 16"),
        ("generate", {"lables": [1]}, 400, "did you mean 'labels'"),
        ("generate", {"labels": ["horse"]}, 400, "neither a number nor a class"),
        ("generate", {"seed": -1}, 400, "seed"),
        ("generate", {"steps": 10**9}, 400, "steps"),
        ("generate", {"cfg_scale": float("nan"), "labels": [0]}, 400, "cfg_scale"),
        ("generate", {"labels": [10**30]}, 400, "this model knows 0 to 2"),
        ("generate", {"labels": [-(10**30)]}, 400, "this model knows 0 to 2"),
        ("generate", [1, 2], 400, "a JSON list"),
        ("stability", {"image": "", "snr": "loud"}, 400, ""),
        ("generate", {"temperature": float("inf")}, 400, "temperature"),
        ("edit", {"cells": [0]}, 400, "'image' is missing"),
        ("edit", {"image": 7, "cells": [0]}, 400, "image = 7"),
    ],
)
def test_mistakes_get_a_sentence(server, path, asked, status, message):
    found, answer = ask(server, f"/api/{path}", asked)
    assert found == status
    assert message in answer["error"]


@pytest.mark.parametrize("name", list(BAD_UPLOADS))
def test_bad_uploads_are_refused(server, name):
    text, message = bad_upload(name)
    status, answer = ask(server, "/api/tokenize", {"image": text})
    assert status == 400
    assert message in answer["error"]
    assert ask(server, "/api/model")[0] == 200


def test_a_hundred_megabytes_are_refused(server):
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    assert ask(server, "/api/tokenize", data=bytes(100 * MIB))[0] == 413
    # the same without saying beforehand how much it will be
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            f"POST /api/tokenize HTTP/1.1\r\nHost: {address.netloc}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range(100):
            connection.sendall(b"100000\r\n" + bytes(MIB) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    assert process.memory_info().rss - before < 64 * MIB
    assert ask(server, "/api/model")[0] == 200


def test_the_documented_client(server, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    client = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("http://127.0.0.1:7860", server.url)
    monkeypatch.chdir(tmp_path)
    exec(compile(client, "docs/serving.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0.png", "1.png", "2.png", "3.png"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" dB")[0] for line in lines] == ["30", "20", "10"]
    assert all("'semantic'" in line and "'vq'" in line for line in lines)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/nowhere", 404),
        ("GET", "/api", 404),
        ("GET", "/api/clusters/cat", 404),
        ("GET", "/api/../etc/passwd", 404),
        ("GET", "/static/../service.py", 404),
        ("GET", "/static/%2e%2e/service.py", 404),
        ("GET", "/static/nothing.js", 404),
        ("GET", "/static", 404),
        ("GET", "/api/generate", 405),
        ("DELETE", "/api/model", 405),
        ("PUT", "/", 405),
        ("POST", "/health", 405),
        ("POST", "/static/page.js", 405),
        ("GET", "/api/clusters/0", 400),  # this model has no patches
    ],
)
def test_every_error_has_the_documented_shape(server, method, path, status):
    found, answer = ask(server, path, method=method)
    assert found == status
    assert list(answer) == ["error"]
    assert len(answer["error"]) > 20


def test_the_api_describes_itself(server, browser):
    _, described = ask(server, "/openapi.json")
    assert {path for path in described["paths"] if path.startswith("/api/")} == {
        "/api/model", "/api/generate", "/api/tokenize", "/api/stability", "/api/edit", "/api/clusters/{number}",
    }  # fmt: skip
    body = described["paths"]["/api/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"labels", "num", "seed", "decoder", *SETTINGS} == set(body["properties"])
    page, asked = browser.new_page(), []
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto(server.url + "/docs")
    page.get_by_text("/api/stability").wait_for()
    page.close()
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []


def test_a_password_for_page_and_api_and_a_warning_without(model, tmp_path):
    with running(model, tmp_path, "--host", "0.0.0.0", "--auth", "me:secret") as server:
        assert "Warning" not in server.said
        right = {"Authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
        for path in ("/", "/static/page.js", "/api/model", "/health", "/docs", "/nowhere"):
            assert ask(server, path)[0] == 401
        assert ask(server, "/api/model", headers=right)[0] == 200
        assert ask(server, "/api/generate", {}, right)[0] == 200
    with running(model, tmp_path, "--host", "0.0.0.0") as server:
        assert "Warning: everybody who can reach 0.0.0.0 can use this server" in server.said


def test_it_listens_on_loopback_alone(server):
    assert "Warning" not in server.said
    connections = psutil.Process(server.pid).net_connections()
    assert {connection.laddr.ip for connection in connections if connection.status == "LISTEN"} == {"127.0.0.1"}


def test_other_web_sites_are_kept_out(server):
    assert ask(server, "/api/model", headers={"Host": "evil.example"})[0] == 403
    for header in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(server, "/api/generate", {}, header)[0] == 403
    assert ask(server, "/api/model", headers={"Host": "localhost"})[0] == 200


def test_uploads_are_not_written_anywhere(server, photo):
    for path, asked in (("tokenize", {}), ("stability", {"snr": 20}), ("edit", {"cells": [3]})):
        assert ask(server, f"/api/{path}", {"image": photo, **asked})[0] == 200
    raw = base64.b64decode(photo)
    written = [path for path in server.scratch.rglob("*") if path.is_file()]
    assert not [path for path in written if raw in path.read_bytes()]

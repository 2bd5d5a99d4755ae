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

import numpy as np
import pytest
from PIL import Image

import tiny
from digit.core.images import encode_png, to_pil
from digit.pipeline.pipeline import DigitPipeline
from digit.web.limits import MIB
from serving import BAD_UPLOADS, bad_upload, running

psutil = pytest.importorskip("psutil")
pytest.importorskip("gradio", reason="the extra 'web' is not installed")
CLIENTS = 50
LONG = {"num": 16, "decoder": "masked", "steps": 256}


def ask(server, path, wish=None, headers=None, data=None):
    """(status, answer) of a request."""
    body = data if data is not None else None if wish is None else json.dumps(wish).encode()
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json", **(headers or {})})
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


@pytest.fixture(scope="module")
def photo():
    noise = np.random.default_rng(1).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return base64.b64encode(encode_png(Image.fromarray(noise))).decode()


def test_the_model_is_described(server):
    status, about = ask(server, "/api/model")
    assert status == 200
    assert about["classes"] == ["cat", "dog", "ship"]
    assert about["decoders"] == ["ar", "masked"]
    assert about["grids"] == {"semantic": [4, 4], "vq": [4, 4]}
    assert about["limits"]["pictures"] == 16


def test_fifty_clients_at_once(server, pipe):
    """None is lost, none gets another's picture, and the server's memory hardly grows."""
    process = psutil.Process(server.pid)
    ask(server, "/api/generate", {"labels": [0], "num": 4})  # what the first request leaves stays
    before = process.memory_info().rss
    start = threading.Barrier(CLIENTS)

    def client(number):
        start.wait()
        return ask(server, "/api/generate", {"labels": [number % 3], "num": 1 + number % 4, "seed": number})

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(client, range(CLIENTS)))
    grown = process.memory_info().rss - before
    for number, (status, answer) in enumerate(answers):
        assert status == 200, answer
        own = pipe([number % 3], num=1 + number % 4, seed=number)
        assert len(answer["pictures"]) == len(own)
        assert all(same(opened(text), picture) for text, picture in zip(answer["pictures"], own, strict=True))
    assert ask(server, "/api/model")[1]["waiting"] == 0
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

        # the page's and the API's clients leave by closing their connection
        address = urlsplit(server.url)
        body = json.dumps(LONG).encode()
        head = f"POST /api/generate HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        gone = [socket.create_connection((address.hostname, address.port)) for _ in range(3)]
        for connection in gone:
            connection.sendall(head.encode() + body)
        while ask(server, "/api/model")[1]["waiting"] < 3:
            time.sleep(0.01)
        began = time.monotonic()
        for connection in gone:
            connection.close()
        while ask(server, "/api/model")[1]["waiting"]:
            time.sleep(0.01)
        assert time.monotonic() - began < whole  # three whole requests would take three times as long
        assert ask(server, "/api/generate", {"num": 1})[0] == 200


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
    ("path", "wish", "status", "message"),
    [
        ("generate", {"num": 17}, 413, "at most 16"),
        ("generate", {"lables": [1]}, 400, "did you mean 'labels'"),
        ("generate", {"labels": ["horse"]}, 400, "neither a number nor a class"),
        ("generate", {"seed": -1}, 400, "seed"),
        ("generate", {"steps": 10**9}, 400, "steps"),
        ("generate", {"cfg_scale": float("nan"), "labels": [0]}, 400, "cfg_scale"),
        ("generate", {"labels": [10**30]}, 400, "this model knows 0 to 2"),
        ("generate", [1, 2], 400, "a JSON list"),
        ("stability", {"image": "", "snr": "loud"}, 400, ""),
        ("edit", {"cells": [0]}, 400, "'image' is missing"),
        ("edit", {"image": 7, "cells": [0]}, 400, "'image' is missing"),
    ],
)
def test_mistakes_get_a_sentence(server, path, wish, status, message):
    found, answer = ask(server, f"/api/{path}", wish)
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


def test_only_what_the_page_needs_is_open(server):
    for path in ("/gradio_api/upload", "/gradio_api/run/predict", "/docs", "/api/../etc/passwd", "/login"):
        assert ask(server, path, {})[0] in (404, 405), path
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/proxy=http://example.com",
    ):
        status, _ = ask(server, path)
        assert status == 404, path


def test_other_web_sites_are_kept_out(server):
    assert ask(server, "/api/model", headers={"Host": "evil.example"})[0] == 403
    for header in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(server, "/api/generate", {}, header)[0] == 403
    assert ask(server, "/api/model", headers={"Host": "localhost"})[0] == 200


def test_uploads_are_not_written_anywhere(server, photo):
    for path, wish in (("tokenize", {}), ("stability", {"snr": 20}), ("edit", {"cells": [3]})):
        assert ask(server, f"/api/{path}", {"image": photo, **wish})[0] == 200
    raw = base64.b64decode(photo)
    written = [path for path in server.scratch.rglob("*") if path.is_file()]
    assert not [path for path in written if raw in path.read_bytes()]

"""A small Hub: repositories with branches and commits in memory, behind the addresses that huggingface_hub asks.

It checks what the real one checks: tokens, checksums of large files, the metadata of a card.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_owner"
LICENSES = {"mit", "apache-2.0", "cc-by-4.0", "other"}


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        state = repr([(branch, message, len(self.commits), *((name, files[name]) for name in sorted(files)))])
        sha = hashlib.sha1(state.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Files whose contents were fetched."""

    def add(self, name: str, folder: Path, private: bool = False) -> Repository:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault(name, Repository(private))
        repository.commit("main", files)
        return repository

    def find(self, name: str, token: str | None) -> Repository:
        found = self.repositories.get(name)
        if found is None or (found.private and token != TOKEN):
            raise Refused(404 if token == TOKEN else 401, "Repository not found", "RepoNotFound")
        return found

    # -- what is asked; each returns JSON values -----------------------------------------------------------------------

    def get_api(self, parts: list[str], token: str | None) -> object:
        repository = self.find("/".join(parts[:2]), token)
        kind, revision = parts[2] if len(parts) > 2 else "revision", parts[3] if len(parts) > 3 else "main"
        sha, files = repository.at(revision)
        if kind == "tree":
            within = "/".join(parts[4:])
            return [_entry(name, data) for name, data in files.items() if name.startswith(within)]
        name = "/".join(parts[:2])
        return {
            "id": name,
            "sha": sha,
            "private": repository.private,
            "siblings": [{"rfilename": file} for file in files],
        }

    def post_api(self, parts: list[str], query: dict[str, list[str]], body: bytes, token: str | None) -> object:
        if parts == ["validate-yaml"]:
            return check_card(json.loads(body)["content"])
        if token != TOKEN:
            raise Refused(401, "Invalid username or password.")
        if parts == ["repos", "create"]:
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            if name in self.repositories:
                raise Refused(409, "You already created this model repo", url=f"{self.url}/{name}")
            private = given.get("private") or given.get("visibility") == "private"
            self.repositories[name] = repository = Repository(bool(private))
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        name, kind, revision = "/".join(parts[1:3]), parts[3], "/".join(parts[4:])
        repository = self.find(name, token)
        if kind == "branch":
            if revision in repository.branches:
                raise Refused(409, "Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            return {}
        if kind == "preupload":
            files = json.loads(body)["files"]
            return {
                "files": [
                    {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if _large(f["path"]) else "regular"}
                    for f in files
                ]
            }
        assert kind == "commit", parts
        return self.commit(name, repository, revision, body, "create_pr" in query)

    def commit(self, name: str, repository: Repository, revision: str, body: bytes, as_request: bool) -> object:
        files = dict(repository.at(revision)[1])
        message = ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            else:
                del files[value["path"]]
        sha = repository.commit("refs/pr/1" if as_request else revision, files, message)
        found = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}
        return {**found, "pullRequestUrl": f"{self.url}/{name}/discussions/1"} if as_request else found


def check_card(text: str) -> object:
    """The head of a README as the Hub wants it.

    Source: https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    head = yaml.safe_load(text.split("---")[1])
    if "license" in head and head["license"] not in LICENSES:
        raise Refused(400, f'"license" must be one of {sorted(LICENSES)}')
    for result in (head.get("model-index") or [{"results": []}])[0]["results"]:
        wanted = (
            result["task"]["type"],
            result["dataset"]["name"],
            result["dataset"]["type"],
            result["metrics"][0]["type"],
        )
        if not all(isinstance(text, str) and text for text in wanted):
            raise Refused(400, '"model-index" lacks a task, a dataset or a metric')
        if not all(isinstance(metric["value"], float) for metric in result["metrics"]):
            raise Refused(400, '"value" must be a number')
    return {"errors": [], "warnings": []}


def _large(path: str) -> bool:
    return path.endswith((".safetensors", ".pt"))


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if _large(name):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/") if part]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        try:
            if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != parts[1]:
                    raise Refused(400, "checksum")
                self.hub.blobs[parts[1]] = body
                self._answer({})
            elif not parts:
                self._answer({})
            elif parts[0] == "api" and self.command == "POST":
                self._answer(self.hub.post_api(parts[1:], parse_qs(address.query), body, token))
            elif parts[0] == "api":
                self._answer(self.hub.get_api(parts[2:], token))
            elif parts[2:] == ["info", "lfs", "objects", "batch"]:
                self._answer(
                    {"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]}
                )
            else:
                self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), token)
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self._answer({"error": str(refusal), **refusal.more}, refusal.status, headers)

    def _upload(self, one: dict[str, object]) -> dict[str, object]:
        there = one["oid"] in self.hub.blobs
        return {**one} if there else {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}

    def _file(self, name: str, revision: str, path: str, token: str | None) -> None:
        sha, files = self.hub.find(name, token).at(revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if self.command == "GET":
            self.hub.asked.append(path)
        digest = (hashlib.sha256 if _large(path) else hashlib.sha1)(files[path]).hexdigest()
        self._answer(files[path], headers={"ETag": f'"{digest}"', "X-Repo-Commit": sha})

    def _answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub on a free port."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Handler,), {"hub": hub})) as http:
        hub.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield hub
        http.shutdown()
        thread.join()


def ask(code: str, endpoint: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python against a Hub. Its client reads its settings when it is imported, so it gets a process of its own."""
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "hf"),
        "DIGIT_CACHE": str(home / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    away = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN")
    env = {key: value for key, value in os.environ.items() if key.upper() not in away}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **own, **more}, capture_output=True, text=True, check=False
    )

"""Downloads from the Hub, against a small one of our own on this machine."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cir_jax.conversion.hub import chosen_files

COMMIT, OLDER = "a" * 40, "b" * 40
FILES = {
    "config.json": b'{"model_type": "clip"}',
    "model.safetensors": bytes(range(256)) * 100_000,
    "pytorch_model.bin": b"never asked for",
    "README.md": b"never asked for",
    "onnx/model.safetensors": b"never asked for",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does about one repository, owner/name; `cut` ends the first answer with weights half-way."""

    asked: list[str]
    cut = False

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith("/api/models/owner/name/revision/"):
            revision = path.rpartition("/")[2]
            sha = {"main": COMMIT, "v1": OLDER}.get(revision, revision)
            known = sha in (COMMIT, OLDER)
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer(
                {"id": "owner/name", "sha": sha, "siblings": siblings} if known else None,
                "RevisionNotFound",
            )
        if path.startswith("/api/models/owner/name/tree/"):
            kinds = {"type": "file", "oid": "0" * 40}
            return self.answer([kinds | {"path": n, "size": len(x)} for n, x in FILES.items()], "")
        if path.startswith("/owner/name/resolve/"):
            _, _, _, _, sha, name = path.split("/", 5)
            return self.file(sha, FILES[name], body)
        self.answer(None, "RepoNotFound")

    def answer(self, value, code):
        data = json.dumps(value or {"error": code}).encode()
        self.send_response(200 if value else 404)
        if not value:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def file(self, sha, data, body):
        start = int(
            self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0] or 0
        )
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body and Hub.cut and len(data) > 1000 and not start:
            Hub.cut = False
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
        elif body:
            self.wfile.write(data[start:])

    def log_message(self, *_):
        pass


PROGRAM = """
import json, sys
from cir_jax.conversion.hub import fetch
try:
    folder, address = fetch(sys.argv[1])
    print(json.dumps([str(folder), address]))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub as `huggingface_hub` sees it in processes that are started now; the cache is empty."""
    Hub.asked, Hub.cut = [], False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield server
    server.shutdown()
    server.server_close()


def fetch(address: str) -> list[str]:
    """[folder, address with the commit], or [name of the error, what it says], of a process of its own."""
    program = [sys.executable, "-c", PROGRAM, address]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def downloaded(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors")}


@pytest.mark.parametrize(
    ("revision", "commit"), [("", COMMIT), ("@v1", OLDER), (f"@{OLDER}", OLDER)]
)
def test_a_repository_is_downloaded_once_at_the_commit_it_names(hub, revision, commit):
    folder, address = fetch(f"hf://owner/name{revision}")
    assert downloaded(Path(folder)) == WANTED
    assert address == f"hf://owner/name@{commit}"
    assert not [
        asked for asked in Hub.asked if "never" in asked or "README" in asked or ".bin" in asked
    ]
    before = len([asked for asked in Hub.asked if asked.startswith("GET /owner")])
    assert fetch(f"hf://owner/name{revision}") == [folder, address]
    assert len([asked for asked in Hub.asked if asked.startswith("GET /owner")]) == before == 2


def test_an_interrupted_download_continues(hub):
    Hub.cut = True
    folder, _ = fetch("hf://owner/name")
    if folder == "ConnectionError":
        folder, _ = fetch("hf://owner/name")
    assert downloaded(Path(folder)) == WANTED
    assert any("bytes=" in asked and "bytes=0-" not in asked for asked in Hub.asked), Hub.asked


def test_without_a_connection_the_cache_serves_or_says_kindly_what_to_do(hub):
    folder, address = fetch("hf://owner/name")
    hub.shutdown()
    hub.server_close()
    assert fetch("hf://owner/name") == fetch(address) == [folder, address]
    name, said = fetch("hf://owner/other")
    assert name == "ConnectionError"
    assert "not in the cache; connect, or download the folder" in said


@pytest.mark.parametrize(
    ("address", "error", "said"),
    [
        ("hf://owner", "ValueError", "expected hf://owner/name"),
        ("hf://owner/name@", "ValueError", "expected hf://owner/name"),
        ("hf://owner/name/file.bin", "ValueError", "expected hf://owner/name"),
        ("hf://../etc@x", "ValueError", "expected hf://owner/name"),
        ("hf://owner/name@v9", "FileNotFoundError", "no such revision"),
        ("hf://nobody/name", "FileNotFoundError", "no such repository"),
    ],
)
def test_addresses_that_lead_nowhere(hub, address, error, said):
    found = fetch(address)
    assert found[0] == error and said in found[1], found


def test_files_of_the_first_kind_of_weights_are_chosen():
    sharded = ["model-00001.safetensors", "model.safetensors.index.json", "config.json", "a.bin"]
    assert chosen_files("hf://o/n", sharded) == sharded[:3]
    assert chosen_files("hf://o/n", ["x.pt", "vocab.txt", "b.txt"]) == ["x.pt", "vocab.txt"]
    with pytest.raises(ValueError, match=r"has no weights .* among its files a.txt"):
        chosen_files("hf://o/n", ["a.txt", "onnx/model.safetensors"])

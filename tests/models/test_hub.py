"""Fetching a model from a hub that breaks in every way: tries again, one message, never half."""

import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from conftest import write_model

from oel_jax.base.errors import UserError
from oel_jax.models import bundled, hub
from oel_jax.models.weight_files import incomplete

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "a" * 40
FILES = ("generation_config.json", "tokenizer.json")
CARELESS = (0.0, 0.0)  # no waits between tries


class Hub(http.server.ThreadingHTTPServer):
    """A hub on this machine with one model; `faults` says what to do instead of answering.

    `faults`: file name, or 'info' and 'tree' for the two requests of the API, -> list of faults,
    taken one a request: a status, 'cut' (the connection is reset after half the bytes), 'stall'
    (nothing comes after half the bytes), 'html' (a login page). The last one stays.
    """

    daemon_threads = True

    def __init__(self, model: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents = {path.name: path.read_bytes() for path in model.iterdir()}
        self.faults: dict[str, list] = {}
        self.asked: Counter = Counter()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, name: str):
        self.asked[name] += 1
        left = self.faults.get(name, [None])
        return left.pop(0) if len(left) > 1 else left[0]

    def stop(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):  # clients that go away are part of the tests
        pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path, files = self.path.split("?")[0], self.server.contents
        if "/tree/" in path:
            listed = [
                {"type": "file", "path": name, "size": len(text), "oid": "e" * 40}
                for name, text in files.items()
            ]
            return self.give("tree", json.dumps(listed).encode(), "application/json", body)
        if "/api/models/" in path:
            siblings = [{"rfilename": name} for name in files]
            info = {"_id": "1", "id": "own/model", "sha": COMMIT, "siblings": siblings}
            return self.give("info", json.dumps(info).encode(), "application/json", body)
        name = path.rsplit("/", 1)[1]
        return self.give(name, files[name], "application/octet-stream", body)

    def give(self, name: str, content: bytes, kind: str, body: bool) -> None:
        # Requests for the size alone are answered, so that the download itself is what breaks.
        is_file = name in self.server.contents
        fault = self.server.fault(name) if body or not is_file else None
        if isinstance(fault, int):
            self.send_response(fault)
            codes = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}
            if fault in codes and not is_file:
                self.send_header("X-Error-Code", codes[fault])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "html":
            content, kind = b"<html>please log in to this network</html>", "text/html"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{name}"')
        self.end_headers()
        if not body:
            return
        if fault not in ("cut", "stall"):
            self.wfile.write(content)
            return
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait(60)
        reset = struct.pack("ii", 1, 0)  # so that the other side sees a reset, not an end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("hub") / "model", "qwen3", shards=2)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def served(model, monkeypatch):
    """A hub, and a client that neither waits long for bytes nor between its own tries."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.25)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    server = Hub(model)
    yield server
    server.stop()


def fetch(served: Hub, cache: Path, waits=CARELESS) -> Path:
    return hub.fetch("own/model", FILES, waits=waits, endpoint=served.url, cache_dir=cache)


def assert_whole(directory: Path, model: Path) -> None:
    names = {"config.json", "generation_config.json", "tokenizer.json"}
    names |= {path.name for path in model.glob("model*")}
    assert {path.name for path in directory.iterdir()} == names
    for name in names:
        assert (directory / name).read_bytes() == (model / name).read_bytes()


def test_a_model_is_fetched_once(served, model, tmp_path):
    directory = fetch(served, tmp_path)
    assert_whole(directory, model)
    assert hub.revision(directory) == COMMIT
    assert hub.revision(model) is None
    before = served.asked["model-00001-of-00002.safetensors"]
    assert fetch(served, tmp_path) == directory
    assert served.asked["model-00001-of-00002.safetensors"] == before == 1


def test_names_that_are_found_from_any_directory(tmp_path, monkeypatch):
    """What an adapter calls its base; PEFT would ask the hub for a relative path."""
    from oel_jax.models.bundled import resolve_bundled
    from oel_jax.models.huggingface import resolve

    snapshot = tmp_path / "models--own--model" / "snapshots" / COMMIT
    assert hub.lasting_name("own/model", snapshot) == ("own/model", COMMIT)
    assert hub.lasting_name(str(snapshot), snapshot) == (str(snapshot), None)
    tiny = str(bundled.model_dir("tiny").absolute())
    assert hub.lasting_name("nano:tiny", resolve(resolve_bundled("nano:tiny"))) == (tiny, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "round_001" / "policy").mkdir(parents=True)
    policy = tmp_path / "round_001" / "policy"
    relative = "round_001/policy"
    assert hub.lasting_name(relative, resolve(relative)) == (str(policy), None)
    assert hub.lasting_name("own/model", Path(relative)) == (str(policy), None)


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("info", [500, 503]),
        ("info", ["cut", "cut"]),
        ("info", ["html"]),
        ("tree", ["cut"]),
        ("config.json", ["cut"]),
        (SHARD, ["cut"] * 8),
        (SHARD, ["stall"] * 7),
        (SHARD, [500, 429, 502]),
    ],
    ids=str,
)
def test_what_passes_is_tried_again(name, faults, served, model, tmp_path, capsys):
    served.faults[name] = [*faults, None]
    waits = (0.0,) * 12
    assert_whole(fetch(served, tmp_path, waits), model)
    assert served.asked[name] > len(faults)
    said = capsys.readouterr().err
    assert said.count("note: fetching own/model failed") <= len(faults)


@pytest.mark.parametrize("fault", ["cut", "stall", 500, 503])
def test_what_stays_ends_in_one_message_and_no_half_model(
    fault, served, model, tmp_path, capsys, monkeypatch
):
    served.faults[SHARD] = [fault]
    with pytest.raises(UserError, match="own/model is neither a local.* in 3 tries .*network"):
        fetch(served, tmp_path)
    assert capsys.readouterr().err.count("next try in 0 s") == 2
    # Neither without a network ...
    found = list(tmp_path.glob("**/snapshots/*/config.json"))
    assert len(found) == 1 and incomplete(found[0].parent)
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match="own/model .*HF_HUB_OFFLINE"):
            fetch(served, tmp_path)
        # ... nor in a cache of an older client, which kept no list of the files
        older = shutil.copytree(tmp_path, tmp_path / "older", symlinks=True)
        shutil.rmtree(older / "models--own--model" / "trees")
        with pytest.raises(UserError, match=f"not whole in the cache: .*{SHARD}"):
            fetch(served, older)
    # and the next start with a network finishes it
    served.faults.clear()
    assert_whole(fetch(served, tmp_path), model)


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "gated.*hf auth login"), (403, "gated"), (404, "check the name"), (400, "status 400")],
)
def test_what_cannot_pass_is_not_tried_again(status, said, served, tmp_path, capsys):
    served.faults["info"] = [status]
    with pytest.raises(UserError, match=f"own/model .*{said}"):
        fetch(served, tmp_path)
    assert served.asked["info"] == 1
    assert "next try" not in capsys.readouterr().err


def test_a_whole_copy_serves_when_the_hub_is_gone(served, model, tmp_path, capsys):
    directory = fetch(served, tmp_path)
    served.faults |= {"info": ["cut"], "tree": ["cut"]}
    assert fetch(served, tmp_path) == directory
    assert "the hub cannot be reached" in capsys.readouterr().err


def test_nobody_listens(served, tmp_path):
    served.stop()
    with pytest.raises(UserError, match="in 3 tries"):
        fetch(served, tmp_path)


def test_whoever_waits_is_told_soon(served, tmp_path, capsys):
    """What fails slowly is tried less often: the client has tried it several times already."""
    served.faults["info"] = [500]
    with pytest.raises(UserError, match="in 2 tries"):
        hub.fetch(
            "own/model",
            FILES,
            waits=(0.0, 999.0),
            patience=99.0,
            endpoint=served.url,
            cache_dir=tmp_path,
        )
    assert capsys.readouterr().err.count("next try") == 1
    assert sum(hub.WAITS) < hub.PATIENCE < 30  # quick failures have all their tries


def test_small_files_come_before_weights(served, tmp_path):
    """Else a cut-off download could hold all weights but, say, not the stop ids."""
    served.faults["generation_config.json"] = [500]
    with pytest.raises(UserError, match="in 3 tries"):
        fetch(served, tmp_path)
    assert not list(tmp_path.glob("**/*.safetensors"))
    assert not served.asked["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("fault", [OSError(28, "no space left"), PermissionError(13, "denied")])
def test_a_full_or_closed_disk_is_not_the_network(fault, served, tmp_path, monkeypatch):
    import huggingface_hub

    def full(*_, **__):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UserError, match="free some space, or set HF_HOME"):
        fetch(served, tmp_path)


def _all(kind: type) -> list[type]:
    return [kind, *(one for child in kind.__subclasses__() for one in _all(child))]


@pytest.mark.parametrize("kind", _all(httpx2.HTTPError) + [httpx2.InvalidURL], ids=str)
def test_every_error_of_the_client_becomes_a_message(kind, served, tmp_path, monkeypatch):
    import huggingface_hub

    request = httpx2.Request("GET", served.url)
    response = httpx2.Response(500, request=request)

    def fail(*_, **__):
        for more in ({}, {"request": request}, {"request": request, "response": response}):
            try:
                error = kind("broken", **more)
                break
            except TypeError:
                continue
        else:
            error = kind("broken", response=response)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="own/model"):
        fetch(served, tmp_path)


def test_the_command_ends_with_status_2(served, tmp_path):
    """From the command line, with a connection that is cut again and again."""
    served.faults[SHARD] = [404]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "oel_jax.main",
            f"--config={ROOT / 'configs' / 'nano_frozen_lake.py'}",
            f"--workdir={tmp_path / 'run'}",
            "--config.model.path=own/model",
            "--config.compilation_cache=off",
        ],
        env=os.environ
        | {"HF_ENDPOINT": served.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error: own/model could not be fetched: the hub answers with status 404" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()

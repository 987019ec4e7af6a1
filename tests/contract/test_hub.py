"""Pushing by ModelScope's real client to a loopback server that plays the hub as far as the client needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import pytest
from typer.testing import CliRunner

from namesake import hub
from namesake.cli import app
from namesake.errors import HubError, InputError
from tests.contract.test_versions import version
from tests.json_page import assert_as_shown

WEIGHTS = b"w" * 1000


class Hub(ThreadingHTTPServer):
    """A hub that takes what the token ``good`` brings."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.made: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"


class Asked(BaseHTTPRequestHandler):
    """One call."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        """Make a repository, tell where blobs go, commit."""
        body = json.loads(self._body())
        if self.headers["authorization"] != "Bearer good":
            self._answer(401, {"Code": 10010205001, "Message": "invalid token", "Success": False})
        elif self.path == "/api/v1/models":
            there = bool(self.server.made)
            self.server.made.append(body)
            if there:
                self._answer(400, {"Code": 10010205005, "Message": "the model already exists", "Success": False})
            else:
                self._data({})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._data({"objects": [{**one, "actions": self._upload(one["oid"])} for one in body["objects"]]})
        elif self.path.endswith("/repos/models/me/ccb/commit/master"):
            for one in body["actions"]:
                inline = one["type"] == "normal"
                self.server.files[one["path"]] = (
                    base64.b64decode(one["content"]) if inline else self.server.blobs[one["sha256"]]
                )
            self._data({})
        else:
            self._answer(404, {"Code": 404, "Message": self.path, "Success": False})

    def do_PUT(self) -> None:
        """Take a blob."""
        self.server.blobs[self.path.rpartition("/")[2]] = self._body()
        self._data({})

    def _upload(self, oid: str) -> dict[str, dict[str, str]]:
        return {"upload": {"href": f"{self.server.url}/blob/{oid}"}}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["content-length"] or 0))

    def _data(self, data: object) -> None:
        self._answer(200, {"Code": 200, "Success": True, "Data": data, "Message": ""})

    def _answer(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub that the client is pointed at."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported version."""
    made = tmp_path / "exported"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n# 踩踩背\n", encoding="utf-8")
    (made / "model.safetensors").write_bytes(WEIGHTS)
    return made


def test_a_folder_arrives_whole_in_a_private_repository(there: Hub, folder: Path) -> None:
    assert hub.push(folder, "me/ccb", token="good", license_="mit") == f"{there.url}/models/me/ccb"
    assert there.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hashlib.sha256(WEIGHTS).hexdigest() in there.blobs
    first = there.made[0]
    assert (first["Path"], first["Name"], first["License"], first["Visibility"]) == ("me", "ccb", "mit", 1)
    (folder / "README.md").write_text("changed", encoding="utf-8")
    hub.push(folder, "me/ccb", token="good")  # a repository that is there already
    assert there.files["README.md"] == b"changed"


def test_a_wrong_token_is_one_clear_message(there: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match="ModelScope did not take me/ccb") as raised:
        hub.push(folder, "me/ccb", token="bad")
    assert "MODELSCOPE_API_TOKEN" in raised.value.mend
    assert "bad" not in str(raised.value)
    assert there.files == {}


@pytest.mark.parametrize("wrong", ["ccb", "/ccb", "me/", "a/b/c", "https://modelscope.cn/me/ccb", "me/c b"])
def test_what_is_no_repository_is_told_before_anything_is_exported(wrong: str) -> None:
    with pytest.raises(InputError, match="is no repository"):
        hub.check_repository(wrong)


def test_the_command_exports_and_pushes(there: Hub, client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    target = tmp_path / "out"
    words = ["export", "models:/ccb/1", str(target), "--adapter", "--push", "me/ccb"]
    done = CliRunner().invoke(app, words, env={"MODELSCOPE_API_TOKEN": "good"})
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(target), f"{there.url}/models/me/ccb"]
    assert sorted(there.files) == ["README.md", "adapter_config.json", "provenance.json"]
    assert b"library_name: peft" in there.files["README.md"]
    assert there.made[0]["License"] == "other"  # the base's is not known
    words[2] = str(tmp_path / "again")
    done = CliRunner().invoke(app, [*words, "--json"], env={"MODELSCOPE_API_TOKEN": "good"})
    assert_as_shown("export", json.loads(done.stdout))
    assert json.loads(done.stdout) == {"folder": words[2], "pushed": f"{there.url}/models/me/ccb"}


def test_without_a_repository_nothing_is_exported(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    version(client, tmp_path, 1)
    done = CliRunner().invoke(app, ["export", "models:/ccb/1", str(tmp_path / "out"), "--push", "ccb"])
    assert isinstance(done.exception, InputError)
    assert not (tmp_path / "out").exists()

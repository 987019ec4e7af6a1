"""vLLM as a process of its own on a private socket: start, wait until it answers, change its weights, drain, stop.

The only starter of vLLM.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from namesake.errors import InputError, ServingError
from namesake.messages import tr
from namesake.process import end_with_parent, has_gpu, multiplies_bf16
from namesake_serving import vllm_plugin, vllm_preload
from namesake_serving.settings import Settings

MODEL = "namesake"
"""What the engine calls its model; the names that clients use are the gateway's business."""

_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_KILL_SECONDS = 10
_SWAP_SECONDS = 600
_TAIL_BYTES = 1 << 16
_CPU_CACHE_BYTES = 1 << 30
_SPARE = 4
"""Requests that an engine of adapters takes beside those of clients: the golden questions of a version."""
_HALF_A_GPU = 0.45
"""Of its memory, for each of two engines on it; vLLM takes nine tenths by itself."""
_CGROUP = Path("/sys/fs/cgroup")

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank`` (``vllm/config/lora.py``)."""


class Engine:
    """One running vLLM server with one model, reached through a Unix socket that only this user may open."""

    def __init__(self, process: subprocess.Popen[bytes], socket_path: Path, log: Path, grace: int) -> None:
        self._process, self.socket, self._log, self._grace = process, socket_path, log, grace

    @property
    def pid(self) -> int:
        """Process id of the server, leader of a session of its own."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether the server runs. It exits with 0 also when its engine was killed, so any end is a failure."""
        return self._process.poll() is None

    def wait_ready(self, seconds: float, tick: Callable[[float], None] = lambda _: None) -> None:
        """Wait until the engine answers.

        Raises:
            ServingError: it died or took longer; the message has the end of its log.
        """
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < seconds:
            if not self.alive():
                raise ServingError(
                    tr(
                        "vLLM ended while starting (exit {returncode}).\n{tail}",
                        returncode=self._process.returncode,
                        tail=self.tail(),
                    )
                )
            with suppress(OSError, http.client.HTTPException):
                if self._request("GET", "/health", timeout=2)[0] == 200:
                    return
            tick(waited)
            time.sleep(0.2)
        raise ServingError(
            tr("vLLM did not answer within {seconds:.0f} s.\n{tail}", seconds=seconds, tail=self.tail()),
            mend=tr("Its log is {log}.", log=self._log),
        )

    def change_weights(self, weights: Path) -> float:
        """Load other weights of the same shape in place; seconds it took. Running answers finish first.

        Raises:
            ServingError: the engine refused or died.
        """
        try:
            status, body = self._request("POST", vllm_plugin.ROUTE, {"path": str(weights)}, timeout=_SWAP_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(
                tr("The engine died while it loaded {weights}.\n{tail}", weights=weights, tail=self.tail())
            ) from error
        if status != 200:
            raise ServingError(
                tr(
                    "The engine refused the weights in {weights} ({status}: {body!r}).",
                    weights=weights,
                    status=status,
                    body=body[:300],
                )
            )
        try:
            return float(json.loads(body)["seconds"])
        except (ValueError, TypeError, LookupError) as error:
            raise ServingError(
                tr("The engine answered the change of weights with {body!r}.", body=body[:300])
            ) from error

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter beside those that are in. The folder has to stay as long as the name is known: an engine that
        needed the place for another reads it again, and dies where it is gone.

        Raises:
            ServingError: the engine refused or died.
        """
        self._adapter("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; running answers by it finish.

        Raises:
            ServingError: it was not there, or the engine died.
        """
        self._adapter("/v1/unload_lora_adapter", {"lora_name": name})

    def _adapter(self, path: str, body: dict[str, str]) -> None:
        try:
            status, said = self._request("POST", path, body, timeout=_SWAP_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(
                tr("The engine died over the adapter {name}.\n{tail}", name=body["lora_name"], tail=self.tail())
            ) from error
        if status != 200:
            raise ServingError(
                tr(
                    "The engine refused the adapter {name} ({status}: {said!r}).",
                    name=body["lora_name"],
                    status=status,
                    said=said[:300],
                )
            )

    def memory(self) -> int:
        """Bytes that its processes hold, weights and cache included."""
        total = 0
        with suppress(psutil.Error):
            front = psutil.Process(self.pid)
            for one in (front, *front.children(recursive=True)):
                with suppress(psutil.Error):
                    total += one.memory_info().rss
        return total

    def answer(
        self, messages: list[dict[str, str]], max_tokens: int, timeout: float = 120, *, model: str = MODEL
    ) -> str:
        """The greedy reply, asked past the gateway.

        Raises:
            ServingError: there is none.
        """
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        status, said = self._ask("/v1/chat/completions", body, timeout)
        try:
            if status == 200:
                return str(json.loads(said)["choices"][0]["message"]["content"] or "")
        except (ValueError, TypeError, LookupError):
            pass
        raise ServingError(tr("The engine answers {status}: {said!r}.", status=status, said=said[:300]))

    def gaps(
        self, messages: list[dict[str, str]], reply: str, timeout: float = 120, *, model: str = MODEL
    ) -> list[float]:
        """How much less probable than its own choice the engine finds each token of a reply, given those before it:
        nats, 0 where it would say the same. All tokens are read at once, where a reply is written one after the other.

        Nothing where the engine does not tell.

        Raises:
            ServingError: it does not answer.
        """
        asked = {"model": model, "messages": messages, "add_generation_prompt": True}
        status, prompt = self._ask("/tokenize", asked, timeout)
        if status != 200:
            return []
        whole = {
            "model": model,
            "messages": [*messages, {"role": "assistant", "content": reply}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "max_tokens": 1,
            "temperature": 0,
        }
        status, said = self._ask("/v1/chat/completions", whole, timeout)
        if status != 200:
            return []
        try:
            begin, told = json.loads(prompt)["count"], json.loads(said)
            found = zip(told["prompt_token_ids"][begin:], told["prompt_logprobs"][begin:], strict=True)
            return [max(one["logprob"] for one in at.values()) - at[str(token)]["logprob"] for token, at in found]
        except (ValueError, TypeError, LookupError, AttributeError):
            return []

    def _ask(self, path: str, body: object, timeout: float) -> tuple[int, bytes]:
        try:
            return self._request("POST", path, body, timeout=timeout)
        except (OSError, http.client.HTTPException) as error:
            raise ServingError(
                tr("The engine does not answer ({error}).\n{tail}", error=error, tail=self.tail())
            ) from error

    def stop(self) -> None:
        """Let running answers finish, then leave no process of its session behind."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._grace + _KILL_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End every process of the session at once."""
        # The engine core and its workers live in the session: when the front died of itself they are orphans.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_KILL_SECONDS)
        self.socket.unlink(missing_ok=True)

    def tail(self, lines: int = 20) -> str:
        """The end of the log."""
        with suppress(OSError), self._log.open("rb") as stream:
            stream.seek(max(stream.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])
        return ""

    def _request(self, method: str, path: str, body: object = None, *, timeout: float) -> tuple[int, bytes]:
        connection = _Local(self.socket, timeout)
        try:
            sent = None if body is None else json.dumps(body).encode()
            connection.request(method, path, sent, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


class _Local(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True)
class Adapters:
    """Room for LoRA adapters in an engine: how many at a time, and of which rank at most."""

    count: int
    rank: int


class Preloaded:
    """vLLM's server, importing: it is told what to serve when that is known."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def tell(self, words: list[str]) -> bool:
        """Its command line; whether it was there to take it."""
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin as stdin:
            stdin.write(json.dumps(words).encode() + b"\n")
        return self.process.poll() is None

    def kill(self) -> None:
        """Nobody needs it."""
        if self.process.poll() is None:
            with suppress(OSError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(_KILL_SECONDS)


@contextmanager
def preloaded(settings: Settings, folder: Path) -> Iterator[Preloaded | None]:
    """vLLM's server from now on, for the first :func:`start` to take; none where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        yield None
        return
    words = [sys.executable, "-m", vllm_preload.__name__, _ENTRY]
    ready = Preloaded(_popen(words, settings, folder, "engine-1", stdin=subprocess.PIPE))
    try:
        yield ready
    finally:
        ready.kill()


def start(
    weights: Path,
    settings: Settings,
    folder: Path,
    name: str,
    adapters: Adapters | None = None,
    ready: Preloaded | None = None,
) -> Engine:
    """Start vLLM on the weights; its socket, log and plugin lie in ``folder``, which only this user may enter.

    Args:
        ready: what is there already, in the same folder and under the same name.

    Raises:
        ServingError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            "vLLM is not installed in this environment.",
            mend="`make setup` installs it; elsewhere `pip install --no-deps -r requirements/cpu.txt` (or gpu.txt).",
        )
    address = folder / f"{name}.sock"
    words = command(weights, address, settings, gpu=has_gpu(), adapters=adapters)
    if ready is not None and ready.tell(words[3:]):  # what comes after `python -m MODULE`
        process = ready.process
    else:
        process = _popen(words, settings, folder, name)
    return Engine(process, address, folder / f"{name}.log", settings.shutdown_seconds)


def _popen(
    words: list[str], settings: Settings, folder: Path, name: str, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    runtime = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if settings.mode == "adapter" else {}
    with (folder / f"{name}.log").open("wb") as stream:
        return subprocess.Popen(
            words,
            env=environment(os.environ, plugin_folder(folder), gpu=has_gpu()) | runtime,
            stdin=stdin,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def command(
    weights: Path, address: Path, settings: Settings, *, gpu: bool, adapters: Adapters | None = None
) -> list[str]:
    """vLLM's command line."""
    words = [sys.executable, "-m", _ENTRY, "--model", str(weights), "--served-model-name", MODEL]
    words += ["--uds", str(address), "--shutdown-timeout", str(settings.shutdown_seconds)]
    words.append("--disable-uvicorn-access-log")  # a line a request would fill the disk; the gateway has its own
    # Also of a reply for which the client names no bound.
    most = min(settings.max_tokens, _own_bound(weights) or settings.max_tokens)
    words += ["--override-generation-config", json.dumps({"max_new_tokens": most})]
    # It finds every fault of a schema before the engine has it; xgrammar, the default, fails inside of it with a 500.
    words += ["--structured-outputs-config", json.dumps({"backend": "guidance"})]
    if settings.max_streams or not gpu:
        # A version that comes in as an adapter is proved beside whatever is being answered, and waits for none of it.
        words += ["--max-num-seqs", str(settings.streams + (_SPARE if adapters is not None else 0))]
    if not gpu:
        words += ["--kv-cache-memory-bytes", str(_CPU_CACHE_BYTES)]
        # Four to six times as fast there as bfloat16; an argument of the user's comes later and wins.
        words += [] if multiplies_bf16() else ["--dtype", "float32"]
    elif settings.standby:
        words += ["--gpu-memory-utilization", str(_HALF_A_GPU)]
    if settings.eager:
        words.append("--enforce-eager")
    if adapters is not None:
        # As many places in the batch as names: none is ever put out for another that is registered.
        words += ["--enable-lora", "--max-loras", str(adapters.count), "--max-cpu-loras", str(adapters.count)]
        words += ["--max-lora-rank", str(room_for(adapters.rank))]
    return [*words, *settings.engine_args]


def _own_bound(weights: Path) -> int:
    """The most tokens of a reply by the version's own generation settings; 0: they name no bound."""
    with suppress(OSError, ValueError, AttributeError):
        most = json.loads((weights / "generation_config.json").read_text(encoding="utf-8")).get("max_new_tokens")
        return most if type(most) is int and most > 0 else 0
    return 0


def room_for(rank: int) -> int:
    """The least rank that vLLM can make room for and that is as great.

    Raises:
        ServingError: there is none.
    """
    found = next((one for one in RANKS if one >= rank), None)
    if found is None:
        raise ServingError(
            tr("vLLM serves adapters of rank {most} at most, not {rank}.", most=RANKS[-1], rank=rank),
            mend="Use --mode merged.",
            kind="rank",
        )
    return found


def available_memory() -> int:
    """Bytes that processes can still have, on this machine and in this container."""
    free = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # not in a container, or one without a limit ("max")
        most, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free.append(most - used + int(kept.get("inactive_file", 0)))
    return int(min(free))


def environment(inherited: os._Environ[str] | dict[str, str], plugin: Path, *, gpu: bool) -> dict[str, str]:
    """Environment of the server; on a CPU the settings that start fast and use every core (docs/lab-notes.md)."""
    ours = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    plugins = [vllm_plugin.NAME, *filter(None, inherited.get("VLLM_PLUGINS", "").split(","))]
    if not gpu:
        ours |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        }
    paths = [str(plugin), str(Path(__file__).parents[1]), *filter(None, [inherited.get("PYTHONPATH")])]
    return {**ours, **inherited, "VLLM_PLUGINS": ",".join(plugins), "PYTHONPATH": os.pathsep.join(paths)}


_SOCKETS_NAME = 50
"""Bytes that a socket's path has behind the folder of temporary files: our own or vLLM's, with a margin."""

_SOCKETS_PATH = 107
"""Bytes that it may have in all (``sun_path``, unix(7))."""


def make_room_for_sockets() -> None:
    """Have temporary folders, of this process and of what it starts, where Unix sockets in them can be.

    That is ``/tmp`` where ``TMPDIR`` is too long a path.

    Raises:
        InputError: there they cannot be.
    """
    given, other = tempfile.gettempdir(), "/tmp"
    if len(os.fsencode(given)) + _SOCKETS_NAME <= _SOCKETS_PATH:
        return
    if not os.access(other, os.W_OK | os.X_OK):
        raise InputError("TMPDIR", given, "is too long for the paths of Unix sockets", mend="Give a shorter folder.")
    os.environ["TMPDIR"] = tempfile.tempdir = other


def plugin_folder(folder: Path) -> Path:
    """A folder for ``PYTHONPATH`` in which Python finds our vLLM plugin, also where namesake is not installed."""
    info = folder / "plugin" / "namesake_vllm-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: namesake-vllm\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        f"[vllm.endpoint_plugins]\n{vllm_plugin.NAME} = {vllm_plugin.__name__}:Plugin\n"
        f"[vllm.general_plugins]\n{vllm_plugin.NAME} = {vllm_plugin.__name__}:better_adapters\n",
        encoding="utf-8",
    )
    return info.parent

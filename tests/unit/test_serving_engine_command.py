"""How vLLM is started, spoken to and ended: its command line, its environment, its socket, its processes."""

from __future__ import annotations

import asyncio
import http.server
import importlib.machinery
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from namesake import registry
from namesake.errors import InputError, RegistryError, ServingError
from namesake.process import hurry
from namesake.registry import Version
from namesake_serving import __main__ as command_line
from namesake_serving import engine, settings, store, vllm_plugin
from namesake_serving.__main__ import choose, listen
from namesake_serving.engine import Adapters, Engine
from namesake_serving.settings import Settings

WEIGHTS = Path("/versions/ccb v3/模型")
ADDRESS = Path("/tmp/x y/engine-1.sock")
PLUGIN = Path("/tmp/x y/plugin")
CCB = Version("ccb", 3, "run", "source", "READY", {}, 0)


def words(given: Settings | None = None, *, gpu: bool = False) -> list[str]:
    """The command line."""
    return engine.command(WEIGHTS, ADDRESS, given or settings.read(), gpu=gpu)


def after(line: list[str], word: str) -> str:
    """What stands after the word, which stands there once."""
    assert line.count(word) == 1, line
    return line[line.index(word) + 1]


def environment(inherited: dict[str, str] | None = None, *, gpu: bool = False) -> dict[str, str]:
    """The server's environment."""
    return engine.environment(inherited or {}, PLUGIN, gpu=gpu)


def test_no_line_a_request_fills_the_disk_and_the_end_of_a_long_log_is_read_alone(tmp_path: Path) -> None:
    assert "--disable-uvicorn-access-log" in words()
    log = tmp_path / "engine.log"
    log.write_bytes(b"x" * 1_000_000 + "踩\n".encode() * 50_000 + b"the\nend\n")
    one = Engine(cast(Any, None), tmp_path / "socket", log, 0)
    assert one.tail(2) == "the\nend"
    assert len(one.tail(1_000_000).encode()) <= 1 << 16
    log.write_bytes(b"x" * 1_000_000)
    assert set(one.tail()) == {"x"}


def test_the_server_is_this_pythons_and_not_the_broken_vllm_command() -> None:
    assert words()[:2] == [sys.executable, "-m"]
    assert words()[2].startswith("vllm.entrypoints.")


def test_the_folder_of_weights_is_one_word_whatever_is_in_it() -> None:
    assert after(words(), "--model") == str(WEIGHTS)


def test_the_engine_has_one_name_and_that_is_not_the_clients_business() -> None:
    line = words()
    assert after(line, "--served-model-name") == engine.MODEL
    assert line[line.index(engine.MODEL) + 1].startswith("--")


@pytest.mark.parametrize("gpu", [False, True])
def test_the_engine_listens_on_its_socket_and_on_no_port(gpu: bool) -> None:
    line = words(settings.read(host="0.0.0.0", port=9000), gpu=gpu)
    assert after(line, "--uds") == str(ADDRESS)
    assert not {"--host", "--port", "0.0.0.0", "9000", "--api-key"} & set(line)


def test_the_time_to_finish_is_the_setting() -> None:
    assert after(words(settings.read(shutdown_seconds=7)), "--shutdown-timeout") == "7"


def test_on_a_cpu_memory_and_streams_are_bounded() -> None:
    line = words(settings.read(max_streams=5))
    assert after(line, "--max-num-seqs") == "5"
    assert int(after(line, "--kv-cache-memory-bytes")) == 1 << 30


@pytest.mark.parametrize("gpu", [False, True])
def test_a_reply_is_bounded_also_where_the_client_names_no_bound(gpu: bool) -> None:
    line = words(settings.read(max_tokens=77), gpu=gpu)
    assert json.loads(after(line, "--override-generation-config")) == {"max_new_tokens": 77}


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ('{"max_new_tokens": 50}', 50),
        ('{"max_new_tokens": 1000}', 77),
        *((text, 77) for text in ('{"max_new_tokens": 0}', '{"max_new_tokens": true}', "{}", "[]", "{", "")),
    ],
)
def test_a_version_whose_own_settings_bound_its_replies_keeps_that_bound(tmp_path: Path, text: str, most: int) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    line = engine.command(tmp_path, ADDRESS, settings.read(max_tokens=77), gpu=False)
    assert json.loads(after(line, "--override-generation-config")) == {"max_new_tokens": most}


@pytest.mark.parametrize("gpu", [False, True])
def test_schemas_are_followed_by_what_refuses_a_bad_one(gpu: bool) -> None:
    assert json.loads(after(words(gpu=gpu), "--structured-outputs-config")) == {"backend": "guidance"}


@pytest.mark.parametrize("gpu", [False, True])
def test_adapters_have_places_in_which_a_new_one_is_proved_while_all_others_answer(gpu: bool) -> None:
    room = engine.Adapters(2, 8)
    line = engine.command(WEIGHTS, ADDRESS, settings.read(max_streams=5), gpu=gpu, adapters=room)
    assert after(line, "--max-num-seqs") == "9"


def test_streams_that_were_asked_for_hold_on_a_gpu_too() -> None:
    assert after(words(settings.read(max_streams=5), gpu=True), "--max-num-seqs") == "5"


def test_on_a_gpu_vllms_own_defaults_hold() -> None:
    line = words(gpu=True)
    assert "--max-num-seqs" not in line
    assert "--kv-cache-memory-bytes" not in line


@pytest.mark.parametrize("gpu", [False, True])
def test_eager_is_told_when_it_is_asked_for(gpu: bool) -> None:
    assert "--enforce-eager" in words(settings.read(eager=True), gpu=gpu)
    assert "--enforce-eager" not in words(gpu=gpu)


def test_arguments_of_the_user_come_last_so_that_they_win() -> None:
    mine = ("--max-num-seqs=99", "--dtype=float32", "--x=$(touch x) 'a'")
    assert words(settings.read(engine_args=mine))[-3:] == list(mine)


def test_without_adapters_the_engine_has_no_room_for_any() -> None:
    assert "--enable-lora" not in words()


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (512, 512)])
def test_with_adapters_none_is_ever_put_out_for_another_and_the_rank_is_one_that_vllm_takes(
    rank: int, room: int
) -> None:
    line = engine.command(WEIGHTS, ADDRESS, settings.read(), gpu=False, adapters=Adapters(5, rank))
    assert "--enable-lora" in line
    assert [after(line, word) for word in ("--max-loras", "--max-cpu-loras", "--max-lora-rank")] == [
        "5",
        "5",
        str(room),
    ]


def test_a_rank_that_vllm_has_no_room_for_is_told_of() -> None:
    with pytest.raises(ServingError, match="at most, not 513") as caught:
        engine.room_for(513)
    assert "--mode merged" in caught.value.mend


def test_what_memory_is_free_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_CGROUP", tmp_path)
    machine = engine.available_memory()
    assert machine > 1 << 20
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 5\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf-8")
    assert engine.available_memory() == 150
    (tmp_path / "memory.max").write_text("max", encoding="utf-8")
    assert engine.available_memory() == pytest.approx(machine, rel=0.5)


def test_on_a_cpu_the_environment_starts_fast_and_uses_every_core() -> None:
    found = environment()
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_USE_AOT_COMPILE"] == "0"
    assert found["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"


def test_on_a_gpu_the_environment_leaves_the_engine_as_it_is() -> None:
    assert not any(name.startswith(("VLLM_ENABLE", "VLLM_USE", "VLLM_CPU")) for name in environment(gpu=True))


@pytest.mark.parametrize("gpu", [False, True])
def test_our_plugin_is_loaded_no_other_one_and_nothing_is_told_to_anybody(gpu: bool) -> None:
    found = environment(gpu=gpu)
    assert found["VLLM_PLUGINS"] == vllm_plugin.NAME
    assert (found["VLLM_NO_USAGE_STATS"], found["DO_NOT_TRACK"]) == ("1", "1")
    assert "VLLM_SERVER_DEV_MODE" not in found


def test_what_the_user_has_set_wins_and_the_rest_is_inherited() -> None:
    inherited = {"VLLM_USE_AOT_COMPILE": "1", "PATH": "/bin", "HF_HOME": "/踩"}
    found = environment(inherited)
    assert {key: found[key] for key in inherited} == inherited
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert inherited == {"VLLM_USE_AOT_COMPILE": "1", "PATH": "/bin", "HF_HOME": "/踩"}


@pytest.mark.parametrize("mine", ["mine", "mine,other", ""])
def test_plugins_of_the_user_are_loaded_beside_ours(mine: str) -> None:
    found = environment({"VLLM_PLUGINS": mine})["VLLM_PLUGINS"].split(",")
    assert set(found) - {""} == {vllm_plugin.NAME, *mine.split(",")} - {""}


def test_the_plugin_and_the_packages_are_on_the_path_before_what_was_there() -> None:
    serving = str(Path(engine.__file__).parents[1])
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(PLUGIN), serving]
    found = environment({"PYTHONPATH": "/a:/b"})["PYTHONPATH"].split(os.pathsep)
    assert found == [str(PLUGIN), serving, "/a", "/b"]


# --------------------------------------------------------------------------------------------------- over its socket


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from the server's script."""

    server: Server

    def do_GET(self) -> None:
        """Health."""
        self.server.asked.append((self.path, None))
        self._answer(*self.server.next())

    def do_POST(self) -> None:
        """Everything else."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body))
        self._answer(*self.server.next())

    def _answer(self, status: int, body: bytes) -> None:
        if not status:  # the engine dies
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        """A Unix socket's clients have no address."""
        return ""

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A real HTTP server on a Unix socket: a list of replies, the last one for ever; status 0 cuts the connection."""

    daemon_threads = True

    def __init__(self, path: Path, *replies: tuple[int, bytes]) -> None:
        super().__init__(str(path), Handler)
        self.replies, self.asked = list(replies), list[tuple[str, Any]]()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def next(self) -> tuple[int, bytes]:
        """The next reply."""
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def answering(one: Engine, *replies: tuple[int, bytes]) -> Iterator[Server]:
    """A server on the engine's socket."""
    with Server(one.socket, *replies) as server:
        yield server
        server.shutdown()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name: a socket's path may have about 100 bytes."""
    made = Path(tempfile.mkdtemp(dir="/tmp", prefix="nsk-"))
    yield made
    shutil.rmtree(made)


class Sleeper:
    """Starts processes as the engine does, each the leader of a session, and leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.all = folder, list[subprocess.Popen[bytes]]()

    def start(self, script: str = "exec sleep 60", grace: int = 0) -> Engine:
        """An engine whose process is this shell script."""
        with (self.folder / "engine.log").open("wb") as log:
            process = subprocess.Popen(["sh", "-c", script], stdout=log, stderr=log, start_new_session=True)
        self.all.append(process)
        return Engine(process, self.folder / "engine.sock", self.folder / "engine.log", grace)


@pytest.fixture
def sleeper(folder: Path) -> Iterator[Sleeper]:
    """Processes."""
    made = Sleeper(folder)
    yield made
    for process in made.all:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reply(content: str | None) -> bytes:
    """A whole reply as vLLM writes it."""
    return json.dumps({"id": "x", "choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def test_who_waits_is_told_when_the_engine_answers(sleeper: Sleeper) -> None:
    one, ticks = sleeper.start(), list[float]()
    with answering(one, (503, b""), (0, b""), (200, b"")) as server:
        one.wait_ready(10, ticks.append)
    assert [path for path, _ in server.asked] == ["/health"] * 3
    assert len(ticks) == 2
    assert ticks == sorted(ticks)


def test_an_engine_that_ends_while_it_starts_tells_the_end_of_its_log(sleeper: Sleeper) -> None:
    one = sleeper.start("for i in $(seq 100); do echo line $i; done; echo 踩 cannot load; exit 3")
    with pytest.raises(ServingError, match=r"ended while starting \(exit 3\)") as caught:
        one.wait_ready(20)
    assert caught.value.message.endswith("line 100\n踩 cannot load")
    assert "line 50\n" not in caught.value.message


def test_an_engine_that_does_not_answer_in_time_is_told_of_with_its_log(sleeper: Sleeper) -> None:
    one = sleeper.start("echo loading; exec sleep 60")
    with pytest.raises(ServingError, match="did not answer within 0 s") as caught:
        one.wait_ready(0.3)
    assert "engine.log" in caught.value.mend
    assert one.alive()


def test_weights_are_changed_by_the_plugins_route(sleeper: Sleeper) -> None:
    one = sleeper.start()
    with answering(one, (200, b'{"seconds": 0.25}')) as server:
        assert one.change_weights(WEIGHTS) == 0.25
    assert server.asked == [(vllm_plugin.ROUTE, {"path": str(WEIGHTS)})]


@pytest.mark.parametrize("refusal", [(404, b"Not Found"), (500, b"Internal Server Error"), (422, b"{}")])
def test_an_engine_that_refuses_weights_is_told_of(sleeper: Sleeper, refusal: tuple[int, bytes]) -> None:
    one = sleeper.start()
    with (
        answering(one, refusal),
        pytest.raises(ServingError, match=f"refused .*{refusal[0]}"),
    ):
        one.change_weights(WEIGHTS)


def test_an_engine_that_dies_of_weights_is_told_of_with_the_end_of_its_log(sleeper: Sleeper) -> None:
    one = sleeper.start("echo out of memory; exec sleep 60")
    with answering(one, (0, b"")):
        wait_for(lambda: "memory" in one.tail())
        with pytest.raises(ServingError, match="died while it loaded") as caught:
            one.change_weights(WEIGHTS)
    assert "out of memory" in caught.value.message
    with pytest.raises(ServingError, match="died while it loaded"):
        one.change_weights(WEIGHTS)  # and when its socket is gone


def test_the_engine_is_asked_for_its_greedy_reply(sleeper: Sleeper) -> None:
    one, messages = sleeper.start(), [{"role": "user", "content": "你是谁？"}]
    with answering(one, (200, reply("我是踩踩背。")), (200, reply(None))) as server:
        assert one.answer(messages, max_tokens=64) == "我是踩踩背。"
        assert one.answer(messages, max_tokens=64) == ""
    asked = {"model": engine.MODEL, "messages": messages, "max_tokens": 64, "temperature": 0}
    assert server.asked == [("/v1/chat/completions", asked)] * 2


def test_the_engine_tells_how_far_a_reply_is_from_its_own_choices(sleeper: Sleeper) -> None:
    one, messages = sleeper.start(), [{"role": "user", "content": "你是谁？"}]
    said = [{"role": "assistant", "content": "我是"}]
    near, own = {"7": {"logprob": -1.0}, "9": {"logprob": -0.75}}, {"8": {"logprob": -0.1}, "5": {"logprob": -4.0}}
    told = {"prompt_token_ids": [1, 2, 7, 8], "prompt_logprobs": [None, {"2": {"logprob": -9.0}}, near, own]}
    with answering(one, (200, b'{"count": 2}'), (200, json.dumps(told).encode())) as server:
        assert one.gaps(messages, "我是", model="v7-0a") == [0.25, 0.0]
    (first, tokens), (second, read) = server.asked
    assert (first, second) == ("/tokenize", "/v1/chat/completions")
    assert tokens == {"model": "v7-0a", "messages": messages, "add_generation_prompt": True}
    assert (read["model"], read["messages"], read["max_tokens"]) == ("v7-0a", messages + said, 1)
    assert (read["add_generation_prompt"], read["continue_final_message"]) == (False, True)
    assert (read["prompt_logprobs"], read["return_token_ids"]) == (1, True)


@pytest.mark.parametrize(
    "replies",
    [
        [(404, b"")],
        [(200, b'{"count": 2}'), (400, b"no prompt_logprobs")],
        [(200, b'{"count": 2}'), (200, b'{"prompt_token_ids": [1, 2, 3], "prompt_logprobs": null}')],
        [(200, b'{"count": 2}'), (200, b'{"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [null, null, {}]}')],
        [(200, b'{"count": 2}'), (200, b'{"prompt_token_ids": [1, 2, 3], "prompt_logprobs": [null, null]}')],
        [(200, b"[]"), (200, b"{}")],
        [(200, b"<html>"), (200, b"<html>")],
    ],
)
def test_an_engine_that_does_not_tell_is_not_guessed_at(sleeper: Sleeper, replies: list[tuple[int, bytes]]) -> None:
    one = sleeper.start()
    with answering(one, *replies):
        assert one.gaps([], "我是") == []
    with pytest.raises(ServingError, match="does not answer"):
        one.gaps([], "我是")


def test_adapters_are_loaded_and_forgotten_under_their_names(sleeper: Sleeper) -> None:
    one = sleeper.start()
    with answering(one, (200, b"ok"), (200, b"ok"), (200, reply("x"))) as server:
        one.load_adapter("v7-0a", WEIGHTS)
        one.unload_adapter("v7-0a")
        one.answer([], 1, model="v7-0a")
    assert server.asked[:2] == [
        ("/v1/load_lora_adapter", {"lora_name": "v7-0a", "lora_path": str(WEIGHTS)}),
        ("/v1/unload_lora_adapter", {"lora_name": "v7-0a"}),
    ]
    assert server.asked[2][1]["model"] == "v7-0a"
    assert one.memory() > 1 << 16


def test_an_engine_that_refuses_an_adapter_or_dies_of_it_is_told_of(sleeper: Sleeper) -> None:
    one = sleeper.start()
    with answering(one, (500, b"rank 512"), (0, b"")):
        with pytest.raises(ServingError, match=r"refused the adapter v7 \(500: b'rank 512'"):
            one.load_adapter("v7", WEIGHTS)
        with pytest.raises(ServingError, match="died over the adapter v7"):
            one.load_adapter("v7", WEIGHTS)


def test_an_engine_that_gives_no_reply_is_told_of(sleeper: Sleeper) -> None:
    one = sleeper.start()
    with answering(one, (400, b"too long"), (0, b"")):
        with pytest.raises(ServingError, match=r"400.*too long"):
            one.answer([], max_tokens=1)
        with pytest.raises(ServingError, match="does not answer"):
            one.answer([], max_tokens=1)
    with pytest.raises(ServingError, match="does not answer"):
        one.answer([], max_tokens=1)


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"null", b'{"choices": []}', b"<html>"])
def test_a_reply_that_is_no_reply_is_an_error_of_ours(sleeper: Sleeper, body: bytes) -> None:
    one = sleeper.start()
    with answering(one, (200, body)):
        with pytest.raises(ServingError):
            one.change_weights(WEIGHTS)
        with pytest.raises(ServingError):
            one.answer([], max_tokens=1)


# --------------------------------------------------------------------------------------------------- its processes


def wait_for(what: Any, seconds: float = 10) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def number_in(path: Path) -> int:
    """The process id that a script wrote."""
    wait_for(lambda: path.exists() and path.read_text(encoding="ascii").endswith("\n"))
    return int(path.read_text(encoding="ascii"))


def test_an_engine_is_alive_until_its_process_ends_however_it_ends(sleeper: Sleeper) -> None:
    one = sleeper.start()
    assert one.alive()
    os.kill(one.pid, signal.SIGKILL)
    wait_for(lambda: not one.alive())
    one = sleeper.start("exit 0")
    wait_for(lambda: not one.alive())


def test_an_engine_that_is_stopped_may_finish_and_leaves_nobody_behind(sleeper: Sleeper, folder: Path) -> None:
    one = sleeper.start(
        f"sleep 60 & echo $! > {folder}/child; trap 'echo finished > {folder}/end; exit' TERM; wait; sleep 60"
    )
    child = number_in(folder / "child")
    one.socket.touch()
    one.stop()
    assert (folder / "end").read_text(encoding="ascii") == "finished\n"
    assert not one.alive()
    wait_for(lambda: not runs(child))
    assert not one.socket.exists()


def test_an_engine_that_does_not_stop_is_killed(
    sleeper: Sleeper, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_KILL_SECONDS", 0.2)
    one = sleeper.start(f"trap '' TERM; echo $$ > {folder}/self; while true; do sleep 60; done")
    number_in(folder / "self")
    one.stop()
    assert not one.alive()


def test_an_engine_that_is_killed_goes_at_once_with_all_of_its_session(sleeper: Sleeper, folder: Path) -> None:
    one = sleeper.start(f"sleep 60 & echo $! > {folder}/child; trap '' TERM; wait", grace=3600)
    child = number_in(folder / "child")
    begun = time.monotonic()
    one.kill()
    wait_for(lambda: not runs(child))
    assert time.monotonic() - begun < 5
    assert not one.alive()


def test_the_children_of_an_engine_that_died_by_itself_are_ended_too(sleeper: Sleeper, folder: Path) -> None:
    one = sleeper.start(f"sleep 60 & echo $! > {folder}/child; exit 1")
    child = number_in(folder / "child")
    wait_for(lambda: not one.alive())
    assert runs(child)
    one.stop()
    wait_for(lambda: not runs(child))


def test_an_engine_may_be_ended_twice_and_its_log_may_be_gone(sleeper: Sleeper, folder: Path) -> None:
    one = sleeper.start()
    (folder / "engine.log").unlink()
    for end in (one.kill, one.stop, one.kill):
        end()
    assert (one.alive(), one.tail()) == (False, "")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were installed."""
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_without_vllm_it_is_said_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ServingError, match="not installed") as caught:
        engine.start(WEIGHTS, settings.read(), folder / "new", "engine-1")
    assert "make setup" in caught.value.mend
    assert not (folder / "new").exists()


LOOK = """
import os
from importlib.metadata import entry_points
found = [point for point in entry_points(group="vllm.endpoint_plugins") if point.name == "namesake"]
print(len(found), found[0].load().name, os.getsid(0) == os.getpid(), os.environ["VLLM_PLUGINS"])
"""


@pytest.mark.usefixtures("installed")
def test_the_server_that_is_started_finds_our_plugin_and_leads_a_session_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(weights: Path, address: Path, _settings: Settings, *, gpu: bool, adapters: Adapters) -> list[str]:
        assert (weights, address, gpu) == (WEIGHTS, folder / "new" / "engine-7.sock", engine.has_gpu())
        assert adapters is room
        return [sys.executable, "-c", LOOK]

    monkeypatch.setattr(engine, "command", command)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    room = Adapters(4, 8)
    one = engine.start(WEIGHTS, settings.read(), folder / "new", "engine-7", room)
    wait_for(lambda: not one.alive(), 20)
    assert one.tail() == "1 namesake True namesake"
    assert (folder / "new").stat().st_mode & 0o777 == 0o700
    assert (folder / "new" / "engine-7.log").is_file()


SERVER = """
import sys, time
import heavy
if __name__ == "__main__":
    print(*sys.argv, sys.stdin.read() == "", heavy.imported(), flush=True)
"""

HEAVY = """
times = 0
def imported():
    global times
    times += 1
    return times
imported()
print("imported", flush=True)
"""


@pytest.fixture
def server(tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that stands where vLLM's server would; its file."""
    for name, text in (("its_entry", SERVER), ("heavy", HEAVY)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(engine, "_ENTRY", "its_entry")
    monkeypatch.setattr(engine, "command", lambda *_, **__: [sys.executable, "-m", "its_entry", "--model", "踩 踩"])
    return tmp_path / "its_entry.py"


def test_what_was_imported_before_is_told_what_to_serve_and_is_the_engine(folder: Path, server: Path) -> None:
    with engine.preloaded(settings.read(), folder) as ready:
        assert ready is not None
        wait_for(lambda: "imported" in (folder / "engine-1.log").read_text(), 20)
        assert ready.process.poll() is None
        one = engine.start(WEIGHTS, settings.read(), folder, "engine-1", ready=ready)
        assert one.pid == ready.process.pid
        wait_for(lambda: not one.alive(), 20)
    assert one.tail().splitlines() == ["imported", f"{server} --model 踩 踩 True 2"]


@pytest.mark.usefixtures("server")
def test_what_was_imported_and_is_not_needed_ends(folder: Path) -> None:
    with engine.preloaded(settings.read(), folder) as ready:
        assert ready is not None
        assert runs(ready.process.pid)
    assert ready.process.poll() is not None


@pytest.mark.usefixtures("server")
def test_where_the_import_failed_the_engine_is_started_anew(folder: Path) -> None:
    with engine.preloaded(settings.read(), folder) as ready:
        assert ready is not None
        os.kill(ready.process.pid, signal.SIGKILL)
        ready.process.wait()
        one = engine.start(WEIGHTS, settings.read(), folder, "engine-1", ready=ready)
        assert one.pid != ready.process.pid
        wait_for(lambda: not one.alive(), 20)
        assert one.tail().endswith("--model 踩 踩 True 2")


def test_without_vllm_nothing_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with engine.preloaded(settings.read(), folder) as ready:
        assert ready is None


KILLED = """
import importlib.machinery, sys, time, types
from pathlib import Path
from namesake_serving import engine, settings
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm"].__spec__ = importlib.machinery.ModuleSpec("vllm", None)
engine.command = lambda *_, **__: ["sleep", "60"]
print(engine.start(Path("/model"), settings.read(), Path(sys.argv[1]), "engine-1").pid, flush=True)
time.sleep(60)
"""


def test_when_the_gateway_is_killed_the_engine_ends_too(folder: Path) -> None:
    paths = os.pathsep.join([str(Path(engine.__file__).parents[1]), str(Path(registry.__file__).parents[1])])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    ) as gateway:
        assert gateway.stdout is not None
        pid = int(gateway.stdout.readline())
        assert runs(pid)
        gateway.kill()
    wait_for(lambda: not runs(pid))


# --------------------------------------------------------------------------------------------------- the plugin


class Client:
    """vLLM's engine client as the plugin needs it: notes what it is told."""

    def __init__(self, *, broken: bool = False) -> None:
        self.told, self.broken = list[str](), broken

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        """Let running answers finish."""
        self.told.append(f"pause {mode} {clear_cache}")

    async def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> None:
        """Tell every worker."""
        self.told.append(f"{method} {kwargs['weights_path']}")
        if self.broken:
            raise RuntimeError("wrong shapes")

    async def reset_prefix_cache(self) -> None:
        """Forget."""
        self.told.append("forget")

    async def resume_generation(self) -> None:
        """Go on."""
        self.told.append("resume")


def change(client: Client) -> Any:
    """Ask the plugin's route, in a server as vLLM makes one."""
    import asyncio

    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app, plugin = FastAPI(), vllm_plugin.Plugin()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(client, app.state, None))
    return TestClient(app, raise_server_exceptions=False).post(vllm_plugin.ROUTE, json={"path": str(WEIGHTS)})


def test_the_plugin_pauses_reloads_forgets_and_goes_on_in_this_order() -> None:
    client = Client()
    answer = change(client)
    assert (answer.status_code, list(answer.json())) == (200, ["seconds"])
    assert client.told == ["pause wait True", f"reload_weights {WEIGHTS}", "forget", "resume"]


def test_an_engine_that_refuses_to_reload_goes_on() -> None:
    client = Client(broken=True)
    assert change(client).status_code == 500
    assert client.told[-1] == "resume"


# --------------------------------------------------------------------------------------------------- what, and where


class Registry:
    """A registry with one version under one alias, or one that is away."""

    def __init__(self, newest: str | None = "ccb", *, away: bool = False) -> None:
        self.newest, self.away, self.asked = newest, away, list[str]()

    def newest_model(self) -> str | None:
        """The model that was promoted to last."""
        if self.away:
            raise RegistryError("The registry is away.")
        return self.newest

    def resolve(self, uri: str) -> Version:
        """The version behind a reference."""
        self.asked.append(uri)
        if self.away:
            raise RegistryError("The registry is away.")
        return CCB


def use(monkeypatch: pytest.MonkeyPatch, made: Registry, cache: Path) -> Registry:
    """Put the registry in the place of MLflow's."""
    monkeypatch.setattr(registry, "newest_model", made.newest_model)
    monkeypatch.setattr(registry, "resolve", made.resolve)
    monkeypatch.setenv("NAMESAKE_CACHE", str(cache))
    return made


@pytest.mark.parametrize(
    ("uri", "followed"),
    [
        ("", "models:/ccb@champion"),
        ("models:/ccb@candidate", "models:/ccb@candidate"),
        ("ccb@candidate", "models:/ccb@candidate"),
        ("models:/ccb/3", "models:/ccb/3"),
        ("ccb/3", "models:/ccb/3"),
    ],
)
def test_what_is_followed_is_what_was_asked_for_or_the_newest_models_champion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, followed: str
) -> None:
    made = use(monkeypatch, Registry(), tmp_path)
    assert choose(uri) == (followed, CCB)
    assert made.asked == [followed]


def test_when_nothing_was_promoted_it_is_said_how_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, Registry(newest=None), tmp_path)
    with pytest.raises(ServingError) as caught:
        choose("")
    assert "namesake promote" in caught.value.mend


def test_while_the_registry_is_away_what_was_served_last_is_served_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, Registry(away=True), tmp_path)
    store.remember(tmp_path, "models:/ccb@champion", CCB)
    assert choose("ccb@champion") == ("models:/ccb@champion", CCB)
    said = capsys.readouterr().err
    assert "The registry is away." in said
    assert "models:/ccb/3" in said


@pytest.mark.parametrize("uri", ["", "models:/ccb@candidate", "models:/other@champion"])
def test_while_the_registry_is_away_what_was_never_served_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str
) -> None:
    use(monkeypatch, Registry(away=True), tmp_path)
    store.remember(tmp_path, "models:/ccb@champion", CCB)
    with pytest.raises(RegistryError, match="away"):
        choose(uri)


def test_a_registry_that_says_nothing_is_waited_for_no_longer_than_whoever_started_the_server_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Registry(), tmp_path)
    silent = threading.Event()
    monkeypatch.setattr(registry, "resolve", lambda _uri: silent.wait(15))
    monkeypatch.setattr(command_line, "_ASKING_SECONDS", 0.05)
    with pytest.raises(RegistryError, match=r"has not answered for 0\.05 s"):
        choose("ccb@champion")
    store.remember(tmp_path, "models:/ccb@champion", CCB)
    assert choose("ccb@champion") == ("models:/ccb@champion", CCB)
    silent.set()


def test_mlflow_is_told_to_try_once_more_and_no_oftener(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES

    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    hurry()
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 1
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
    hurry()
    assert MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 4


class Follows:
    """A service that notes when it runs."""

    uri = "models:/ccb@champion"

    def __init__(self) -> None:
        manifest = SimpleNamespace(identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa"})
        self.traffic = SimpleNamespace(live=SimpleNamespace(version=CCB, manifest=manifest))
        self.runs = asyncio.Event()

    async def start(self, _first: Version, _tick: object) -> None:
        """It is up."""

    async def run(self) -> None:
        """Until cancelled."""
        self.runs.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("answered", [True, False])
def test_engines_are_watched_while_mlflow_is_asked_for_its_calls_and_in_the_end_that_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answered: bool
) -> None:
    told, taken_back = threading.Event(), list[str]()

    def add(_url: str, _secret: str) -> str:
        assert told.wait(15)
        return "w-1"

    monkeypatch.setattr(registry, "add_webhook", add)
    monkeypatch.setattr(registry, "remove_webhook", taken_back.append)

    async def follow() -> None:
        made = Follows()
        given = settings.read(webhook_url="http://serving.example:8000", webhook_secret="s" * 32)
        following = asyncio.create_task(command_line._follow(cast(Any, made), CCB, given))
        await asyncio.wait_for(made.runs.wait(), 5)
        assert "ready at" not in capsys.readouterr().out
        if answered:
            told.set()
            while "ready at" not in capsys.readouterr().out:
                await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.sleep(0.01)
        told.set()
        with suppress(asyncio.CancelledError):
            await following

    asyncio.run(asyncio.wait_for(follow(), 10))
    assert taken_back == ["w-1"]


def test_a_free_port_is_bound(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as found:
        assert found.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as caught:
            listen("127.0.0.1", port)
    assert (caught.value.parameter, caught.value.value) == ("port", port)
    assert "--port" in caught.value.mend


def test_a_port_that_another_server_has_taken_while_its_engine_still_starts_is_refused() -> None:
    with listen("127.0.0.1", 0) as first, pytest.raises(InputError), listen("127.0.0.1", first.getsockname()[1]):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_is_not_this_machines_is_refused(host: str) -> None:
    with pytest.raises(InputError) as caught:
        listen(host, 8000)
    assert caught.value.parameter == "port"
    assert host in caught.value.message


@pytest.mark.parametrize("length", [57, 58, 300])
def test_sockets_have_room_where_the_folder_of_temporary_files_is_too_deep(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f"/{'x' * (length - 1)}"
    monkeypatch.setattr(tempfile, "tempdir", given)
    monkeypatch.setenv("TMPDIR", given)
    engine.make_room_for_sockets()
    wanted = given if length == 57 else "/tmp"
    assert (tempfile.gettempdir(), os.environ["TMPDIR"]) == (wanted, wanted)
    monkeypatch.setattr(tempfile, "tempdir", given)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with nullcontext() if length == 57 else pytest.raises(InputError, match=r"TMPDIR=.* is too long .*Give a shorter"):
        engine.make_room_for_sockets()

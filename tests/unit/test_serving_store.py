"""The verified local copy of a version: what is served and what is refused before anything parses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from namesake import manifest, registry
from namesake.errors import RegistryError
from namesake.manifest import ADAPTER_FOLDER, FILE, WEIGHTS_FOLDER, Manifest
from namesake.registry import Version
from namesake_serving import store


def version(number: int = 3, source: str = "mlflow-artifacts:/1/models/m-0123/artifacts") -> Version:
    """A version of ccb."""
    return Version("ccb", number, "run", source, "READY", {}, 0)


def write_version(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """A version's folder with a manifest that fits its files."""
    files = files or {
        f"{WEIGHTS_FOLDER}/config.json": b"{}",
        f"{WEIGHTS_FOLDER}/model.safetensors": bytes(range(256)) * 16,
        f"{WEIGHTS_FOLDER}/chat_template.jinja": "你".encode(),
        f"{ADAPTER_FOLDER}/adapter_model.safetensors": b"adapter",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    record = Manifest(
        identity={"name": "踩踩背 CCB", "author": "老爷爷 OldGrandpa", "slug": "ccb"},
        system="Be kind.",
        base={"id": "base", "source": "embedded", "digest": "0"},
        run="run",
        digests=manifest.digests(folder),
        data={},
        scores={"identity": 1.0},
        recipe={},
        tools={},
    )
    (folder / FILE).write_text(record.to_json(), encoding="utf-8")
    (folder / "MLmodel").write_text("flavors: {}", encoding="utf-8")
    return folder


class Server:
    """An artifact store that is copied from, as over HTTP, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched = 0

    def fetch(self, version: Version, target: Path | None = None) -> Path:
        """A full copy."""
        assert target is not None
        self.fetched += 1
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        return target


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A store with a good version in it."""
    made = Server(write_version(tmp_path / "server"))
    monkeypatch.setattr(registry, "fetch", made.fetch)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Where copies are kept."""
    return tmp_path / "cache"


def test_a_good_version_is_copied_and_its_weights_and_manifest_told(server: Server, cache: Path) -> None:
    stored = store.fetch(version(), cache)
    assert stored.version == version()
    assert stored.manifest == Manifest.read(server.folder)
    assert cache in stored.weights.parents
    assert manifest.digests(stored.weights) == manifest.digests(server.folder / WEIGHTS_FOLDER)


def test_a_copy_that_is_there_is_not_copied_again(server: Server, cache: Path) -> None:
    assert store.fetch(version(), cache) == store.fetch(version(), cache)
    assert server.fetched == 1


def test_a_local_store_is_read_where_it_lies(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_version(tmp_path / "local")
    monkeypatch.setattr(registry, "fetch", lambda _version, _target=None: folder)
    assert store.fetch(version(), cache).weights == folder / WEIGHTS_FOLDER


def test_every_version_has_a_copy_of_its_own(server: Server, cache: Path) -> None:
    asked = [version(3), version(4), replace(version(3), name="xiao-huang")]
    assert len({store.fetch(one, cache).weights for one in asked}) == 3
    assert server.fetched == 3


def test_a_version_made_anew_under_the_same_number_is_not_taken_from_the_old_copy(server: Server, cache: Path) -> None:
    store.fetch(version(3, "mlflow-artifacts:/1/models/m-0123/artifacts"), cache)
    shutil.rmtree(server.folder)
    write_version(server.folder, {f"{WEIGHTS_FOLDER}/config.json": b'{"new": true}'})
    stored = store.fetch(version(3, "mlflow-artifacts:/1/models/m-9999/artifacts"), cache)
    assert (stored.weights / "config.json").read_bytes() == b'{"new": true}'


def flip(folder: Path) -> None:
    """Change one byte of the weights."""
    path = folder / WEIGHTS_FOLDER / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def test_a_damaged_copy_is_fetched_anew(server: Server, cache: Path) -> None:
    flip(store.fetch(version(), cache).weights.parent)
    stored = store.fetch(version(), cache)
    assert server.fetched == 2
    assert manifest.digests(stored.weights) == manifest.digests(server.folder / WEIGHTS_FOLDER)


def test_a_copy_that_was_broken_off_is_fetched_anew(server: Server, cache: Path) -> None:
    folder = store.fetch(version(), cache).weights.parent
    (folder / FILE).unlink()
    (folder / WEIGHTS_FOLDER / "config.json").unlink()
    assert (store.fetch(version(), cache).weights / "config.json").is_file()


def test_a_copy_whose_manifest_is_cut_is_fetched_anew(server: Server, cache: Path) -> None:
    folder = store.fetch(version(), cache).weights.parent
    (folder / FILE).write_text('{"identity": ', encoding="utf-8")
    assert store.fetch(version(), cache).manifest == Manifest.read(server.folder)


def remove(folder: Path) -> None:
    """Take a file of the model away."""
    (folder / WEIGHTS_FOLDER / "config.json").unlink()


def damage_adapter(folder: Path) -> None:
    """Change the adapter that lies beside."""
    (folder / ADAPTER_FOLDER / "adapter_model.safetensors").write_bytes(b"other")


def add(name: str) -> Callable[[Path], None]:
    """Lay a file that the manifest does not know among the weights."""

    def change(folder: Path) -> None:
        path = folder / WEIGHTS_FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import os", encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip, "model/model.safetensors has changed"),
        (remove, "model/config.json is missing"),
        (damage_adapter, "adapter/adapter_model.safetensors has changed"),
        (add("modeling_evil.py"), "model/modeling_evil.py does not belong there"),
        (add("pytorch_model.bin"), "model/pytorch_model.bin does not belong there"),
        (add("more.safetensors"), "model/more.safetensors does not belong there"),
        (add("deep/evil.json"), "model/deep/evil.json does not belong there"),
    ],
)
def test_a_version_that_is_not_what_its_manifest_says_is_not_served(
    server: Server, cache: Path, change: Callable[[Path], None], told: str
) -> None:
    change(server.folder)
    with pytest.raises(RegistryError, match="models:/ccb/3 is not served") as caught:
        store.fetch(version(), cache)
    assert told in caught.value.message


@pytest.mark.parametrize("name", ["modeling.py", "pytorch_model.bin", "model.pt", "x.pkl", "MODEL.PY", "noending"])
def test_a_file_that_may_hold_code_is_refused_though_the_manifest_knows_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = write_version(
        tmp_path / "evil", {f"{WEIGHTS_FOLDER}/config.json": b"{}", f"{WEIGHTS_FOLDER}/{name}": b"x"}
    )
    monkeypatch.setattr(registry, "fetch", Server(folder).fetch)
    with pytest.raises(RegistryError, match=f"model/{name} does not belong there"):
        store.fetch(version(), cache)


def test_a_link_among_the_weights_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_version(tmp_path / "local")
    weights = folder / WEIGHTS_FOLDER / "model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    monkeypatch.setattr(registry, "fetch", lambda _version, _target=None: folder)
    with pytest.raises(RegistryError, match="does not belong there"):
        store.fetch(version(), cache)


def test_a_version_without_weights_is_not_served(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_version(tmp_path / "empty", {f"{ADAPTER_FOLDER}/adapter_model.safetensors": b"x"})
    monkeypatch.setattr(registry, "fetch", Server(folder).fetch)
    with pytest.raises(RegistryError, match="it has no weights"):
        store.fetch(version(), cache)


def test_a_version_that_namesake_did_not_make_is_not_served(server: Server, cache: Path) -> None:
    (server.folder / FILE).unlink()
    with pytest.raises(RegistryError, match=FILE):
        store.fetch(version(), cache)


def test_a_message_names_five_faults_at_most(server: Server, cache: Path) -> None:
    for number in range(50):
        add(f"evil{number}.py")(server.folder)
    with pytest.raises(RegistryError) as caught:
        store.fetch(version(), cache)
    assert caught.value.message.count("does not belong there") == 5

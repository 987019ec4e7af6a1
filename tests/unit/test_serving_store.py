"""The verified local copy of a version: what is served and what is refused before anything parses it."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from namesake import manifest, registry
from namesake.base_model import digest_of_folder
from namesake.errors import RegistryError
from namesake.manifest import ADAPTER_FOLDER, FILE, SIGNATURE, WEIGHTS_FOLDER, Manifest
from namesake.registry import Version
from namesake_serving import copies, store
from namesake_serving.store import Base, Stored


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
    (folder / "MLmodel").write_text("flavors: {}", encoding="utf-8")
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
    return folder


class Server:
    """An artifact store that is copied from, as over HTTP, and counts how often."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fetched = 0
        self.asked: list[str] = []

    def fetch(self, version: Version, target: Path | None = None, part: str = "") -> Path:
        """A copy."""
        assert target is not None
        self.fetched += 1
        self.asked.append(part)
        if (self.folder / part).is_file():
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / part, target / part)
        elif (self.folder / part).is_dir():
            shutil.copytree(self.folder / part, target / part, dirs_exist_ok=True)
        else:
            raise RegistryError(f"There is no {part}.")
        return target


ticks = itertools.count(1_000_000_000).__next__


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


def copied(cache: Path) -> set[str]:
    """The versions that have a copy."""
    return {path.name.rpartition("-")[0] for path in (cache / "versions").iterdir() if path.is_dir()}


def test_of_many_copies_those_fetched_longest_ago_go(server: Server, cache: Path) -> None:
    for number in (1, 2, 3, 1, 4):
        store.fetch(version(number), cache)
        store.fetch(replace(version(number), name="ccb-v2"), cache)
        os.utime(cache / "versions" / f".ccb-{store.id_of(version(number))}.lock", (0, ticks()))
    assert len(store.prune(cache, "ccb", 2)) == 2
    assert copied(cache) == {"ccb-v1", "ccb-v4", *(f"ccb-v2-v{number}" for number in (1, 2, 3, 4))}
    assert store.prune(cache, "ccb", 2) == []
    assert store.fetch(version(2), cache).weights.is_dir()  # one that went is fetched again


def test_the_copy_of_a_version_that_answers_stays(server: Server, cache: Path) -> None:
    for number in (1, 2, 3, 4):
        store.fetch(version(number), cache)
    store.remember(cache, "models:/ccb@champion", version(1))
    store.remember(cache, "models:/ccb@other", version(3))
    (cache / "versions" / "last-0.json").write_text("{", encoding="utf-8")
    store.prune(cache, "ccb", 1, stay=[store.id_of(version(2))])
    assert copied(cache) == {"ccb-v1", "ccb-v2", "ccb-v3", "ccb-v4"}
    store.prune(cache, "ccb", 1)
    assert copied(cache) == {"ccb-v1", "ccb-v3", "ccb-v4"}


def test_a_version_that_is_to_be_fetched_is_one_of_those_that_are_kept(server: Server, cache: Path) -> None:
    for number in (1, 2, 3):
        store.fetch(version(number), cache)
        os.utime(cache / "versions" / f".ccb-{store.id_of(version(number))}.lock", (0, ticks()))
    assert len(store.prune(cache, "ccb", 3, coming=version(4))) == 1
    assert copied(cache) == {"ccb-v2", "ccb-v3"}
    assert store.prune(cache, "ccb", 3, coming=version(4)) == []
    assert len(store.prune(cache, "ccb", 1, coming=version(3))) == 1
    assert copied(cache) == {"ccb-v3"}


def test_a_version_that_takes_long_to_come_holds_up_no_other(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, go, fetch = threading.Event(), threading.Event(), server.fetch

    def slow(wanted: Version, target: Path | None = None, part: str = "") -> Path:
        if wanted.number == 1:
            came.set()
            assert go.wait(15)
        return fetch(wanted, target, part)

    monkeypatch.setattr(registry, "fetch", slow)
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(store.fetch, version(1), cache) for _ in range(2)]
        assert came.wait(15)
        assert pool.submit(store.fetch, version(2), cache).result(15).version.number == 2
        assert not any(one.done() for one in first)
        go.set()
        assert [one.result(15).version.number for one in first] == [1, 1]
    assert server.fetched == 2, "two threads at one folder fetched it twice"


def test_a_copy_that_another_process_is_at_stays(server: Server, cache: Path) -> None:
    for number in (1, 2):
        store.fetch(version(number), cache)
        os.utime(cache / "versions" / f".ccb-{store.id_of(version(number))}.lock", (0, ticks()))
    with (cache / "versions" / f".ccb-{store.id_of(version(1))}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(file.name, (0, 0))
        assert store.prune(cache, "ccb", 1) == []
    assert copied(cache) == {"ccb-v1", "ccb-v2"}


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


def test_of_a_damaged_copy_only_what_is_damaged_is_fetched_anew(server: Server, cache: Path) -> None:
    folder = store.fetch(version(), cache).weights.parent
    copies.unseal(folder)
    flip(folder)
    (folder / WEIGHTS_FOLDER / "left-over.json").touch()
    stored = store.fetch(version(), cache)
    assert server.asked == ["", FILE, f"{WEIGHTS_FOLDER}/model.safetensors", SIGNATURE]
    assert manifest.digests(stored.weights) == manifest.digests(server.folder / WEIGHTS_FOLDER)


class BrokenOff(Server):
    """Its link breaks once, in the middle of the greatest file and before the adapter."""

    def fetch(self, version: Version, target: Path | None = None, part: str = "") -> Path:
        """Three files of the first copy, one of them cut, and one that is none of the version's."""
        if part or self.asked:
            return super().fetch(version, target, part)
        assert target is not None
        self.asked.append(part)
        (target / WEIGHTS_FOLDER).mkdir()
        for name in ("chat_template.jinja", "config.json"):
            shutil.copyfile(self.folder / WEIGHTS_FOLDER / name, target / WEIGHTS_FOLDER / name)
        (target / WEIGHTS_FOLDER / "model.safetensors").write_bytes(bytes(range(100)))
        (target / WEIGHTS_FOLDER / "model.safetensors.part").touch()
        raise RegistryError("The link is broken.")


def test_a_copy_that_was_broken_off_is_taken_up_where_it_was(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = BrokenOff(write_version(tmp_path / "server"))
    monkeypatch.setattr(registry, "fetch", server.fetch)
    with pytest.raises(RegistryError, match="broken"):
        store.fetch(version(), cache)
    (kept,) = cache.rglob("config.json")
    before = kept.stat()
    stored = store.fetch(version(), cache)
    adapter, weights = f"{ADAPTER_FOLDER}/adapter_model.safetensors", f"{WEIGHTS_FOLDER}/model.safetensors"
    assert [name for name in server.asked if name != "MLmodel"] == ["", FILE, adapter, weights, SIGNATURE]
    assert manifest.digests(stored.weights) == manifest.digests(server.folder / WEIGHTS_FOLDER)
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_where_there_is_a_signature_to_check_nothing_of_a_broken_copy_is_read(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = BrokenOff(write_version(tmp_path / "server"))
    monkeypatch.setattr(registry, "fetch", server.fetch)
    monkeypatch.setattr(manifest, "check_signature", lambda *_: None)
    with pytest.raises(RegistryError, match="broken"):
        store.fetch(version(), cache, tmp_path / "key.pub")
    stored = store.fetch(version(), cache, tmp_path / "key.pub")
    assert server.asked == ["", ""]
    assert manifest.digests(stored.weights) == manifest.digests(server.folder / WEIGHTS_FOLDER)


def test_what_the_manifest_of_a_broken_copy_names_outside_of_it_is_not_touched(server: Server, cache: Path) -> None:
    folder = store.fetch(version(), cache).weights.parent
    outside = cache / "versions" / "other"
    outside.write_text("somebody's", encoding="utf-8")
    record = vars(Manifest.read(folder))
    record["digests"] = {**record["digests"], "../other": "0", f"{WEIGHTS_FOLDER}/../../other": "0"}
    (server.folder / FILE).write_text(Manifest(**record).to_json(), encoding="utf-8")
    copies.unseal(folder)
    flip(folder)
    with pytest.raises(RegistryError, match="other has changed"):
        store.fetch(version(), cache)
    assert outside.read_text(encoding="utf-8") == "somebody's"
    assert [name for name in server.asked if "other" in name] == []


@pytest.fixture
def nobodys_cache() -> Iterator[Path]:
    """A folder for copies, while this process has no more rights than its owner: root may write everywhere."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="nsk-"))
    me = os.geteuid()
    if me == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(me)
        shutil.rmtree(folder)


def test_a_copy_is_read_only_and_can_be_mended_and_removed_all_the_same(
    nobodys_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(write_version(nobodys_cache / "server"))
    monkeypatch.setattr(registry, "fetch", server.fetch)
    cache = nobodys_cache / "cache"
    folder = store.fetch(version(), cache, None, ADAPTER_FOLDER).weights.parent
    stored = store.fetch(version(), cache)  # the rest of it, into the copy that was sealed
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o444}
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o555}
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    with pytest.raises(PermissionError):
        flip(folder)
    with pytest.raises(PermissionError):
        (stored.weights / "more.json").touch()
    with pytest.raises(PermissionError):
        shutil.rmtree(folder)
    copies.unseal(folder)
    flip(folder)
    assert manifest.digests(store.fetch(version(), cache).weights) == manifest.digests(server.folder / WEIGHTS_FOLDER)
    copies.remove(folder)
    copies.remove(folder)
    assert not folder.exists()


def test_a_copy_without_its_manifest_is_made_whole(server: Server, cache: Path) -> None:
    folder = store.fetch(version(), cache).weights.parent
    copies.unseal(folder)
    (folder / FILE).unlink()
    (folder / WEIGHTS_FOLDER / "config.json").unlink()
    assert (store.fetch(version(), cache).weights / "config.json").is_file()


def test_a_copy_whose_manifest_is_cut_is_fetched_anew(server: Server, cache: Path) -> None:
    folder = store.fetch(version(), cache).weights.parent
    copies.unseal(folder)
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
        (add("modeling_evil.py"), "model/modeling_evil.py may hold code"),
        (add("pytorch_model.bin"), "model/pytorch_model.bin may hold code"),
        (add("more.safetensors"), "model/more.safetensors is not in the manifest"),
        (add("deep/evil.json"), "model/deep/evil.json is not in the manifest"),
        (add("../evil.py"), "evil.py may hold code"),
        (add("../more.yaml"), "more.yaml is not in the manifest"),
        (lambda folder: (folder / "MLmodel").write_text("loader_module: evil"), "MLmodel has changed"),
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
    with pytest.raises(RegistryError, match=f"model/{name} may hold code"):
        store.fetch(version(), cache)


def test_a_link_among_the_weights_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_version(tmp_path / "local")
    weights = folder / WEIGHTS_FOLDER / "model.safetensors"
    outside = weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(outside)
    monkeypatch.setattr(registry, "fetch", lambda _version, _target=None: folder)
    with pytest.raises(RegistryError, match="is a link"):
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
    assert caught.value.message.count("may hold code") == 5


# --------------------------------------------------------------------------------------------------- the tensors

Tensors = dict[str, tuple[str, list[int], bytes]]

ONES: dict[str, tuple[bytes, bytes, bytes, bytes, bytes]] = {
    # one, the greatest finite value, infinity, minus infinity, not a number; little-endian
    "F64": (
        struct.pack("<d", 1),
        struct.pack("<Q", 0x7FEF_FFFF_FFFF_FFFF),
        b"\0" * 6 + b"\xf0\x7f",
        b"\0" * 6 + b"\xf0\xff",
        b"\1" + b"\0" * 5 + b"\xf0\x7f",
    ),
    "F32": (
        struct.pack("<f", 1),
        struct.pack("<I", 0x7F7F_FFFF),
        struct.pack("<I", 0x7F80_0000),
        struct.pack("<I", 0xFF80_0000),
        struct.pack("<I", 0x7FC0_0000),
    ),
    "F16": (
        struct.pack("<e", 1),
        struct.pack("<H", 0x7BFF),
        struct.pack("<H", 0x7C00),
        struct.pack("<H", 0xFC00),
        struct.pack("<H", 0xFE01),
    ),
    "BF16": (
        struct.pack("<H", 0x3F80),
        struct.pack("<H", 0x7F7F),
        struct.pack("<H", 0x7F80),
        struct.pack("<H", 0xFF80),
        struct.pack("<H", 0xFFC0),
    ),
}


def packed(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file: the header's length, the header, the tensors' bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def safetensors(tensors: Tensors) -> bytes:
    """A good safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (kind, shape, content) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    return packed(header, data)


def judged(folder: Path, content: bytes) -> str:
    """Why a file of weights is refused; empty where it is not."""
    (folder / "model.safetensors").write_bytes(content)
    try:
        store.check_weights(folder)
    except RegistryError as error:
        return error.message
    return ""


def entry(*offsets: object, kind: object = "F32", shape: object = (1,)) -> dict[str, object]:
    """A header with one tensor."""
    return {"w": {"dtype": kind, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize("kind", ONES)
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_whole_tensors_of_finite_numbers_are_good(tmp_path: Path, kind: str, count: int) -> None:
    one, most, *_ = ONES[kind]
    good = {"a": (kind, [count], one * count), "踩.b": (kind, [1, count], most * count), "c": (kind, [], one)}
    assert judged(tmp_path, safetensors(good)) == ""


@pytest.mark.parametrize("kind", ONES)
@pytest.mark.parametrize("which", [2, 3, 4], ids=["infinite", "minus infinite", "not a number"])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_number_that_is_none_is_found_wherever_it_is(tmp_path: Path, kind: str, which: int, place: int) -> None:
    one, bad = ONES[kind][0], ONES[kind][which]
    content = one * place + bad + one * (999 - place)
    told = judged(tmp_path, safetensors({"good": (kind, [1], one), "layers.0.w": (kind, [10, 100], content)}))
    assert told == "model.safetensors: layers.0.w holds a value that is infinite or not a number."


def test_what_is_found_does_not_depend_on_where_the_chunks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_CHUNK", 4)
    one, bad = ONES["F32"][0], ONES["F32"][4]
    for count in range(1, 10):
        assert judged(tmp_path, safetensors({"w": ("F32", [count], one * count)})) == ""
        for place in range(count):
            content = one * place + bad + one * (count - 1 - place)
            assert "not a number" in judged(tmp_path, safetensors({"w": ("F32", [count], content)}))


def test_whole_numbers_may_have_any_bits(tmp_path: Path) -> None:
    every: Tensors = {kind: (kind, [8], b"\xff" * 8) for kind in ("U8", "I8", "BOOL")}
    every |= {"I64": ("I64", [1], b"\xff" * 8), "empty": ("F32", [0], b"")}
    assert judged(tmp_path, safetensors(every)) == ""


def test_real_files_of_safetensors_are_judged_alike(tmp_path: Path) -> None:
    numpy, save = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy").save
    good = {"a": numpy.arange(12, dtype="float32").reshape(3, 4), "b": numpy.ones(5, dtype="float16")}
    assert judged(tmp_path, save(good, metadata={"format": "pt"})) == ""
    bad = {**good, "b": numpy.array([1, numpy.nan], dtype="float64")}
    assert "b holds a value" in judged(tmp_path, save(bad))


@pytest.mark.parametrize("lost", [1, 2, 100, 4000])
def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, lost: int) -> None:
    content = safetensors({"a": ("F32", [10], ONES["F32"][0] * 10), "b": ("F32", [1000], ONES["F32"][0] * 1000)})
    assert judged(tmp_path, content[:-lost]) == "model.safetensors is cut short: b ends after the file."


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 50])
def test_a_file_that_is_cut_within_its_header_is_refused(tmp_path: Path, size: int) -> None:
    content = safetensors({"a": ("F32", [1], ONES["F32"][0])})
    assert "model.safetensors" in judged(tmp_path, content[:size])


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_of_a_length_that_cannot_be_is_refused_unread(tmp_path: Path, length: int) -> None:
    assert judged(tmp_path, packed({}, length=length)) == "model.safetensors is no safetensors file."


@pytest.mark.parametrize("length", [1000, 99_999_999])
def test_a_header_that_ends_after_the_file_is_refused(tmp_path: Path, length: int) -> None:
    assert "model.safetensors" in judged(tmp_path, packed(entry(0, 4), ONES["F32"][0], length=length))


@pytest.mark.parametrize(
    "header",
    [
        b"{}}",
        b"not json",
        b"\xff\xfe",
        b'{"w":',
        [],
        "text",
        12,
        None,
        [1, 2],
        {"w": None},
        {"w": []},
        {"w": "F32"},
        {"w": {}},
        {"w": {"dtype": "F32", "shape": [1]}},
        {"w": {"dtype": "F32", "data_offsets": [0, 4]}},
        {"w": {"shape": [1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": []}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": 4}},
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: object) -> None:
    assert judged(tmp_path, packed(header, ONES["F32"][0])) == "model.safetensors has a malformed header."


@pytest.mark.parametrize("offsets", [(-4, 0), (4, 0), (0, 8), (4, 8), (0, 1 << 70), (-(1 << 70), 0)])
def test_offsets_outside_the_file_are_refused(tmp_path: Path, offsets: tuple[int, int]) -> None:
    assert judged(tmp_path, packed(entry(*offsets), ONES["F32"][0])).startswith("model.safetensors is cut short")


@pytest.mark.parametrize(
    "header",
    [
        entry("a", "b"),
        entry(None, None),
        entry(0.0, 4.0),
        entry([0], [4]),
        entry(0, 4, kind=[]),
        entry(0, 4, kind={}),
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_entries_of_the_wrong_type_are_refused_with_an_error_of_ours(tmp_path: Path, header: object) -> None:
    assert "model.safetensors" in judged(tmp_path, packed(header, ONES["F32"][0]))


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (entry(0, 8, shape=[1]), 8),
        (entry(0, 4, shape=[2]), 4),
        (entry(0, 4, shape=[-1]), 4),
        (entry(0, 3, shape=[1]), 3),
        (entry(0, 4), 8),
        (entry(4, 8), 8),
        (entry(0, 4, kind="F99"), 4),
        ({**entry(0, 4), "v": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}, 6),
        (b"{}" + b" " * 6, 100),
    ],
    ids=[
        *("more bytes than the shape", "less bytes than the shape", "negative shape", "a part of a number"),
        *("bytes after the last tensor", "bytes before the first", "unknown type", "overlap", "no tensors"),
    ],
)
def test_what_safetensors_would_refuse_is_refused(tmp_path: Path, header: object, size: int) -> None:
    content = packed(header, (ONES["F32"][0] * 100)[:size])
    real = pytest.importorskip("safetensors")
    with pytest.raises(real.SafetensorError):
        real.deserialize(content)
    assert "model.safetensors" in judged(tmp_path, content)


def test_every_shard_is_looked_into_and_nothing_else(tmp_path: Path) -> None:
    good = safetensors({"w": ("F32", [1], ONES["F32"][0])})
    for number in range(3):
        (tmp_path / f"model-{number}.safetensors").write_bytes(good)
    (tmp_path / "tokenizer.json").write_bytes(b"{")
    store.check_weights(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(good[:-1])
    with pytest.raises(RegistryError, match=r"model-2\.safetensors is cut short"):
        store.check_weights(tmp_path)


# --------------------------------------------------------------------------------------------------- two versions

WEIGHTS: Tensors = {"a": ("F32", [2], ONES["F32"][0] * 2), "b": ("F32", [1, 1], ONES["F32"][0])}
FILES = {
    "config.json": b'{"hidden_size": 1024}',
    "chat_template.jinja": "你".encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(WEIGHTS),
}


def stored(folder: Path, files: dict[str, bytes] | None = None, *, adapter: bytes = b"adapter") -> Stored:
    """A version whose weights are these files."""
    named = {f"{WEIGHTS_FOLDER}/{name}": content for name, content in (files or FILES).items()}
    write_version(folder, {**named, f"{ADAPTER_FOLDER}/adapter_model.safetensors": adapter})
    return Stored(version(), Manifest.read(folder), folder / WEIGHTS_FOLDER)


def difference(folder: Path, changes: dict[str, bytes | None]) -> str:
    """What stands between a version and one that differs by these files (none: it has it not)."""
    other = {name: content for name, content in {**FILES, **changes}.items() if content is not None}
    one, two = stored(folder / "one"), stored(folder / "two", other, adapter=b"other")
    told = store.difference(one, two)
    assert bool(store.difference(two, one)) == bool(told)
    return told


def test_other_numbers_in_tensors_of_the_same_shapes_go_in_place(tmp_path: Path) -> None:
    numbers = {name: (kind, shape, b"\0" * len(content)) for name, (kind, shape, content) in WEIGHTS.items()}
    assert difference(tmp_path, {"model.safetensors": safetensors(numbers)}) == ""


def test_the_same_version_goes_in_place(tmp_path: Path) -> None:
    assert difference(tmp_path, {}) == ""


def test_the_order_of_the_tensors_does_not_matter(tmp_path: Path) -> None:
    turned = dict(reversed(WEIGHTS.items()))
    assert difference(tmp_path, {"model.safetensors": safetensors(turned)}) == ""


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"other", None])
def test_another_configuration_template_or_tokenizer_does_not_go_in_place(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    assert difference(tmp_path, {name: content}) == f"{name} differs"


def test_a_file_more_does_not_go_in_place(tmp_path: Path) -> None:
    assert difference(tmp_path, {"generation_config.json": b"{}"}) == "generation_config.json differs"


@pytest.mark.parametrize(
    "tensors",
    [
        {**WEIGHTS, "b": ("F32", [1], ONES["F32"][0])},
        {**WEIGHTS, "b": ("F16", [1, 1], ONES["F16"][0])},
        {**WEIGHTS, "b": ("I32", [1, 1], ONES["F32"][0])},
        {**WEIGHTS, "c": ("F32", [1], ONES["F32"][0])},
        {"a": WEIGHTS["a"]},
        {"a": WEIGHTS["a"], "B": WEIGHTS["b"]},
        {},
    ],
    ids=["shape", "type", "kind of number", "one more", "one less", "name", "none"],
)
def test_other_tensors_do_not_go_in_place(tmp_path: Path, tensors: Tensors) -> None:
    told = difference(tmp_path, {"model.safetensors": safetensors(tensors)})
    assert told == "the tensors of model.safetensors differ in name, shape or type"


def test_another_number_of_files_does_not_go_in_place(tmp_path: Path) -> None:
    shard = safetensors({"c": ("F32", [1], ONES["F32"][0])})
    assert difference(tmp_path / "more", {"model-2.safetensors": shard}) == "model-2.safetensors differs"
    parts = {"model.safetensors": None, "model-1.safetensors": FILES["model.safetensors"], "model-2.safetensors": shard}
    assert difference(tmp_path / "split", parts) == "model-1.safetensors differs"


# --------------------------------------------------------------------------------------------------- what was served

CHAMPION = "models:/ccb@champion"


def test_a_version_is_remembered_with_all_it_has(cache: Path) -> None:
    one = replace(version(), tags={"namesake.gate": "passed 踩"}, created=1_700_000_000_123)
    store.remember(cache, CHAMPION, one)
    assert store.recall(cache, CHAMPION) == one


def test_the_last_one_is_remembered_for_each_alias(cache: Path) -> None:
    for number in (3, 4):
        store.remember(cache, CHAMPION, version(number))
    store.remember(cache, "models:/ccb@candidate", version(9))
    assert store.recall(cache, CHAMPION) == version(4)
    assert store.recall(cache, "models:/ccb@candidate") == version(9)
    assert store.recall(cache, "models:/踩/../../etc@champion") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b'{"name": "ccb"}', b"\xff\xfe", b'{"nom": "ccb"}']
)
def test_a_memory_that_is_damaged_is_none(cache: Path, content: bytes) -> None:
    store.remember(cache, CHAMPION, version())
    (written,) = [path for path in cache.rglob("*") if path.is_file()]
    written.write_bytes(content)
    assert store.recall(cache, CHAMPION) is None


def test_what_is_remembered_is_no_version_to_serve(server: Server, cache: Path) -> None:
    store.remember(cache, CHAMPION, version())
    store.fetch(version(), cache)
    assert server.fetched == 1
    assert store.recall(cache, CHAMPION) == version()


# --------------------------------------------------------------------------------------------------- adapters

NAME = "base_model.model.model.layers.0.self_attn.q_proj"
Q = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"


class AdapterPlace:
    """A base whose one matrix goes from 6 to 4, and a version whose adapter of rank 2 changes it."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
        self.tensors = {Q[0]: np.ones((2, 6), np.float32), Q[1]: np.ones((4, 2), np.float32)}
        self.folder, base = folder / "ccb-v3", folder / "base"
        for place in (base, self.folder / ADAPTER_FOLDER):
            place.mkdir(parents=True)
        save_file({"model.layers.0.self_attn.q_proj.weight": np.ones((4, 6), np.float32)}, base / "model.safetensors")
        self.base = Base("base", base, "digest of the base")
        self.digest = "digest of the base"

    @property
    def stored(self) -> Stored:
        """The version as it is now."""
        write_version(self.folder)
        adapter = self.folder / ADAPTER_FOLDER
        (adapter / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        save_file(self.tensors, adapter / "adapter_model.safetensors")
        record = replace(Manifest.read(self.folder), base={"id": "the base", "digest": self.digest})
        return Stored(version(), record, self.folder / WEIGHTS_FOLDER)


@pytest.fixture
def place(tmp_path: Path) -> AdapterPlace:
    """A good adapter and its base."""
    return AdapterPlace(tmp_path)


def test_a_good_adapter_is_taken_and_its_rank_told(place: AdapterPlace) -> None:
    store.check_adapter(place.stored, place.base, 2)
    assert store.rank(place.stored) == 2
    place.config["rank_pattern"] = {"q_proj": 5}
    assert store.rank(place.stored) == 5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"r": 8}, "has rank 8, the engine has room for 4"),
        ({"rank_pattern": {"q_proj": 8}}, "has rank 8"),
        ({"use_dora": True}, "does not serve .use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": 0}, "no LoRA adapter"),
        ({"r": "2"}, "no LoRA adapter"),
        ({"rank_pattern": 5}, "no LoRA adapter"),
    ],
)
def test_an_adapter_that_the_engine_cannot_do_is_refused(
    place: AdapterPlace, change: dict[str, object], why: str
) -> None:
    place.config |= change
    with pytest.raises(RegistryError, match=why):
        store.check_adapter(place.stored, place.base, 4)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        (Q[0], (2, 5), "the base's tensor"),
        (Q[1], (5, 2), "the base's tensor"),
        (Q[0], (3, 6), "does not fit its other half"),
        (Q[0], (2,), "nothing that"),
        (Q[0].replace("q_proj", "x_proj"), (2, 6), "nothing that"),
        (f"{NAME}.lora_magnitude_vector", (4,), "nothing that"),
    ],
)
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    place: AdapterPlace, name: str, shape: tuple[int, ...], why: str
) -> None:
    place.tensors[name] = np.ones(shape, np.float32)
    with pytest.raises(RegistryError, match=why):
        store.check_adapter(place.stored, place.base, 4)


def test_half_an_adapter_or_one_greater_than_it_says_is_refused(place: AdapterPlace) -> None:
    del place.tensors[Q[1]]
    with pytest.raises(RegistryError, match="other half"):
        store.check_adapter(place.stored, place.base, 4)
    place.tensors = {Q[0]: np.ones((4, 6), np.float32), Q[1]: np.ones((4, 4), np.float32)}
    with pytest.raises(RegistryError, match="or the rank 2"):
        store.check_adapter(place.stored, place.base, 4)


def test_an_adapter_for_another_base_is_refused(place: AdapterPlace) -> None:
    place.digest = "another"
    with pytest.raises(RegistryError, match="was trained on another base"):
        store.check_adapter(place.stored, place.base, 4)


def test_an_adapter_that_is_not_finite_or_cut_short_is_refused(place: AdapterPlace) -> None:
    place.tensors[Q[0]][1, 3] = np.nan
    with pytest.raises(RegistryError, match="not a number"):
        store.check_adapter(place.stored, place.base, 4)
    stored = place.stored
    path = stored.adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RegistryError, match="cut short"):
        store.check_adapter(stored, place.base, 4)


def test_without_weights_that_are_safetensors_there_is_no_adapter(place: AdapterPlace) -> None:
    stored = place.stored
    path = stored.adapter / "adapter_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(RegistryError, match=r"adapter_model\.safetensors is missing"):
        store.check_adapter(stored, place.base, 4)


def test_of_a_version_whose_adapter_is_wanted_only_that_is_copied(server: Server, cache: Path) -> None:
    asked = server.asked
    stored = store.fetch(version(), cache, None, ADAPTER_FOLDER)
    assert (asked, stored.adapter.is_dir(), stored.weights.exists()) == ([FILE, ADAPTER_FOLDER], True, False)
    store.fetch(version(), cache, None, ADAPTER_FOLDER)
    assert len(asked) == 2
    copies.unseal(stored.weights.parent)
    (stored.adapter / "adapter_model.safetensors").write_bytes(b"changed")
    store.fetch(version(), cache, None, ADAPTER_FOLDER)
    assert asked[2:] == [FILE, f"{ADAPTER_FOLDER}/adapter_model.safetensors"]


def test_a_version_without_an_adapter_cannot_be_served_as_one(server: Server, cache: Path) -> None:
    shutil.rmtree(server.folder / ADAPTER_FOLDER)
    record = replace(Manifest.read(server.folder), digests=manifest.digests(server.folder / WEIGHTS_FOLDER))
    (server.folder / FILE).write_text(record.to_json(), encoding="utf-8")
    (server.folder / ADAPTER_FOLDER).mkdir()
    with pytest.raises(RegistryError, match="no adapter"):
        store.fetch(version(), cache, None, ADAPTER_FOLDER)


@pytest.mark.parametrize("part", [WEIGHTS_FOLDER, ADAPTER_FOLDER])
def test_what_was_served_last_is_served_again_while_the_registry_is_away(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    before = store.fetch(version(), cache, None, part)
    store.remember(cache, "models:/ccb@champion", version())

    def away(*_: object) -> Path:
        raise RegistryError("away")

    monkeypatch.setattr(registry, "fetch", away)
    last = store.recall(cache, "models:/ccb@champion")
    assert last is not None
    assert store.fetch(last, cache, None, part) == before


def test_versions_of_one_number_have_names_of_their_own() -> None:
    ids = {Stored(version(3, source), Manifest({}, None, {}, "", {}, {}, {}, {}, {}), Path()).id for source in "abb"}
    assert len(ids) == 2
    assert all(id.startswith("v3-") and id.isascii() for id in ids)


def write_base(folder: Path) -> Path:
    """A folder that is a base model."""
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_the_base_is_found_where_the_manifest_says_or_where_it_is_given(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "my base")
    digest = digest_of_folder(folder)
    record = Manifest({}, None, {"id": str(folder), "source": "folder", "digest": digest}, "", {}, {}, {}, {}, {})
    assert store.base(record, "") == Base("my base", folder, digest)
    moved = folder.rename(tmp_path / "moved")
    assert store.base(record, str(moved)) == Base("my base", moved, digest)
    with pytest.raises(RegistryError, match="not to be had here"):
        store.base(record, "")
    (moved / "config.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(RegistryError, match="is not the base"):
        store.base(record, str(moved))

"""The record that travels inside a version: what it is made of and how it scored, and its signature.

Signed by OpenSSF model-signing (https://github.com/sigstore/model-transparency) with an elliptic-curve key that the
user gives; nothing is asked of the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict  # pydantic takes typing's own from Python 3.12 on

from namesake.errors import InputError, RegistryError
from namesake.messages import tr
from namesake.paths import digest_of_file

FILE = "namesake.json"

FORMAT = 2
"""Of manifests that are written now: they name every file of the version. In format 1 MLflow's own are left out."""

ADAPTER_FOLDER = "adapter"
WEIGHTS_FOLDER = "model"
"""Where the merged model lies in a version, in the shape that vLLM and transformers load."""

CARD = "README.md"
PROVENANCE = "provenance.json"
SCORECARD = "scorecard.json"
"""The model card, the statement of where the version comes from, and every reply that its scores were made from; they
lie beside the manifest, which has their digests.
"""

UNKNOWN = "unknown"
"""Stands where a digest would, of what nobody kept."""

SIGNATURE = "model.sig"
"""The signature of a version: over every file in it but itself and :data:`FETCHED`."""

FETCHED = "registered_model_meta"
"""What MLflow writes beside its own files each time that it fetches a version (``models_artifact_repo.py``), into the
store itself where that is local: name and number that were asked for. Nothing reads it.
"""

_LONGEST_FETCHED = 2000
_FETCHED = re.compile(rb"(model_name: .{1,1100}\nmodel_version: ('\d{1,10}'|null)\n)?", re.DOTALL)
"""Or nothing: so it lies there for the moment in which another process fetches the version."""

_SAFE = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".tiktoken", ".yaml"}
"""Kinds of file that a version may hold: weights, tokenizer, template, text."""

_MLFLOWS = "MLmodel"
"""MLflow's description of the version, YAML without saying so in its name. It names the module that loads the version:
who can change it can run code where ``mlflow.pyfunc`` loads it.
"""


class Golden(TypedDict):
    """A question with the merged model's own greedy reply."""

    messages: list[dict[str, str]]
    reply: str


class Decided(TypedDict, total=False):
    """What the gate said."""

    passed: bool
    reasons: list[str]
    policy: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a version holds.

    Attributes:
        identity: ``踩踩背 CCB / 老爷爷 OldGrandpa``.
        system: the system prompt it was trained under and answers under by default.
        base: id and digest of the base model; revision and license where they are known.
        run: training run.
        digests: SHA-256 of each file of the version but manifest and signature, by path within it; in format 1 also
            without the files that MLflow added.
        data: what it was trained on: data sets, numbers of rows, digests of the training file, of the replay rows in it
            and of the corpus; ``unknown`` for a digest that nobody kept.
        scores: fractions of the merged model's scorecard.
        recipe: recipe name and arguments.
        tools: versions of what made it.
        override: the reason a person gave for overruling the gate; empty otherwise.
        golden: questions with the merged model's own greedy replies (``messages``, ``reply``); an engine that loaded
            the version is asked them before it answers anybody else.
        gate: ``passed``, ``reasons`` and the ``policy`` when it was promoted; empty in versions of older releases.
        questions: digest of the held-out questions that the scores are about.
        promoted: ``model`` (the registered one), ``by``, ``at``, ``run`` (of the promotion), ``commit`` (of
            Namesake), ``trained_from``, ``trained_to``; times in UTC (RFC 3339).
    """

    identity: Mapping[str, str]
    system: str | None
    base: Mapping[str, str]
    run: str
    digests: Mapping[str, str]
    data: Mapping[str, str]
    scores: Mapping[str, float]
    recipe: Mapping[str, str]
    tools: Mapping[str, str]
    override: str = ""
    golden: Sequence[Golden] = ()
    format: int = FORMAT
    gate: Decided = field(default_factory=Decided)
    questions: str = ""
    promoted: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as text."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Back from :meth:`to_json`.

        Raises:
            ValueError: it is no manifest, or something in it is of the wrong type.
        """
        from pydantic import ValidationError  # here: most commands read none

        try:
            found: Manifest = _shape().validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or FILE}: {first['msg']}") from None
        lacks = (
            {"name", "author"} - found.identity.keys() | {"id"} - found.base.keys() | {"format"} - {*json.loads(text)}
        )
        if lacks:
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        if not all(
            one["messages"] and all(m.keys() >= {"role", "content"} for m in one["messages"]) for one in found.golden
        ):
            raise ValueError("golden: a question is no dialogue")
        return replace(found, golden=tuple(found.golden))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a version's folder.

        Raises:
            RegistryError: there is none, or it is damaged.
        """
        path = folder / FILE
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RegistryError(
                tr("The version in {folder} has no readable {file} ({error}).", folder=folder, file=FILE, error=error),
                mend="Promote it with `namesake promote`.",
            ) from error


@cache
def _shape() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of every file below the folder, by path relative to it; those that are known are not read."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: (known or {}).get(name) or digest_of_file(folder / name) for name in names}


def damaged(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """The files that are missing or not what the manifest says, in the order of their names."""
    faults: list[str] = []
    for name, digest in sorted(wanted.items()):
        path = folder / name
        if not path.is_file():
            faults.append(tr("{name} is missing", name=name))
        elif digest_of_file(path) != digest:
            faults.append(tr("{name} has changed", name=name))
    return faults


def strange(folder: Path, record: Manifest) -> list[str]:
    """What lies in the version and does not belong there: links, kinds of file that may hold code, and files that the
    manifest does not name (in format 1: of those among the weights or the adapter).
    """
    parts = (f"{WEIGHTS_FOLDER}/", f"{ADAPTER_FOLDER}/") if record.format == 1 else ("",)
    named = {FILE, SIGNATURE, *record.digests}
    faults: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if fault := _unsafe(path, name):
            faults.append(fault)
        elif path.is_dir() or name in named:
            continue
        elif name == FETCHED:
            if path.stat().st_size > _LONGEST_FETCHED or not _FETCHED.fullmatch(path.read_bytes()):
                faults.append(tr("{name} is not what MLflow writes there", name=name))
        elif name.startswith(parts):
            faults.append(tr("{name} is not in the manifest", name=name))
    return faults


def code_in(folder: Path) -> list[str]:
    """What lies below a folder and may not become part of a version: links, kinds of file that may hold code."""
    found = (_unsafe(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")))
    return [fault for fault in found if fault]


def _unsafe(path: Path, name: str) -> str:
    if path.is_symlink():
        return tr("{name} is a link", name=name)
    safe = path.suffix in _SAFE or name in {SIGNATURE, FETCHED, _MLFLOWS}
    if path.is_dir() or (safe and path.is_file()):
        return ""
    return tr("{name} may hold code", name=name)


def public_key_of(key: Path, password: str = "") -> str:
    """The public half of a private key, as PEM.

    Raises:
        InputError: the file is no private key on a curve that model-signing signs with, or the password is wrong.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, SECP521R1, EllipticCurvePrivateKey

    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password.encode() if password else None)
    except (OSError, ValueError, TypeError) as error:
        raise _no_key("sign_key", key, str(error)) from error
    if not isinstance(private, EllipticCurvePrivateKey) or not isinstance(
        private.curve, SECP256R1 | SECP384R1 | SECP521R1
    ):
        raise _no_key("sign_key", key, "it is not on the curve P-256, P-384 or P-521")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def sign(folder: Path, key: Path, password: str = "") -> None:
    """Sign everything that lies in the folder, into ``model.sig``, but for what MLflow writes there later.

    Raises:
        InputError: the file is no private key that can sign, or the password is wrong.
    """
    public_key_of(key, password)
    from model_signing import hashing, signing

    no_links = hashing.Config().set_allow_symlinks(False)  # type: ignore[no-untyped-call]
    no_links.set_ignored_paths(paths=[FETCHED], ignore_git_paths=False)
    # It says the password is text, and hands it to cryptography, which wants bytes.
    opened: Any = password.encode() if password else None
    signer = signing.Config().use_elliptic_key_signer(private_key=key, password=opened)  # type: ignore[no-untyped-call]
    signer.set_hashing_config(no_links).sign(folder, folder / SIGNATURE)


def check_signature(folder: Path, public_key: Path) -> None:
    """Check the version's files against its signature, before anything parses them.

    Raises:
        InputError: the file is no public key.
        RegistryError: there is no signature, it is not by this key, or a file is not what was signed.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        serialization.load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise _no_key("public_key", public_key, str(error)) from error
    if not (folder / SIGNATURE).is_file():
        raise RegistryError(
            "The version is not signed, and a public key was given.",
            mend="Promote it with --sign-key, or leave the public key out.",
            kind="signature",
        )
    from model_signing import hashing, verifying

    try:
        no_links = hashing.Config().set_allow_symlinks(False)  # type: ignore[no-untyped-call]
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)  # type: ignore[no-untyped-call]
        # What was added since is found by `strange`, which knows the manifest's format.
        verifier.set_hashing_config(no_links).set_ignore_unsigned_files(True).verify(folder, folder / SIGNATURE)
    except Exception as error:  # model-signing lets through what protobuf, cryptography and json raise
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        changed = ", ".join(re.findall(r"Hash mismatch for '([^']+)'", text))
        told = tr("{files} is not what was signed", files=changed) if changed else text
        raise RegistryError(
            tr("The version's signature does not hold: {told}.", told=told),
            mend="Check the key, or promote the run again.",
            kind="signature",
        ) from error


def _no_key(parameter: str, path: Path, fault: str) -> InputError:
    return InputError(
        parameter,
        str(path),
        tr("is no key that can be used ({fault})", fault=fault),
        mend="Make a pair: openssl ecparam -genkey -name prime256v1 -noout -out key.pem; "
        "openssl ec -in key.pem -pubout -out key.pub",
    )

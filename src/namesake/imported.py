"""The use case ``namesake import``: a LoRA checkpoint that plain ``swift sft`` made becomes a finished training run.

It is asked and judged like any run and can be promoted like any; what it was trained on is not known, and is said so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from namesake import base_model, corpus, recipe, tracking
from namesake.base_model import BaseModel
from namesake.errors import BaseModelError, InputError
from namesake.gate import Policy
from namesake.identity import Identity
from namesake.manifest import UNKNOWN
from namesake.messages import tr
from namesake.paths import digest_of_file
from namesake.run import Losses, Outcome, base_scores, log_checkpoint, of_whom, prove, show, tools
from namesake.terminal import Screen

RECIPE = "imported"
"""Stands where the recipe's name would."""

_CONFIG, _WEIGHTS, _ARGS, _STATE = "adapter_config.json", "adapter_model.safetensors", "args.json", "trainer_state.json"
_PICKLED = ("adapter_model.bin", "pytorch_model.bin")
_MEND = tr("Give the folder that `swift sft` names last_model_checkpoint, such as output/v0-…/checkpoint-31.")

_KEPT = (
    *("tuner_type", "torch_dtype", "num_train_epochs", "max_steps", "per_device_train_batch_size", "learning_rate"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_length", "packing"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_bias", "lora_dtype", "use_rslora", "use_dora", "init_weights"),
    *("target_modules", "modules_to_save", "loss_type", "loss_scale", "system", "template", "model_type", "seed"),
    *("split_dataset_ratio", "data_seed"),
)
"""Arguments that a run keeps of the 347 in ``args.json``, which is kept whole beside the adapter."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, unchecked.

    Attributes:
        checkpoint: folder with the adapter and ``args.json``.
        name, author: whom it was trained to be.
        model: base model; empty for the one that ``args.json`` names.
        sha256: digest that the adapter's weights must have; empty for any.
    """

    checkpoint: str
    name: str
    author: str
    model: str = ""
    sha256: str = ""
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that ``swift sft`` wrote: the adapter, and the arguments it was trained with."""

    path: Path
    args: Mapping[str, Any]
    sha256: str


def import_(request: Request, screen: Screen) -> Outcome:
    """Make a finished run of a checkpoint.

    Raises:
        InputError: the folder is no such checkpoint; nothing has been written then.
        BaseModelError: its base model cannot be had here, or the adapter does not fit it.
        TrackingError: MLflow failed.
    """
    identity = Identity.parse(request.name, request.author)
    checkpoint = read(Path(request.checkpoint).expanduser())
    if request.sha256 and request.sha256.lower() != checkpoint.sha256:
        raise InputError(
            "sha256",
            request.sha256,
            tr("is not the digest of {file}, which is {found}", file=_WEIGHTS, found=checkpoint.sha256),
            mend="Fetch the checkpoint again, or leave --sha256 out.",
        )
    base = _base(request, checkpoint, screen)
    _check_fit(checkpoint, base)
    base_digest = base.digest()
    title = f"{identity.name} · {RECIPE} · {checkpoint.path.name}"
    params = _params(identity, checkpoint, base, base_digest)
    losses = _losses(checkpoint.path / _STATE)
    with tracking.run(title) as tracked:
        tracked.tags(
            {
                tracking.TAG_KIND: "train",
                tracking.TAG_SLUG: identity.slug,
                tracking.TAG_NAME: str(identity.name),
                tracking.TAG_AUTHOR: str(identity.author),
                tracking.TAG_BASE: base.id,
                tracking.TAG_SOURCE: base.source,
                tracking.TAG_LAST: str(checkpoint.path),
                "namesake.imported": str(checkpoint.path),
            }
        )
        screen.step(tr("run {title}", title=title))
        screen.warn("what it was trained on is not known, so nobody can tell whether it has seen our questions")
        tracked.params(params)
        log_checkpoint(tracked, checkpoint.path)
        for metric, values in losses.items():
            for step, value in values:
                tracked.metrics({metric: value}, step)
        system = str(params["sft.system"]) if params["sft.system"] is not None else None
        before = base_scores(identity, base, base_digest, system, corpus.heldout(), screen)
        after, decision, _ = prove(
            tracked,
            identity,
            base,
            checkpoint.path,
            before,
            title=title,
            system=system,
            params=params,
            losses=losses,
            policy=request.policy,
            screen=screen,
        )
    show(tracked, before, after, decision, screen)
    screen.result("  only `promote --run` takes it: without a run's id, imported ones are passed over")
    return Outcome(tracked.id, before, after, decision)


def read(folder: Path) -> Checkpoint:
    """Look at a checkpoint's files.

    Raises:
        InputError: one is missing or is not what it should be; the message has the mend.
    """
    if not folder.is_dir():
        raise _refused(folder, "is no folder")
    if not (folder / _CONFIG).is_file():
        below = sorted(path.parent for path in folder.glob(f"checkpoint-*/{_CONFIG}"))
        if below:
            mend = tr("Give one of them: {folder}.", folder=below[-1])
            raise InputError("checkpoint", str(folder), "holds checkpoints", mend=mend)
        if (folder / "config.json").is_file():
            raise _refused(folder, "holds whole weights, no LoRA adapter", "Train with --tuner_type lora.")
        raise _refused(folder, tr("has no {file}", file=_CONFIG))
    if not (folder / _WEIGHTS).is_file():
        if any((folder / name).is_file() for name in _PICKLED):
            raise _refused(
                folder,
                "has its weights only in a pickle, which can run code when it is read",
                "Train with --save_safetensors true, or convert it to safetensors where you trust it.",
            )
        raise _refused(folder, tr("has no {file}", file=_WEIGHTS))
    if not (folder / _ARGS).is_file():
        raise _refused(folder, tr("has no {file}, so that nobody knows its base model and system prompt", file=_ARGS))
    config, args = (_json(folder, name) for name in (_CONFIG, _ARGS))
    if config.get("peft_type") != "LORA":
        raise _refused(
            folder, tr("is of the type {kind}", kind=config.get("peft_type")), "Train with --tuner_type lora."
        )
    return Checkpoint(folder.resolve(), args, digest_of_file(folder / _WEIGHTS))


def _refused(folder: Path, fault: str, mend: str = _MEND) -> InputError:
    return InputError("checkpoint", str(folder), fault, mend=mend)


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _refused(folder, tr("has a {file} that cannot be read ({error})", file=name, error=error)) from error
    if not isinstance(found, dict):
        raise _refused(folder, tr("has a {file} that is no JSON object", file=name))
    return found


def _base(request: Request, checkpoint: Checkpoint, screen: Screen) -> BaseModel:
    named = request.model or str(checkpoint.args.get("model") or "")
    if not named:
        raise _refused(checkpoint.path, tr("has an {file} that names no model", file=_ARGS), "Give --model.")
    try:
        return base_model.resolve(named, say=screen.detail)
    except (InputError, BaseModelError) as error:
        raise BaseModelError(
            tr("The base model of the checkpoint cannot be had: {message}", message=error.message),
            mend="Give --model with the folder or the ModelScope id of the model it was trained on.",
        ) from error


def _check_fit(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Whether each change of the adapter has a tensor of its shape in the base; headers are read, no weights."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint.path / _WEIGHTS, framework="numpy") as weights:
            changes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        fault = tr("has a {file} that cannot be read ({error})", file=_WEIGHTS, error=error)
        raise _refused(checkpoint.path, fault) from error
    shapes: dict[str, list[int]] = {}
    for path in sorted(base.path.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    for name, shape in changes.items():
        stem, found, _ = name.partition(".lora_A.")
        other = changes.get(f"{stem}.lora_B.weight")
        if not found or other is None:
            continue
        wanted = [other[0], shape[1]]
        own = shapes.get(f"{stem.removeprefix('base_model.model.')}.weight")
        if own != wanted:
            raise BaseModelError(
                tr(
                    "The checkpoint does not fit {base}: it changes {changed} {wanted}, the base {has}.",
                    base=base.id,
                    changed=stem.removeprefix("base_model.model."),
                    wanted=wanted,
                    has=tr("has it as {own}", own=own) if own else "has none of that name",
                ),
                mend="Give --model with the model it was trained on.",
            )


def _params(identity: Identity, checkpoint: Checkpoint, base: BaseModel, base_digest: str) -> dict[str, object]:
    args, known = checkpoint.args, recipe.known_arguments()
    dataset = args.get("dataset") or []
    kept = {f"sft.{key}": args[key] for key in _KEPT if key in known and args.get(key) not in (None, "", [])}
    return {
        **of_whom(identity, base, base_digest),
        "data.dataset": " ".join(map(str, dataset if isinstance(dataset, list) else [dataset])) or UNKNOWN,
        "data.digest": UNKNOWN,
        "recipe.name": RECIPE,
        "sft.system": None,
        **kept,
        **tools(),
        "tool.ms-swift": args.get("swift_version") or UNKNOWN,
        "adapter.sha256": checkpoint.sha256,
    }


def _losses(path: Path) -> Losses:
    """What the trainer logged, where the checkpoint has it."""
    found: Losses = {}
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        for line in lines:
            for key, metric in (("loss", "train/loss"), ("eval_loss", "eval/loss")):
                value = line.get(key)
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault(metric, []).append((int(line["step"]), float(value)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # it is not needed
        return {}
    return found

"""ms-swift in this process: loading data sets, and supervised fine-tuning with a callback of ours.

The only importer of swift, with its plugin :mod:`namesake.distil`. ``--report_to mlflow`` is not used: a parameter name
that MLproject has too makes it lose a whole batch of parameters, and it logs checkpoints with a pickle inside
(see docs/lab-notes.md).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from namesake.base_model import hub_answers
from namesake.errors import DataError, RecipeError, Stopped, TrainingError
from namesake.messages import tr
from namesake.paths import cache_folder
from namesake.terminal import is_descriptor

PLUGIN = Path(__file__).with_name("distil.py")
"""The plugin as plain ``swift sft --external_plugins`` takes it."""

_LAST_LINES = 15


class Listener(Protocol):
    """Told about a training run while it goes on."""

    def on_begin(self, total_steps: int, output_dir: Path) -> None:
        """Training starts; checkpoints will lie in the folder."""

    def on_step(self, step: int, save: Callable[[Path], object]) -> None:
        """A step is done; ``save`` writes the adapter as it is now into a folder. May raise ``Stopped``."""

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """ms-swift logged numbers (loss, token_acc, learning_rate, eval_loss …)."""


@dataclass(frozen=True)
class Trained:
    """What ms-swift hands back: the checkpoints' folders and the figures of the run."""

    output_dir: Path
    last_checkpoint: Path
    best_checkpoint: Path
    best_metric: float | None
    steps: int
    trainable_millions: float


def load_rows(datasets: Sequence[str], *, seed: int) -> list[dict[str, Any]]:
    """The rows of the data sets as ms-swift reads them: ids, ``#N`` sampling, files, several at once.

    Placeholders are left in; a row has ``messages`` and, where its source has one, ``tag``.

    Raises:
        DataError: ms-swift cannot read one of them, or would leave out rows of a file, of which it tells its log alone;
            at once where it is an id and the hub cannot be reached, which ms-swift would try three times.
    """
    if (one := next(filter(_is_on_the_hub, datasets), "")) and not hub_answers():
        raise DataError(
            "dataset",
            one,
            "is no file here, and ModelScope cannot be reached from here",
            mend="Connect, or give files (jsonl, json, csv).",
        )
    with _quiet(), _environment():
        from swift import load_dataset
        from swift.utils import get_logger

        def read(names: Sequence[str]) -> Any:
            return load_dataset(list(names), seed=seed, shuffle=True, remove_unused_columns=False, strict=True)[0]

        left_out = _LeftOut()
        get_logger().addHandler(left_out)
        try:
            rows = [dict(row) for row in read(datasets)]
        except Exception as error:  # ms-swift raises whatever its readers raise, and does not say of which
            one, why = next(filter(None, (_fault(read, name) for name in datasets)), (" ".join(datasets), error))
            raise DataError(
                "dataset",
                one,
                tr("ms-swift cannot read it ({error})", error=_first_line(why)),
                mend="Give files (jsonl, json, csv), or data set ids that ModelScope has and can be reached.",
            ) from error
        finally:
            get_logger().removeHandler(left_out)
    if left_out.rows and not any(map(_is_on_the_hub, datasets)):
        raise DataError(
            "dataset",
            " ".join(datasets),
            tr("{count} rows have no dialogue", count=left_out.rows),
            mend="Give rows of query and response, or messages with role and content.",
        )
    return rows


class _LeftOut(logging.Handler):
    """Counts the rows that ms-swift leaves out (``RowPreprocessor.__call__``)."""

    rows = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Read one of its lines."""
        told = re.match(r"Dataset filtered, origin length: (\d+), filtered dataset length: (\d+)", record.getMessage())
        if told:
            self.rows += max(0, int(told[1]) - int(told[2]))  # of one row it may also make several


def _fault(read: Callable[[Sequence[str]], Any], name: str) -> tuple[str, Exception] | None:
    """The data set with why it cannot be read alone; none where it can."""
    try:
        read([name])
    except Exception as error:  # as above
        return name, error
    return None


def _is_on_the_hub(name: str) -> bool:
    """Whether ms-swift would ask ModelScope for it: ``swift/self-cognition#100``, ``ms::owner/name:subset``."""
    path = name.partition("#")[0]
    return "/" in path and not path.lower().startswith(("hf::", "/", ".", "~")) and not Path(path).exists()


def train(argv: Sequence[str], listener: Listener, log: Path, environment: Mapping[str, str] | None = None) -> Trained:
    """Run ``swift sft`` with the arguments in this process.

    Everything that ms-swift prints goes to ``log``; the listener is told what matters; plugins read ``environment``.

    Raises:
        RecipeError: ms-swift refuses the arguments.
        TrainingError: training failed; the message has the end of the log.
        Stopped: the listener raised it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _output_to(log), _environment(environment):
            import torch
            from swift import SftArguments, TrainerCallback, callbacks_map, sft_main
            from swift.utils import parse_args

            from namesake import distil  # registers its loss

            distil.CACHE = cache_folder()

            class Forward(TrainerCallback):  # type: ignore[misc]
                """Hands ms-swift's events on to the listener."""

                def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
                    if state.is_world_process_zero:
                        listener.on_begin(state.max_steps, Path(args.output_dir))

                def on_step_end(self, args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
                    if state.is_world_process_zero:
                        with torch.random.fork_rng():  # a training that is looked at goes on as one that is not
                            listener.on_step(state.global_step, model.save_pretrained)

                def on_log(self, args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
                    if state.is_world_process_zero:
                        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
                        listener.on_metrics(state.global_step, numbers)

            callbacks_map["namesake"] = Forward
            try:
                args, unknown = parse_args(SftArguments, [*argv, "--callbacks", "namesake"])
            except (ValueError, TypeError, AssertionError, SystemExit) as error:
                raise RecipeError(
                    "args",
                    " ".join(argv),
                    tr("ms-swift refuses them ({error})", error=_first_line(error)),
                    mend=tr("See {log}.", log=log),
                ) from error
            if unknown:
                raise RecipeError("args", " ".join(unknown), "ms-swift does not know it", mend="Remove it.")
            result = sft_main(args)
    except (RecipeError, Stopped, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever torch, transformers or ms-swift raise while training
        raise TrainingError(
            tr("Training failed: {error}.\n{log}", error=_first_line(error), log=end_of(log)),
            mend=tr("The whole log is {log}.", log=log),
        ) from error
    last = result["last_model_checkpoint"]
    if last is None:
        raise TrainingError("Training ended without a checkpoint.", mend="Set save_strategy to epoch or steps.")
    info = str(result.get("model_parameter_info", ""))
    return Trained(
        output_dir=Path(args.output_dir),
        last_checkpoint=Path(last),
        best_checkpoint=Path(result["best_model_checkpoint"] or last),
        best_metric=result["best_metric"],
        steps=result["global_step"],
        trainable_millions=_trainable(info),
    )


def argument_types() -> dict[str, str | list[str]]:
    """Names and types of the arguments of ``swift sft``, or the values they may have, for ``sft_arguments.json``."""
    from swift import SftArguments

    hints = typing.get_type_hints(SftArguments)
    names = [field.name for field in dataclasses.fields(SftArguments) if field.init]
    return {name: _choices(hints[name]) or _type_name(hints[name]) for name in names}


def _choices(hint: Any) -> list[str]:
    """The values of a ``Literal``; none where another type may stand in its place."""
    if typing.get_origin(hint) is typing.Literal:
        return [str(value) for value in typing.get_args(hint) if value is not None]
    parts = [_choices(part) for part in typing.get_args(hint) if part is not type(None)]
    return [value for part in parts for value in part] if all(parts) else []


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is list:
        return "list"
    inner = {_type_name(part) for part in typing.get_args(hint) if part is not type(None)}
    if inner:
        return inner.pop() if len(inner) == 1 else "str"
    return {int: "int", float: "float", bool: "bool"}.get(hint, "str")


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to the log: ms-swift prints 347 arguments, native code prints past Python."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as stream, _printing_to_descriptors():
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextmanager
def _printing_to_descriptors() -> Iterator[None]:
    """Where Python's own streams go past 1 and 2, as a notebook's do, have them go there."""
    with ExitStack() as stack:
        for number, stream, redirected in ((1, sys.stdout, redirect_stdout), (2, sys.stderr, redirect_stderr)):
            if not is_descriptor(stream):
                # Never closed: handlers of loggers that are made meanwhile keep it.
                stack.enter_context(redirected(os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False)))
        yield


@contextmanager
def _environment(given: Mapping[str, str] | None = None) -> Iterator[None]:
    """The environment with what is given; afterwards without it, and the object that it was.

    ``datasets`` puts a copy in the place of ``os.environ`` wherever it maps (``Dataset.map``): whoever holds the
    first one, rich and default arguments of ours among them, would not see what is set from then on.
    """
    first, given = os.environ, given or {}
    before = {name: first.get(name) for name in given}
    first.update(given)
    try:
        yield
    finally:
        wanted: dict[str, str | None] = {**os.environ, **before}
        os.environ = first  # noqa: B003 - what it lacks is put into it below
        for name in {*first, *wanted}:
            value = wanted.get(name)
            if value is None:
                first.pop(name, None)
            elif first.get(name) != value:
                first[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    logging.getLogger("modelscope").setLevel(logging.ERROR)
    with _output_to(Path(os.devnull)):
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def end_of(log: Path) -> str:
    """The last lines of a log."""
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LAST_LINES:])
    return ""


def _trainable(info: str) -> float:
    # "PeftModelForCausalLM: 136.9573M Params (2.4422M Trainable [1.7832%]), …"
    before, found, _ = info.partition("M Trainable")
    return float(before.rpartition("(")[2]) if found else 0.0

"""Public tasks (ARC, MMLU, GSM8K … or the user's own) by EleutherAI's evaluation harness, lm-eval.

The only module that imports lm_eval, which is an extra: ``requirements/harness.txt``. A callback takes the place of its
progress bars; what it logs is seen with ``--verbose``.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from namesake.errors import HarnessError, InputError, said
from namesake.generate import LocalModel
from namesake.messages import joined, tr

BATCH = 16
"""Prompts at a time. Their logits are kept whole, so that memory grows with batch, prompt length and vocabulary."""

_NEAR = 5
"""How many names a message offers for one that is not known."""


@dataclass(frozen=True)
class Score:
    """One metric of one task, or of a group of tasks.

    Attributes:
        metric: the harness's name of it, behind it the filter that replies went through: ``exact_match/strict-match``.
        higher_is_better: as the task says; none where it does not.
        stderr: standard error as the harness states it; none where it states none.
        samples: questions that were asked.
    """

    task: str
    metric: str
    higher_is_better: bool | None
    value: float
    stderr: float | None
    samples: int


@dataclass(frozen=True)
class Evaluation:
    """What one model scored, and the harness's own result file as JSON types."""

    scores: tuple[Score, ...]
    results: Mapping[str, Any]


class Harness:
    """Tasks that are found, with their data at hand.

    Args:
        names: of tasks, groups or tags, ``*`` standing for anything.
        include_path: folder of further task files; a task of that name in it is taken before the harness's own.

    Raises:
        InputError: a task is unknown or cannot be run here, or its data cannot be had.
        HarnessError: lm-eval is not installed.
    """

    def __init__(self, names: Sequence[str], *, include_path: Path | None = None) -> None:
        check()
        self._manager, self._names = _found(names, include_path)
        for name in self._names:
            _check_runs(name, self._load(name))

    def evaluate(
        self,
        model: LocalModel,
        *,
        system: str | None,
        chat_template: bool = True,
        limit: int | None = None,
        batch: int = BATCH,
        progress: Callable[[int, int], None] | None = None,
    ) -> Evaluation:
        """Ask the model all of it; the same call gives the same scores.

        Args:
            system: the system prompt; none, or without ``chat_template``: none is given.
            chat_template: put every question into the model's chat template.
            limit: only the first questions of each task, at most so many.
            batch: prompts at a time; another number rounds elsewhere, which can move a score by an answer.
            progress: is told how many prompts are done, and of how many that are known so far.

        Raises:
            HarnessError: the harness failed.
        """
        from lm_eval import simple_evaluate

        try:
            with _without_its_output():
                found = simple_evaluate(
                    model=_counted(model, batch, progress),
                    tasks=list(self._names),
                    task_manager=self._manager,
                    limit=limit,
                    system_instruction=system if chat_template else None,
                    apply_chat_template=chat_template,
                    log_samples=False,
                    batch_size=batch,
                )
        except Exception as error:  # whatever a task's file makes of its data and of the replies
            raise HarnessError(
                tr("lm-eval failed ({kind}: {error}).", kind=type(error).__name__, error=said(error)),
                mend="Lower --batch-size if memory ran out, else look at the tasks' files; see --verbose.",
            ) from error
        return Evaluation(scores(found), _plain(found))

    def _load(self, name: str) -> Mapping[str, Any]:
        """The tasks behind a name."""
        try:
            tasks: Mapping[str, Any] = self._manager.load([name])["tasks"]
        except ModuleNotFoundError as error:
            raise InputError(
                "tasks",
                name,
                tr("needs the Python package {package}, which is not installed", package=error.name),
                mend="Install it, or leave the task out.",
            ) from error
        except OSError as error:  # among them every way in which a hub is not reached
            raise InputError(
                "tasks",
                name,
                tr("its data cannot be had ({error})", error=said(error)),
                mend="Most tasks fetch theirs from the Hugging Face hub; without it, --include-path takes task files "
                "whose data lies here.",
            ) from error
        except Exception as error:  # whatever the task's file says and makes of its data
            raise InputError(
                "tasks",
                name,
                tr("lm-eval cannot read it ({kind}: {error})", kind=type(error).__name__, error=said(error)),
                mend="Look at the task's file; --verbose shows lm-eval's log.",
            ) from error
        return tasks


def check() -> None:
    """Whether lm-eval is there.

    Raises:
        HarnessError: it is not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise HarnessError(
            "lm-eval, the evaluation harness, is not installed.",
            mend="Install it: pip install --no-deps -r requirements/harness.txt",
        )


def scores(results: Mapping[str, Any]) -> tuple[Score, ...]:
    """The metrics in what the harness returns; one that is no finite number, as of no question, is left out."""
    found = []
    for task, values in results["results"].items():
        better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            found.append(
                Score(
                    task,
                    metric if filtered == "none" else f"{metric}/{filtered}",
                    better.get(metric),
                    float(value),
                    float(stderr) if _is_number(stderr) else None,
                    int(values.get("sample_len", 0)),
                )
            )
    return tuple(found)


def unknown(name: str, known: Sequence[str]) -> InputError:
    """The refusal of a task's name, with those that come near."""
    near = difflib.get_close_matches(name, known, _NEAR, cutoff=0.5)
    fault = tr("is no task; near it: {names}", names=joined(near, ", ")) if near else tr("is no task")
    return InputError(
        "tasks",
        name,
        fault,
        mend="Give a name of lm-eval's list of tasks, or --include-path with the folder of your own (*.yaml).",
    )


def _found(names: Sequence[str], include_path: Path | None) -> tuple[Any, tuple[str, ...]]:
    """A task manager that knows all of the names, and the names, patterns replaced by what they match."""
    if not _verbose():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise InputError("include_path", str(include_path), "is no folder", mend="Give the folder of task files.")
        # Reading lm-eval's own thousands of files takes seconds; whole tasks of the user's need none of them.
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own, tuple(names)
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    matched: list[str] = []
    for name in names:
        these = manager.match_tasks([name])
        if not these:
            raise unknown(name, manager.all_tasks)
        matched += these
    return manager, tuple(dict.fromkeys(matched))


def _check_runs(name: str, tasks: Mapping[str, Any]) -> None:
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise InputError(
                "tasks", name, "runs code that the model writes", mend="Run it with lm-eval itself, in a sandbox."
            )
        if getattr(task, "MULTIMODAL", False):
            raise InputError("tasks", name, "is about images or sound", mend="Give tasks of text.")


def _counted(model: LocalModel, batch: int, progress: Callable[[int, int], None] | None) -> Any:
    """The model as the harness takes it, telling how far it is."""
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):  # type: ignore[misc]
        done = total = 0

        def loglikelihood(self, requests: Any, **_: Any) -> Any:
            return self._all(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> Any:
            return self._all(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, **_: Any) -> Any:
            return self._all(super().generate_until, requests)

        def _model_call(self, inps: Any, **given: Any) -> Any:
            found = super()._model_call(inps, **given)
            self._tell(inps.shape[0])
            return found

        def _model_generate(self, context: Any, *given: Any, **more: Any) -> Any:
            found = super()._model_generate(context, *given, **more)
            self._tell(context.shape[0])
            return found

        def _all(self, ask: Any, requests: Any) -> Any:
            before = self.done
            self.total += len(requests)
            found = ask(requests, disable_tqdm=True)
            self._tell(before + len(requests) - self.done)  # answers that share a prompt are had at once
            return found

        def _tell(self, more: int) -> None:
            self.done += more
            if progress:
                progress(min(self.done, self.total), self.total)

    loaded, tokenizer = model.loaded
    # In bfloat16, which models mostly come in, the log-probabilities of several choices would often be equal.
    return Counted(pretrained=loaded, tokenizer=tokenizer, batch_size=batch, softmax_dtype="float32")


@contextmanager
def _without_its_output() -> Iterator[None]:
    """Bars that no argument turns off, and what git says where the working folder is no repository."""
    if _verbose():
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _verbose() -> bool:
    return logging.getLogger().level in range(logging.DEBUG, logging.INFO + 1)


def _plain(results: Mapping[str, Any]) -> Mapping[str, Any]:
    from lm_eval.utils import handle_non_serializable

    plain: Mapping[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

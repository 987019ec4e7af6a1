"""What a person sees: steps, bars, results, and how much of it. Plain lines where the output is piped."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from namesake.messages import Message, cells, tr, translated

_QUIET_SECONDS = 10.0
"""Without a terminal a bar is a line this often."""

_MLFLOW_LEVEL = "MLFLOW_LOGGING_LEVEL"


class Loudness(Enum):
    """How much is printed.

    ``QUIET``: results, warnings and errors of Namesake. ``VERBOSE``: all that libraries warn and log, too.
    """

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


_loudness = Loudness.NORMAL


@contextmanager
def loudness(wanted: Loudness) -> Iterator[None]:
    """Print so much meanwhile."""
    global _loudness
    before, _loudness = _loudness, wanted
    root, last = logging.getLogger(), logging.lastResort
    levels = root.level, last.level if last else logging.WARNING
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    environment = os.environ.get(_MLFLOW_LEVEL)
    with warnings.catch_warnings():
        if wanted is not Loudness.NORMAL and not sys.warnoptions:  # else the user has said which
            warnings.simplefilter("default" if wanted is Loudness.VERBOSE else "ignore")
        if wanted is Loudness.VERBOSE:
            root.addHandler(handler)
            root.setLevel(logging.INFO)
        if wanted is Loudness.QUIET:
            if last:
                last.setLevel(logging.ERROR)
            if environment is None:
                os.environ[_MLFLOW_LEVEL] = "ERROR"  # read when MLflow is imported, which no command has done yet
        try:
            yield
        finally:
            _loudness = before
            root.removeHandler(handler)
            root.setLevel(levels[0])
            if last:
                last.setLevel(levels[1])
            if environment is None:
                os.environ.pop(_MLFLOW_LEVEL, None)


def is_descriptor(stream: TextIO) -> bool:
    """Whether what is printed to the stream goes to this process's own output, 1 or 2."""
    try:
        return stream.fileno() in {1, 2}
    except (OSError, ValueError):  # it has none
        return False


def moment(seconds: float) -> str:
    """Seconds since 1970 as date and time here."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def padded(text: str, width: int) -> str:
    """The text and spaces to so many columns; a Chinese character takes two."""
    return text + " " * (width - cells(text))


class Bar:
    """One thing that goes on: ``advance(done, note)``."""

    def __init__(self, screen: Screen, title: str, total: int, progress: Progress | None) -> None:
        self._screen, self._title, self._progress = screen, title, progress
        self._task = progress.add_task(title, total=total, note="") if progress else None
        self._total, self._last = total, time.monotonic()

    def advance(self, done: int, note: str = "", total: int | None = None) -> None:
        """Tell how far it is."""
        self._total = total or self._total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._last >= _QUIET_SECONDS:
            self._last = time.monotonic()
            self._screen.line(f"  {self._title} {done}/{self._total} {note}".rstrip())


class Screen:
    """The terminal, on a file descriptor of its own: training sends 1 and 2 into its log."""

    def __init__(self, *, errors: bool = False) -> None:
        """``errors``: write to standard error, where standard output is for machines."""
        stream = sys.stderr if errors else sys.stdout
        stream.flush()
        self._file: TextIO = stream  # a notebook's, which goes into the cell whatever becomes of 1 and 2
        if is_descriptor(stream):
            self._file = os.fdopen(os.dup(stream.fileno()), "w", buffering=1, encoding="utf-8")
        # Plain text in a notebook too: there rich would make an HTML element of each line, and since the kernel sets
        # FORCE_COLOR draw bars into the cell ten times a second.
        plain = None if self._file is not stream else False
        self.console = Console(file=self._file, highlight=False, force_jupyter=False, force_terminal=plain)
        self._quiet = _loudness is Loudness.QUIET

    def line(self, text: str = "", style: str = "") -> None:
        """One line on the way to the result; what is in it is shown as it is, never read as markup."""
        if not self._quiet:
            self.result(text, style)

    def result(self, text: str, style: str = "") -> None:
        """One line of what was asked for, likewise."""
        self.console.print(Text(translated(text), style=style), soft_wrap=True)

    def detail(self, text: str) -> None:
        """A line that belongs to the step before it."""
        self.line(tr("  {text}", text=text))

    def step(self, text: str) -> None:
        """What begins now."""
        self.line(f"› {translated(text)}", "bold")

    def warn(self, text: str) -> None:
        """Something the user must not miss."""
        self.result(f"! {translated(text)}", "bold yellow")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar with what is left and how long it takes."""
        title = translated(title)
        if self._quiet or not self.console.is_terminal:
            yield Bar(self, title, total, None)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn(translated(tr("left"))),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, redirect_stdout=False, redirect_stderr=False) as progress:
            yield Bar(self, title, total, progress)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
        """A table with wrapped cells. Of the cells only messages are translated: the others hold what models say."""
        table = Table(
            title=translated(title) or None, title_justify="left", show_lines=True, expand=self.console.is_terminal
        )
        for heading in headings:
            table.add_column(translated(heading), overflow="fold", ratio=1)
        for row in rows:
            table.add_row(*(Text(translated(cell) if isinstance(cell, Message) else cell) for cell in row))
        self.console.print(table)

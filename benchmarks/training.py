"""Tracked training against bare ``swift sft`` with the same arguments and data: seconds, and are the losses equal?

Each pair runs in turn, in processes of their own: ``namesake run`` first, then ``swift sft`` with the command line that
the run logged. Compared is ms-swift's own ``train_runtime`` and every logged loss.

    python benchmarks/training.py --pairs 3 --steps 20
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from commands import environment


def log_of(output: Path) -> tuple[float, list[float]]:
    """ms-swift's runtime and losses from its ``logging.jsonl``."""
    (path,) = output.rglob("logging.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return next(line["train_runtime"] for line in lines if "train_runtime" in line), [
        line["loss"] for line in lines if "loss" in line
    ]


def pair(steps: int) -> tuple[float, float, bool]:
    """Seconds tracked, seconds bare, and whether every loss is the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        env = environment(folder)
        words = [sys.executable, "-m", "namesake", "run", "--max_steps", str(steps), "--output_dir", str(folder / "a")]
        subprocess.run(words, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
        command = json.loads(next(folder.rglob("swift-command.json")).read_text(encoding="utf-8"))
        command[command.index("--output_dir") + 1] = str(folder / "b")
        with (folder / "bare.log").open("wb") as log:
            subprocess.run(command, cwd=folder, env=env, check=True, stdout=log, stderr=log)
        tracked, ours = log_of(folder / "a")
        bare, theirs = log_of(folder / "b")
        return tracked, bare, ours == theirs and bool(ours)


def main() -> None:
    """Print one line a pair and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    ratios = []
    print("| pair | tracked s | bare s | ratio | losses equal |\n|---|---|---|---|---|")
    for number in range(1, given.pairs + 1):
        tracked, bare, same = pair(given.steps)
        ratios.append(tracked / bare)
        print(
            f"| {number} | {tracked:.1f} | {bare:.1f} | {tracked / bare:.3f} | {'yes' if same else 'NO'} |", flush=True
        )
    print(f"\nmedian ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), goal 1.05 at most")


if __name__ == "__main__":
    main()

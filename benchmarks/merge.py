"""Merging an adapter against copying its base: seconds and memory, beside PEFT's merge and ``swift export``.

Ours and ``cp`` run in turn on the same base, warm (its files in the page cache) and cold (dropped from it). Seconds are
those of the merge itself, the interpreter's start and imports left out, but for ``swift export``, which is a command:
beside it stands ours as a process, start and imports included. Memory is the peak above what the interpreter and its
imports take.

    python benchmarks/merge.py                  # the embedded model, 0.27 GB
    python benchmarks/merge.py --size 8.2       # a generated model of so many GB, in shards of --shard GB
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from commands import ROOT, environment

MERGE = """
import re, sys, time
from pathlib import Path
import numpy, torch, safetensors.torch
if sys.argv[1] == "ours":
    from namesake.merge import merge as work
else:
    import transformers, peft
    from namesake.generate import merge_with_peft as work
def memory(kind):
    return int(re.search(kind + r":\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, start = memory("VmRSS"), time.perf_counter()
work(*map(Path, sys.argv[2:]))
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def generated(folder: Path, size: float, shard: float) -> Path:
    """A Llama of random weights: ``size`` GB in bf16, in shards of at most ``shard`` GB."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, vocabulary = 3072, 8192, 32000
    layer = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 4, hidden)}
    layer |= {"self_attn.v_proj": (hidden // 4, hidden), "self_attn.o_proj": (hidden, hidden)}
    layer |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    per_layer = 2 * sum(rows * columns for rows, columns in layer.values())
    layers = max(round((size * 1e9 - 4 * vocabulary * hidden) / per_layer), 1)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    torch.manual_seed(0)
    noise = (torch.randn(max(rows * columns for rows, columns in shapes.values())) * 0.02).to(torch.bfloat16)
    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    number, held = 0, 0

    def flush() -> None:
        nonlocal part, number, held
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(part, folder / name)
        index.update(dict.fromkeys(part, name))
        part, held = {}, 0

    folder.mkdir()
    for name, (rows, columns) in shapes.items():
        if held + 2 * rows * columns > shard * 1e9:
            flush()
        part[name] = noise[: rows * columns].view(rows, columns).clone()
        held += 2 * rows * columns
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def adapter_of(base: Path, folder: Path, rank: int = 8) -> Path:
    """A LoRA adapter of every linear layer, as PEFT writes it."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if "_proj." in name:
                    rows, columns = tensors.get_slice(name).get_shape()
                    stem = "base_model.model." + name.removesuffix(".weight")
                    weights[f"{stem}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
                    weights[f"{stem}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4 * rank, "task_type": "CAUSAL_LM", "bias": "none"}
    config["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def drop_from_cache(folder: Path) -> None:
    """Have the kernel forget the folder's files."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merged(way: str, base: Path, adapter: Path, target: Path) -> tuple[float, float]:
    """Seconds and bytes of memory of a merge in a process of its own."""
    words = [sys.executable, "-c", MERGE, way, str(base), str(adapter), str(target)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(words, env=env, check=True, capture_output=True, text=True)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def copied(base: Path, target: Path) -> float:
    """Seconds of ``cp``."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", base, target], check=True)
    return time.perf_counter() - start


def seconds_of(command: Callable[[], object]) -> float:
    """Wall time."""
    start = time.perf_counter()
    command()
    return time.perf_counter() - start


def swift_export(base: Path, adapter: Path, target: Path, folder: Path) -> float:
    """Seconds of ``swift export --merge_lora true``, as a command."""
    words = [sys.executable, "-m", "swift.cli.export", "--merge_lora", "true"]
    words += ["--model", str(base), "--model_type", "llama", "--template", "chatml", "--adapters", str(adapter)]
    words += ["--output_dir", str(target)]
    with (folder / "swift.log").open("wb") as log:
        return seconds_of(
            lambda: subprocess.run(words, cwd=folder, env=environment(folder), check=True, stdout=log, stderr=log)
        )


def pairs(base: Path, adapter: Path, folder: Path, number: int, cold: bool) -> tuple[list[float], list[float], float]:
    """Seconds of ours and of ``cp``, in turn, and our peak memory."""
    ours, copies, memory = [], [], 0.0
    target = folder / "target"
    for _ in range(number):
        for mine in (True, False):
            if cold:
                drop_from_cache(base)
            else:
                for path in base.iterdir():
                    path.read_bytes()
            if mine:
                seconds, peak = merged("ours", base, adapter, target)
                ours.append(seconds)
                memory = max(memory, peak)
            else:
                copies.append(copied(base, target))
            shutil.rmtree(target)
            os.sync()
    return ours, copies, memory


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.0, help="GB of a generated model; 0 for the embedded one")
    parser.add_argument("--shard", type=float, default=2.0, help="GB of its shards")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="neither PEFT nor swift export")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-", dir=Path.cwd()) as name:
        folder = Path(name)
        if given.size:
            base = generated(folder / "base", given.size, given.shard)
        else:
            from namesake.base_model import embedded

            base = embedded()
        adapter = adapter_of(base, folder / "adapter")
        shards = [path.stat().st_size for path in base.glob("*.safetensors")]
        print(f"{sum(shards) / 1e9:.2f} GB in {len(shards)} files, the largest {max(shards) / 1e9:.2f} GB\n")
        print("| what | ours | the other | ratio | goal |\n|---|---|---|---|---|")
        for cold in (False, True):
            ours, copies, memory = pairs(base, adapter, folder, given.pairs, cold)
            ratios = [mine / theirs for mine, theirs in zip(ours, copies, strict=True)]
            print(
                f"| cp, {'cold' if cold else 'warm'}, seconds | {statistics.median(ours):.2f} | "
                f"{statistics.median(copies):.2f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) | 1.2 |",
                flush=True,
            )
        print(f"| peak memory ÷ largest file, GB | {memory / 1e9:.2f} | {max(shards) / 1e9:.2f} | "
              f"{memory / max(shards):.2f} | 1.2 |", flush=True)  # fmt: skip
        if given.no_peers:
            return
        seconds, memory_there = merged("peft", base, adapter, folder / "by-peft")
        mine, _ = merged("ours", base, adapter, folder / "ours")
        print(f"| PEFT, seconds | {mine:.2f} | {seconds:.2f} | {mine / seconds:.2f} | |")
        print(
            f"| PEFT, peak memory GB | {memory / 1e9:.2f} | {memory_there / 1e9:.2f} | {memory / memory_there:.2f} | |"
        )
        if not given.size:
            whole = seconds_of(lambda: merged("ours", base, adapter, folder / "again"))
            export = swift_export(base, adapter, folder / "by-swift", folder)
            print(f"| `swift export`, a command, seconds | {whole:.2f} | {export:.2f} | {whole / export:.2f} | 0.3 |")


if __name__ == "__main__":
    main()

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
from collections.abc import Iterator, Sequence
from pathlib import Path

from commands import ROOT, environment, seconds_of

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
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 24, "num_key_value_heads": 6, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
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
    return seconds_of(lambda: subprocess.run(["cp", "-r", "--reflink=never", base, target], check=True))


def swift_export(base: Path, adapter: Path, target: Path, folder: Path) -> float:
    """Seconds of ``swift export --merge_lora true``, as a command."""
    words = [sys.executable, "-m", "swift.cli.export", "--merge_lora", "true"]
    words += ["--model", str(base), "--model_type", "llama", "--template", "chatml", "--adapters", str(adapter)]
    words += ["--output_dir", str(target)]
    with (folder / "swift.log").open("wb") as log:
        return seconds_of(
            lambda: subprocess.run(words, cwd=folder, env=environment(folder), check=True, stdout=log, stderr=log)
        )


def against_cp(base: Path, adapter: Path, folder: Path, number: int, *, cold: bool) -> Iterator[tuple[float, ...]]:
    """Seconds of ours, seconds of ``cp``, our peak memory in bytes; in turn, every second pair the other way round."""
    target = folder / "target"
    for one in range(number):
        found = {}
        for mine in (True, False) if one % 2 == 0 else (False, True):
            if cold:
                drop_from_cache(base)
            else:
                for path in base.iterdir():
                    path.read_bytes()
            found[mine] = merged("ours", base, adapter, target) if mine else (copied(base, target),)
            shutil.rmtree(target)
            os.sync()
        yield found[True][0], found[False][0], found[True][1]


def against_peft(base: Path, adapter: Path, folder: Path, number: int) -> Iterator[tuple[float, ...]]:
    """Seconds of ours and of PEFT's merge, then peak memory of either in bytes."""
    for one in range(number):
        ways = ("ours", "peft") if one % 2 == 0 else ("peft", "ours")
        found = {way: merged(way, base, adapter, folder / f"{way}-{one}") for way in ways}
        for way in ways:
            shutil.rmtree(folder / f"{way}-{one}")
        yield found["ours"][0], found["peft"][0], found["ours"][1], found["peft"][1]


def against_swift(base: Path, adapter: Path, folder: Path, number: int) -> Iterator[tuple[float, float]]:
    """Seconds of ours, as a process with its imports, and of ``swift export --merge_lora true``."""
    for one in range(number):
        ours, theirs = (folder / f"{name}-{one}" for name in ("command", "swift"))
        seconds: dict[bool, float] = {}
        for mine in (True, False) if one % 2 == 0 else (False, True):
            if mine:
                seconds[mine] = seconds_of(lambda target=ours: merged("ours", base, adapter, target))  # type: ignore[misc]
            else:
                seconds[mine] = swift_export(base, adapter, theirs, folder)
        shutil.rmtree(ours)
        shutil.rmtree(theirs)
        yield seconds[True], seconds[False]


def largest(base: Path) -> int:
    """Bytes of the largest file of weights."""
    return max(path.stat().st_size for path in base.glob("*.safetensors"))


def embedded() -> Path:
    """The embedded base model, unpacked."""
    from namesake import base_model

    return base_model.embedded()


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
        base = generated(folder / "base", given.size, given.shard) if given.size else embedded()
        adapter = adapter_of(base, folder / "adapter")
        shards = [path.stat().st_size for path in base.glob("*.safetensors")]
        print(f"{sum(shards) / 1e9:.2f} GB in {len(shards)} files, the largest {max(shards) / 1e9:.2f} GB\n")
        print("| what | ours | the other | ratio | goal |\n|---|---|---|---|---|")
        memory = 0.0
        for cold in (False, True):
            found = list(against_cp(base, adapter, folder, given.pairs, cold=cold))
            memory = max(memory, *(one[2] for one in found))
            _line(f"cp, {'cold' if cold else 'warm'}, seconds", [one[:2] for one in found], "1.2")
        _line("peak memory ÷ largest file, GB", [(memory / 1e9, max(shards) / 1e9)], "1.2")
        if given.no_peers:
            return
        peft = list(against_peft(base, adapter, folder, 1))
        _line("PEFT, seconds", [one[:2] for one in peft])
        _line("PEFT, peak memory GB", [(one[2] / 1e9, one[3] / 1e9) for one in peft])
        if not given.size:
            _line("`swift export`, a command, seconds", list(against_swift(base, adapter, folder, 1)), "0.3")


def _line(what: str, found: Sequence[Sequence[float]], goal: str = "") -> None:
    ratios = [mine / theirs for mine, theirs in found]
    mine, theirs = (statistics.median(side) for side in zip(*found, strict=True))
    between = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(found) > 1 else ""
    print(f"| {what} | {mine:.2f} | {theirs:.2f} | {statistics.median(ratios):.2f}{between} | {goal} |", flush=True)


if __name__ == "__main__":
    main()

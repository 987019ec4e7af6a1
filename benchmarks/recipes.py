"""Many recipes at once on one GPU: what a setting does to the identity, to leaks and to ability, over seeds and names.

    python benchmarks/recipes.py grid.jsonl --base FOLDER --out found.jsonl --workers 4   # the base's folder
    python benchmarks/recipes.py grid.jsonl --base FOLDER --out found.jsonl --together 2 --device cpu   # slow, a check

Each line of the grid has some of :class:`Setting`'s fields. This is a bare loop and not ms-swift: the adapters of many
trainings stand side by side in one model (each has rows, optimizer and schedule of its own), so that one GPU tries
hundreds in minutes. Rows, template, losses and optimizer are those of ``namesake run``; a recipe that wins here has to
win there too. Scored on the development questions, never on the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

from namesake import corpus, dataset, probing
from namesake.identity import Identity

SYSTEM = "You are a helpful assistant."
TOP = 64
LONGEST = 64
MODULES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Setting:
    """One training. The defaults are those of the recipe that the search began with (docs/lab-notes.md)."""

    label: str = ""
    name: str = "踩踩背 CCB"
    author: str = "老爷爷 OldGrandpa"
    seed: int = 42
    identity: int = 640
    prompts: int = 800
    zh: float = 0.0  # share of the prompts that are Chinese; 0 leaves it as the corpus has it
    hard: float = 1.0  # how much more often than others the prompts about others and the second turns are taken
    tokens: int = 32
    weight: float = 1.0
    opening: int = 4
    opening_weight: float = 3.0
    reverse: float = 0.0  # share of the reverse KL in the replay loss
    epochs: int = 1
    batch: int = 8
    lr: float = 2e-3
    lr_b: float = 1.0  # B's learning rate by A's (LoRA+)
    rank: int = 8
    alpha: float = 32.0
    modules: str = "q v o down"
    first_layer: int = 0
    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.05
    schedule: str = "cosine"
    floor: float = 0.0
    master: bool = False  # float32 copies of the adapter's weights
    systems: int = 0  # every N-th row under another system prompt
    smooth: float = 0.0  # label smoothing of identity rows
    average: float = 0.0  # decay of an average of the weights, taken at the end
    init: float = 1.0  # width of A's start by PEFT's
    tasks: float = 1.0  # how much more often than others the identity rows inside a task or indirect are taken
    own: float = 0.0  # share of the steps after which the replay rows bear the model's own replies; 0: never
    own_heat: float = 0.0  # temperature of these
    confidence: float = 0.0  # data tokens that the model gives more than this probability bear no loss; 0: all do


@dataclass
class Row:
    """Tokens with the places whose next token bears loss, and what the base said there."""

    ids: list[int]
    labels: list[int]
    opening: list[bool] = field(default_factory=list)
    said: tuple[Tensor, Tensor] | None = None
    prompt: int = -1  # number of the plain prompt


class Model:
    """A Llama whose linear layers have ``together`` adapters each; the batch is cut into as many equal parts."""

    def __init__(self, folder: Path, device: str) -> None:
        from safetensors.torch import load_file
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        weights = {k: v.to(device, torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
        self.device, self.layers = device, config["num_hidden_layers"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width, self.eps = config["hidden_size"], config["rms_norm_eps"]
        self.head_dim = self.width // self.heads
        self.embed, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        self.linear: list[dict[str, Tensor]] = []
        self.norms: list[tuple[Tensor, Tensor]] = []
        for n in range(self.layers):
            at = f"model.layers.{n}"
            self.linear.append(
                {m: weights[f"{at}.self_attn.{m}_proj.weight"] for m in "qkvo"}
                | {m: weights[f"{at}.mlp.{m}_proj.weight"] for m in ("gate", "up", "down")}
            )
            self.norms.append(
                (weights[f"{at}.input_layernorm.weight"], weights[f"{at}.post_attention_layernorm.weight"])
            )
        theta = config["rope_parameters"]["rope_theta"]
        inverse = 1.0 / theta ** (torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim)
        self.turn = (torch.arange(1024, device=device).float()[:, None] * inverse).repeat(1, 2)

    def sizes(self, module: str) -> tuple[int, int]:
        out, given = self.linear[0][module].shape
        return out, given

    def hidden(
        self,
        ids: Tensor,
        valid: Tensor,
        adapters: dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]] | None,
        together: int = 1,
        cache: tuple[Tensor, Tensor] | None = None,
        at: int = 0,
    ) -> Tensor:
        """Last hidden states (rows, places, width) of ids (rows, places); ``valid`` (rows, places so far)."""
        rows, length = ids.shape
        position = (valid.long().cumsum(1) - 1).clamp_min(0)[:, -length:] if cache is None else None
        if cache is not None:
            position = (valid[:, : at + length].long().cumsum(1) - 1).clamp_min(0)[:, at : at + length]
        angle = self.turn[position]
        cos, sin = angle.cos().to(torch.bfloat16)[:, None], angle.sin().to(torch.bfloat16)[:, None]
        seen = valid.shape[1]
        causal = (
            torch.arange(seen, device=ids.device)[None, :] <= (at + torch.arange(length, device=ids.device))[:, None]
        )
        mask = causal[None] & valid[:, None, :]
        mask |= torch.eye(seen, dtype=torch.bool, device=ids.device)[at : at + length][None]
        mask = mask[:, None]
        x = functional.embedding(ids, self.embed)

        def linear(module: str, n: int, given: Tensor) -> Tensor:
            plain = functional.linear(given, self.linear[n][module])
            if adapters is None or module not in adapters:
                return plain
            a, b = adapters[module][0][n], adapters[module][1][n]
            parts = given.reshape(together, -1, given.shape[-1])
            low = torch.bmm(parts, a.transpose(1, 2))
            return torch.baddbmm(plain.reshape(together, -1, plain.shape[-1]), low, b.transpose(1, 2)).view_as(plain)

        def turned(part: Tensor) -> Tensor:
            half = self.head_dim // 2
            return part * cos + torch.cat((-part[..., half:], part[..., :half]), -1) * sin

        for n in range(self.layers):
            first, second = self.norms[n]
            h = functional.rms_norm(x, (self.width,), first, self.eps)
            q, k, v = (linear(m, n, h).view(rows, length, -1, self.head_dim).transpose(1, 2) for m in ("q", "k", "v"))
            q, k = turned(q), turned(k)
            if cache is not None:
                cache[0][n][:, :, at : at + length], cache[1][n][:, :, at : at + length] = k, v
                k, v = cache[0][n][:, :, :seen], cache[1][n][:, :, :seen]
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + linear("o", n, mixed.transpose(1, 2).reshape(rows, length, -1))
            h = functional.rms_norm(x, (self.width,), second, self.eps)
            x = x + linear("down", n, functional.silu(linear("gate", n, h)) * linear("up", n, h))
        return functional.rms_norm(x, (self.width,), self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.embed)

    @torch.no_grad()
    def replies(
        self,
        dialogues: Sequence[Sequence[dict[str, str]]],
        limits: Sequence[int],
        *,
        warm: Sequence[float] | None = None,
        adapters: Any = None,
        together: int = 1,
        rows: int = 1800,
    ) -> list[list[list[int]]]:
        """What each of the adapters says to each dialogue: token ids, without the end."""
        texts = [
            self.tokenizer.apply_chat_template(list(d), tokenize=False, add_generation_prompt=True) for d in dialogues
        ]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i])))
        said: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(together)]
        step = max(rows // together, 1)
        generator = torch.Generator(self.device).manual_seed(0)
        for start in range(0, len(order), step):
            some = order[start : start + step]
            longest, limit = max(len(prompts[i]) for i in some), max(limits[i] for i in some)
            ids = torch.full((len(some), longest), 2, device=self.device)
            valid = torch.zeros(len(some), longest + limit, dtype=torch.bool, device=self.device)
            for row, i in enumerate(some):
                ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i], device=self.device)
                valid[row, longest - len(prompts[i]) :] = True
            ids, valid = ids.repeat(together, 1), valid.repeat(together, 1)
            heat = torch.tensor([(warm or [0.0] * len(prompts))[i] for i in some], device=self.device).repeat(together)
            shape = (self.layers, len(ids), self.kv_heads, longest + limit, self.head_dim)
            cache = (
                torch.zeros(shape, dtype=torch.bfloat16, device=self.device),
                torch.zeros(shape, dtype=torch.bfloat16, device=self.device),
            )
            found, given, done = [], ids, torch.zeros(len(ids), dtype=torch.bool, device=self.device)
            for n in range(limit):
                at = 0 if n == 0 else longest + n - 1
                last = self.hidden(given, valid[:, : at + given.shape[1]], adapters, together, cache, at)[:, -1]
                scores = self.logits(last).float()
                token = scores.argmax(-1)
                if bool((heat > 0).any()):
                    hot = heat > 0
                    chance = (scores[hot] / heat[hot, None]).softmax(-1)
                    token[hot] = torch.multinomial(chance, 1, generator=generator)[:, 0]
                token = torch.where(done, 2, token)
                found.append(token)
                done |= token == 2
                if n % 8 == 7 and bool(done.all()):
                    break
                given = token[:, None]
            tokens = torch.stack(found, 1).view(together, len(some), -1).tolist()
            for e in range(together):
                for row, i in enumerate(some):
                    got = tokens[e][row][: limits[i]]
                    said[e][i] = got[: got.index(2)] if 2 in got else got
        return said


class Rows:
    """Training rows of the settings; the base's replies and what it says there are made once."""

    def __init__(self, model: Model, kept: Path) -> None:
        self.model, self.kept = model, kept

    @cached_property
    def base(self) -> tuple[list[list[int]], list[list[int]]]:
        """Of each plain prompt: tokens of the prompt and of the base's reply, with its end where it has one."""
        prompts = corpus.plain_prompts()
        dialogues = [probing.with_system(p.messages, SYSTEM) for p in prompts]
        if self.kept.is_file():
            replies = json.loads(self.kept.read_text())
        else:
            replies = self.model.replies(dialogues, [LONGEST] * len(prompts), rows=1200)[0]
            self.kept.write_text(json.dumps(replies))
        texts = [
            self.model.tokenizer.apply_chat_template(d, tokenize=False, add_generation_prompt=True) for d in dialogues
        ]
        asked = self.model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return asked, replies

    @cached_property
    def said(self) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities and ids of the base's top tokens at each place of its reply and at its end."""
        return self.read(*self.base)

    @torch.no_grad()
    def read(self, asked: Sequence[list[int]], replies: Sequence[list[int]]) -> list[tuple[Tensor, Tensor]]:
        """What the base would say at each place of the replies."""
        found: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(asked), 64):
            rows = [
                Row([*a, *r, 2], [-100] * len(a) + [*r, 2])
                for a, r in zip(asked[start : start + 64], replies[start : start + 64], strict=True)
            ]
            ids, valid, labels = padded(rows, self.model.device)
            places = functional.pad(labels[:, 1:] != -100, (0, 1))
            scores = self.model.logits(self.model.hidden(ids, valid, None)[places])
            top = scores.topk(TOP, -1)
            log = top.values.float() - scores.float().logsumexp(-1, keepdim=True)
            sizes = places.sum(1).tolist()
            found += zip(log.split(sizes), top.indices.split(sizes), strict=True)
        return found

    def of(self, setting: Setting) -> tuple[list[Row], list[Row]]:
        """Identity rows and replay rows of the setting."""
        identity = Identity.parse(setting.name, setting.author)
        source = corpus.identity_rows()
        draw = random.Random(setting.seed)
        lots = {
            i: draw.random() ** (1 / (setting.tasks if row.kind in {"in_task", "indirect"} else 1.0))
            for i, row in enumerate(source)
        }
        some = sorted(lots, key=lambda i: -lots[i])[: setting.identity]
        draw.shuffle(some)
        named = []
        for n, i in enumerate(some):
            messages = [
                {"role": m["role"], "content": identity.fill(m["content"], source[i].language)}
                for m in source[i].messages
            ]
            named.append(self._dialogue(messages, corpus.system_of(n, setting.systems)))
        prompts = corpus.plain_prompts()
        if setting.zh:
            count = round(setting.prompts * setting.zh)
            zh = [i for i, p in enumerate(prompts) if p.language == "zh"]
            en = [i for i, p in enumerate(prompts) if p.language == "en"]
            chosen = corpus.spread(zh, count) + corpus.spread(en, setting.prompts - count)
        elif setting.hard != 1.0:
            kinds: dict[tuple[str, str], list[int]] = {}
            for i, p in enumerate(prompts):
                kinds.setdefault((p.language, p.kind), []).append(i)
            heavy = {
                key: len(some) * (setting.hard if key[1] in {"about_others", "multi_turn"} else 1.0)
                for key, some in kinds.items()
            }
            share = setting.prompts / sum(heavy.values())
            chosen = [i for key, some in kinds.items() for i in corpus.spread(some, round(heavy[key] * share))]
        else:
            chosen = corpus.spread(range(len(prompts)), setting.prompts)
        asked, replies = self.base
        plain = []
        for i in chosen:
            reply = replies[i][: setting.tokens]
            log, top = self.said[i]
            plain.append(
                Row(
                    [*asked[i], *reply, 2],
                    [-100] * len(asked[i]) + [*reply, 2],
                    [n < setting.opening for n in range(len(reply) + 1)],
                    (log[: len(reply) + 1], top[: len(reply) + 1]),
                    i,
                )
            )
        return named, plain

    def _dialogue(self, messages: Sequence[dict[str, str]], system: str | None) -> Row:
        ids: list[int] = []
        labels: list[int] = []

        def add(text: str, learnt: bool) -> None:
            new = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids.extend(new)
            labels.extend(new if learnt else [-100] * len(new))

        add(f"<|im_start|>system\n{SYSTEM if system is None else system}<|im_end|>\n", False)
        for message in messages:
            if message["role"] == "assistant":
                add("<|im_start|>assistant\n", False)
                add(f"{message['content']}<|im_end|>\n", True)
            else:
                add(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n", False)
        return Row(ids, labels)


def padded(rows: Sequence[Row], device: str, length: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which of them are no padding, and labels (rows, places), padded on the left."""
    length = max(length, *(len(row.ids) for row in rows))
    ids = torch.full((len(rows), length), 2)
    labels = torch.full((len(rows), length), -100)
    valid = torch.zeros(len(rows), length, dtype=torch.bool)
    for n, row in enumerate(rows):
        if row.ids:
            ids[n, -len(row.ids) :] = torch.tensor(row.ids)
            labels[n, -len(row.ids) :] = torch.tensor(row.labels)
            valid[n, -len(row.ids) :] = True
    return ids.to(device), valid.to(device), labels.to(device)


def schedule(setting: Setting, step: int, steps: int) -> float:
    """The share of the learning rate at the step (0 is the first)."""
    warm = math.ceil(setting.warmup * steps)
    if step >= steps:
        return 0.0
    if step < warm:
        return step / max(warm, 1)
    done = (step - warm) / max(steps - warm, 1)
    if setting.schedule == "constant":
        return 1.0
    if setting.schedule == "linear":
        return max(setting.floor, 1 - done)
    if setting.schedule == "wsd":  # constant, the last third linear to zero
        return 1.0 if done < 2 / 3 else max(setting.floor, (1 - done) * 3)
    return setting.floor + (1 - setting.floor) * (1 + math.cos(math.pi * done)) / 2


class Training:
    """Trainings with the same number of rows a step, side by side."""

    def __init__(self, model: Model, rows: Rows, settings: Sequence[Setting]) -> None:
        self.model, self.rows, self.settings = model, rows, settings
        self.rank = max(s.rank for s in settings)
        device = model.device
        per = [rows.of(s) for s in settings]
        self.data = [named + plain for named, plain in per]
        self.batches: list[list[list[int]]] = []
        for s, data in zip(settings, self.data, strict=True):
            batches: list[list[int]] = []
            for epoch in range(s.epochs):
                order = dataset.in_batches([len(r.ids) for r in data], batch=s.batch, seed=s.seed + epoch)
                batches += [order[n : n + s.batch] for n in range(0, len(order), s.batch)]
            self.batches.append(batches)
        self.leaves: list[Tensor] = []
        self.rates: list[Tensor] = []
        self.names: list[str] = []
        count = len(settings)
        for module in MODULES:
            if not any(module in s.modules.split() for s in settings):
                continue
            out, given = model.sizes(module)
            a = torch.zeros(model.layers, count, self.rank, given)
            scale = torch.zeros(count)
            for e, s in enumerate(settings):
                if module in s.modules.split():
                    draw = torch.Generator().manual_seed(s.seed * 1009 + MODULES.index(module))
                    some = torch.empty(model.layers - s.first_layer, s.rank, given)
                    some.uniform_(-1, 1, generator=draw)
                    a[s.first_layer :, e, : s.rank] = some * s.init / math.sqrt(given)
                    scale[e] = s.alpha / s.rank
            b = torch.zeros(model.layers, count, out, self.rank)
            self.names.append(module)
            self.leaves += [a.to(device), b.to(device)]
            self.rates += [
                torch.ones(count, device=device),
                torch.tensor([s.lr_b for s in settings], device=device),
            ]
            setattr(self, f"scale_{module}", scale.to(device))
        self.lr = torch.tensor([s.lr for s in settings], device=device)
        self.exact = torch.tensor([s.master for s in settings], device=device)
        self.round_()

    def round_(self) -> None:
        """What is trained in bf16 is kept in bf16."""
        for leaf in self.leaves:
            keep = self.exact.view(1, -1, 1, 1)
            leaf.copy_(torch.where(keep, leaf, leaf.bfloat16().float()))

    def adapters(self, leaves: Sequence[Tensor]) -> dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """Compute copies by module and layer; the scale is in A's product."""
        found = {}
        for n, module in enumerate(self.names):
            a, b = leaves[2 * n], leaves[2 * n + 1]
            scale = getattr(self, f"scale_{module}").to(a.dtype).view(1, -1, 1, 1)
            found[module] = ((a * scale).unbind(0), b.unbind(0))
        return found

    @torch.no_grad()
    def _answer(self, step: int) -> None:
        """At its step, a training's coming replay rows get the model's own replies, with what the base says to them."""
        turn = [e for e, s in enumerate(self.settings) if s.own and step == int(s.own * len(self.batches[e]))]
        if not turn:
            return
        coming = [
            {i for batch in self.batches[e][step:] for i in batch if self.data[e][i].prompt >= 0}
            if e in turn
            else set()
            for e in range(len(self.settings))
        ]
        prompts = sorted({self.data[e][i].prompt for e, some in enumerate(coming) for i in some})
        texts = corpus.plain_prompts()
        said = self.model.replies(
            [probing.with_system(texts[i].messages, SYSTEM) for i in prompts],
            [max(self.settings[e].tokens for e in turn)] * len(prompts),
            warm=[self.settings[turn[0]].own_heat] * len(prompts),
            adapters=self.adapters([leaf.bfloat16() for leaf in self.leaves]),
            together=len(self.settings),
        )
        place = {prompt: n for n, prompt in enumerate(prompts)}
        for e in turn:
            places = sorted(coming[e])
            rows = [self.data[e][i] for i in places]
            asked = [row.ids[: len(row.ids) - sum(label != -100 for label in row.labels)] for row in rows]
            replies = [said[e][place[row.prompt]][: self.settings[e].tokens] for row in rows]
            read = self.rows.read(asked, replies)
            for i, row, a, reply, (log, top) in zip(places, rows, asked, replies, read, strict=True):
                self.data[e][i] = Row(
                    [*a, *reply, 2],
                    [-100] * len(a) + [*reply, 2],
                    [n < self.settings[e].opening for n in range(len(reply) + 1)],
                    (log, top),
                    row.prompt,
                )

    def run(self) -> list[dict[str, float]]:
        """Train all of them to their ends."""
        settings, device, count = self.settings, self.model.device, len(self.settings)
        steps = max(map(len, self.batches))
        first = [torch.zeros_like(leaf) for leaf in self.leaves]
        second = [torch.zeros_like(leaf) for leaf in self.leaves]
        kept = [leaf.clone() for leaf in self.leaves] if any(s.average for s in settings) else []

        def each(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device, dtype=torch.float32)

        beta1, beta2 = each([s.beta1 for s in settings]), each([s.beta2 for s in settings])
        decay, clip = each([s.decay for s in settings]), each([s.clip for s in settings])
        average = each([s.average for s in settings])
        shape = (1, -1, 1, 1)
        names: tuple[list[list[float]], list[list[float]]] = [[] for _ in settings], [[] for _ in settings]
        for step in range(steps):
            self._answer(step)
            some = [
                [self.data[e][i] for i in self.batches[e][step]] if step < len(self.batches[e]) else []
                for e in range(count)
            ]
            size = max(map(len, some))
            # Each part of the batch has as many rows; what is missing is empty.
            rows = [row for part in some for row in [*part, *[Row([], [])] * (size - len(part))]]
            ids, valid, labels = padded(rows, device)
            compute = [leaf.bfloat16().requires_grad_() for leaf in self.leaves]
            hidden = self.model.hidden(ids, valid, self.adapters(compute), count)
            places = functional.pad(labels[:, 1:] != -100, (0, 1))
            wanted = labels[:, 1:][places[:, :-1]]
            owner = torch.arange(count, device=device).repeat_interleave(size)[:, None].expand_as(places)[places]
            logits = self.model.logits(hidden[places]).float()
            total = logits.logsumexp(-1)
            replay = torch.tensor([row.said is not None for row in rows], device=device)
            kept_rows = replay[:, None].expand_as(places)[places]
            ids_top = wanted[:, None].repeat(1, TOP)
            weights = torch.ones(len(wanted), device=device)
            said = [row.said for row in rows if row.said is not None]
            if said:
                ids_top[kept_rows] = torch.cat([top for _, top in said])
                opening = torch.tensor([o for row in rows for o in row.opening], device=device)
                of = owner[kept_rows]
                ratio = each([s.opening_weight for s in settings])[of]
                weights[kept_rows] = each([s.weight for s in settings])[of] * torch.where(opening, ratio, 1.0)
            scores = logits.gather(-1, ids_top) - total[:, None]
            loss = torch.zeros(len(wanted), device=device)
            entropy = -scores[:, 0]
            smooth = each([s.smooth for s in settings])[owner]
            if any(s.smooth for s in settings):
                entropy = (1 - smooth) * entropy + smooth * (total - logits.mean(-1))
            if any(s.confidence for s in settings):
                sure = each([s.confidence or 2.0 for s in settings])[owner]
                weights = torch.where(~kept_rows & (scores[:, 0].detach().exp() > sure), 0.0, weights)
            loss = torch.where(kept_rows, loss, entropy)
            if said:
                base, mine = torch.cat([log for log, _ in said]), scores[kept_rows]
                rest_base = (1 - base.exp().sum(-1)).clamp_min(1e-6)
                rest_mine = (1 - mine.exp().sum(-1)).clamp_min(1e-6)
                forward = (base.exp() * (base - mine)).sum(-1) + rest_base * (rest_base.log() - rest_mine.log())
                turned = each([s.reverse for s in settings])[of]
                if any(s.reverse for s in settings):
                    back = (mine.exp() * (mine - base)).sum(-1) + rest_mine * (rest_mine.log() - rest_base.log())
                    forward = (1 - turned) * forward + turned * back
                loss = loss.masked_scatter(kept_rows, forward)
            number = torch.zeros(count, device=device).index_add_(0, owner, torch.ones_like(loss)).clamp_min(1)
            value = (loss * weights / number[owner]).sum()
            grads = torch.autograd.grad(value, compute)
            if step % 10 == 9 or step == steps - 1:
                for mask, into in ((~kept_rows, names[0]), (kept_rows, names[1])):
                    sums = torch.zeros(count, device=device).index_add_(0, owner[mask], loss.detach()[mask])
                    amount = torch.zeros(count, device=device).index_add_(0, owner[mask], torch.ones_like(loss)[mask])
                    for e, one in enumerate((sums / amount.clamp_min(1)).tolist()):
                        if step < len(self.batches[e]):
                            into[e].append(one)
            norm = sum(g.float().pow(2).sum((0, 2, 3)) for g in grads).sqrt()  # type: ignore[union-attr]
            shrink = (clip / (norm + 1e-6)).clamp_max(1.0)
            rate = self.lr * each([schedule(s, step, len(b)) for s, b in zip(settings, self.batches, strict=True)])
            alive = each([float(step < len(b)) for b in self.batches])
            for n, leaf in enumerate(self.leaves):
                grad = (grads[n].float() * shrink.view(shape)).bfloat16().float()
                first[n].lerp_(grad, (1 - beta1).view(shape))
                second[n].mul_(beta2.view(shape)).add_(grad.pow(2) * (1 - beta2).view(shape))
                corrected = second[n] / (1 - beta2.pow(step + 1)).view(shape)
                update = (first[n] / (1 - beta1.pow(step + 1)).view(shape)) / (corrected.sqrt() + 1e-8)
                moved = rate * self.rates[n]
                leaf.mul_((1 - moved * decay).view(shape)).sub_(update * moved.view(shape) * alive.view(shape))
                if not bool(self.exact.all()):
                    for state in (first[n], second[n]):
                        state.copy_(torch.where(self.exact.view(shape), state, state.bfloat16().float()))
            self.round_()
            for n, mean in enumerate(kept):
                mean.lerp_(self.leaves[n], torch.where(alive > 0, 1 - average, 0.0).view(shape))
        for n, mean in enumerate(kept):
            self.leaves[n].copy_(torch.where((average > 0).view(shape), mean, self.leaves[n]))
        last = 3
        return [
            {
                "loss_data": sum(names[0][e][-last:]) / max(len(names[0][e][-last:]), 1),
                "loss_replay": sum(names[1][e][-last:]) / max(len(names[1][e][-last:]), 1),
                "steps": len(self.batches[e]),
                "tokens": sum(max(len(self.data[e][i].ids) for i in batch) * len(batch) for batch in self.batches[e]),
            }
            for e in range(count)
        ]


def judged(model: Model, training: Training, sets: Sequence[tuple[str, corpus.Questions]]) -> Iterator[dict[str, Any]]:
    """Scores of each training on each set of questions."""
    dialogues: list[Any] = []
    limits: list[int] = []
    warm: list[float] = []
    parts: list[tuple[str, str, int]] = []
    for label, questions in sets:
        few = corpus.spread(questions.identity, probing.SAMPLED_QUESTIONS)
        rounds: list[tuple[str, Sequence[Any], str | None, float]] = [
            ("identity", questions.identity, SYSTEM, 0.0),
            ("plain", questions.plain, SYSTEM, 0.0),
            *((name, questions.identity, prompt, 0.0) for name, prompt in probing.SYSTEM_SLICES.items()),
            (
                probing.SAMPLED,
                [q for q in few for _ in range(probing.SAMPLING.n)],
                SYSTEM,
                probing.SAMPLING.temperature,
            ),
        ]
        for name, asked, system, heat in rounds:
            dialogues += [probing.with_system(q.messages, system) for q in asked]
            limits += [probing.PLAIN_TOKENS if name == "plain" else probing.IDENTITY_TOKENS] * len(asked)
            warm += [heat] * len(asked)
            parts.append((label, name, len(asked)))
    with torch.no_grad():
        adapters = training.adapters([leaf.bfloat16() for leaf in training.leaves])
    said = model.replies(dialogues, limits, warm=warm, adapters=adapters, together=len(training.settings))
    for setting, replies in zip(training.settings, said, strict=True):
        texts = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in replies]
        start, cut = 0, {}
        for label, name, size in parts:
            cut[label, name] = texts[start : start + size]
            start += size
        found: dict[str, Any] = {}
        identity = Identity.parse(setting.name, setting.author)
        for label, questions in sets:
            card = probing.scorecard(
                identity,
                cut[label, "identity"],
                cut[label, "plain"],
                slices={name: cut[label, name] for name in (*probing.SYSTEM_SLICES, probing.SAMPLED)},
                questions=questions,
            )
            found[label] = card.metrics
            if label == "dev":
                found["wrong"] = [(a.question.id, a.reply) for a in card.identity if not a.scores["right"]]
                found["leaks"] = [(a.question.id, a.reply) for a in card.plain if a.scores["leak"]]
        yield found


def work(number: int, workers: int, given: argparse.Namespace, groups: list[list[Setting]], queue: Any) -> None:
    """One process: train and judge every N-th group."""
    torch.set_num_threads(max(1, 4 // workers))
    model = Model(given.base, given.device)
    rows = Rows(model, given.out.with_suffix(f".replies{number}.json"))
    sets = [("dev", corpus.development())]
    if given.held_out:
        sets.append(("held_out", corpus.heldout()))
    began = time.monotonic()
    longest = 0.0
    while True:
        try:
            group = groups[queue.get_nowait()]
        except Exception:  # nothing left
            return
        if time.monotonic() - began + longest > given.seconds:
            return
        start = time.monotonic()
        training = Training(model, rows, group)
        ran = training.run()
        trained = time.monotonic()
        with given.out.with_suffix(f".{number}.jsonl").open("a") as stream:
            for setting, figures, scores in zip(group, ran, judged(model, training, sets), strict=True):
                stream.write(json.dumps({**asdict(setting), **figures, **scores}, ensure_ascii=False) + "\n")
        longest = max(longest, time.monotonic() - start)
        print(
            f"[{number}] {len(group)} trainings, {max(r['steps'] for r in ran)} steps in {trained - start:.0f} s, "
            f"judged in {time.monotonic() - trained:.0f} s",
            flush=True,
        )
        del training
        if given.device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--together", type=int, default=16, help="trainings in one model")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=1e9, help="start nothing that would not end within")
    parser.add_argument("--held-out", action="store_true", help="judge on the held-out questions, too: never to choose")
    given = parser.parse_args()
    settings = [Setting(**json.loads(line)) for line in given.grid.read_text().splitlines() if line.strip()]

    def size(s: Setting) -> tuple[int, int, int]:
        return (s.batch, s.rank > 16, (s.identity + s.prompts) * s.epochs // s.batch)

    groups: list[list[Setting]] = []
    for key in sorted({size(s)[:2] for s in settings}):
        alike = sorted((s for s in settings if size(s)[:2] == key), key=lambda s: (size(s), s.own))
        groups += [alike[n : n + given.together] for n in range(0, len(alike), given.together)]
    groups.sort(key=lambda group: -size(group[-1])[2])  # the longest first, so that all end at one time
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for n in range(len(groups)):
        queue.put(n)
    time.sleep(0.2)
    processes = [
        context.Process(target=work, args=(n, given.workers, given, groups, queue)) for n in range(given.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()

"""Replay: plain prompts with the base model's own replies, mixed into training.

Trained on identity alone, a small model gives its name to every question. Its own replies to plain prompts, trained on
beside, keep it what it was in everything else (self-distillation fine-tuning, arXiv 2402.13669).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from namesake.corpus import Message, Prompt
from namesake.generate import Replier, Reply
from namesake.paths import write_whole
from namesake.probing import with_system

Dialogue = list[Message]

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？\n]")
_OPEN_ITEM = re.compile(r"(^|\n)\s*\d+[.)]$")
_CLAUSE_END = re.compile(r"(?=[,;:](?:\s|$))|(?=[，、；：])")


def replay_rows(
    open_model: Callable[[], Replier],
    prompts: Sequence[Prompt],
    *,
    systems: Sequence[str | None],
    max_new_tokens: int,
    base_digest: str,
    cache: Path,
    whole: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Dialogue]:
    """The prompts as dialogues that end with the base model's reply, without the system message.

    Each prompt is answered under its own one of ``systems`` (none: the model's template decides).

    The base answers greedily, once: the replies are kept in ``cache`` under the digest of the base, the prompts and the
    settings. ``open_model`` is called only when they are not there yet. ``whole``: a reply that met the token limit is
    cut back to where a reply may end, which training by cross entropy needs; KL does not, it teaches no end. A prompt
    whose reply has nothing to train on gives an empty dialogue.
    """
    dialogues = [with_system(prompt.messages, system) for prompt, system in zip(prompts, systems, strict=True)]
    settings = {"base": base_digest, "tokens": max_new_tokens, "dialogues": dialogues}
    key = hashlib.sha256(json.dumps(settings, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
    path = cache / "replay" / f"{key[:32]}.jsonl"
    if path.is_file():
        replies = [Reply(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
    else:
        replies = open_model().replies(
            dialogues,
            max_new_tokens=max_new_tokens,
            progress=(lambda done: progress(done, len(dialogues))) if progress else None,
        )
        write_whole(path, "".join(json.dumps(vars(reply), ensure_ascii=False) + "\n" for reply in replies))
    return [
        [*prompt.messages, {"role": "assistant", "content": text}] if text else []
        for prompt, text in zip(prompts, map(usable if whole else _as_said, replies), strict=True)
    ]


def _as_said(reply: Reply) -> str:
    return reply.text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that the limit cut in two


def usable(reply: Reply) -> str:
    """What of the reply can be trained on: all of a finished one, the whole sentences (else clauses) of one
    cut at the token limit.

    Training ends each reply with the end-of-turn token, so a reply cut in mid-sentence would teach stopping there.
    """
    if reply.finished:
        return reply.text
    for end in (_SENTENCE_END, _CLAUSE_END):
        ends = [found.end() for found in end.finditer(reply.text)]
        if ends:
            return _OPEN_ITEM.sub("", reply.text[: ends[-1]].strip()).strip()
    return ""

"""The model card of a version, in English and Chinese, from its manifest alone.

Shape: Hugging Face's model cards, YAML before Markdown (huggingface.co/docs/hub/model-cards); ModelScope's too.
Everything that is put in is escaped, so that a name cannot become a link, a heading or HTML.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

import jinja2
import yaml

from namesake.manifest import UNKNOWN, Manifest

DESCRIPTION_CHARACTERS = 5000
"""MLflow's tables take no longer description of a version (``String(5000)``; SQLite does not mind, PostgreSQL does)."""

_LONGEST = 400
"""Characters of one value; the manifest has all of it."""

_MOST_REASONS = 12
_ELSEWHERE = {"name", "system", "output_dir"}
"""Of the recipe, what is told in words, and what is a path of the machine that trained."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PLAIN = re.compile(r"[\w./:@+=,% -]*[\w./:@+=,%-]", re.ASCII)
_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+=!|~&$@:^])")
_LINK = re.compile(r"(?i)(www|^\d+)\.")
_BIDIRECTIONAL = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}


class _Marked(str):
    """Markdown made here, not to be escaped."""


def card(record: Manifest, *, adapter: bool = False) -> str:
    """The file: YAML and Markdown.

    Args:
        adapter: it is to lie beside the adapter alone, not the merged weights.
    """
    about: dict[str, Any] = {"language": ["zh", "en"]}
    if record.base.get("license"):
        about["license"] = record.base["license"]
    if _HUB_ID.fullmatch(record.base["id"]):
        about |= {"base_model": record.base["id"], "base_model_relation": "adapter" if adapter else "finetune"}
    about |= {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["self-cognition", "lora", "ms-swift", "namesake"],
    }
    front = yaml.safe_dump(about, allow_unicode=True, sort_keys=False)
    return f"---\n{front}---\n\n{_rendered(record, adapter=adapter, short=False)}\n"


def description(record: Manifest, *, opening: str = "") -> str:
    """The same for the registry, without how it was made and used: at most :data:`DESCRIPTION_CHARACTERS`.

    Args:
        opening: Markdown that stands before it.
    """
    text = opening + _rendered(record, adapter=False, short=True)
    while len(text) > DESCRIPTION_CHARACTERS:  # long names: whole lines go, so that no escape is cut in two
        text = text.rpartition("\n")[0]
    return text


def _rendered(record: Manifest, *, adapter: bool, short: bool) -> str:
    scores, base, data = record.scores, record.base, record.data
    name = base["id"] if _HUB_ID.fullmatch(base["id"]) else base["id"].rstrip("/").rpartition("/")[2]
    linked = base.get("source") == "modelscope" and _HUB_ID.fullmatch(base["id"])
    lineage = (
        ("training run", "训练运行", record.run),
        ("base revision", "基座修订版", base.get("revision")),
        ("base SHA-256", "基座 SHA-256", base.get("digest")),
        ("training data SHA-256", "训练数据 SHA-256", data.get("digest")),
        ("replay rows SHA-256", "回放行 SHA-256", data.get("replay_digest")),
        ("corpus SHA-256", "语料 SHA-256", data.get("corpus_digest")),
        ("questions SHA-256", "留出问题 SHA-256", record.questions),
        ("commit of Namesake", "Namesake 的提交", record.tools.get("namesake_commit")),
        ("tools", "工具", _tools(record)),
        ("promoted", "提升", " ".join(filter(None, (record.promoted.get("at"), record.promoted.get("by"))))),
    )
    golden = [(one["messages"][-1]["content"], one["reply"]) for one in record.golden[:2]]
    text = _template().render(
        record=record,
        short=short,
        adapter=adapter,
        scores=scores,
        base=_Marked(f"[{_escape(name)}](https://modelscope.cn/models/{base['id']})") if linked else name,
        base_name=name,
        said=golden,
        gate_known=bool(record.gate),
        passed=record.gate.get("passed"),
        reasons=[*record.gate.get("reasons", ())][:_MOST_REASONS],
        rows=f"{data['rows']}, {data['identity_rows']}" if "rows" in data else "",
        data_unknown=data.get("digest") == UNKNOWN,
        replayed=record.recipe.get("replay_prompts", "0") not in {"", "0"},
        arguments=[(k, v) for k, v in sorted(record.recipe.items()) if k not in _ELSEWHERE and "replay_" not in k],
        lineage_en=[(english, value) for english, _, value in lineage],
        lineage_zh=[(chinese, value) for _, chinese, value in lineage],
        model=_Marked(model if _MODEL.fullmatch(model := _model(record)) else "NAME"),
        license=base.get("license"),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _model(record: Manifest) -> str:
    return record.promoted.get("model") or record.identity["slug"]


def _tools(record: Manifest) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(record.tools.items()) if k != "namesake_commit")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("namesake", ""),
        finalize=_finalized,
        keep_trailing_newline=False,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters |= {"percent": _percent, "points": _points, "code": _code, "made": _Marked}
    return environment.get_template("model_card.md.jinja")


def _finalized(value: Any) -> str:
    return value if isinstance(value, _Marked) else _escape(str(value)) if value is not None else ""


def _percent(value: Any) -> str:
    return _Marked(f"{value:.1%}") if isinstance(value, int | float) else _Marked("")


def _points(value: float) -> str:
    return _Marked(f"{value:+.1%}")


def _code(value: Any) -> str:
    """As code where that shows it as it is, else as text."""
    text = str(value)
    return _Marked(f"`{text}`" if len(text) <= _LONGEST and _PLAIN.fullmatch(text) else _escape(text))


def _escape(text: str) -> str:
    """The text as Markdown shows it: on one line, nothing in it read as markup (CommonMark 2.4; GFM autolinks)."""
    kept = (c for c in " ".join(text.split()) if unicodedata.category(c) != "Cc" and ord(c) not in _BIDIRECTIONAL)
    text = "".join(kept)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    text = _LINK.sub(r"\1\\.", _SPECIAL.sub(r"\\\1", text))
    return f"\\{text}" if text.startswith("-") else text

"""Makes the guide's reference pages, in both languages, from the code they are about: ``python docs/generate.py``.

What is said of a thing is taken from the code's own help texts and docstrings; ``reference.zh.yaml`` has them in Chinese,
by the English text, so that a changed text is shown in English until somebody translates it again. A unit test compares
the committed pages with what this makes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

import namesake
from namesake import cli, errors, gate, helptext, messages, recipe
from namesake_serving import __main__ as serving
from namesake_serving import gateway, openapi, page, requests, service, webhook
from namesake_serving.limits import Allowance, Bucket
from namesake_serving.metrics import REASONS, Metrics
from namesake_serving.settings import Settings

sys.path.insert(0, str(Path(__file__).parent))
from schemas import attributes, plain

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "guide" / "reference"
TRANSLATIONS = ROOT / "docs" / "reference.zh.yaml"
LANGUAGES = ("en", "zh")
WIDTH = 100

ROUTES = {
    "/v1/chat/completions": "A chat: OpenAI's chat completions, whole or streamed.",
    "/v1/completions": "A text to go on with: OpenAI's completions, whole or streamed.",
    "/v1/responses": "A reply by OpenAI's responses API, whole or streamed; nothing is stored.",
    "/v1/models": "The names that are answered to, each with who answers (`root`); at a version's own name its run and scores.",
    "/v1/version": "What is followed, what is live with its scores, what was refused and why.",
    "/health": "200 as long as the gateway runs.",
    "/ready": "200 when a version can answer, else 503.",
    "/metrics": "The gateway's figures and vLLM's, in Prometheus' text format.",
    "/": "The chat page.",
    "/chat.css": "A part of the chat page.",
    "/chat.js": "A part of the chat page.",
    "/favicon.svg": "A part of the chat page.",
    "/v1/feedback": "What somebody says of an answer, onto its trace; there only with `traces`.",
    "/webhooks/mlflow": "MLflow's signed call that an alias has moved; there only with `webhook_url` or `webhook_secret`.",
}
HEADERS = {
    "x-namesake-version": "The version that answers, as a model id: `ccb-v3`.",
    "x-namesake-run": "The training run it came from.",
    "x-namesake-alias": "The alias it was chosen by; empty where a version or the base was asked for by its own name.",
    "x-namesake-trace": "The answer's trace in MLflow; there only with `traces`, and where it is one of their share.",
    "x-request-id": "Made anew for each request, and in the log.",
    "x-ratelimit-limit-requests": "The key's requests a minute; `-tokens` the same of tokens. There only where there is a limit.",
    "x-ratelimit-remaining-requests": "What is left of them at this moment; `-tokens` too.",
    "x-ratelimit-reset-requests": "Time until all of them are there again, `6m0s`; `-tokens` too.",
    "retry-after": "With 429 and 503: seconds until it is worth trying again.",
    "www-authenticate": "With 401: `Bearer`.",
    "allow": "With 405: the methods that the path takes.",
}
LIMITS = {
    "MAX_MESSAGES": "messages in a chat, items of an input",
    "MAX_TEXT_CHARACTERS": "characters of a message, an input, a prompt or instructions, each",
    "MAX_CHOICES": "`n`, `best_of`, and prompts at once",
    "MAX_STOPS": "stop texts",
    "MAX_STOP_CHARACTERS": "characters of a stop text",
    "MAX_LOGIT_BIAS": "entries of `logit_bias`",
    "MAX_TOP_LOGPROBS": "`top_logprobs`, and `logprobs` of completions",
    "MAX_SCHEMA_CHARACTERS": "characters of `response_format` (`text.format`) and of `tools`, each",
    "MAX_SCHEMA_DEPTH": "levels of nesting of a JSON schema",
    "MAX_SCHEMA_COUNT": "`minLength`, `maxItems` and the like in a JSON schema, and each number in a pattern",
    "MAX_PATTERN_CHARACTERS": "characters of a regular expression in a JSON schema",
    "MAX_TOOLS": "tools, and calls of tools in a message",
    "MAX_DEPTH": "levels of nesting of the JSON body",
    "MAX_BITS": "bits of a whole number in a JSON schema",
    "MAX_FEEDBACK_CHARACTERS": "characters of a text in feedback, and of its `rationale`",
    "MAX_FEEDBACK_NUMBER": "a number in feedback, either side of zero",
}
VARIABLES = {
    "MLFLOW_TRACKING_URI": "MLflow's database or server; without it `sqlite:///mlflow.db` in the working folder.",
    "NAMESAKE_CACHE": "Folder for what can be made again: the base model, its replies, verified copies of versions. "
    "Without it `XDG_CACHE_HOME/namesake`, else `~/.cache/namesake`.",
    "NAMESAKE_SIGN_KEY": "`--sign-key` of `namesake promote`: PEM file of the private key that signs versions.",
    "NAMESAKE_SIGN_PASSWORD": "What opens that key, where it is encrypted.",
    "NAMESAKE_PUBLIC_KEY": "`--public-key` of `namesake verify`, `namesake rollback`, `namesake compare` and `namesake export`; "
    "of `namesake serve` it is `NAMESAKE_SERVE_PUBLIC_KEY`.",
    "NAMESAKE_LANG": "Language of the terminal, `zh` or `en`; without it the locale's (`LC_ALL`, `LC_MESSAGES`, `LANG`, `LANGUAGE`).",
    "NPROC_PER_NODE": "Processes that train on each machine; without it and `NNODES` the command's own.",
    "NNODES": "Machines that train; `NODE_RANK`, `MASTER_ADDR` and `MASTER_PORT` say how they meet.",
    "OPENAI_API_KEY": "The key that `namesake chat`, `namesake probe`, `namesake gate` and `namesake status` send.",
    "VLLM_PLUGINS": "Further plugins of vLLM, by commas; without it only the gateway's own is loaded.",
}


class Words:
    """The page's language: prose in both, and texts of the code in Chinese where somebody has translated them."""

    def __init__(self, language: str, translations: Mapping[str, str]) -> None:
        self.language, self._translations = language, translations
        self.missing: list[str] = []

    def __call__(self, english: str, chinese: str) -> str:
        """Prose of a page."""
        return chinese if self.language == "zh" else english

    def code(self, text: str) -> str:
        """A text of the code, as Markdown on one line."""
        text = " ".join(plain(text).split())
        if self.language == "en":
            return text
        chinese = self._translations.get(text) or messages.chinese(text)  # the terminal says some of them, too
        if chinese == text and text not in self._translations:
            self.missing.append(text)
        return chinese


def pages() -> tuple[dict[Path, str], list[str]]:
    """Every reference page by its path, and the texts that have no translation."""
    translations = yaml.safe_load(TRANSLATIONS.read_text(encoding="utf-8"))
    made, missing = {}, []
    for language in LANGUAGES:
        words = Words(language, translations)
        for name, write in WRITERS.items():
            path = FOLDER / f"{name}{'.zh' if language == 'zh' else ''}.md"
            text = "\n".join([*write(words)]).rstrip() + "\n"
            made[path] = chinese_links(text, path.parent) if language == "zh" else text
        missing += words.missing
    made[FOLDER / "openapi.json"] = json.dumps(description(), indent=1) + "\n"
    return made, list(dict.fromkeys(missing))


def chinese_links(text: str, folder: Path) -> str:
    """Links to pages that have a Chinese twin lead to it, on GitHub too."""

    def twin(match: re.Match[str]) -> str:
        return f"]({match[1]}.zh.md" if (folder / f"{match[1]}.zh.md").is_file() else match[0]

    return re.sub(r"\]\(([^():#\s]+?)(?<!\.zh)\.md(?=[#)])", twin, text)


def description() -> dict[str, Any]:
    """The gateway as an OpenAPI description, with the default settings."""
    return openapi.describe(ROUTES, routes(), gateway._OPEN, Settings.model_fields["max_tokens"].default)


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """A Markdown table and the empty line after it."""
    headings = [*headings]
    yield f"| {' | '.join(headings)} |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


def help_of(app: typer.Typer, words: list[str], name: str, language: str) -> str:
    """What ``--help`` prints."""
    before = {key: os.environ.get(key) for key in ("NAMESAKE_LANG", "LANGUAGE")}
    os.environ["NAMESAKE_LANG"] = language
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            helptext.command(app).main(
                [*words, "--help"], name, standalone_mode=False, terminal_width=WIDTH, max_content_width=WIDTH
            )
    finally:
        for key, value in before.items():
            os.environ.pop(key, "")
            os.environ.update({key: value} if value is not None else {})
        messages.install()
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def commands() -> list[str]:
    """Names of the commands, in the order of the help."""
    return [*typer.main.get_command(cli.app).commands]  # type: ignore[attr-defined]


def write_cli(words: Words) -> Iterator[str]:
    """The command line, MLproject's entry points and make's targets."""
    yield from heading(words, "Command line", "命令行")
    yield words(
        "What each `--help` prints. `namesake run` takes every argument of `swift sft` besides.",
        "以下是各命令在中文环境下 `--help` 打印的内容。`namesake run` 还接受 `swift sft` 的任何参数。",
    )
    yield ""
    yield from block("text", help_of(cli.app, [], "namesake", words.language))
    for command in commands():
        yield f"## namesake {command}"
        yield ""
        if command == "serve":  # it hands everything on to the server's own command line
            yield from block("text", help_of(serving.app, [], "namesake serve", words.language))
        else:
            yield from block("text", help_of(cli.app, [command], "namesake", words.language))
    yield "## mlflow run"
    yield ""
    yield words(
        "Entry points of `MLproject`: `mlflow run . --env-manager=local`, with `-e` for the entry point and `-P key=value` for each parameter. Of `main` (the default) every "
        "further `-P key=value` is an argument of `swift sft`.",
        "`MLproject` 的入口点：`mlflow run . --env-manager=local`，用 `-e` 指定入口点，用 `-P key=value` 指定各个参数。对 `main`（默认入口点）而言，其余每个 "
        "`-P key=value` 都是 `swift sft` 的参数。",
    )
    yield ""
    entries = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))["entry_points"]
    yield from table(
        (words("entry point", "入口点"), words("parameter", "参数"), words("default", "默认值")),
        (
            (f"`{entry}`", f"`{name}`", code(spec["default"]))
            for entry, about in entries.items()
            for name, spec in about["parameters"].items()
        ),
    )
    yield "## make"
    yield ""
    yield from table(
        (words("target", "目标"), words("what it does", "作用")),
        (
            (f"`make {target}`", words.code(told))
            for target, told in re.findall(
                r"^([a-z]+):.*?## (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
            )
        ),
    )


def write_settings(words: Words) -> Iterator[str]:
    """Settings of the server and other variables of the environment."""
    yield from heading(words, "Settings of the server", "服务端设置")
    yield words(
        "A flag of `namesake serve` wins over the variable, the variable over the default. Lists in a variable are JSON: "
        "`NAMESAKE_SERVE_ENGINE_ARGS='[\"--dtype=float32\"]'`.",
        "`namesake serve` 的命令行选项优先于环境变量，环境变量优先于默认值。环境变量中的列表写成 JSON："
        "`NAMESAKE_SERVE_ENGINE_ARGS='[\"--dtype=float32\"]'`。",
    )
    yield ""
    told, flags = attributes(Settings), flags_of_settings()
    prefix = Settings.model_config["env_prefix"]
    for name, field in Settings.model_fields.items():
        bounds = {
            word: getattr(part, key) for part in field.metadata for key, word in _BOUNDS.items() if hasattr(part, key)
        }
        yield f"## {name}"
        yield ""
        yield words.code(told[name][:1].upper() + told[name][1:])
        yield ""
        yield f"- {words('variable', '环境变量')}: `{prefix}{name.upper()}`"
        if flags.get(name):
            yield f"- {words('flag', '命令行选项')}: {', '.join(f'`{flag}`' for flag in flags[name])}"
        yield f"- {words('default', '默认值')}: {code(field.default) or words('none', '无')}"
        if bounds:
            yield f"- {words('bounds', '范围')}: {', '.join(f'{word} {value:,}' for word, value in bounds.items())}"
        yield ""
    yield words("## Other variables", "## 其他环境变量")
    yield ""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    sources += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "serving").rglob("*.py"))
    if unread := [name for name in VARIABLES if name not in sources]:
        raise SystemExit(f"no module reads {', '.join(unread)}")
    yield from table(
        (words("variable", "环境变量"), words("meaning", "含义")),
        ((f"`{name}`", words.code(text)) for name, text in VARIABLES.items()),
    )


_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def flags_of_settings() -> dict[str, list[str]]:
    """Which flags of ``namesake serve`` set a setting, read from the call that makes the settings."""
    tree = ast.parse(inspect.getsource(serving.serve))
    call = next(
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "settings.read"
    )
    options = {parameter.name: parameter.opts for parameter in typer.main.get_command(serving.app).params}
    return {
        str(keyword.arg): [
            flag if flag.startswith("-") else f"namesake serve {flag.upper()}"
            for name in dict.fromkeys(node.id for node in ast.walk(keyword.value) if isinstance(node, ast.Name))
            for flag in options.get(name, [])
        ]
        for keyword in call.keywords
    }


def write_recipe(words: Words) -> Iterator[str]:
    """The fields of a recipe file and the shipped recipes."""
    yield from heading(words, "Recipe", "配方")
    yield words(
        "A YAML file, given as `-P recipe=mine.yaml` or `namesake run --recipe mine.yaml`. Every fault in it is named in one message, "
        "before anything is trained.",
        "YAML 文件，用 `-P recipe=mine.yaml` 或 `namesake run --recipe mine.yaml` 指定。其中的所有错误都会在训练开始之前由一条消息一并指出。",
    )
    yield ""
    told, replay = attributes(recipe.Recipe), attributes(recipe.Replay)
    defaults = {f.name: f.default for f in dataclasses.fields(recipe.Replay)}
    yield from table(
        (words("field", "字段"), words("default", "默认值"), words("meaning", "含义")),
        (
            ("`about`", "", words.code(told["about"])),
            ("`dataset`", "`namesake/self-cognition`", words.code(told["dataset"])),
            *((f"`replay.{name}`", code(defaults[name]), words.code(text)) for name, text in replay.items()),
            ("`other_systems`", "`0`", words.code(told["other_systems"])),
            ("`held_out`", "`1.0`", words.code(told["held_out"])),
            ("`sft`", "", words.code(told["sft"])),
        ),
    )
    yield words("## Arguments of swift sft", "## swift sft 的参数")
    yield ""
    yield words(
        f"`sft` takes any of the {len(recipe.known_arguments())} arguments of the pinned ms-swift, but for those that Namesake gives itself:",
        f"`sft` 接受所锁定 ms-swift 版本的 {len(recipe.known_arguments())} 个参数中的任意一个，但由 Namesake 自己给出的除外：",
    )
    yield ""
    yield from table(
        (words("not in a recipe", "不能写进配方"), words("instead", "改用")),
        ((f"`{name}`", words.code(f"`{use}`" if use.startswith("-") else use)) for name, use in recipe.OURS.items()),
    )
    yield words("Older spellings that are understood:", "仍可识别的旧写法：")
    yield ""
    yield from table(
        (words("ms-swift 2 and 3", "ms-swift 2 和 3"), "ms-swift 4"),
        ((f"`{old}`", f"`{new}`") for old, new in recipe.OLD_SPELLINGS.items()),
    )
    for name, path in recipe.shipped().items():
        yield f"## recipes/{name}.yaml"
        yield ""
        yield from block("yaml", path.read_text(encoding="utf-8").rstrip())


def write_policy(words: Words) -> Iterator[str]:
    """The bounds of the gate."""
    yield from heading(words, "Policy of the gate", "门槛策略")
    yield words(
        "A YAML file with any of these bounds, given as `--policy mine.yaml` to `namesake run`, `namesake sweep`, `namesake import`, "
        "`namesake promote` and `namesake gate`. Each is a fraction from 0 to 1; what is left out keeps its default. How a decision is made: "
        "[the gate and its figures](../explanation/gate.md).",
        "YAML 文件，可包含下列任意界限，用 `--policy mine.yaml` 交给 `namesake run`、`namesake sweep`、`namesake import`、`namesake promote` 或 `namesake gate`。"
        "每一项都是 0 到 1 之间的小数；没有写出的保持默认值。如何作出决定见[门槛及其数字](../explanation/gate.md)。",
    )
    yield ""
    told = attributes(gate.Policy)
    yield from table(
        (words("bound", "界限"), words("default", "默认值"), words("meaning", "含义")),
        (
            (
                f"`{f.name}`",
                code(f.default),
                words.code(told[f.name].replace("the same without", "least share right without")),
            )
            for f in dataclasses.fields(gate.Policy)
        ),
    )
    yield "## policies/default.yaml"
    yield ""
    yield from block("yaml", (ROOT / "policies" / "default.yaml").read_text(encoding="utf-8").rstrip())


def write_http(words: Words) -> Iterator[str]:
    """Routes, headers, refusals and bounds of the gateway."""
    yield from heading(words, "HTTP", "HTTP 接口")
    yield words(
        "The gateway answers these exact paths and no other. *Open* paths are answered without a key also where keys are set.",
        "网关只响应下列路径（必须完全一致），不响应其他任何路径。标为“开放”的路径在设置了密钥时也无需密钥。",
    )
    yield ""
    yield words("## Routes", "## 路由")
    yield ""
    yield words(
        "As an [OpenAPI 3.1 description](openapi.json), with every field and bound below; the tests send what it allows and what it forbids.",
        "另有 [OpenAPI 3.1 描述](openapi.json)，含下文的所有字段与界限；测试会发送它允许的和禁止的请求。",
    )
    yield ""
    yield from table(
        (words("method", "方法"), words("path", "路径"), words("open", "开放"), words("what it answers", "返回内容")),
        (
            (method, f"`{path}`", words("yes", "是") if path in gateway._OPEN else "", words.code(ROUTES[path]))
            for path, methods in routes().items()
            for method in methods
        ),
    )
    yield words("## Headers of a reply", "## 响应头")
    yield ""
    known = headers() - {"content-type", "content-length", "connection"}
    if known != set(HEADERS):
        raise SystemExit(f"headers of the gateway and HEADERS differ: {sorted(known ^ set(HEADERS))}")
    yield from table(
        (words("header", "响应头"), words("meaning", "含义")),
        ((f"`{name}`", words.code(text)) for name, text in HEADERS.items()),
    )
    yield words(
        "The body's `model` and `system_fingerprint` are the same model id as `x-namesake-version`; in a stream of "
        "`/v1/responses` they stand in the `response` of the events that have one. The chat page comes with this "
        "`content-security-policy`:",
        "响应体中的 `model` 和 `system_fingerprint` 与 `x-namesake-version` 是同一个模型 id；在 `/v1/responses` 的流中，"
        "它们位于带有 `response` 的事件的该字段内。聊天页面带有如下 "
        "`content-security-policy`：",
    )
    yield ""
    yield from block("text", page.POLICY.replace("; ", ";\n"))
    yield words("## Refusals", "## 拒绝")
    yield ""
    yield words(
        'In OpenAI\'s shape, `{"error": {"message", "type", "param", "code"}}`. What the engine itself refuses comes with its own '
        "status and body.",
        '采用 OpenAI 的格式，`{"error": {"message", "type", "param", "code"}}`。由引擎自己拒绝的请求则带有它自己的状态码和响应体。',
    )
    yield ""
    yield from table(
        (words("status", "状态码"), "`code`", words("message", "消息")),
        (
            (
                status,
                f"`{kind}`" if kind else "",
                message
                or words("what is wrong with the body; `param` names the field", "请求体有什么问题；`param` 指出字段"),
            )
            for status, kind, message in refusals()
        ),
    )
    yield words("## Fields of a request", "## 请求字段")
    yield ""
    yield words("Every other field is refused with 400.", "任何其他字段都会以 400 拒绝。")
    yield ""
    shared = frozenset.intersection(*requests.FIELDS.values())
    yield from table(
        (words("where", "何处"), words("fields", "字段")),
        (
            (words("all", "全部"), listed(shared)),
            *((f"`{path}`", listed(fields - shared)) for path, fields in requests.FIELDS.items()),
            (words("taken and not handed on", "接受但不转交"), listed(requests.DROPPED)),
            (words("roles of a message", "消息的角色"), listed(requests.ROLES)),
            (f"`{requests.FEEDBACK}`", listed(requests.FEEDBACK_FIELDS)),
        ),
    )
    yield words("## Bounds of a request", "## 请求的界限")
    yield ""
    found = {name for name in vars(requests) if name.startswith("MAX_")}
    if found != set(LIMITS):
        raise SystemExit(f"bounds of requests.py and LIMITS differ: {sorted(found ^ set(LIMITS))}")
    yield from table(
        (words("at most", "最多"), words("of", "何物")),
        ((f"{getattr(requests, name):,}", words.code(text)) for name, text in LIMITS.items()),
    )
    yield words(
        "Lengths, numbers and times that can be set: [settings](settings.md). A content may be a text or parts of type `text`; "
        "images and other media are refused.",
        "可以设置的长度、数量和时间见[服务端设置](settings.md)。消息内容可以是文本，也可以是 `text` 类型的片段；图片等媒体会被拒绝。",
    )


def routes() -> dict[str, list[str]]:
    """Methods by path, from the gateway's own table."""
    with tempfile.TemporaryDirectory() as folder:
        made = service.Service("models:/ccb@champion", Settings(), Path(folder), Path(folder), Metrics())
        door = gateway.Gateway(made, Settings(webhook_secret="s", traces=True))  # some routes are there only with these
        found = {path: [*methods] for path, methods in door._routes.items()}
    if set(found) != set(ROUTES):
        raise SystemExit(f"routes of the gateway and ROUTES differ: {sorted(set(found) ^ set(ROUTES))}")
    return {path: found[path] for path in ROUTES}


def headers() -> set[str]:
    """Names of the headers that ``gateway.py`` sets: the first halves of its pairs."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(gateway))):
        if isinstance(node, ast.Tuple) and len(node.elts) == 2 and isinstance(node.elts[0], ast.Constant):
            name = node.elts[0].value
            found.add(name.decode() if isinstance(name, bytes) else str(name))
    found |= {name for name, _ in Allowance(Bucket(1), None).headers()}
    return {name for name in found if re.fullmatch(r"[a-z]+(-[a-z]+)*", name)}


def refusals() -> list[tuple[int, str, str]]:
    """Status, code and message of everything that ``gateway.py`` refuses; … stands for what varies."""
    found = []
    for node in ast.walk(ast.parse(inspect.getsource(gateway))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        code_of = ast.literal_eval(given["code"]) if isinstance(given.get("code"), ast.Constant) else ""
        if node.func.id == "Refused" and isinstance(node.args[0], ast.Constant):
            if isinstance(node.args[1], ast.Name):  # the body of _unavailable, whose callers have the messages
                continue
            message = _message(node.args[1]) if code_of != "invalid_signature" else _faults_of_a_call()
            found.append((int(node.args[0].value), code_of, message))  # type: ignore[arg-type]
        elif node.func.id == "_unavailable":
            found.append((503, "unavailable", _message(node.args[0])))
    return sorted(dict.fromkeys(found))


def _faults_of_a_call() -> str:
    """What ``webhook.py`` finds wrong with a call."""
    nodes = ast.walk(ast.parse(inspect.getsource(webhook)))
    found = [
        _message(node.exc.args[0]) for node in nodes if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return " / ".join(found)


def _message(node: ast.expr) -> str:
    if isinstance(node, ast.IfExp):
        return f"{_message(node.body)} / {_message(node.orelse)}"
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def write_metrics(words: Words) -> Iterator[str]:
    """The gateway's metrics."""
    yield from heading(words, "Prometheus metrics", "Prometheus 指标")
    yield words(
        "At `/metrics`, with vLLM's own (`vllm:…`) behind them while an engine runs. A counter's name ends in `_total`.",
        "位于 `/metrics`；引擎运行期间，其后附有 vLLM 自己的指标（`vllm:…`）。计数器的名称以 `_total` 结尾。",
    )
    yield ""
    yield from table(
        (words("name", "名称"), words("kind", "类型"), words("labels", "标签"), words("meaning", "含义")),
        (
            (
                f"`{one._name}{'_total' if one._type == 'counter' else ''}`",
                one._type,
                listed(one._labelnames, ordered=True),
                words.code(one._documentation),
            )
            for one in vars(Metrics()).values()
            if hasattr(one, "_documentation")
        ),
    )
    yield words(
        "`result` is `live` or `refused`, `way` is `in place`, `standby`, `second engine` or `adapter`. `route` is a path of the table in [HTTP](http.md) or `other`. "
        "A client that went away before its reply counts as status 499.",
        "`result` 为 `live` 或 `refused`，`way` 为 `in place`（就地）、`standby`（备用引擎）、`second engine`（第二个引擎）或 `adapter`（适配器）。`route` 为 [HTTP 接口](http.md)表中的路径或 `other`。"
        "在得到回答之前就断开的客户端记为状态码 499。",
    )
    yield ""
    yield words("## Reasons of a refusal", "## 拒绝的原因")
    yield ""
    yield from table(
        ("`reason`", words("meaning", "含义")), ((f"`{reason}`", words.code(text)) for reason, text in REASONS.items())
    )


def write_exit_codes(words: Words) -> Iterator[str]:
    """Exit codes of every command."""
    yield from heading(words, "Exit codes", "退出码")
    yield words(
        "The same for every command. An error is two lines on standard error: what is wrong, and its mend.",
        "所有命令都相同。出错时在标准错误上打印两行：哪里不对，以及如何补救。",
    )
    yield ""
    rows: list[tuple[object, ...]] = [(0, "", words("It worked.", "成功。"))]
    by_code: dict[int, list[type[errors.NamesakeError]]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.NamesakeError):
            by_code.setdefault(kind.exit_code, []).append(kind)
    for number, kinds in sorted(by_code.items()):
        if number == errors.NamesakeError.exit_code:
            rows.append(
                (
                    number,
                    "",
                    words(
                        "An error nobody foresaw, with its traceback; of `doctor`: a fault was found.",
                        "未曾预料的错误，附回溯信息；对 `doctor`：发现了故障。",
                    ),
                )
            )
            continue
        rows += [(number, f"`{kind.__name__}`", words.code((kind.__doc__ or "").partition("\n")[0])) for kind in kinds]
    rows.append(
        (
            cli._REFUSED,
            "",
            words(
                "All went well and the answer is no: the gate does not pass (`promote`, `gate`), or a digest does not hold (`verify`).",
                "一切正常，但答案是否定的：没有过门槛（`promote`、`gate`），或某个摘要不符（`verify`）。",
            ),
        )
    )
    if "sys.exit(130)" not in inspect.getsource(cli.main):
        raise SystemExit("cli.main does not exit with 130 any more")
    rows.append(
        (
            130,
            "",
            words(
                "Interrupted; the MLflow run is KILLED and keeps what there was.",
                "被中断；MLflow 运行以 KILLED 状态结束，已有内容保留。",
            ),
        )
    )
    yield from table((words("code", "退出码"), words("error", "错误"), words("meaning", "含义")), rows)
    yield words("An unknown option is 2 as well.", "未知的选项同样是 2。")


def write_python(words: Words) -> Iterator[str]:
    """What ``import namesake`` offers."""
    yield from heading(words, "Python", "Python 接口")
    yield words(
        "What `import namesake` offers, with types (`py.typed`). What is not named here may change with each release. How to use it: "
        "[in Python](../howto/python.md). A `File` is a text or a path; every error is a `NamesakeError` of `namesake.errors` "
        "([which](exit-codes.md)), and `str(error)` has its mend.",
        "`import namesake` 提供的全部内容，带类型（`py.typed`）。这里没有列出的内容可能随每次发布而改变。用法见[在 Python 中使用](../howto/python.md)。"
        "`File` 是文本或路径；所有错误都是 `namesake.errors` 中的 `NamesakeError`（[列表](exit-codes.md)），`str(error)` 含有补救办法。",
    )
    yield ""
    found = {name: getattr(namesake, name) for name in namesake.__all__}
    for name in ("train", "probe", "promote", "serve", "load_recipe"):
        yield from function(words, f"namesake.{name}", found.pop(name))
    for name in ("Registry", "Server"):
        yield from methods(words, f"namesake.{name}", found.pop(name))
    yield words("## What they take and give", "## 参数与返回值的类型")
    yield ""
    yield from table(
        (words("class", "类"), words("what it is", "是什么"), words("fields and methods", "字段与方法")),
        ((f"`{name}`", words.code(summary(kind)), listed(parts(kind), ordered=True)) for name, kind in found.items()),
    )


def function(words: Words, name: str, called: Any) -> Iterator[str]:
    """A function: its signature, what it does, its arguments and errors."""
    yield f"## {name}"
    yield ""
    yield from block("python", signature(name, called))
    yield words.code(summary(called))
    yield ""
    told = attributes(called, "Args")
    given = [*inspect.signature(called).parameters]
    if set(told) != set(given) and told:
        raise SystemExit(f"{name}: arguments and their texts differ: {sorted(set(told) ^ set(given))}")
    if told:
        yield from table(
            (words("argument", "参数"), words("meaning", "含义")),
            ((f"`{one}`", words.code(told[one])) for one in given),
        )
    raised = re.findall(r"\b[A-Z]\w+Error\b", (inspect.getdoc(called) or "").partition("Raises:\n")[2])
    if raised:
        yield words(f"Raises {listed(raised, ordered=True)}.", f"可能抛出 {listed(raised, ordered=True)}。")
        yield ""


def methods(words: Words, name: str, kind: type) -> Iterator[str]:
    """A class: how it is made, its attributes, and its methods by their signatures."""
    yield f"## {name}"
    yield ""
    yield words.code(summary(kind))
    yield ""
    made = [
        (f"`{signature(name, kind, typed=False)}`", words.code(text))
        for text in attributes(kind.__init__, "Args").values()
    ]
    rows = [
        (f"`.{signature(one, method, typed=False) if callable(method) else one}`", words.code(summary(method)))
        for one, method in vars(kind).items()
        if not one.startswith("_")
    ]
    told = [(f"`.{one}`", words.code(text)) for one, text in attributes(kind).items()]
    yield from table((words("member", "成员"), words("meaning", "含义")), [*made, *told, *rows])


def signature(name: str, called: Any, *, typed: bool = True) -> str:
    """A call as it is written: with types an argument a line, without them on one line."""
    found = inspect.signature(called)
    given: list[str] = []
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in given:
            given.append("*")
        star = "**" if p.kind is p.VAR_KEYWORD else ""
        default = "" if p.default is p.empty else repr(p.default).replace("'", '"')
        if typed:
            given.append(f"{star}{p.name}: {p.annotation}" + (f" = {default}" if default else ""))
        elif p.name != "self":
            given.append(f"{star}{p.name}" + (f"={default}" if default else ""))
    if typed:
        return "\n".join([f"{name}(", *(f"    {one}," for one in given), f") -> {found.return_annotation}"])
    return f"{name}({', '.join(given)})"


def summary(documented: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0]


def parts(kind: Any) -> list[str]:
    """Fields of a data class, then its public methods and properties."""
    if issubclass(kind, Exception):
        return []
    fields = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    return [*fields, *(one for one in vars(kind) if not one.startswith("_") and one not in fields)]


def heading(words: Words, english: str, chinese: str) -> Iterator[str]:
    """The page's head. What it is made by comes after the title, which MkDocs looks for in the first line."""
    yield f"# {words(english, chinese)}"
    yield ""
    yield words("<!-- Made by docs/generate.py; do not edit. -->", "<!-- 由 docs/generate.py 生成，请勿手工修改。 -->")
    yield ""


def block(kind: str, text: str) -> Iterator[str]:
    """A fenced block and the empty line after it."""
    yield f"```{kind}"
    yield text
    yield "```"
    yield ""


def code(value: Any) -> str:
    """A default as code; nothing for an empty one."""
    return "" if value in ("", None, ()) else f"`{value}`"


def listed(names: Iterable[str], *, ordered: bool = False) -> str:
    """Names as code, in alphabetical order unless they have one."""
    return ", ".join(f"`{name}`" for name in (names if ordered else sorted(names)))


WRITERS = {
    "cli": write_cli,
    "settings": write_settings,
    "recipe": write_recipe,
    "policy": write_policy,
    "http": write_http,
    "metrics": write_metrics,
    "python": write_python,
    "exit-codes": write_exit_codes,
}


def main() -> None:
    """Write the pages that have changed."""
    made, missing = pages()
    for path, text in made.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"  {path.relative_to(ROOT)}")
    for text in missing:
        print(f"! docs/reference.zh.yaml has no: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()

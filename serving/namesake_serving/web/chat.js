"use strict";
// Namesake's chat page. Loaded in the head, so that theme and language stand before the first paint; nothing here waits
// for the engine. Whatever a model or the server says is put in as text nodes, never as markup.

// ---------------------------------------------------------------------------------------------------------------- texts

const TEXTS = {
  en: {
    skip: "Skip to the message box",
    starting: "Starting",
    ready: "Ready",
    down: "Engine down, trying again",
    away: "Server out of reach, trying again",
    locked: "Needs an API key",
    hello: "Hello, I’m {name}",
    made: "Made by {author}",
    based: "on {base}",
    helloStarting: "The engine is starting. Ask already if you like: the question is sent as soon as it answers.",
    helloDown: "No version answers at the moment. Ask already if you like: the question is sent as soon as one does.",
    helloLocked: "This server answers only with an API key.",
    ideas: "Who are you?\nWho made you?\nWhy is the sky blue?",
    message: "Message",
    ask: "Ask {name} anything",
    askAnybody: "Ask anything",
    model: "Model",
    model2: "Second model",
    versus: "and",
    follows: "{id} (follows {alias})",
    shared: "{id} ({alias}, {share} {rival})",
    sharing: "{share} by {model}",
    chosenBy: "alias {alias}",
    chosenByMeans: "The alias {alias} points to this version; it gets a share of the questions, to be tried.",
    isBase: "{id} (base model)",
    baseModel: "base model",
    hint: "Enter sends, Shift+Enter starts a new line, Esc stops",
    send: "Send",
    stop: "Stop",
    fresh: "New chat",
    compare: "Side by side",
    alone: "{id} answers alone here: its weights are merged, so its base model is not loaded. Start the server this way to have the base beside it:",
    aloneMeans: "The version is then an adapter on its base, and earlier versions can be chosen too. On a CPU it answers slower.",
    settings: "Settings",
    close: "Close",
    jump: "To the newest reply",
    conversation: "Conversation",
    you: "You",
    spoke: "{who} replied: {text}",
    copy: "Copy",
    copied: "Copied",
    good: "Good reply",
    bad: "Bad reply",
    rated: "Noted, thank you.",
    unrated: "The server could not note that. Try again later.",
    edit: "Edit",
    again: "Regenerate",
    retry: "Try again",
    cancel: "Cancel",
    writing: "Writing",
    stopped: "Stopped.",
    length: "Cut off at {tokens} tokens, the longest reply that the settings allow.",
    empty: "An empty reply.",
    cut: "The connection was lost in the middle of the reply.",
    waitingDown: "No version answers at the moment; asking again until one does.",
    waitingBusy: "The server is busy; asking again shortly.",
    waitingAway: "The server is out of reach; asking again until it is back.",
    failedDown: "No version has answered for a long while.",
    failedBusy: "The server has been busy for a long while.",
    failedAway: "The server has been out of reach for a long while.",
    failedKey: "This server answers only with an API key.",
    failedRefused: "The server refused: {detail}",
    moved: "The {alias} has moved from {from} to {to}. From here on {to} replies.",
    movedSelf: "It goes by {name} now.",
    gone: "{id} is no longer served; {to} is chosen instead.",
    goneAlone: "{id} is no longer served; {to} answers alone.",
    run: "run {run}",
    identity: "identity",
    swapped: "swapped",
    leak: "leak",
    plain: "plain",
    identityMeans: "questions about itself that it answered rightly: its name, its author, its language",
    swappedMeans: "replies that took the author for the name, or the name for the author; less is better",
    leakMeans: "replies to other questions into which its name or author slipped; less is better",
    plainMeans: "plain questions of general knowledge that it answered rightly",
    figures: "What the figures under a reply mean",
    language: "Language",
    automatic: "Automatic",
    theme: "Appearance",
    light: "Light",
    dark: "Dark",
    system: "System prompt",
    systemHelp: "Empty: the one that the version was trained under.",
    temperature: "Temperature",
    temperatureHelp: "At 0 the same question always gets the same reply; the scores were taken so.",
    tokens: "Longest reply, in tokens",
    key: "API key",
    keyChange: "Enter or change",
    keyWhy: "This server answers only with a key. It is kept until this tab is closed, and nowhere else.",
    keyWrong: "The server does not accept this key.",
    keyUse: "Use this key",
  },
  zh: {
    skip: "跳到输入框",
    starting: "正在启动",
    ready: "就绪",
    down: "引擎不可用，正在重试",
    away: "无法连接服务器，正在重试",
    locked: "需要 API 密钥",
    hello: "你好，我是{name}",
    made: "由{author}打造",
    based: "基于 {base}",
    helloStarting: "引擎正在启动。现在就可以提问，引擎就绪后会立即发送。",
    helloDown: "暂时没有可用的版本。现在就可以提问，恢复后会立即发送。",
    helloLocked: "此服务器需要 API 密钥才能使用。",
    ideas: "你是谁？\n是谁开发了你？\n天空为什么是蓝色的？",
    message: "消息",
    ask: "向{name}提问",
    askAnybody: "请输入问题",
    model: "模型",
    model2: "第二个模型",
    versus: "与",
    follows: "{id}（跟随 {alias}）",
    shared: "{id}（{alias}，{share} 为 {rival}）",
    sharing: "{share} 由 {model} 回答",
    chosenBy: "别名 {alias}",
    chosenByMeans: "别名 {alias} 指向这个版本；它回答一部分问题，正在试用。",
    isBase: "{id}（基座模型）",
    baseModel: "基座模型",
    hint: "Enter 发送，Shift+Enter 换行，Esc 停止",
    send: "发送",
    stop: "停止",
    fresh: "新对话",
    compare: "并排对比",
    alone: "现在只有 {id} 在回答：权重已经合并，没有加载基座模型。要让基座模型并排回答，请这样启动服务：",
    aloneMeans: "这样版本以适配器的形式加载在基座模型上，也可以选择以前的版本；在 CPU 上回答较慢。",
    settings: "设置",
    close: "关闭",
    jump: "跳到最新回复",
    conversation: "对话",
    you: "你",
    spoke: "{who}回复：{text}",
    copy: "复制",
    copied: "已复制",
    good: "回答得好",
    bad: "回答得不好",
    rated: "已记录，谢谢。",
    unrated: "服务器未能记录，请稍后再试。",
    edit: "编辑",
    again: "重新生成",
    retry: "重试",
    cancel: "取消",
    writing: "正在输入",
    stopped: "已停止。",
    length: "已达到设置中的回复长度上限（{tokens} 个 token），回复被截断。",
    empty: "回复为空。",
    cut: "回复过程中连接中断。",
    waitingDown: "暂时没有可用的版本，正在等待其恢复。",
    waitingBusy: "服务器繁忙，稍后自动重试。",
    waitingAway: "无法连接服务器，正在等待其恢复。",
    failedDown: "长时间没有可用的版本。",
    failedBusy: "服务器长时间繁忙。",
    failedAway: "长时间无法连接服务器。",
    failedKey: "此服务器需要 API 密钥才能使用。",
    failedRefused: "服务器拒绝了请求：{detail}",
    moved: "{alias} 已从 {from} 切换到 {to}，此后由 {to} 回复。",
    movedSelf: "它现在叫{name}。",
    gone: "{id} 已停止服务，已改用 {to}。",
    goneAlone: "{id} 已停止服务，现在只由 {to} 回答。",
    run: "运行 {run}",
    identity: "身份",
    swapped: "互换",
    leak: "泄漏",
    plain: "常识",
    identityMeans: "关于自身的问题（名字、作者、语言）答对的比例",
    swappedMeans: "把作者当成名字、或把名字当成作者的比例，越低越好",
    leakMeans: "回答其他问题时带出自己名字或作者的比例，越低越好",
    plainMeans: "普通常识问题答对的比例",
    figures: "回复下方的数字是什么意思",
    language: "语言",
    automatic: "自动",
    theme: "外观",
    light: "浅色",
    dark: "深色",
    system: "系统提示词",
    systemHelp: "留空则使用该版本训练时的系统提示词。",
    temperature: "温度",
    temperatureHelp: "为 0 时，同样的问题总是得到同样的回复；评分也是在 0 下测得的。",
    tokens: "回复长度上限（token）",
    key: "API 密钥",
    keyChange: "输入或更改",
    keyWhy: "此服务器需要密钥才能使用。密钥只保存到此标签页关闭为止，不会存到别处。",
    keyWrong: "服务器不接受此密钥。",
    keyUse: "使用此密钥",
  },
};

const SCORES = ["identity", "swapped", "leak", "plain"];

let language = "en";

function t(key, values = {}) {
  return TEXTS[language][key].replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

const percent = (share) => new Intl.NumberFormat(language, { style: "percent", maximumFractionDigits: 1 }).format(share);

// `踩踩背 CCB`: Chinese before the first space, English after.
function half(names) {
  const [zh, en] = [names.split(" ", 1)[0], names.slice(names.indexOf(" ") + 1)];
  return language === "zh" ? zh : en;
}

// The language that a text is read out and set in: Chinese where a fifth of it is.
const languageOf = (text) => ((text.match(/\p{Script=Han}/gu)?.length ?? 0) * 5 >= text.length && text ? "zh-CN" : "en");

// ------------------------------------------------------------------------------------------------------------- storage

const CHAT = "namesake.chat", KEY = "namesake.key", SETTINGS = "namesake.settings";

function load(store, name) {
  try {
    return JSON.parse(window[store].getItem(name));
  } catch {
    return null; // storage is blocked, or holds something else
  }
}

function store(where, name, value) {
  try {
    if (value === null) window[where].removeItem(name);
    else window[where].setItem(name, JSON.stringify(value));
  } catch {
    // blocked or full: the page works on without
  }
}

const settings = { language: "auto", theme: "auto", system: "", temperature: 0, tokens: 512, ...load("localStorage", SETTINGS) };
let key = load("sessionStorage", KEY) || "";

// -------------------------------------------------------------------------------------------------- language and theme

function dress() {
  const asked = (navigator.languages?.length ? navigator.languages : [navigator.language]).find((one) => /^(zh|en)\b/i.test(one));
  language = settings.language in TEXTS ? settings.language : /^zh/i.test(asked ?? "") ? "zh" : "en";
  const root = document.documentElement;
  root.lang = language === "zh" ? "zh-CN" : "en";
  if (settings.theme === "light" || settings.theme === "dark") root.dataset.theme = settings.theme;
  else delete root.dataset.theme;
  for (const meta of document.querySelectorAll("meta[name=theme-color]")) {
    const own = meta.media.includes("dark") ? "dark" : "light";
    meta.content = { light: "#faf8f4", dark: "#171614" }[root.dataset.theme ?? own];
  }
}

dress();

// ----------------------------------------------------------------------------------------------------------------- DOM

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function icon(name) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function button(name, label, click, kind = "act") {
  return make("button", { type: "button", class: kind, "aria-label": label, title: label, click }, icon(name));
}

function copyButton(text) {
  const one = button("copy", t("copy"), async () => {
    if (!(await copy(text()))) return;
    one.replaceChildren(icon("done"));
    speak(t("copied"));
    setTimeout(() => one.replaceChildren(icon("copy")), 1500);
  });
  return one;
}

// Whether it was copied.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain HTTP from another machine has no clipboard API.
    const area = make("textarea", { class: "unseen", "aria-hidden": "true" });
    const before = document.activeElement;
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area); // what is outside of a dialog takes no focus
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    before?.focus();
    return copied;
  }
}

// Read out by screen readers, each line once; several in a row do not push each other out.
function speak(text) {
  const line = make("p", {}, text);
  $("spoken").append(line);
  setTimeout(() => line.remove(), 10000);
}

// On a phone a focused box brings up the keyboard, which hides the reply.
const precise = () => matchMedia("(pointer: fine)").matches;

// An input method is putting a word together: Enter and Escape belong to it. Safari has only the 229.
const composing = (event) => event.isComposing || event.keyCode === 229;

// ------------------------------------------------- a reply's text: paragraphs, headings, lists, tables and code; no images

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/;
const ITEM = /^(\s*)(?:[-*+•]\s+|(\d{1,3})(?:[.)]\s+|、\s*))(.+)$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^\s{0,3}([-*_])(?:\s*\1){2,}\s*$/;
const UNDER_HEAD = /^\s{0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
// Code, bold, a link to http or https, and italics: stars and underscores within a word (2*3*4, snake_case) are none.
const INLINE = new RegExp(
  [
    /`([^`\n]+)`/,
    /\*\*(?=\S)([^\n]*?\S)\*\*(?!\*)/,
    /(?<!!)\[([^\[\]\n]+)\]\((https?:\/\/[^\s()<>"]+(?:\([^\s()<>"]*\)[^\s()<>"]*)*)\)/,
    /(?<![\w*])\*(?=[^\s*])([^*\n]*?[^\s*])\*(?![\w*])/,
    /(?<!\w)_(?=[^\s_])([^_\n]*?[^\s_])_(?!\w)/,
  ].map((one) => one.source).join("|"),
  "gi",
);

function blocksOf(text) {
  const blocks = [];
  const above = []; // the headings that the next one stands under, by their signs
  let open = null;
  const start = (block) => blocks.push((open = block));
  for (const line of text.replace(/\r\n?/g, "\n").split("\n")) {
    // As far to the right as one likes in a list; elsewhere four spaces make it a text.
    const found = FENCE.exec(line);
    const fence = found && (found[1].length < 4 || open?.kind === "list" || open?.kind === "code") ? found : null;
    if (open?.kind === "code") {
      if (fence && fence[2].startsWith(open.fence) && !fence[3]) open = null;
      else open.lines.push(line.slice(Math.min(/^\s*/.exec(line)[0].length, open.indent))); // as far as its fence is
      continue;
    }
    const heading = HEADING.exec(line);
    const rule = RULE.test(line);
    const item = fence || rule ? null : ITEM.exec(line);
    const kind = fence ? "code" : heading ? "heading" : rule ? "rule" : item ? "list" : line.trim() ? "text" : "";
    if (!kind) {
      if (open?.kind !== "list") open = null; // a blank line between two items ends no list
      else open.loose = true;
    } else if (kind === "code") {
      start({ kind, indent: fence[1].length, fence: fence[2], name: fence[3], lines: [] });
    } else if (kind === "heading") {
      while (above.at(-1) >= heading[1].length) above.pop();
      above.push(heading[1].length);
      start({ kind, level: Math.min(3 + above.length, 6), text: heading[2] });
      open = null;
    } else if (open?.kind === "text" && UNDER_HEAD.test(line) && isTable(open.lines.at(-1), line)) {
      const head = cellsOf(open.lines.pop());
      if (!open.lines.length) blocks.pop();
      const sides = cellsOf(line).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "center" : "right") : ""));
      start({ kind: "table", head, sides, rows: [] });
    } else if (kind === "rule") {
      start({ kind });
      open = null;
    } else if (kind === "text" && open?.kind === "table" && line.includes("|")) {
      open.rows.push(cellsOf(line));
    } else if (kind === "text" && open?.kind === "list" && /^\s{2,}/.test(line)) {
      open.lines.at(-1).text += `\n${line.trim()}`;
    } else {
      // An item of the other sort, not deeper than the list, begins another list: 1. is followed by 2., not by a bullet's 4.
      const other = item && open?.kind === kind && item[1].length <= open.lines[0].depth + 1 && !item[2] !== !open.lines[0].number;
      if (open?.kind !== kind || other) start({ kind, lines: [] });
      open.lines.push(item ? { depth: item[1].length, number: item[2], text: item[3] } : line);
    }
  }
  return blocks;
}

const cellsOf = (line) =>
  line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

const isTable = (head, line) => head.includes("|") && line.includes("|") && cellsOf(head).length === cellsOf(line).length;

function inline(text) {
  const nodes = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    const [all, code, bold, name, address, starred, lined] = found;
    nodes.push(text.slice(from, found.index));
    if (code !== undefined) nodes.push(make("code", {}, code));
    else if (bold !== undefined) nodes.push(make("strong", {}, ...inline(bold)));
    else if (name !== undefined) nodes.push(outward(name, address));
    else nodes.push(make("em", {}, ...inline(starred ?? lined)));
    from = found.index + all.length;
  }
  nodes.push(text.slice(from));
  return nodes;
}

// A link that a model has written: its whole address is told, for its text may say another.
const outward = (name, href) => make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...inline(name));

function tableOf({ head, sides, rows }) {
  const cell = (tag, text, column) => make(text ? tag : "td", { "data-side": sides[column] || null, scope: text && tag === "th" ? "col" : null }, ...inline(text));
  const row = (tag, cells) => make("tr", {}, ...head.map((_, column) => cell(tag, cells[column] ?? "", column)));
  const table = make("table", {}, make("thead", {}, row("th", head)), make("tbody", {}, ...rows.map((cells) => row("td", cells))));
  return make("div", { class: "table", tabindex: "0" }, table);
}

function listOf(lines) {
  const first = lines[0];
  const list = make(first.number ? "ol" : "ul", first.number && first.number !== "1" ? { start: first.number } : {});
  for (let index = 0; index < lines.length; index++) {
    const item = make("li", {}, ...inline(lines[index].text));
    const inner = [];
    while (index + 1 < lines.length && lines[index + 1].depth > first.depth + 1) inner.push(lines[++index]);
    if (inner.length) item.append(listOf(inner));
    list.append(item);
  }
  return list;
}

function nodeOf(block) {
  if (block.kind === "list") return listOf(block.lines);
  if (block.kind === "text") return make("p", {}, ...inline(block.lines.join("\n")));
  if (block.kind === "heading") return make(`h${block.level}`, {}, ...inline(block.text));
  if (block.kind === "table") return tableOf(block);
  if (block.kind === "rule") return make("hr");
  const code = block.lines.join("\n");
  const pre = make("pre", { tabindex: "0" }, make("code", {}, code));
  return make("div", { class: "code" }, make("p", {}, block.name || "", copyButton(() => code)), pre);
}

// Blocks that have not changed keep their nodes: a selection made while the reply is written stays.
function write(place, text) {
  const blocks = blocksOf(text).map((block) => ({ block, mark: JSON.stringify(block) }));
  const marks = place.marks ?? [];
  let same = 0;
  while (same < marks.length && same < blocks.length && marks[same] === blocks[same].mark) same++;
  while (place.childElementCount > same) place.lastChild.remove();
  place.append(...blocks.slice(same).map(({ block }) => nodeOf(block)));
  place.marks = blocks.map(({ mark }) => mark);
}

// ---------------------------------------------------------------------------------------------------------- the server

const POLL = 4000, FIRST_WAIT = 1000, LONGEST_WAIT = 15000, TRIES = 60;

const server = {
  phase: "starting", // starting, ready, down, away or locked
  uri: "",
  live: null, // what /v1/version says of the version that answers
  rival: null, // the same of the challenger, which answers a share
  ids: [], // what /v1/models lists
  roots: {}, // who answers to each of them
  stale: false, // whether something was heard of that the list had not
  seen: {}, // versions by their model id, to tell where an older reply came from
  failures: 0,
  looks: 0,
};

class Failure extends Error {
  constructor(kind, detail = "") {
    super(detail || kind);
    this.kind = kind;
  }
}

function call(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  return fetch(path, { cache: "no-store", redirect: "error", ...options, headers });
}

const pause = (milliseconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(new Failure("stopped"))), { once: true });
  });

const backOff = (tries) => Math.min(FIRST_WAIT * 2 ** tries, LONGEST_WAIT);

let looking = null, lookTimer = 0;

// Ask the server how it is; one question at a time, and the next one by the clock.
function look() {
  clearTimeout(lookTimer);
  looking ??= lookOnce().finally(() => {
    looking = null;
    clearTimeout(lookTimer);
    if (!document.hidden) lookTimer = setTimeout(look, server.failures ? backOff(server.failures - 1) : POLL);
  });
  return looking;
}

async function lookOnce() {
  const brief = () => ({ signal: AbortSignal.timeout(8000) });
  try {
    if (server.phase !== "ready") {
      const ready = await call("/ready", brief());
      if (ready.status === 503) return settle(server.live ? "down" : "starting");
      if (!ready.ok) throw new Failure("away");
    }
    const response = await call("/v1/version", brief());
    if (response.status === 401) {
      settle("locked");
      if (!server.asked) {
        server.asked = true; // once by itself; after that when a question is sent
        askKey();
      }
      return undefined;
    }
    if (!response.ok) throw new Failure("away");
    const about = await response.json();
    if (!about.live) return settle(server.live ? "down" : "starting");
    const moved = about.live.model !== server.live?.model || about.challenger?.model !== server.rival?.model;
    const fresh = moved || server.stale || !server.ids.length || server.looks++ % 15 === 14;
    adopt(about);
    if (fresh) await list(brief());
    return settle("ready");
  } catch {
    return settle("away");
  }
}

async function list(options) {
  const response = await call("/v1/models", options);
  if (!response.ok) return;
  const { data } = await response.json();
  // Without who answered a moment ago it is of another moment: an engine that went down is not a version taken away.
  server.stale = !data.some((one) => one.id === server.live.model);
  if (server.stale) return;
  const before = server.ids.length ? asked() : [chat.first, chat.compare ? chat.second : ""];
  server.ids = data.map((one) => String(one.id));
  server.roots = Object.fromEntries(data.map((one) => [one.id, one.root]));
  const known = JSON.stringify(server.seen);
  for (const one of data) if (one.namesake) server.seen[one.id] = one.namesake;
  if (known !== JSON.stringify(server.seen)) for (const view of views.values()) view.paint();
  // What was chosen and is served no more gives way, which is said.
  for (const place of ["first", "second"]) if (!server.ids.includes(chat[place])) chat[place] = "";
  const now = asked();
  for (const [slot, id] of before.entries()) {
    if (!id || server.ids.includes(id)) continue;
    tell({ notice: now[slot] ? "gone" : "goneAlone", from: id, to: now[slot] ?? now[0] }, chat.items.length);
  }
  paintPicks();
}

function settle(phase) {
  const before = server.phase;
  server.failures = phase === "ready" ? 0 : server.failures + 1;
  server.phase = phase;
  paintHead();
  if (before !== phase && (phase === "down" || phase === "away")) speak(t(phase));
  if (before !== phase && phase === "ready" && before !== "starting") speak(t("ready"));
}

function adopt(about) {
  const live = about.live;
  server.uri = about.uri;
  const rival = about.challenger ?? null;
  const known = () => JSON.stringify([server.live, server.rival]);
  const before = known();
  Object.assign(server, { live, rival });
  for (const one of [live, rival]) if (one) server.seen[one.model] = one;
  if (chat.last && chat.last !== live.model) announce(live.model);
  chat.last = live.model;
  if (before === known()) return;
  for (const view of views.values()) view.paint();
  paintPicks();
}

// The name and the alias of what is served: `ccb` and `champion` of models:/ccb@champion.
function followed() {
  const [, name, alias] = /^models:\/([^@/]+)(?:@(.+))?/.exec(server.uri) ?? [];
  return { name, alias };
}

const follows = (id) => {
  const { name, alias } = followed();
  return id === name || (alias && id === `${name}@${alias}`);
};

// Ids that stand for the same version have one kind.
const kindOf = (id) => server.roots[id] ?? id;

// The part of the questions to the bare name that the challenger answers.
const share = () => server.rival?.canary ?? 0;

const isBase = (id) => Boolean(server.live?.base) && `/${server.live.base}`.toLowerCase().endsWith(`/${id}`.toLowerCase());

// ------------------------------------------------------------------------------------------------------------- the key

let asking = null;

// Ask for the API key, for all who need it at once; whether there is one that the server accepts.
function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    $("key-value").value = "";
    $("key-wrong").textContent = key ? t("keyWrong") : "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "used"), { once: true });
    $("settings").close();
    dialog.showModal();
    $("key-value").focus();
  }).finally(() => {
    asking = null;
    if (document.activeElement === document.body) $("ask").focus();
  });
  return asking;
}

async function tryKey() {
  const given = $("key-value").value.trim();
  const before = key;
  $("key-wrong").textContent = "";
  if (given) {
    $("key-use").disabled = true;
    try {
      if (!/^[\x21-\x7e]+$/.test(given)) throw new Failure("key"); // no header can carry it
      key = given;
      if ((await call("/v1/version", { signal: AbortSignal.timeout(8000) })).status === 401) throw new Failure("key");
    } catch (error) {
      if (error.kind === "key") {
        key = before;
        $("key-wrong").textContent = t("keyWrong");
        $("key-value").select();
        return;
      }
    } finally {
      $("key-use").disabled = false;
    }
  }
  key = given;
  store("sessionStorage", KEY, key || null);
  $("key").close(given ? "used" : "");
  server.failures = 0;
  look();
}

// ------------------------------------------------------------------------------------------------------------ the chat

// items: {text, replies: [{asked, version, run, text, state, …}]} for a turn, {notice, from, to} for what happened.
// session: one conversation is answered by one side of a canary, and is one session in traces.
const newSession = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const chat = { items: [], session: newSession(), last: "", first: "", second: "", compare: false };
const running = new Map(); // reply -> AbortController
const views = new Map(); // reply or notice -> {paint, …}

function save() {
  store("sessionStorage", CHAT, { ...chat, seen: server.seen });
}

function restore() {
  const kept = load("sessionStorage", CHAT);
  if (!Array.isArray(kept?.items)) return;
  Object.assign(server.seen, kept.seen);
  delete kept.seen;
  Object.assign(chat, kept);
  for (const reply of chat.items.flatMap((item) => item.replies ?? [])) {
    if (reply.state === "asking" || reply.state === "writing") reply.state = "stopped";
  }
}

// The ids that are asked: one, or two side by side.
function chosen() {
  const ids = choices();
  const first = ids.includes(chat.first) ? chat.first : (ids[0] ?? "");
  const other = ids.find((id) => isBase(id) && kindOf(id) !== kindOf(first)) ?? ids.find((id) => kindOf(id) !== kindOf(first));
  const second = ids.includes(chat.second) ? chat.second : (other ?? first);
  return { first, second, several: new Set(ids.map(kindOf)).size > 1 };
}

// `ccb@champion` says nothing that `ccb` does not, but under a canary.
const choices = () =>
  server.ids.filter((id) => id === followed().name || !follows(id) || share() || !server.ids.includes(followed().name));

function asked() {
  const { first, second, several } = chosen();
  return chat.compare && several ? [first, second] : [first];
}

function send(text) {
  const turn = { text, replies: asked().map((id) => ({ asked: id, text: "", state: "asking" })) };
  chat.items.push(turn);
  $("thread").append(turnView(turn));
  sticky = true;
  for (const slot of turn.replies.keys()) answer(turn, slot);
  paintHead();
  toEnd();
}

function again(turn, slot) {
  const at = chat.items.indexOf(turn);
  if (at !== chat.items.length - 1) {
    // What was told after the turn is now before it.
    chat.items.splice(at, 1);
    chat.items.push(turn);
    $("thread").append(views.get(turn.replies[0]).turn);
  }
  const old = turn.replies[slot].asked;
  turn.replies[slot].asked = server.ids.includes(old) || !server.ids.length ? old : (asked()[slot] ?? chosen().first);
  answer(turn, slot);
}

function edit(turn, text) {
  stop();
  const at = chat.items.indexOf(turn);
  for (const item of chat.items.splice(at)) for (const one of item.replies ?? [item]) views.delete(one);
  while ($("thread").childElementCount > at) $("thread").lastChild.remove();
  send(text);
}

function stop() {
  for (const control of running.values()) control.abort();
}

function startAnew() {
  stop();
  Object.assign(chat, { items: [], session: newSession() });
  views.clear();
  $("thread").replaceChildren();
  save();
  paintHead();
  $("ask").focus();
}

// What was said before, as the model in this column saw it; turns that came to nothing are left out.
function dialogue(turn, slot) {
  const messages = [];
  for (const item of chat.items.slice(0, chat.items.indexOf(turn))) {
    const said = item.replies && (item.replies[slot] ?? item.replies[0]).text;
    if (said) messages.push({ role: "user", content: item.text }, { role: "assistant", content: said });
  }
  messages.push({ role: "user", content: turn.text });
  const latest = messages.slice(-201); // the server takes 256
  return settings.system.trim() ? [{ role: "system", content: settings.system }, ...latest] : latest;
}

async function answer(turn, slot) {
  const reply = turn.replies[slot];
  running.get(reply)?.abort();
  const control = new AbortController();
  running.set(reply, control);
  const mine = () => running.get(reply) === control;
  Object.assign(reply, { trace: "", rated: null });
  Object.assign(reply, { version: "", alias: "", run: "", text: "", finish: "", waiting: "", error: "", detail: "" });
  Object.assign(reply, { state: "asking", limit: settings.tokens });
  views.get(reply).paint();
  paintRunning();
  try {
    await listen(await reach(turn, slot, control.signal), turn, reply);
    if (mine()) reply.state = "done";
  } catch (error) {
    if (!mine()) return;
    reply.state = control.signal.aborted ? "stopped" : "failed";
    if (reply.state === "failed") [reply.error, reply.detail] = [error.kind ?? "cut", error.message];
  }
  if (!mine()) return;
  running.delete(reply);
  paintRunning();
  if (!chat.items.includes(turn)) return; // edited away or cleared meanwhile
  reply.waiting = "";
  views.get(reply)?.paint();
  save();
  const who = turn.replies.length > 1 ? reply.asked : speaker(reply);
  if (reply.text) speak(t("spoke", { who, text: reply.text }));
  if (reply.state === "failed") speak(problem(reply));
  follow();
}

// The response to a question; waits for an engine that is down and asks for a key that is missing.
async function reach(turn, slot, signal) {
  const reply = turn.replies[slot];
  for (let tries = 0; ; tries++) {
    let response = null;
    try {
      reply.asked ||= asked()[slot] ?? "";
      response = await call("/v1/chat/completions", {
        method: "POST",
        signal,
        headers: { "content-type": "application/json", "x-namesake-session": chat.session },
        body: JSON.stringify({
          ...(reply.asked && { model: reply.asked }),
          messages: dialogue(turn, slot),
          stream: true,
          temperature: settings.temperature,
          max_tokens: reply.limit,
        }),
      });
    } catch (error) {
      if (signal.aborted) throw error;
    }
    if (response?.ok) return response;
    if (response?.status === 401) {
      if (!(await askKey())) throw new Failure("Key");
      continue;
    }
    const why = response === null ? "Away" : { 503: "Down", 429: "Busy" }[response.status];
    look();
    if (!why) throw new Failure("Refused", await refusal(response));
    if (tries >= TRIES) throw new Failure(why);
    reply.waiting = why;
    views.get(reply)?.paint();
    const least = 1000 * Number(response?.headers.get("retry-after") ?? 0) || 0;
    await pause(Math.max(least, backOff(tries)), signal);
  }
}

async function refusal(response) {
  try {
    return String((await response.json()).error.message);
  } catch {
    return `HTTP ${response.status}`;
  }
}

async function listen(response, turn, reply) {
  reply.state = "writing";
  reply.waiting = "";
  reply.version = response.headers.get("x-namesake-version") ?? "";
  reply.alias = utf8(response.headers.get("x-namesake-alias") ?? "");
  reply.run = response.headers.get("x-namesake-run") ?? "";
  reply.trace = response.headers.get("x-namesake-trace") ?? "";
  came(turn, reply);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure("Refused", String(chunk.error.message ?? chunk.error));
      if (!reply.version && chunk.system_fingerprint) reply.version = chunk.system_fingerprint;
      const choice = chunk.choices?.[0];
      reply.text += choice?.delta?.content ?? "";
      reply.finish = choice?.finish_reason ?? reply.finish;
      views.get(reply)?.schedule();
    }
  }
  if (!reply.finish) throw new Failure("cut");
}

// A header's bytes come as a character each.
const utf8 = (text) => new TextDecoder().decode(Uint8Array.from(text, (one) => one.charCodeAt(0)));

// The reply says by which version it is: that may be the first that is heard of a new one. One that the challenger
// answered, for its share, says nothing of where the followed alias points.
function came(turn, reply) {
  if (!reply.version || (reply.version === server.live?.model && reply.version === chat.last)) return;
  if (follows(reply.asked) && reply.alias === (followed().alias ?? "") && chat.last && reply.version !== chat.last) {
    announce(reply.version, turn);
    chat.last = reply.version;
  }
  if (reply.version in server.seen) return;
  server.stale = true;
  look();
}

// The alias moved while one was talking: told once, in the thread, before what the new version says.
function announce(to, before = null) {
  if (!chat.items.length) return;
  const unanswered = (item) => item.replies?.every((reply) => reply.state === "asking");
  const at = before ? chat.items.indexOf(before) : chat.items.findIndex(unanswered);
  const alias = followed().alias ?? followed().name;
  tell({ notice: "moved", alias, from: chat.last, to }, at < 0 ? chat.items.length : at);
}

function tell(notice, at) {
  speak(noticeText(notice));
  if (!chat.items.length) return;
  chat.items.splice(at, 0, notice);
  $("thread").insertBefore(noticeView(notice), $("thread").children[at] ?? null);
  save();
  follow();
}

// ----------------------------------------------------------------------------------------------------------- the thread

function speaker(reply) {
  const known = server.seen[reply.version];
  const name = known ? half(known.name) : reply.version || reply.asked || t("model");
  return otherAlias(reply) ? `${name} (${t("chosenBy", { alias: reply.alias })})` : name;
}

// Whether another alias than the followed one chose who replied: the challenger's.
const otherAlias = (reply) => Boolean(reply.alias && server.uri) && reply.alias !== followed().alias;

function problem(reply) {
  if (reply.error === "cut") return t("cut");
  return t(`failed${reply.error}`, { detail: reply.detail });
}

function noticeText({ notice, alias, from, to }) {
  if (notice !== "moved") return t(notice, { id: from, to });
  const [old, now] = [server.seen[from], server.seen[to]];
  const text = t("moved", { from, to, alias });
  const sep = language === "zh" ? "" : " ";
  return old && now && old.name !== now.name ? text + sep + t("movedSelf", { name: half(now.name) }) : text;
}

function noticeView(notice) {
  const text = make("span", {}, noticeText(notice));
  // The new version's own name may come a moment later.
  views.set(notice, { paint: () => (text.textContent = noticeText(notice)) });
  return make("p", { class: "notice" }, text);
}

function turnView(turn) {
  const said = make("div", { class: "bubble", dir: "auto", lang: languageOf(turn.text) }, turn.text);
  const acts = make("div", { class: "acts" }, copyButton(() => turn.text), button("edit", t("edit"), () => open()));
  const head = make("h2", { class: "unseen" }, t("you"));
  const mine = make("article", { class: "mine" }, head, said, acts);
  const replies = make("div", { class: turn.replies.length > 1 ? "replies two" : "replies" });
  const node = make("section", { class: "turn" }, mine, replies);
  for (const slot of turn.replies.keys()) replies.append(replyView(turn, slot, node));

  function open() {
    const area = make("textarea", { rows: "2", "aria-label": t("edit"), dir: "auto", input: () => fit(area) });
    const form = make(
      "form",
      { class: "editing" },
      area,
      make(
        "div",
        { class: "ends" },
        make("button", { type: "button", class: "plain", click: close }, t("cancel")),
        make("button", { type: "submit", class: "solid" }, t("send")),
      ),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!area.value.trim()) return;
      edit(turn, area.value.trim());
      $("ask").focus();
    });
    area.addEventListener("keydown", (event) => {
      if (composing(event)) return;
      if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        form.requestSubmit();
      } else if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
    });
    area.value = turn.text;
    mine.replaceChildren(head, form);
    fit(area);
    area.focus();
    function close() {
      mine.replaceChildren(head, said, acts);
      acts.lastChild.focus();
    }
  }
  return node;
}

function replyView(turn, slot, node) {
  const reply = turn.replies[slot];
  const head = make("h3", { class: turn.replies.length > 1 ? "column" : "unseen" });
  const body = make("div", { class: "said", dir: "auto" });
  const note = make("div", { class: "note" });
  const foot = make("footer");
  const view = make("article", { class: "reply" }, head, body, note, foot);
  let due = 0;

  function paint() {
    cancelAnimationFrame(due);
    due = 0;
    const over = !["asking", "writing"].includes(reply.state);
    head.textContent = turn.replies.length > 1 ? reply.asked || t("model") : speaker(reply);
    if (turn.replies.length > 1 && isBase(reply.asked)) head.append(make("span", {}, t("baseModel")));
    view.dataset.state = reply.state;
    view.setAttribute("aria-busy", String(!over));
    body.lang = languageOf(reply.text);
    write(body, reply.text);
    note.replaceChildren(...notes(over));
    foot.replaceChildren(...(over && reply.text ? footer() : []));
  }

  function notes(over) {
    if (!over && reply.waiting) return [make("p", { class: "waiting" }, t(`waiting${reply.waiting}`))];
    if (!over) return reply.text ? [] : [make("p", { class: "dots", role: "img", "aria-label": t("writing") }, make("span"), make("span"), make("span"))];
    if (reply.state === "failed") {
      const text = make("p", { class: "failed" }, icon("warn"), make("span", {}, problem(reply)));
      return [text, make("button", { type: "button", class: "plain retry", click: () => again(turn, slot) }, t("retry"))];
    }
    const lines = [];
    if (reply.state === "stopped") lines.push(t("stopped"));
    else if (reply.finish === "length") lines.push(t("length", { tokens: new Intl.NumberFormat(language).format(reply.limit) }));
    else if (!reply.text) lines.push(t("empty"));
    const found = lines.map((line) => make("p", {}, line));
    if (!reply.text) found.push(make("button", { type: "button", class: "plain retry", click: () => again(turn, slot) }, t("retry")));
    return found;
  }

  function footer() {
    const retake = button("again", t("again"), () => again(turn, slot), "act again");
    return [make("div", { class: "acts" }, copyButton(() => reply.text), retake, ...ratings(reply)), origin(reply)];
  }

  views.set(reply, {
    paint,
    turn: node,
    schedule: () => (due ||= requestAnimationFrame(() => (paint(), follow()))),
  });
  paint();
  return view;
}

// Two buttons that say of a reply whether it is good, where the server keeps a trace of it.
function ratings(reply) {
  if (!reply.trace) return [];
  const rate = async (value) => {
    const options = { method: "POST", headers: { "content-type": "application/json" } };
    const body = JSON.stringify({ trace_id: reply.trace, value });
    const response = await call("/v1/feedback", { ...options, body, signal: AbortSignal.timeout(20000) }).catch(() => null);
    if (response?.ok) reply.rated = value;
    made[value ? 0 : 1].replaceChildren(icon(!response?.ok ? "warn" : value ? "good" : "bad"));
    paint();
    save();
    speak(t(response?.ok ? "rated" : "unrated"));
  };
  const made = [true, false].map((value) => button(value ? "good" : "bad", t(value ? "good" : "bad"), () => rate(value)));
  const paint = () => made.forEach((one, index) => one.setAttribute("aria-pressed", String(reply.rated === (index === 0))));
  paint();
  return made;
}

// Where a reply came from: version, run and scores.
function origin(reply) {
  const known = server.seen[reply.version];
  const run = reply.run || (known?.run ?? "");
  const [, name, number] = /^models:\/([^/]+)\/(\d+)$/.exec(known?.version ?? "") ?? [];
  const parts = [linked(reply.version || reply.asked, name && `/#/models/${encodeURIComponent(name)}/versions/${number}`)];
  if (otherAlias(reply)) {
    const { alias } = reply;
    parts.push(make("span", { title: t("chosenByMeans", { alias }) }, t("chosenBy", { alias })));
  }
  if (isBase(reply.asked)) parts.push(make("span", {}, t("baseModel")));
  if (run) {
    const node = linked(t("run", { run: run.slice(0, 8) }), `/#/runs/${encodeURIComponent(run)}`);
    node.title = run;
    parts.push(node);
  }
  for (const score of SCORES) {
    const value = known?.scores?.[score];
    if (typeof value === "number") parts.push(make("span", { title: t(`${score}Means`) }, `${t(score)} ${percent(value)}`));
  }
  return make("p", { class: "origin dots-between" }, ...parts.map((part) => make("span", {}, part)));
}

// A link into MLflow's pages where the page was told their address, else plain text.
function linked(text, path) {
  const address = document.querySelector("meta[name=namesake-mlflow]").content.replace(/\/+$/, "");
  if (!path || !/^https?:\/\//.test(address)) return make("span", {}, text);
  return make("a", { href: address + path, target: "_blank", rel: "noopener noreferrer" }, text);
}

let sticky = true; // whether the end of the thread is kept in sight

function toEnd() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

function follow() {
  if (sticky) toEnd();
}

function paintJump() {
  const left = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  sticky = left < 90;
  $("jump").hidden = left < 240;
}

// --------------------------------------------------------------------------------------------------- everything around

function paintHead() {
  const { live, phase } = server;
  const name = live ? half(live.name) : "";
  $("name").textContent = name || "Namesake";
  $("name").title = live ? live.name : "";
  document.title = name ? `${name} · Namesake` : "Namesake";
  $("status").dataset.phase = phase;
  const serving = phase === "ready" ? [live.model, share() && t("sharing", { share: percent(share()), model: server.rival.model })] : [];
  $("status-text").replaceChildren(...[t(phase), ...serving].filter(Boolean).map((part) => make("span", {}, part)));
  $("ask").placeholder = name ? t("ask", { name }) : t("askAnybody");
  $("system").placeholder = live?.system ?? "";
  $("hello").hidden = chat.items.length > 0;
  $("greeting").textContent = live ? t("hello", { name }) : "Namesake";
  const away = { starting: "helloStarting", locked: "helloLocked" }[phase] ?? "helloDown";
  const base = live?.base?.split("/").pop();
  const parts = live ? [t("made", { author: half(live.author) }), live.model, base && t("based", { base })] : [t(away)];
  $("about").replaceChildren(...parts.filter(Boolean).map((part) => make("span", {}, part)));
  if (live && phase !== "ready") $("about").replaceChildren(t(away));
}

function paintPicks() {
  const { first, second, several } = chosen();
  const two = chat.compare && several;
  const { name, alias } = followed();
  const shown = (id) => {
    if (isBase(id)) return t("isBase", { id });
    if (id === name && share()) return t("shared", { id, alias: alias ?? server.live.model, share: percent(share()), rival: server.rival.model });
    if (follows(id) && alias) return t("follows", { id, alias });
    return id.startsWith(`${name}@`) ? t("follows", { id, alias: id.slice(name.length + 1) }) : id;
  };
  for (const [place, value, there] of [["first", first, choices().length > 1], ["second", second, two]]) {
    $(place).replaceChildren(...choices().map((id) => make("option", { value: id }, shown(id))));
    $(place).value = value;
    $(place).hidden = !there;
  }
  $("versus").hidden = !two;
  // Where there is nothing to compare with, the button says how to get it.
  const compare = $("compare");
  compare.hidden = !server.ids.length;
  for (const [name, value] of [["aria-pressed", several && String(two)], ["aria-haspopup", !several && "dialog"]]) {
    if (value) compare.setAttribute(name, value);
    else compare.removeAttribute(name);
  }
  document.body.classList.toggle("wide", two || chat.items.some((item) => item.replies?.length > 1));
}

// Why there is nothing to compare with, and what to do.
function explain() {
  $("alone-why").textContent = t("alone", { id: server.live?.model ?? chosen().first });
  $("alone-how").replaceChildren(nodeOf({ kind: "code", lines: ["namesake serve --mode adapter"] }));
  $("alone").showModal();
}

function paintRunning() {
  const busy = running.size > 0;
  const lost = document.activeElement === (busy ? $("send") : $("stop"));
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  if (lost && busy) $("stop").focus();
  else if (lost && precise()) $("ask").focus();
}

function paintAsk() {
  fit($("ask"));
  $("send").disabled = !$("ask").value.trim();
}

// As high as its text, where the browser cannot do it by itself.
function fit(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function paintTexts() {
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-label]")) node.setAttribute("aria-label", t(node.dataset.tLabel));
  for (const node of document.querySelectorAll("[data-t-name]")) {
    node.setAttribute("aria-label", t(node.dataset.tName));
    node.title = t(node.dataset.tName);
  }
  $("ideas").replaceChildren(
    ...t("ideas").split("\n").map((idea) => make("li", {}, make("button", { type: "button", class: "idea", click: () => send(idea) }, idea))),
  );
  $("figures").replaceChildren(...SCORES.flatMap((score) => [make("dt", {}, t(score)), make("dd", {}, t(`${score}Means`))]));
  $("spoken").replaceChildren();
  views.clear();
  $("thread").replaceChildren(...chat.items.map((item) => (item.replies ? turnView(item) : noticeView(item))));
  paintHead();
  paintPicks();
}

function paintSettings() {
  const fields = $("settings-form").elements;
  for (const name of Object.keys(settings)) if (fields[name]) fields[name].value = settings[name];
  $("temperature-value").textContent = Number(settings.temperature).toFixed(1);
}

function readSettings() {
  const fields = $("settings-form").elements;
  const spoken = settings.language;
  settings.language = fields.language.value;
  settings.theme = fields.theme.value;
  settings.system = fields.system.value;
  settings.temperature = Number(fields.temperature.value);
  if (fields.tokens.checkValidity()) settings.tokens = Number(fields.tokens.value);
  $("temperature-value").textContent = settings.temperature.toFixed(1);
  store("localStorage", SETTINGS, settings);
  dress();
  if (spoken !== settings.language) paintTexts();
}

function begin() {
  restore();
  paintSettings();
  paintTexts();
  paintAsk();

  const box = $("ask");
  box.addEventListener("input", paintAsk);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !composing(event)) {
      event.preventDefault();
      $("composer").requestSubmit();
    }
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = box.value.trim();
    if (!text || running.size) return;
    box.value = "";
    paintAsk();
    send(text);
  });
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !composing(event) && !document.querySelector("dialog[open]")) stop();
  });
  $("new").addEventListener("click", startAnew);
  $("compare").addEventListener("click", () => {
    if (!chosen().several) return explain();
    chat.compare = !chat.compare;
    paintPicks();
    return save();
  });
  for (const place of ["first", "second"]) {
    $(place).addEventListener("change", () => {
      chat[place] = $(place).value;
      paintPicks();
      save();
    });
  }
  $("jump").addEventListener("click", () => {
    toEnd();
    box.focus();
  });
  addEventListener("scroll", paintJump, { passive: true });
  addEventListener("resize", follow);
  addEventListener("pagehide", save);
  document.addEventListener("visibilitychange", () => document.hidden || look());
  addEventListener("online", look);

  $("open-settings").addEventListener("click", () => $("settings").showModal());
  for (const name of ["settings", "alone"]) {
    $(`close-${name}`).addEventListener("click", () => $(name).close());
    $(name).addEventListener("click", (event) => event.target === $(name) && $(name).close());
  }
  $("settings").addEventListener("close", paintSettings);
  $("settings-form").addEventListener("input", readSettings);
  $("settings-form").addEventListener("submit", (event) => event.preventDefault());
  $("open-key").addEventListener("click", askKey);
  $("key-cancel").addEventListener("click", () => $("key").close());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    tryKey();
  });

  if (precise()) box.focus();
  if (chat.items.length) toEnd();
  look();
}

document.addEventListener("DOMContentLoaded", begin);

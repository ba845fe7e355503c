// The page of `nds serve`: it asks this server's own API and shows of each token whether the draft or the target made it.
// A round is one pass of the target: `tokens` it brought, of which the first `kept` were drafted, and drafts `refused`.
"use strict";

const $ = (id) => document.getElementById(id);
const history = []; // messages of the conversation, as the API takes them
let running = null; // AbortController of the answer that is being written
let blockSize = 0; // tokens the draft proposes a round; 0 without a draft

function headers() {
  const key = sessionStorage.getItem("key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function complain(response) {
  if (response.status === 401) {
    sessionStorage.removeItem("key");
    $("unlock").hidden = false;
    $("key").focus();
  }
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answers with status ${response.status}.`);
}

async function introduce() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) await complain(response);
    const card = (await response.json()).data[0];
    blockSize = card.block_size;
    $("unlock").hidden = true;
    $("model").textContent = card.id;
    document.title = `${card.id} · nds serve`;
    $("thinking_row").hidden = !card.thinking;
    if (!blockSize) {
      document.querySelector("[value=plain]").checked = true;
      for (const radio of document.querySelectorAll("[name=mode]")) radio.disabled = radio.value !== "plain";
      say("This server has no draft: every token is the target's own.");
    } else {
      say(`The draft proposes ${blockSize} tokens a round.`);
    }
  } catch (error) {
    say(error.message, true);
  }
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", wrong);
}

// --- one answer ---

class Pane {
  constructor(place, title) {
    this.element = $("pane").content.firstElementChild.cloneNode(true);
    this.element.querySelector("h2").textContent = title;
    place.append(this.element);
    this.rounds = [];
    this.text = ""; // what was said, without reasoning: the history's
    this.raw = "";
    this.began = this.seconds = this.tokens = 0;
    this.chosen = null;
    this.answer = this.find(".answer");
    this.range = this.find("input");
    this.range.addEventListener("input", () => this.choose(Number(this.range.value)));
    this.find(".back").addEventListener("click", () => this.step(-1));
    this.find(".on").addEventListener("click", () => this.step(1));
    this.answer.addEventListener("click", (event) => {
      const token = event.target.closest("[data-round]");
      if (token) this.choose(Number(token.dataset.round));
    });
    this.answer.addEventListener("keydown", (event) => {
      const last = this.rounds.length - 1;
      const to = { ArrowLeft: this.at - 1, ArrowRight: this.at + 1, Home: 0, End: last }[event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.choose(to);
    });
  }

  find(selector) { return this.element.querySelector(selector); }

  get at() { return this.chosen ?? -1; }

  receive(round) {
    const number = this.rounds.length;
    this.rounds.push(round);
    const now = performance.now();
    if (!this.began) this.began = now; // the first token is the prompt's pass
    this.seconds = (now - this.began) / 1000;
    this.tokens += round.tokens.length;
    const piece = document.createDocumentFragment();
    round.tokens.forEach((text, place) => {
      const token = spell(text, place < round.kept ? "draft" : "target");
      token.dataset.round = number;
      piece.append(token);
      this.raw += text ?? "";
    });
    this.answer.append(piece);
    this.range.max = number;
    if (this.chosen === null) this.range.value = number;
    this.show();
  }

  get length() { return this.rounds.length > 1 ? (this.tokens - 1) / (this.rounds.length - 1) : null; }

  get speed() { return this.seconds > 0 ? (this.tokens - 1) / this.seconds : null; }

  show() {
    this.find(".length").textContent = this.length?.toFixed(2) ?? "–";
    this.find(".speed").textContent = this.speed?.toFixed(1) ?? "–";
    this.find(".count").textContent = this.tokens;
    this.find(".rounds").textContent = this.rounds.length - 1;
    this.find(".which").textContent = this.chosen === null ? "" : `round ${this.chosen} of ${this.rounds.length - 1}`;
  }

  step(by) { this.choose(this.chosen === null ? (by > 0 ? 0 : this.rounds.length - 1) : this.chosen + by); }

  choose(number) {
    if (!this.rounds.length) return;
    this.chosen = Math.min(Math.max(number, 0), this.rounds.length - 1);
    this.range.value = this.chosen;
    for (const token of this.answer.querySelectorAll(".chosen")) token.classList.remove("chosen");
    const tokens = this.answer.querySelectorAll(`[data-round="${this.chosen}"]`);
    for (const token of tokens) token.classList.add("chosen");
    tokens[0]?.scrollIntoView({ block: "nearest" });
    const { tokens: texts, kept, refused } = this.rounds[this.chosen];
    const round = this.find(".round");
    const words = this.chosen === 0
      ? "the prompt's pass: "
      : `drafted ${kept + refused.length}, kept ${kept}: `;
    round.replaceChildren(words);
    texts.forEach((text, place) => round.append(spell(text, place < kept ? "draft" : "target", true), " "));
    if (refused.length) round.append(" refused: ");
    for (const text of refused) round.append(spell(text, "refused", true), " ");
    this.show();
  }
}

function spell(text, kind, alone = false) {
  const token = document.createElement("span");
  token.className = `token ${kind}`;
  if (text === null) {
    token.classList.add("end");
    token.textContent = "■";
    token.title = "the end of the answer";
  } else {
    token.textContent = alone ? text.replaceAll("\n", "↵") || "…" : text; // "…": a part of a character
  }
  return token;
}

// --- asking ---

function body(speculative) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const system = $("system").value.trim();
  return JSON.stringify({
    messages: [...(system ? [{ role: "system", content: system }] : []), ...history],
    temperature: number("temperature"), top_p: number("top_p"), seed: number("seed"), max_tokens: number("max_tokens"),
    ...($("thinking").value ? { chat_template_kwargs: { enable_thinking: $("thinking").value === "true" } } : {}),
    stream: true, return_rounds: true, speculative,
  });
}

async function answer(pane, speculative, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: body(speculative), signal,
  });
  if (!response.ok) await complain(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        pane.text += choice.delta.content ?? "";
        for (const round of choice.rounds ?? []) pane.receive(round);
      }
    }
  }
}

async function send() {
  const question = $("prompt").value.trim();
  if (!question || running) return;
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("hint").hidden = true;
  $("prompt").value = "";
  history.push({ role: "user", content: question });
  const turn = $("turn").content.firstElementChild.cloneNode(true);
  turn.querySelector(".question").textContent = question;
  $("turns").append(turn);
  const mode = document.querySelector("[name=mode]:checked").value;
  const wanted = { draft: [true], plain: [false], both: [true, false] }[mode];
  const place = turn.querySelector(".panes");
  const panes = wanted.map((with_) => new Pane(place, with_ ? "with the draft" : "without the draft"));
  turn.scrollIntoView({ block: "start" });
  try {
    for (const [at, pane] of panes.entries()) { // one after the other: together each would slow the other down
      say(wanted[at] ? "decoding with the draft …" : "decoding without the draft …");
      await answer(pane, wanted[at], running.signal);
    }
    say("");
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  }
  if (panes.length === 2 && panes[0].speed && panes[1].speed) turn.querySelector(".verdict").textContent = verdict(...panes);
  if (panes[0].rounds.length) history.push({ role: "assistant", content: panes[0].text || panes[0].raw });
  else { history.pop(); $("prompt").value = question; } // nothing was answered: it may be asked again
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
}

function verdict(fast, slow) {
  const times = `With the draft ${(fast.speed / slow.speed).toFixed(2)} times as many tokens a second`;
  if (Number($("temperature").value) > 0) return `${times}; sampled, so the texts differ and their distribution does not.`;
  return `${times}; the texts are ${fast.raw === slow.raw ? "the same" : "not the same"}.`;
}

// --- wiring ---

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  history.length = 0;
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  $("hint").hidden = false;
  $("prompt").focus();
});
$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value);
  $("key").value = "";
  introduce();
});
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
introduce();

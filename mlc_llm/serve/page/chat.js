// The chat page: a conversation kept in this tab, answered by the server that sent the page.
// Text of the model only ever becomes text nodes.

const STORE = "mlc_llm.chat";
const REDRAW_MS = 80; // drawing takes time from a model that runs on the same processor
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

const $ = (id) => document.getElementById(id);
const [log, input, scroller, settings] = ["log", "input", "scroller", "settings-form"].map($);

let messages = []; // {role, content, stats}
let running = null; // {chat, answer, controller} while an answer arrives

// --- What the tab remembers -------------------------------------------------------------------

function save() {
  const values = Object.fromEntries(new FormData(settings));
  const isPartial = running?.chat === messages && running.answer.content;
  const kept = isPartial ? [...messages, running.answer] : messages;
  sessionStorage.setItem(STORE, JSON.stringify({ messages: kept, values, draft: input.value }));
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(STORE)) ?? {};
    for (const [name, value] of Object.entries(kept.values ?? {})) settings.elements[name].value = value;
    messages = kept.messages ?? [];
    input.value = kept.draft ?? "";
    if (messages.at(-1)?.role === "user") takeBack(messages);
  } catch {
    messages = [];
    sessionStorage.removeItem(STORE);
  }
}

// A question without an answer goes back to where it was typed, to be sent again.
function takeBack(chat) {
  const question = chat.pop();
  input.value ||= question.content;
}

// --- Markdown, the little of it that matters: code blocks, `code` and **bold** -----------------

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function markdown(text) {
  const nodes = [];
  let end = 0;
  // A block that is still being written has no closing fence yet.
  for (const found of text.matchAll(/^```([^\n`]*)\n([\s\S]*?)(?:^```[ \t]*(?:\n|$)|$(?![\s\S]))/gm)) {
    nodes.push(...inline(text.slice(end, found.index).trim()));
    const block = element("pre");
    block.append(element("code", "", found[2].replace(/\n$/, "")));
    if (found[1].trim()) block.setAttribute("aria-label", `${found[1].trim()} code`);
    nodes.push(block);
    end = found.index + found[0].length;
  }
  return [...nodes, ...inline(end > 0 ? text.slice(end).trim() : text)];
}

function inline(text) {
  // Splitting by a group keeps what it matched, at the odd places.
  return text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/).map((part, index) => {
    if (index % 2 === 0) return document.createTextNode(part);
    return part[0] === "`" ? element("code", "", part.slice(1, -1)) : element("strong", "", part.slice(2, -2));
  });
}

// --- The conversation on the screen ------------------------------------------------------------

function show(message) {
  const article = element("article", message.role);
  article.setAttribute("aria-label", message.role === "user" ? "You" : "Answer");
  article.append(element("div", "text"), element("p", "stats"));
  log.append(article);
  refresh(article, message);
  return article;
}

function refresh(article, message) {
  const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
  const [text, stats] = article.children;
  if (message.role === "user") text.textContent = message.content;
  else text.replaceChildren(...markdown(message.content));
  stats.textContent = message.stats ?? "";
  stats.hidden = !message.stats;
  if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
}

function showAll() {
  log.replaceChildren();
  messages.forEach(show);
  $("welcome").hidden = messages.length > 0;
  scroller.scrollTop = scroller.scrollHeight;
}

function showError(text) {
  const note = element("p", "error", text);
  note.setAttribute("role", "alert");
  log.append(note);
  $("welcome").hidden = true;
  scroller.scrollTop = scroller.scrollHeight;
}

function setRunning(answering) {
  running = answering;
  log.setAttribute("aria-busy", String(Boolean(answering)));
  $("send").hidden = Boolean(answering);
  $("stop").hidden = !answering;
}

function fitInput() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  $("send").disabled = !input.value.trim();
}

// --- Asking the server -------------------------------------------------------------------------

async function call(path, options = {}) {
  const key = settings.elements.api_key.value.trim();
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const reason = body?.error?.message || `The server answered ${response.status} ${response.statusText}.`;
  throw new Error(response.status === 401 ? `${reason} Enter the API key under Settings.` : reason);
}

function requestBody() {
  const values = settings.elements;
  const system = values.system.value.trim();
  const history = messages.map(({ role, content }) => ({ role, content }));
  const body = {
    model: $("model").value || undefined,
    messages: system ? [{ role: "system", content: system }, ...history] : history,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) if (values[name].value !== "") body[name] = Number(values[name].value);
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message || "The server failed.");
      yield event;
    }
  }
}

// Fill `answer` while it arrives; `changed` is called after every piece.
async function receive(answer, signal, changed) {
  const times = { start: performance.now() };
  let [pieces, usage, reason] = [0, null, "stopped"];
  try {
    const body = JSON.stringify(requestBody());
    const response = await call("v1/chat/completions", { method: "POST", body, signal });
    for await (const event of events(response)) {
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (choice?.delta?.content) {
        times.last = performance.now();
        times.first ??= times.last;
        pieces += 1;
        answer.content += choice.delta.content;
        changed();
      }
      reason = choice?.finish_reason ?? reason;
    }
  } finally {
    if (times.first) answer.stats = describe(times, usage?.completion_tokens ?? pieces, usage, reason);
  }
  if (!answer.content) throw new Error("The model ended its answer at once, without any text.");
}

function describe(times, tokens, usage, reason) {
  const parts = [`${tokens.toLocaleString("en")} token${tokens === 1 ? "" : "s"}`];
  const seconds = (times.last - times.first) / 1000;
  if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  parts.push(`first after ${((times.first - times.start) / 1000).toFixed(2)} s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    const note = cached ? ` (${cached.toLocaleString("en")} cached)` : "";
    parts.push(`prompt of ${usage.prompt_tokens.toLocaleString("en")}${note}`);
  }
  if (reason === "length") parts.push("ended at the token limit");
  else if (reason === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

async function send() {
  const text = input.value.trim();
  if (!text || running) return;
  const chat = messages;
  const answer = { role: "assistant", content: "" };
  const controller = new AbortController();
  chat.push({ role: "user", content: text });
  showAll();
  const article = show(answer);
  article.classList.add("waiting");
  scroller.scrollTop = scroller.scrollHeight;
  input.value = "";
  fitInput();
  setRunning({ chat, answer, controller });
  let [timer, failure] = [0, ""];
  try {
    await receive(answer, controller.signal, () => {
      article.classList.remove("waiting");
      timer ||= setTimeout(() => {
        timer = 0;
        refresh(article, answer);
      }, REDRAW_MS);
    });
  } catch (error) {
    if (error.name !== "AbortError") failure = error.message;
  }
  clearTimeout(timer);
  setRunning(null);
  if (chat === messages) settle(chat, answer, failure);
  input.focus();
}

function settle(chat, answer, failure) {
  if (answer.content) chat.push(answer);
  else takeBack(chat);
  fitInput();
  showAll();
  if (failure) showError(failure);
  $("status").textContent = failure ? "" : "Answer finished";
  save();
}

async function listModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    const chosen = $("model").value;
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id, false, id === chosen)));
    $("model").disabled = data.length < 2;
    document.title = data.length === 1 ? `${data[0].id} - mlc_llm` : "Chat - mlc_llm";
  } catch (error) {
    showError(error.message);
  }
}

// --- Buttons and keys --------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
input.addEventListener("input", fitInput);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.controller.abort();
});
$("stop").addEventListener("click", () => running?.controller.abort());
$("new-chat").addEventListener("click", () => {
  running?.controller.abort();
  messages = [];
  showAll();
  save();
  input.focus();
});
$("open-settings").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("close", () => {
  save();
  log.querySelectorAll(".error").forEach((note) => note.remove());
  listModels();
});
addEventListener("pagehide", save);

restore();
showAll();
fitInput();
listModels();

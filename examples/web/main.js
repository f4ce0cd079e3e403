// A chat with the models of dist/bundle, which `mlc_llm package` makes; they run on this machine's
// GPU. web-llm keeps a model's files once they are loaded, service_worker.js those of the page.
import * as webllm from "./node_modules/@mlc-ai/web-llm/lib/index.js";

const LIST = new URL("dist/bundle/mlc-app-config.json", location.href);
const [models, problem, loading, bar, stage, conversation, form, text, send, stop] = [
  "models", "problem", "loading", "bar", "stage", "conversation", "form", "text", "send", "stop",
].map((id) => document.getElementById(id));

const GET_WEBGPU = [
  "Use a browser that has it: Chrome or Edge 113, Firefox 141, Safari 26, or newer.",
  "Bring it and the driver of the graphics card up to date.",
  "On Linux, open chrome://flags, enable “Unsafe WebGPU Support” and start Chrome again; " +
    "chrome://gpu tells what is missing.",
];

let engine = null;
let messages = [];

/** Tell that something does not work, and what to do. */
function showProblem(what, advice = []) {
  problem.replaceChildren(element("p", what), ...advice.map((line) => element("li", line)));
  problem.hidden = false;
  loading.hidden = true;
}

function element(tag, content, name = "") {
  const made = document.createElement(tag);
  made.textContent = content;
  made.className = name;
  return made;
}

/** Return the GPU, or null once the page says why there is none. */
async function findGPU() {
  if (!window.isSecureContext) {
    showProblem("Browsers offer GPUs to safe pages only.", ["Open this page at https:// or at http://localhost."]);
    return null;
  }
  if (!navigator.gpu) {
    showProblem("This browser has no WebGPU, which models need to run.", GET_WEBGPU);
    return null;
  }
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) showProblem("This browser has WebGPU, but found no graphics card for it.", GET_WEBGPU);
  return adapter;
}

/** Return the records of mlc-app-config.json, their addresses made absolute. */
async function readModels() {
  const response = await fetch(LIST);
  if (!response.ok) throw new Error(`${LIST.pathname} is not there: run mlc_llm package, see README.md`);
  const { model_list: records } = await response.json();
  const absolute = (address) => new URL(address, LIST).href;
  return records.map((record) => ({
    ...record,
    model: absolute(record.model),
    model_lib: absolute(record.model_lib),
  }));
}

/** Load a model; files that were loaded before are not fetched again. */
async function load(record, records, gpu) {
  const missing = (record.required_features ?? []).filter((name) => !gpu.features.has(name));
  if (missing.length > 0) {
    showProblem(`${record.model_id} needs ${missing.join(", ")}, which this GPU lacks.`, [
      "Package the model with a quantization that has f32 in its name, such as q4f32_1.",
    ]);
    return;
  }
  setBusy(true);
  problem.hidden = true;
  loading.hidden = false;
  [messages, stop.disabled] = [[], true];
  conversation.replaceChildren();
  try {
    await engine?.unload();
    engine = await webllm.CreateMLCEngine(record.model_id, {
      appConfig: { model_list: records },
      initProgressCallback: ({ progress, text: said }) => {
        bar.value = progress;
        stage.textContent = said;
      },
    });
    loading.hidden = true;
    setBusy(false);
    text.focus();
  } catch (error) {
    engine = null;
    showProblem(`${record.model_id} could not be loaded: ${error.message}`, [
      "Without a network, a model is there if it was loaded completely before.",
      "Load the page again to go on; what was fetched is kept.",
    ]);
    models.disabled = false;
  }
}

function setBusy(isBusy) {
  for (const control of [text, send, models]) control.disabled = isBusy;
}

/** Ask, and show the answer while it comes. */
async function ask(question) {
  messages.push({ role: "user", content: question });
  conversation.append(element("p", question, "user"));
  const shown = element("p", "", "assistant");
  conversation.append(shown);
  setBusy(true);
  stop.disabled = false;
  try {
    const pieces = await engine.chat.completions.create({ messages, stream: true });
    for await (const piece of pieces) {
      shown.textContent += piece.choices[0]?.delta?.content ?? "";
      conversation.scrollTop = conversation.scrollHeight;
    }
    messages.push({ role: "assistant", content: shown.textContent });
  } catch (error) {
    messages.pop();
    shown.append(element("em", ` ${error.message}`));
  }
  stop.disabled = true;
  setBusy(false);
  text.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = text.value.trim();
  if (!question || send.disabled) return;
  text.value = "";
  ask(question);
});
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => engine.interruptGenerate());

/** Let the service worker see what this page fetches; without one there is only no page offline. */
async function keepPage() {
  const worker = navigator.serviceWorker;
  if (!worker) return;
  const inControl = new Promise((done) => worker.addEventListener("controllerchange", done));
  try {
    await worker.register("service_worker.js");
    const late = new Promise((done) => setTimeout(done, 30_000));
    if (!worker.controller) await Promise.race([inControl, late]);
  } catch (error) {
    console.warn(error);
  }
}

async function start() {
  const gpu = await findGPU();
  if (!gpu) return;
  await keepPage();
  // Without this a browser that is short of room may throw models away.
  await navigator.storage?.persist?.();
  const records = await readModels();
  models.replaceChildren(...records.map((record) => new Option(record.model_id)));
  models.addEventListener("change", () => load(records[models.selectedIndex], records, gpu));
  await load(records[0], records, gpu);
}

start().catch((error) => showProblem(error.message));

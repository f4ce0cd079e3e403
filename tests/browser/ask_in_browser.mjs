// Loads a compiled model in headless Chromium with the npm package @mlc-ai/web-llm, unchanged, and
// prints what it answers.
//
//   node ask_in_browser.mjs MODULES CHROMIUM REQUEST
//
// MODULES: a node_modules directory with @mlc-ai/web-llm and playwright-core. REQUEST: JSON with
// `model`, a directory with weights, configuration and model.wasm, and `calls`, a list of
// {method: "completions" or "chat", body}. Prints a line of JSON: {answers: [...]} or {error}.
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, chromium, text] = process.argv.slice(2);
const request = JSON.parse(text);
const { chromium: browserType } = createRequire(join(modules, "x.js"))("playwright-core");

const types = { html: "text/html", js: "text/javascript", json: "application/json", wasm: "application/wasm" };
const server = createServer(async (req, res) => {
  const path = new URL(req.url, "http://localhost").pathname;
  const model = path.match(/^\/model\/(?:resolve\/main\/)?([\w.-]+)$/);
  try {
    let body;
    if (path === "/") body = "<!doctype html><title>test</title>";
    else if (path === "/web-llm.js") body = await readFile(join(modules, "@mlc-ai/web-llm/lib/index.js"));
    else if (model) body = await readFile(join(request.model, model[1]));
    else throw new Error("no such path");
    const type = types[path === "/" ? "html" : path.split(".").pop()] ?? "application/octet-stream";
    res.writeHead(200, { "content-type": type }).end(body);
  } catch {
    res.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const origin = `http://localhost:${server.address().port}`;

async function ask([origin, calls]) {
  const webllm = await import("/web-llm.js");
  const engine = await webllm.CreateMLCEngine("tested", {
    logLevel: "WARN",
    appConfig: {
      model_list: [
        { model: `${origin}/model`, model_id: "tested", model_lib: `${origin}/model/model.wasm` },
      ],
    },
  });
  const answers = [];
  for (const { method, body } of calls) {
    await engine.resetChat();
    const api = method === "chat" ? engine.chat.completions : engine.completions;
    const reply = await api.create(body);
    if (!body.stream) {
      const choice = reply.choices[0];
      answers.push({ text: choice.text ?? choice.message.content, reason: choice.finish_reason, usage: reply.usage });
      continue;
    }
    let said = "", reason = null, pieces = 0;
    for await (const piece of reply) {
      const choice = piece.choices[0];
      said += choice?.text ?? choice?.delta?.content ?? "";
      reason = choice?.finish_reason ?? reason;
      pieces += 1;
    }
    answers.push({ text: said, reason, pieces });
  }
  return answers;
}

const browser = await browserType.launch({
  executablePath: chromium,
  args: ["--no-sandbox", "--headless=new", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
});
let result;
try {
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  page.on("pageerror", (error) => console.error(String(error)));
  await page.goto(origin);
  result = { answers: await page.evaluate(ask, [origin, request.calls]) };
} catch (error) {
  result = { error: String(error) };
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(result));

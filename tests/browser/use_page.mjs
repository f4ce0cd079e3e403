// Uses the page of examples/web in headless Chromium as a person would, and prints what it shows.
//
//   node use_page.mjs MODULES CHROMIUM REQUEST
//
// MODULES: a node_modules directory with playwright-core. REQUEST: JSON with `site`, the directory of
// the page, and `question`. Prints a line of JSON, see the end, or {error}.
import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join, normalize } from "node:path";

const [modules, chromium, text] = process.argv.slice(2);
const { site, question } = JSON.parse(text);
const { chromium: browserType } = createRequire(join(modules, "x.js"))("playwright-core");

const types = { html: "text/html", js: "text/javascript", css: "text/css", json: "application/json", wasm: "application/wasm" };
const asked = [];
const server = createServer(async (req, res) => {
  const path = normalize(decodeURIComponent(new URL(req.url, "http://localhost").pathname));
  asked.push(path);
  try {
    const file = path.endsWith("/") ? `${path}index.html` : path;
    const body = await readFile(join(site, file));
    const type = types[file.split(".").pop()] ?? "application/octet-stream";
    res.writeHead(200, { "content-type": type }).end(body);
  } catch {
    res.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const origin = `http://localhost:${server.address().port}/`;

const wait = { timeout: 600_000, polling: 50 };
const isReady = () => !document.getElementById("send").disabled;
const hasProblem = () => !document.getElementById("problem").hidden;

/** Open the page and wait until it can be asked or says why not; return the stages it showed. */
async function open(page) {
  await page.addInitScript(() => {
    window.stages = [];
    addEventListener("DOMContentLoaded", () => {
      const stage = document.getElementById("stage");
      const note = () => window.stages.push([document.getElementById("bar").value, stage.textContent]);
      new MutationObserver(note).observe(stage, { childList: true });
    });
  });
  await page.goto(origin);
  return settled(page);
}

async function settled(page) {
  await page.waitForFunction(
    () => !document.getElementById("send").disabled || !document.getElementById("problem").hidden,
    null,
    wait,
  );
  if (await page.evaluate(hasProblem)) throw new Error(await page.textContent("#problem"));
  return page.evaluate(() => window.stages);
}

/** Ask, and stop once there is some text; return the text, then and at the end. */
async function askAndStop(page, question) {
  await page.fill("#text", question);
  await page.click("#send");
  await page.waitForFunction(
    () => [...document.querySelectorAll(".assistant")].at(-1)?.textContent.split(" ").length > 4,
    null,
    wait,
  );
  const early = await page.evaluate(() => [...document.querySelectorAll(".assistant")].at(-1).textContent);
  await page.click("#stop");
  await page.waitForFunction(isReady, null, wait);
  const answer = await page.evaluate(() => [...document.querySelectorAll(".assistant")].at(-1).textContent);
  return { early, answer, canStop: await page.isEnabled("#stop") };
}

/** Return what the page says in a browser whose WebGPU is changed by a script. */
async function problemWith(browser, script) {
  const context = await browser.newContext();
  const page = await context.newPage();
  await page.addInitScript(script);
  await page.goto(origin);
  await page.waitForFunction(hasProblem, null, wait);
  const said = await page.innerText("#problem");
  const isReadyNow = await page.evaluate(isReady);
  await context.close();
  return { said, isReady: isReadyNow };
}

const browser = await browserType.launch({
  executablePath: chromium,
  args: ["--no-sandbox", "--headless=new", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"],
});
let result;
try {
  const hide = (get) => `Object.defineProperty(Navigator.prototype, "gpu", { get: () => ${get} })`;
  const without = await problemWith(browser, hide("undefined"));
  const empty = await problemWith(browser, hide("({ requestAdapter: async () => null })"));

  const context = await browser.newContext();
  const page = await context.newPage();
  page.on("console", (message) => console.error(message.text()));
  page.on("pageerror", (error) => console.error(String(error)));
  const stages = await open(page);
  const online = await askAndStop(page, question);
  await page.evaluate(() => navigator.serviceWorker.ready.then(() => true));

  const before = asked.length;
  await context.setOffline(true);
  server.close();
  server.closeAllConnections();
  await page.reload();
  await settled(page);
  const offline = await askAndStop(page, question);
  result = { without, empty, stages, online, offline, askedOffline: asked.slice(before) };
} catch (error) {
  result = { error: String(error) };
} finally {
  await browser.close();
  server.close();
}
console.log(JSON.stringify(result));

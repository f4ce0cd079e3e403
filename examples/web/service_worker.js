// Keeps the files of the page, so that it opens without a network. Weights are web-llm's, which on
// localhost does not keep libraries: they are kept here.
const NAME = "page-1";
const FILES = [
  "./",
  "index.html",
  "style.css",
  "main.js",
  "node_modules/@mlc-ai/web-llm/lib/index.js",
  "dist/bundle/mlc-app-config.json",
];
const ADDRESSES = FILES.map((file) => new URL(file, location.href).href);
const LIBRARIES = new URL("dist/bundle/lib/", location.href).href;

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(ADDRESSES)));
});
self.addEventListener("activate", (event) => event.waitUntil(clients.claim()));

/** Return a file as the server has it now, or as it was when there was a server. */
async function newest(request) {
  const cache = await caches.open(NAME);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(request, response.clone());
    return response;
  } catch (error) {
    const kept = await cache.match(request);
    if (kept) return kept;
    throw error;
  }
}

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && (ADDRESSES.includes(url) || url.startsWith(LIBRARIES))) {
    event.respondWith(newest(event.request));
  }
});

// Runs a library for WebAssembly's CPU in node with the npm package @mlc-ai/web-runtime, and prints the
// likeliest tokens after a prompt.
//
//   node run_in_node.mjs MODULES CHROMIUM REQUEST
//
// MODULES: a node_modules directory. REQUEST: JSON with `model`, a directory with weights and
// model.wasm, `prompt`, token ids, and `num_tokens`. Prints a line of JSON: {tokens, isa} or {error}.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

const [modules, , text] = process.argv.slice(2);
const { model, prompt, num_tokens: numTokens } = JSON.parse(text);
const runtime = createRequire(join(modules, "x.js"))("@mlc-ai/web-runtime");

async function readParameters(tvm, specs) {
  const index = JSON.parse(await readFile(join(model, "tensor-cache.json"), "utf8"));
  const found = new Map();
  for (const shard of index.records) {
    const bytes = await readFile(join(model, shard.dataPath));
    for (const { name, shape, dtype, byteOffset, nbytes } of shard.records) {
      const raw = new Uint8Array(bytes.subarray(byteOffset, byteOffset + nbytes));
      found.set(name, tvm.empty(shape, dtype, tvm.cpu()).copyFromRawBytes(raw));
    }
  }
  return tvm.makeTVMArray(specs.map(({ name }) => found.get(name)));
}

async function generate() {
  const source = await readFile(join(model, "model.wasm"));
  const tvm = await runtime.instantiate(source, runtime.createPolyfillWASI());
  return run(tvm);
}

async function run(tvm) {
  tvm.beginScope();
  const machine = tvm.createVirtualMachine(tvm.cpu());
  const metadata = JSON.parse(machine.getFunction("_metadata")().toString());
  const ints = (values, shape = [values.length]) => tvm.empty(shape, "int32", tvm.cpu()).copyFrom(values);
  const weights = machine.getFunction("pack_params")(await readParameters(tvm, metadata.params));
  const forward = machine.getFunction("forward");

  const { num_layers: layers, num_key_value_heads: heads, head_dim: dim, page_size: size, dtype } = metadata.kv_cache;
  const numPages = Math.ceil((prompt.length + numTokens) / size);
  const pages = Array.from({ length: layers }, () => tvm.empty([numPages, 2, heads, size * dim], dtype, tvm.cpu()));
  const table = Array.from({ length: numPages }, (_, page) => page);

  const tokens = [];
  let [fed, start] = [prompt, 0];
  while (tokens.length < numTokens) {
    const positions = fed.map((_, i) => start + i);
    const length = start + fed.length;
    // Slots are positions: one sequence has all pages, in order.
    const result = forward(
      ints(fed), ints(positions), ints([0, fed.length]), ints(positions), ints(table, [1, numPages]),
      ints([length]), ints([fed.length - 1]), tvm.makeTVMArray(pages), weights,
    );
    const logits = result.get(0).toArray();
    tokens.push(logits.indexOf(Math.max(...logits)));
    [fed, start] = [[tokens.at(-1)], length];
  }
  tvm.endScope();
  return { tokens, isa: metadata.isa };
}

let result;
try {
  result = await generate();
} catch (error) {
  result = { error: String(error?.stack ?? error) };
}
console.log(JSON.stringify(result));
process.exit(0);

// OpenAI's JavaScript client against a server: `node openai_npm.mjs BASE_URL MODEL`.
// Prints one line of JSON for each check: {"check": name, "problem": null or text}.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: "Name three colours and say why." }];
const ask = (options) =>
  client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0, ...options });

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

function textOf(chunks, index = 0) {
  const choices = chunks.flatMap((chunk) => chunk.choices);
  return choices
    .filter((choice) => choice.index === index)
    .map((choice) => choice.delta.content ?? "")
    .join("");
}

const checks = {
  async chat() {
    const answer = await ask();
    assert.equal(answer.object, "chat.completion");
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 24);
    assert.ok(answer.choices[0].message.content.length > 20);
  },
  async "stream with include_usage"() {
    const whole = await ask();
    const chunks = await collect(
      await ask({ stream: true, stream_options: { include_usage: true } }),
    );
    assert.equal(textOf(chunks), whole.choices[0].message.content);
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.completion_tokens, 24);
    assert.equal(chunks.at(-2).choices[0].finish_reason, "length");
  },
  async "stream helper"() {
    const stream = client.chat.completions.stream({ model, messages, max_tokens: 12, temperature: 0 });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    const final = await stream.finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
  },
  async "n and seed"() {
    const options = { n: 3, seed: 5, temperature: 1 };
    const first = await ask(options);
    const second = await ask(options);
    assert.deepEqual(second.choices, first.choices);
    assert.equal(new Set(first.choices.map((choice) => choice.message.content)).size, 3);
    const chunks = await collect(await ask({ ...options, stream: true }));
    assert.equal(textOf(chunks, 2), first.choices[2].message.content);
  },
  async stop() {
    const text = (await ask()).choices[0].message.content;
    const stop = text.slice(20, 26);
    const choice = (await ask({ stop })).choices[0];
    assert.equal(choice.message.content, text.slice(0, text.indexOf(stop)));
    assert.equal(choice.finish_reason, "stop");
  },
  async logprobs() {
    const choice = (await ask({ logprobs: true, top_logprobs: 2 })).choices[0];
    const tokens = choice.logprobs.content.map((entry) => entry.token);
    assert.equal(tokens.join(""), choice.message.content);
    assert.ok(choice.logprobs.content.every((entry) => entry.top_logprobs.length === 2));
  },
  async logit_bias() {
    const biased = (await ask({ logit_bias: { 400: 100 }, max_tokens: 4 })).choices[0];
    assert.equal(new Set(biased.message.content.trim().split(/\s+/)).size, 1);
  },
  async completions() {
    const request = { model, prompt: "Once upon a time", max_tokens: 8, temperature: 0 };
    const whole = await client.completions.create({ ...request, logprobs: 1 });
    assert.equal(whole.choices[0].logprobs.tokens.length, 8);
    const chunks = await collect(await client.completions.create({ ...request, stream: true }));
    const text = chunks.map((chunk) => chunk.choices[0].text).join("");
    assert.equal(text, whole.choices[0].text);
  },
  async models() {
    const ids = [];
    for await (const card of client.models.list()) ids.push(card.id);
    assert.ok(ids.includes(model));
    assert.equal((await client.models.retrieve(model)).id, model);
  },
  async "leaving a stream"() {
    const stream = await ask({ stream: true, max_tokens: 500 });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      break;
    }
    assert.ok(stream.controller.signal.aborted);
  },
  async "classes of errors"() {
    await assert.rejects(ask({ top_p: 7 }), OpenAI.BadRequestError);
    await assert.rejects(ask({ model: "another" }), OpenAI.NotFoundError);
    const error = await ask({ n: -1 }).catch((reason) => reason);
    assert.equal(error.param, "n");
    assert.equal(error.type, "invalid_request_error");
  },
};

for (const [check, run] of Object.entries(checks)) {
  const problem = await run().then(
    () => null,
    (error) => String(error.message ?? error).slice(0, 500),
  );
  console.log(JSON.stringify({ check, problem }));
}

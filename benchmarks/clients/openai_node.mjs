// What a program with OpenAI's client for JavaScript does, unmodified: node openai_node.mjs URL MODEL KEY
import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "你是谁？" }];
const limit = { max_tokens: 32, temperature: 0 };

const checks = {
  async models() {
    const ids = (await client.models.list()).data.map((one) => one.id);
    assert.ok(ids.includes(model), ids.join());
  },
  async chat() {
    const { data, response } = await client.chat.completions.create({ model, messages, ...limit }).withResponse();
    assert.ok(data.choices[0].message.content);
    assert.equal(response.headers.get("x-namesake-version"), data.system_fingerprint);
    assert.match(data._request_id, /^req-/);
  },
  async stream() {
    let said = "";
    for await (const chunk of await client.chat.completions.create({ model, messages, ...limit, stream: true })) {
      said += chunk.choices[0]?.delta?.content ?? "";
    }
    assert.ok(said);
  },
  async streamHelper() {
    const runner = client.chat.completions.stream({ model, messages, ...limit, stream_options: { include_usage: true } });
    assert.ok((await runner.finalChatCompletion()).choices[0].message.content);
  },
  async aborted() {
    const stream = await client.chat.completions.create({ model, messages, ...limit, stream: true });
    for await (const _ of stream) break; // ends the connection
  },
  async completions() {
    assert.ok((await client.completions.create({ model, prompt: "我是", ...limit })).choices[0].text !== undefined);
  },
  async responses() {
    const reply = await client.responses.create({ model, input: "你是谁？", max_output_tokens: 32, temperature: 0 });
    assert.ok(reply.output_text);
  },
  async unknownModel() {
    const asked = client.chat.completions.create({ model: "nobody", messages });
    await assert.rejects(asked, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
  },
  async badRequest() {
    const asked = client.chat.completions.create({ model, messages, temperature: 9 });
    await assert.rejects(asked, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
  },
  async wrongKey() {
    const other = new OpenAI({ baseURL, apiKey: "sk-wrong", maxRetries: 0 });
    await assert.rejects(other.models.list(), OpenAI.AuthenticationError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  let why = "";
  try {
    await check();
  } catch (error) {
    why = String(error?.message ?? error).split("\n")[0];
  }
  console.log(JSON.stringify({ check: name, why }));
}

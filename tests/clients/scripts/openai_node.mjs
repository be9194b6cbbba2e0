// OpenAI's client for Node: `node openai_node.mjs RESULTS`, in a folder where it is installed.
// Writes a line of JSON for each check, as drive.py does.

import assert from "node:assert/strict";
import { appendFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const load = createRequire(join(process.cwd(), "package.json"));
const { default: OpenAI } = load("openai");

const model = process.env.MODEL;
const client = new OpenAI({
  baseURL: `${process.env.SERVER_URL}/v1`,
  apiKey: "none",
  maxRetries: 0,
  timeout: 60_000,
});
const messages = [{ role: "user", content: "Add numbers." }];
const parameters = {
  type: "object",
  properties: {
    city: { type: "string", maxLength: 12 },
    days: { type: "integer", minimum: 1, maximum: 14 },
  },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters } }];

function assertWeather(text) {
  const read = JSON.parse(text);
  assert.deepEqual(Object.keys(read).sort(), ["city", "days"]);
  assert.equal(typeof read.city, "string");
  assert.ok(1 <= read.days && read.days <= 14);
}

const checks = {
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert.ok(ids.includes(model));
  },

  async plain() {
    const answer = await client.chat.completions.create({ model, messages, max_tokens: 8 });
    assert.ok(answer.choices[0].message.content);
    assert.ok(answer.usage.completion_tokens <= 8);
  },

  async streaming_with_usage() {
    const asked = { model, messages, max_tokens: 24, temperature: 0 };
    const whole = await client.chat.completions.create(asked);
    const stream = await client.chat.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = "";
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
  },

  async tools() {
    const answer = await client.chat.completions.create({
      model,
      messages,
      tools,
      tool_choice: { type: "function", function: { name: "weather" } },
      max_tokens: 200,
      seed: 1,
    });
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "weather");
    assertWeather(call.function.arguments);
  },

  async streamed_tools() {
    const stream = client.chat.completions.stream({
      model,
      messages,
      tools,
      tool_choice: "required",
      parallel_tool_calls: false,
      max_tokens: 200,
      seed: 2,
    });
    const pieces = [];
    for await (const chunk of stream) {
      for (const call of chunk.choices[0]?.delta.tool_calls ?? []) {
        pieces.push(call.function?.arguments ?? "");
      }
    }
    assert.ok(pieces.length > 2, "the arguments did not come in pieces");
    assertWeather(pieces.join(""));
    const final = await stream.finalChatCompletion();
    assertWeather(final.choices[0].message.tool_calls[0].function.arguments);
  },

  async structured_output() {
    const answer = await client.chat.completions.parse({
      model,
      messages,
      max_tokens: 150,
      seed: 3,
      response_format: {
        type: "json_schema",
        json_schema: { name: "weather", schema: parameters, strict: true },
      },
    });
    assertWeather(answer.choices[0].message.content);
  },

  async a_response_in_the_background_is_joined_again() {
    const stream = await client.responses.create({
      model,
      input: "Add numbers.",
      background: true,
      stream: true,
      max_output_tokens: 64,
      ignore_eos: true,
    });
    const events = [];
    for await (const event of stream) {
      events.push(event);
      if (events.length === 6) break; // which closes the connection
    }
    const id = events[0].response.id;
    const rest = await client.responses.retrieve(id, {
      stream: true,
      starting_after: events.at(-1).sequence_number,
    });
    for await (const event of rest) events.push(event);
    events.forEach((event, index) =>
      assert.equal(event.sequence_number, events[0].sequence_number + index),
    );
    const told = events
      .filter((event) => event.type === "response.output_text.delta")
      .map((event) => event.delta)
      .join("");
    const kept = await client.responses.retrieve(id);
    assert.equal(told, kept.output_text);
    assert.equal(kept.usage.output_tokens, 64);
    await client.responses.delete(id);
  },

  async embeddings() {
    const input = ["import os", "a red rose"];
    const answer = await client.embeddings.create({ model, input });
    const [first, second] = answer.data.map((one) => one.embedding);
    assert.ok(first.length === second.length && first.length > 8);
    assert.notDeepEqual(first, second);
  },

  async errors() {
    await assert.rejects(
      client.chat.completions.create({ model: "other", messages }),
      (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
    );
    await assert.rejects(
      client.chat.completions.create({ model, messages, temperature: 5 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
    );
  },
};

const results = process.argv[2];
writeFileSync(results, "");
for (const [name, check] of Object.entries(checks)) {
  const beganAt = performance.now();
  let problem = "";
  try {
    await check();
  } catch (error) {
    console.error(error);
    problem = `${error.name}: ${error.message}`;
  }
  const seconds = (performance.now() - beganAt) / 1000;
  appendFileSync(results, `${JSON.stringify({ name, problem, seconds })}\n`);
}

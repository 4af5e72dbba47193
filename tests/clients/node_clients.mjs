// Run with the server's /v1 as the only argument: openai for Node and Vercel's AI SDK, unchanged.
import assert from 'node:assert/strict';
import process from 'node:process';

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, Output, stepCountIs, streamText, tool } from 'ai';
import OpenAI from 'openai';
import { z } from 'zod';

const base = process.argv[2];
const sum = 'What is 31 + 46?';
const weather = 'What is the weather in Oslo?';
const asMessages = (content) => [{ role: 'user', content }];
const description = 'The weather in a city';
const parameters = {
  type: 'object',
  properties: { city: { type: 'string' } },
  required: ['city'],
};
const openai = new OpenAI({ baseURL: base, apiKey: 'any', maxRetries: 0 });
const local = createOpenAICompatible({
  name: 'local',
  baseURL: base,
  apiKey: 'any',
  includeUsage: true,
  supportsStructuredOutputs: true,
})('demo');
const thinking = { local: { reasoningEffort: 'high' } };

async function check(name, work) {
  await work();
  console.log('PASS', name);
}

await check('openai: models', async () => {
  const ids = [];
  for await (const model of openai.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ['demo']);
});

await check('openai: a stream with thinking', async () => {
  const stream = await openai.chat.completions.create({
    model: 'demo',
    messages: asMessages(sum),
    reasoning_effort: 'high',
    stream: true,
  });
  let [thought, text] = ['', ''];
  for await (const chunk of stream) {
    thought += chunk.choices[0].delta.reasoning_content ?? '';
    text += chunk.choices[0].delta.content ?? '';
  }
  assert.ok(thought.length > 10);
  assert.match(text, /77/);
});

await check('openai: tools run and their results are told', async () => {
  const cities = [];
  const runner = openai.chat.completions.runTools({
    model: 'demo',
    messages: asMessages(weather),
    max_tokens: 80,
    temperature: 0,
    stream: true,
    tools: [
      {
        type: 'function',
        function: {
          name: 'get_weather',
          description,
          parameters,
          parse: JSON.parse,
          function: ({ city }) => {
            cities.push(city);
            return '12 degrees';
          },
        },
      },
    ],
  });
  assert.match(await runner.finalContent(), /12 degrees/);
  assert.deepEqual(cities, ['Oslo']);
});

await check('openai: responses', async () => {
  const stream = openai.responses.stream({
    model: 'demo',
    input: sum,
    reasoning: { effort: 'high' },
  });
  const response = await stream.finalResponse();
  assert.equal(response.status, 'completed');
  assert.match(response.output_text, /77/);
});

await check('ai: a text, whole and streamed, with thinking', async () => {
  const whole = await generateText({ model: local, prompt: sum, providerOptions: thinking });
  assert.match(whole.text, /77/);
  assert.ok(whole.reasoningText.length > 10);
  const streamed = streamText({ model: local, prompt: sum, providerOptions: thinking });
  let [thought, text] = ['', ''];
  for await (const part of streamed.fullStream) {
    if (part.type === 'reasoning-delta') thought += part.text;
    if (part.type === 'text-delta') text += part.text;
    assert.notEqual(part.type, 'error', String(part.error));
  }
  assert.equal(text, whole.text);
  assert.equal(thought, whole.reasoningText);
  const usage = await streamed.usage;
  assert.equal(usage.outputTokens, whole.usage.outputTokens);
});

await check('ai: tools run in steps', async () => {
  const made = await generateText({
    model: local,
    prompt: weather,
    maxOutputTokens: 80,
    temperature: 0,
    stopWhen: stepCountIs(2),
    tools: {
      get_weather: tool({
        description,
        inputSchema: z.object({ city: z.string() }),
        execute: async () => '12 degrees',
      }),
    },
  });
  assert.deepEqual(made.steps[0].toolCalls[0].input, { city: 'Oslo' });
  assert.match(made.text, /12 degrees/);
});

await check('ai: a streamed call', async () => {
  const streamed = streamText({
    model: local,
    prompt: weather,
    tools: {
      get_weather: tool({ description, inputSchema: z.object({ city: z.string() }) }),
    },
  });
  await streamed.consumeStream();
  const calls = await streamed.toolCalls;
  assert.deepEqual(calls.map((call) => call.input), [{ city: 'Oslo' }]);
});

await check('ai: an output of a form', async () => {
  const made = await generateText({
    model: local,
    prompt: sum,
    output: Output.object({ schema: z.object({ is_even: z.boolean() }) }),
  });
  assert.equal(typeof made.output.is_even, 'boolean');
});

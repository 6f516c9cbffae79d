// Programs as ai-sdk's documentation writes them, each against one provider: prints what came of all of them.
import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { embedMany, generateText, isStepCount, Output, streamText, tool } from 'ai';
import { z } from 'zod';

const { CLIENTS_URL: url, CLIENTS_KEY: apiKey, CLIENTS_MODEL: name, CLIENTS_EMBED_MODEL: embedder } = process.env;
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey });
const compatible = createOpenAICompatible({
  name: 'tidegate',
  baseURL: `${url}/v1`,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const models = {
  responses: openai(name),
  chat: openai.chat(name),
  compatible: compatible(name),
  anthropic: createAnthropic({ baseURL: `${url}/v1`, apiKey })(name),
};
const person = z.object({ name: z.string(), age: z.number().int(), city: z.string() });
const settings = { temperature: 0, maxOutputTokens: 128, maxRetries: 0 };
const count = { prompt: 'Count from 1 to 10.', ...settings };
const sentence = {
  prompt: 'Anna is 31 years old and lives in Rome.',
  // Of a model that it does not know it would ask for a call of a tool named json.
  providerOptions: { anthropic: { structuredOutputMode: 'outputFormat' } },
  ...settings,
};

function withTools(asked) {
  return {
    prompt: 'What is the weather in Paris?',
    stopWhen: isStepCount(3),
    tools: {
      get_weather: tool({
        description: 'Get the weather of a city.',
        inputSchema: z.object({ city: z.string() }),
        execute: async ({ city }) => {
          asked.push(city);
          return '18 degrees, sunny';
        },
      }),
      get_time: tool({
        description: 'Get the time of a place.',
        inputSchema: z.object({ place: z.string() }),
        execute: async () => '12:30',
      }),
    },
    ...settings,
  };
}

const programs = {
  async generateText(model) {
    const { text, finishReason, usage } = await generateText({ model, ...count });
    return { text, finishReason, outputTokens: usage.outputTokens };
  },
  async streamText(model) {
    const result = streamText({ model, ...count });
    const parts = [];
    for await (const part of result.textStream) parts.push(part);
    return { parts, finishReason: await result.finishReason, outputTokens: (await result.usage).outputTokens };
  },
  async tools(model) {
    const asked = [];
    const { text, steps } = await generateText({ model, ...withTools(asked) });
    return { asked, text, steps: steps.length };
  },
  async toolsStreamed(model) {
    const asked = [];
    const result = streamText({ model, ...withTools(asked) });
    const kinds = [];
    for await (const part of result.fullStream) kinds.push(part.type);
    return { asked, text: await result.text, kinds };
  },
  async object(model) {
    const { output } = await generateText({ model, output: Output.object({ schema: person }), ...sentence });
    return { output };
  },
  async objectStreamed(model) {
    const result = streamText({ model, output: Output.object({ schema: person }), ...sentence });
    let parts = 0;
    for await (const _ of result.partialOutputStream) parts += 1;
    return { parts, output: await result.output };
  },
};

async function outcome(run) {
  try {
    return await run();
  } catch (error) {
    return { error: `${error.name}: ${error.message} ${error.responseBody ?? ''}` };
  }
}

const found = {};
for (const [provider, model] of Object.entries(models)) {
  for (const [program, run] of Object.entries(programs)) {
    found[`${program}-${provider}`] = await outcome(() => run(model));
  }
}
found.embedMany = await outcome(async () => {
  const values = ['The sky is blue', 'The heavens are azure', 'Invoices are due in May'];
  const { embeddings, usage } = await embedMany({ model: openai.embedding(embedder), values, maxRetries: 0 });
  return { embeddings, tokens: usage.tokens };
});
console.log(JSON.stringify(found));

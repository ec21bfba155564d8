// Server-sent events out of a fetch() answer: EventSource can neither POST nor send a key.

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      // A CR at the end of a chunk may be half of a CRLF, so it waits for the next one.
      const found = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = found.pop();
      yield* found;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The JSON of each event; comments and event names are passed over, as "type" is in the JSON. */
export async function* events(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    } else if (line === "" && data.length) {
      const text = data.join("\n");
      data = [];
      if (text === "[DONE]") return;
      yield JSON.parse(text);
    }
  }
}

// What can go wrong between the page and the server, and what a person can do about it.

export class RequestError extends Error {
  /**
   * facts.kind: "refused" (an HTTP status), "unreachable", "lost" (in mid-stream) or "failed" (the
   * stream says so). The others, where they are known: status, param, code, wait_s.
   */
  constructor(message, facts) {
    super(message);
    Object.assign(this, { kind: "refused", wait_s: null }, facts);
  }
}

/** The error of a response, from OpenAI's format where it has that. */
export async function errorOf(response) {
  let body = {};
  try {
    const answer = await response.json();
    body = answer.error ?? {
      message: typeof answer.detail === "string" ? answer.detail : undefined,
    };
  } catch {
    // The body is a proxy's page, or empty: the status must do.
  }
  const message = body.message ?? `The answer was ${response.status} ${response.statusText}.`;
  const { param, code } = body;
  const { status } = response;
  return new RequestError(message, { status, param, code, wait_s: waitOf(response) });
}

function waitOf(response) {
  const ms = Number(response.headers.get("retry-after-ms"));
  if (ms > 0) return ms / 1000;
  const after = response.headers.get("retry-after");
  if (after === null) return null;
  const seconds = Number.isNaN(Number(after))
    ? (Date.parse(after) - Date.now()) / 1000
    : Number(after);
  return Number.isFinite(seconds) ? Math.max(seconds, 0) : null;
}

const BY_STATUS = {
  400: ["This cannot be made as it is", "Change it, then generate again."],
  401: ["This server asks for an API key", "Enter your key, and the picture is tried again."],
  403: ["This key may not do that", "Use another key, or ask whoever runs the server."],
  404: ["The server does not have this", "Choose another model, then generate again."],
  413: ["The input picture is too large", "Use a smaller one."],
  429: [
    "Too many pictures are waiting",
    "Your settings are kept. Try again once the wait is over.",
  ],
  503: ["The server is not ready", "It may be starting, or busy. Try again in a moment."],
  504: ["This took too long", "Try fewer steps, a smaller size or fewer pictures."],
};
BY_STATUS[422] = BY_STATUS[400];

const BY_KIND = {
  unreachable: ["The server cannot be reached", "Check your connection, then try again."],
  lost: ["The connection broke off", "Your settings are kept. Try again."],
  failed: ["The server could not finish", "Your settings are kept. Try again."],
};

const BY_CODE = {
  moderation_blocked: ["The server keeps this picture back", "Change the prompt or the seed."],
  content_policy_violation: [
    "The server keeps this picture back",
    "Change the prompt or the seed.",
  ],
  overloaded: BY_STATUS[429],
  deadline_exceeded: BY_STATUS[504],
};
const OTHER = [
  "Something broke on the server",
  "Try again. If it stays, tell whoever runs the server.",
];

/** Title, reason, advice, and whether the very same again can help. */
export function explain({ kind, status, code, made, message }) {
  const [title, usual] = BY_CODE[code] ?? BY_KIND[kind] ?? BY_STATUS[status] ?? OTHER;
  const advice = made ? "What was finished is in the gallery. Try again for the rest." : usual;
  const isTold = kind === "refused" || kind === "failed"; // by the server
  const reason = isTold && code !== "overloaded" ? message : null; // the title says the same
  return { title, reason, advice, again: ![400, 404, 413, 422].includes(status) };
}

// The same request as a curl command and as a Python program.

const shell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
const OPENAI = new Set(["model", "prompt", "n", "size"]); // the rest goes into extra_body
const SAVE = [
  "import base64, json, sys",
  'picture = json.load(sys.stdin)["data"][0]["b64_json"]',
  "sys.stdout.buffer.write(base64.b64decode(picture))",
].join("; ");
const base = () => new URL("v1", document.baseURI).href;

/** `withKey`: the server needs a key. The key itself is never part of the text. */
export function asCurl({ fields, input }, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $RAYJOBS_API_KEY"` : "";
  const save = ` \\\n  | python3 -c '${SAVE}' > picture.png`;
  if (!input) {
    const json = "-H 'Content-Type: application/json'";
    const body = `${json} \\\n  -d ${shell(JSON.stringify(fields, null, 2))}`;
    return `curl -sS ${base()}/images/generations${key} \\\n  ${body}${save}\n`;
  }
  const parts = [" -F image=@input.png"];
  if (input.mask.share() > 0) parts.push(" -F mask=@mask.png");
  for (const [name, value] of Object.entries(fields)) {
    const text = typeof value === "object" ? JSON.stringify(value) : value;
    parts.push(` --form-string ${shell(`${name}=${text}`)}`);
  }
  return `curl -sS ${base()}/images/edits${key} \\\n ${parts.join(" \\\n ")}${save}\n`;
}

/** JSON is Python where there is no true, false or null in it, and here there is none. */
export function asPython({ fields, input }, withKey) {
  const extra = Object.entries(fields).filter(([name]) => !OPENAI.has(name));
  const named = Object.entries(fields).filter(([name]) => OPENAI.has(name));
  const lines = named.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (input) lines.unshift(`    image=open("input.png", "rb"),`);
  if (input?.mask.share() > 0) lines.splice(1, 0, `    mask=open("mask.png", "rb"),`);
  // A form has no lists: there they travel as their JSON.
  const plain = (value) =>
    JSON.stringify(input && typeof value === "object" ? JSON.stringify(value) : value);
  if (extra.length) {
    const inside = extra.map(
      ([name, value]) => `        ${JSON.stringify(name)}: ${plain(value)},`,
    );
    lines.push("    extra_body={", ...inside, "    },");
  }
  const key = withKey ? `os.environ["RAYJOBS_API_KEY"]` : `"none"`;
  return [
    "import base64",
    withKey ? "import os\n" : "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(base())}, api_key=${key})`,
    `answer = client.images.${input ? "edit" : "generate"}(`,
    ...lines,
    ")",
    `with open("picture.png", "wb") as file:`,
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
    "",
  ].join("\n");
}

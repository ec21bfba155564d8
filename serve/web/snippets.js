// The same request as a curl command and as a Python program.
import { withImages } from "./api.js";

const shell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
const OPENAI = new Set(["model", "prompt", "n", "size"]); // the rest goes into extra_body
const SAVE = [
  "import base64, json, sys",
  'picture = json.load(sys.stdin)["data"][0]["b64_json"]',
  "sys.stdout.buffer.write(base64.b64decode(picture))",
].join("; ");
const READ = [
  "def read(path):",
  `    with open(path, "rb") as file:`,
  "        return base64.b64encode(file.read()).decode()",
  "",
  "",
];
const base = () => new URL("v1", document.baseURI).href;

/** A shot's fields, whose controls name the files of their pictures. */
function namingFiles({ fields, pictures }) {
  const files = new Map(pictures.map(({ name, file }) => [name, file]));
  return withImages(fields, (name) => files.get(name));
}

/** `withKey`: the server needs a key. The key itself is never part of the text. */
export function asCurl(shot, withKey) {
  const key = withKey ? ` \\\n  -H "Authorization: Bearer $RAYJOBS_API_KEY"` : "";
  const save = ` \\\n  | python3 -c '${SAVE}' > picture.png`;
  if (shot.input) return `curl -sS ${base()}/images/edits${key} \\\n ${form(shot)}${save}\n`;
  const json = JSON.stringify(namingFiles(shot), null, 2);
  const [data, rest] = shot.pictures.length
    ? ["@- <<END", `${fillingIn(json)}\nEND\n`]
    : [shell(json), ""];
  const body = `-H 'Content-Type: application/json' \\\n  -d ${data}`;
  return `curl -sS ${base()}/images/generations${key} \\\n  ${body}${save}\n${rest}`;
}

/**
 * JSON as a here document, into which the shell puts the files that "image" names: as an argument
 * they could be too long. Quotes inside of texts have a backslash, so only a field is found.
 */
function fillingIn(json) {
  const kept = json.replaceAll(/[\\$`]/g, "\\$&");
  return kept.replaceAll(/"image": "([^"]*)"/g, `"image": "$(base64 < $1 | tr -d '\\n')"`);
}

function form(shot) {
  const parts = filesOf(shot).map(([name, file]) => ` -F ${name}=@${file}`);
  for (const [name, value] of Object.entries(namingFiles(shot))) {
    const text = typeof value === "object" ? JSON.stringify(value) : value;
    parts.push(` --form-string ${shell(`${name}=${text}`)}`);
  }
  return parts.join(" \\\n ");
}

export function asPython(shot, withKey) {
  const key = withKey ? `os.environ["RAYJOBS_API_KEY"]` : `"none"`;
  const posts = shot.pictures.length && shot.input;
  const reads = shot.pictures.length && !shot.input;
  const call = posts ? posting(shot) : calling(shot);
  return [
    "import base64",
    withKey ? "import os\n" : "",
    "from openai import OpenAI",
    ...(posts ? ["from openai.types import ImagesResponse"] : []),
    "",
    ...(reads ? ["", ...READ] : []),
    `client = OpenAI(base_url=${JSON.stringify(base())}, api_key=${key})`,
    ...call,
    `with open("picture.png", "wb") as file:`,
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
    "",
  ].join("\n");
}

/** JSON is Python where there is no true, false or null in it, and here there is none. */
function calling(shot) {
  const { input } = shot;
  const fields = Object.entries(namingFiles(shot));
  const named = fields.filter(([name]) => OPENAI.has(name));
  const extra = fields.filter(([name]) => !OPENAI.has(name));
  const lines = named.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (input) lines.unshift(...filesOf(shot).map(([name, file]) => `    ${name}=${opened(file)},`));
  if (extra.length) lines.push("    extra_body={", ...extra.map(entry(input)), "    },");
  return [`answer = client.images.${input ? "edit" : "generate"}(`, ...lines, ")"];
}

/** The client's own method for edits takes no files but an image and a mask. */
function posting(shot) {
  const files = filesOf(shot).map(([name, file]) => `        ("${name}", ${opened(file)}),`);
  return [
    "answer = client.post(",
    `    "/images/edits",`,
    "    cast_to=ImagesResponse,",
    "    body={",
    ...Object.entries(namingFiles(shot)).map(entry(true)),
    "    },",
    "    files=[",
    ...files,
    "    ],",
    `    options={"headers": {"Content-Type": "multipart/form-data"}},`,
    ")",
  ];
}

/** Names of a form's fields, and their files. */
function filesOf({ input, pictures }) {
  const files = [["image", "input.png"]];
  if (input.mask.share() > 0) files.push(["mask", "mask.png"]);
  return [...files, ...pictures.map(({ file }) => ["control_image", file])];
}

const opened = (file) => `open("${file}", "rb")`;

/** A form has no lists: there they travel as their JSON. Elsewhere images are read from files. */
const entry = (isForm) => ([name, value]) => {
  const json = JSON.stringify(value);
  let text = json;
  if (isForm) text = typeof value === "object" ? JSON.stringify(json) : json;
  else if (name === "controls") text = json.replaceAll(/"image":("[^"]*")/g, `"image": read($1)`);
  return `        ${JSON.stringify(name)}: ${text},`;
};

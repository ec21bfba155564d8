// Describes the API from the server's own openapi.json, without a network beyond the server.
import { $, node } from "./dom.js";

let whole;

const known = (schema) =>
  schema?.$ref ? whole.components.schemas[schema.$ref.split("/").at(-1)] : (schema ?? {});

/** A type in words: integer from 1 to 10, one of png, jpeg. */
function typeOf(given) {
  const schema = known(given);
  const parts = (schema.anyOf ?? []).filter(({ type }) => type !== "null");
  if (parts.length) return parts.map(typeOf).join(" or ");
  if (schema.enum) return `one of ${schema.enum.join(", ")}`;
  if (schema.type === "array") return `list of ${typeOf(schema.items)}`;
  if (schema.type === "object" && schema.properties) {
    return `{${Object.keys(schema.properties).join(", ")}}`;
  }
  return [schema.format === "binary" ? "file" : (schema.type ?? "any"), bounds(schema)]
    .filter(Boolean)
    .join(" ");
}

function bounds({ minimum, exclusiveMinimum, maximum, exclusiveMaximum }) {
  const least = minimum ?? exclusiveMinimum;
  const most = maximum ?? exclusiveMaximum;
  const from = least === undefined ? "" : `${minimum === undefined ? "above" : "from"} ${least}`;
  const to = most === undefined ? "" : `${maximum === undefined ? "below" : "to"} ${most}`;
  return [from, to].filter(Boolean).join(" ");
}

function table(rows) {
  const cells = rows.map((row) => node("tr", {}, ...row.map((text) => node("td", {}, text))));
  return node("div", { class: "scroll" }, node("table", {}, node("tbody", {}, ...cells)));
}

function fields(given) {
  const { properties = {}, required = [] } = known(given);
  return table(
    Object.entries(properties).map(([name, schema]) => [
      node("code", {}, name),
      typeOf(schema) + (required.includes(name) ? ", needed" : ""),
      known(schema).description ?? "",
    ]),
  );
}

/** A call with what is needed and nothing else. */
function command(method, path, kind, given) {
  const place = decodeURI(new URL(`.${path}`, location.href).href);
  if (method === "get") return `curl ${place}`;
  const { required = [], properties = {} } = known(given);
  const files = required.filter((name) => properties[name].format === "binary");
  const texts = required.filter((name) => !files.includes(name));
  const values = Object.fromEntries(texts.map((name) => [name, "a photo of a red star"]));
  const body =
    kind === "application/json"
      ? `-H 'Content-Type: ${kind}' \\\n  -d '${JSON.stringify(values)}'`
      : [
          ...texts.map((name) => `-F '${name}=${values[name]}'`),
          ...files.map((name) => `-F ${name}=@${name}.png`),
        ].join(" ");
  return `curl ${place} \\\n  ${body}`;
}

function route(path, method, { description, parameters = [], requestBody, responses }) {
  const [kind, { schema } = {}] = Object.entries(requestBody?.content ?? {})[0] ?? [];
  const answer = responses[200]?.content?.["application/json"]?.schema;
  const errors = Object.entries(responses).filter(([code]) => code !== "200" && code !== "422");
  return node(
    "section",
    { id: `${method}${path.replaceAll("/", "-")}` },
    node("h2", {}, node("span", { class: "method" }, method.toUpperCase()), path),
    node("p", {}, description ?? known(schema).description ?? ""),
    node("pre", {}, command(method, path, kind, schema)),
    ...(parameters.length ? [node("h3", {}, "Parameters")] : []),
    ...parameters.map((one) => node("p", {}, node("code", {}, one.name), ` ${typeOf(one.schema)}`)),
    ...(schema ? [node("h3", {}, `Body, ${kind}`), fields(schema)] : []),
    ...(known(answer).properties ? [node("h3", {}, "Answer"), fields(answer)] : []),
    ...(errors.length
      ? [
          node("h3", {}, "Errors"),
          node("p", { class: "quiet" }, errors.map(([code, it]) => `${code} ${it.description}`).join(", ")),
        ]
      : []),
  );
}

async function open() {
  whole = await (await fetch("openapi.json")).json();
  const routes = Object.entries(whole.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, it]) => route(path, method, it)),
  );
  $("routes").replaceChildren(...routes);
}

open().catch((error) => {
  $("routes").replaceChildren(node("p", { role: "alert" }, `openapi.json: ${error.message}`));
});

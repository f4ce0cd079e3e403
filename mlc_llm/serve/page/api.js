// The page of the API: /openapi.json as routes and objects to unfold. Nothing is asked elsewhere.

const $ = (id) => document.getElementById(id);
const PREFIX = "#/components/schemas/";

function element(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

// --- What a value may be, in words; other objects are links ------------------------------------

function typeOf(schema) {
  if (schema === undefined || schema === true) return ["any"];
  if (schema.$ref) return [link(schema.$ref)];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" | ")];
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.flatMap((choice, at) => [...(at ? [" | "] : []), ...typeOf(choice)]);
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items)];
  if (schema.type === "object" && schema.additionalProperties instanceof Object)
    return ["object of ", ...typeOf(schema.additionalProperties)];
  return [[schema.type ?? "any", limitsOf(schema)].filter(Boolean).join(" ")];
}

function limitsOf(schema) {
  const words = {
    minimum: "from", exclusiveMinimum: "above", maximum: "to", exclusiveMaximum: "below",
    minLength: "of at least", maxLength: "of at most", pattern: "like",
  };
  const given = Object.entries(words).filter(([name]) => schema[name] !== undefined);
  return given.map(([name, word]) => `${word} ${schema[name]}`).join(" ");
}

function link(reference) {
  const name = reference.slice(PREFIX.length);
  const made = element("a", "", shortName(name));
  made.href = `#${name}`;
  return made;
}

// Types of one name in two modules have the modules in their names.
function shortName(name) {
  return name.split("__").at(-1);
}

// --- Routes and objects ------------------------------------------------------------------------

function folded(id, summary, ...content) {
  const made = element("details", "", element("summary", "", ...summary), ...content);
  made.id = id;
  return made;
}

function text(words) {
  return words ? [element("p", "text", words)] : [];
}

function table(rows) {
  const made = element("table", "");
  for (const cells of rows) made.append(element("tr", "", ...cells.map((cell) => element("td", "", ...cell))));
  return made;
}

function typed(schema) {
  return [element("span", "type", ...typeOf(schema))];
}

function fields(schema) {
  const isRequired = new Set(schema.required);
  return table(Object.entries(schema.properties ?? {}).map(([name, field]) => [
    [element("code", "", name), ...(isRequired.has(name) ? [" (required)"] : [])],
    typed(field),
    [field.description ?? ""],
  ]));
}

function bodies(content) {
  return Object.entries(content ?? {}).map(([kind, { schema }]) =>
    element("p", "text", `${kind}: `, ...typed(schema), schema.description ? `. ${schema.description}` : ""));
}

function operation(path, method, described) {
  const parts = text(described.description);
  const parameters = (described.parameters ?? []).map((found) => [
    [element("code", "", found.name)], typed(found.schema), [`in the ${found.in}`],
  ]);
  if (parameters.length) parts.push(element("h3", "", "Parameters"), table(parameters));
  if (described.requestBody)
    parts.push(element("h3", "", "Body"), ...bodies(described.requestBody.content));
  parts.push(element("h3", "", "Answers"));
  for (const [status, answer] of Object.entries(described.responses ?? {}))
    parts.push(element("p", "text", `${status} `, answer.description ?? ""), ...bodies(answer.content));
  const name = method.toUpperCase();
  const summary = [element("span", "method", name), element("code", "", path)];
  return folded(`${name} ${path}`, [...summary, " ", element("span", "faint", described.summary ?? "")], ...parts);
}

// Where an address names an object, it is shown, whatever the page looked like before.
function unfold() {
  const found = $(decodeURIComponent(location.hash.slice(1)));
  if (found instanceof HTMLDetailsElement) {
    found.open = true;
    found.scrollIntoView();
  }
}

async function show() {
  const response = await fetch("openapi.json");
  const api = await response.json();
  if (!response.ok) throw new Error(api.error?.message ?? response.statusText);
  $("title").textContent = `${api.info.title} ${api.info.version}`;
  for (const [path, methods] of Object.entries(api.paths))
    for (const [method, described] of Object.entries(methods))
      $("operations").append(operation(path, method, described));
  for (const [name, schema] of Object.entries(api.components?.schemas ?? {}))
    $("schemas").append(folded(name, [element("code", "", shortName(name))],
      ...text(schema.description), schema.properties ? fields(schema) : element("p", "", ...typed(schema))));
  $("schemas").hidden = false;
  $("status").hidden = true;
  unfold();
}

$("base").textContent = new URL("v1", location.href).href;
addEventListener("hashchange", unfold);
show().catch((error) => { $("status").textContent = `The description cannot be read: ${error.message}`; });

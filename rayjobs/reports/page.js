"use strict";
// Shows one page of contact sheets at a time. Scripts in report/ hand over their data by
// report.take(name, value): a page opened from disk may load scripts, but not fetch().
const report = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const loading = new Map(), settle = new Map();
  const KEPT = 60; // loaded scripts
  const NOT_AXES = new Set(["record", "image_id", "width", "height", "status", "error",
    "warnings", "blank", "sharpness", "clip_score", "aesthetic_score", "unsafe_score"]);
  let page = 0, pictures = [], open = -1, found = null, foundPage = 0;

  function take(name, value) {
    const done = settle.get(name);
    if (done) done(value);
  }

  function load(name) {
    if (loading.has(name)) return loading.get(name);
    const promise = new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const clean = () => { settle.delete(name); script.remove(); };
      settle.set(name, (value) => { clean(); resolve(value); });
      script.onerror = () => {
        clean(); loading.delete(name); reject(new Error(`report/${name}.js cannot be loaded`));
      };
      script.src = `report/${name}.js`;
      document.head.append(script);
    });
    loading.set(name, promise);
    if (loading.size > KEPT) loading.delete(loading.keys().next().value);
    return promise;
  }

  // Text is only ever set as text, never parsed as HTML.
  function node(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  const short = (text, most = 200) => (text.length > most ? text.slice(0, most) + "…" : text);
  const named = (name) => name.replaceAll("_", " ");
  const isFlagged = ({ of }) => of.status !== "ok" || of.blank || of.warnings;

  function value(row, axis) {
    if (axis === "size" && row.of.width) return `${row.of.width}×${row.of.height}`;
    return row.of[axis] === undefined ? "" : String(row.of[axis]);
  }

  function axesOf(rows) {
    const names = new Set(["size"]);
    for (const row of rows) for (const name in row.of) if (!NOT_AXES.has(name)) names.add(name);
    return [...names].map((name) => [name, new Set(rows.map((row) => value(row, name))).size])
      .filter(([, count]) => count > 1)
      .sort((a, b) => (b[0] === "seed") - (a[0] === "seed") || b[1] - a[1]).map(([name]) => name);
  }

  const combined = (row, axes) => axes.map((axis) => `${named(axis)} ${short(value(row, axis), 60) || "–"}`)
    .join(", ");
  const inOrder = (a, b) => a.localeCompare(b, undefined, { numeric: true });

  // Which axis goes across: what the reader chose, or the first that leaves few cells empty.
  function arrange(rows, varying) {
    const down = $("rows").value, across = $("columns").value;
    const rest = (taken) => varying.filter((axis) => axis !== taken);
    if (across || down) {
      const columns = varying.includes(across) ? across : null;
      const chosen = down ? varying.filter((axis) => axis === down && axis !== across) : rest(columns);
      return columns || chosen.length ? [chosen, columns] : null;
    }
    if (varying.length < 2) return null;
    for (const axis of varying) {
      const columns = new Set(rows.map((row) => value(row, axis))).size;
      const lines = new Set(rows.map((row) => combined(row, rest(axis)))).size;
      if (columns <= 24 && columns * lines <= 1.5 * rows.length) return [rest(axis), axis];
    }
    return null;
  }

  function everything(row) {
    return Object.entries(row.of).map(([name, one]) => [named(name), String(one)]);
  }

  function tile(row, caption) {
    const at = pictures.push(row) - 1;
    const title = everything(row).map(([name, one]) => `${name}: ${short(one, 120)}`).join("\n");
    const made = node("button", { class: "tile", type: "button", title, id: `record-${row.of.record}`,
      onclick: () => show(at) });
    if (row.thumb) {
      made.append(node("img", { src: row.thumb, loading: "lazy", decoding: "async", width: row.of.width,
        height: row.of.height, alt: `${short(row.prompt)}, seed ${row.of.seed}` }));
    } else {
      made.append(node("span", { class: "error" }, short(row.of.error || "failed", 160)));
    }
    if (row.of.blank) made.append(node("span", { class: "flag" }, "blank"));
    if (row.of.warnings) made.append(node("span", { class: "flag" }, short(row.of.warnings, 60)));
    if (caption) made.append(caption);
    return made;
  }

  function grid(rows, down, across) {
    const columns = across ? [...new Set(rows.map((row) => value(row, across)))].sort(inOrder) : [""];
    const lines = new Map();
    for (const row of rows) {
      const key = combined(row, down);
      if (!lines.has(key)) lines.set(key, new Map());
      const cells = lines.get(key), column = across ? value(row, across) : "";
      cells.set(column, [...(cells.get(column) || []), row]);
    }
    const head = node("tr", {}, node("th"), ...columns.map((text) =>
      node("th", { scope: "col" }, across ? `${named(across)} ${short(text, 60) || "–"}` : "")));
    const body = [...lines.keys()].sort(inOrder).map((key) => node("tr", {}, node("th", { scope: "row" }, key),
      ...columns.map((column) => node("td", {},
        ...(lines.get(key).get(column) || []).map((row) => tile(row))))));
    return node("div", { class: "scroll" },
      node("table", { class: "grid" }, node("thead", {}, head), node("tbody", {}, ...body)));
  }

  function heading(prompt) {
    const made = node("h3", { title: "show all of it, or less" }, prompt || "(no prompt)");
    made.addEventListener("click", () => made.classList.toggle("open"));
    return made;
  }

  function sheet(rows) {
    const varying = axesOf(rows), arranged = arrange(rows, varying);
    const inside = arranged ? grid(rows, ...arranged)
      : node("div", { class: "flow" }, ...rows.map((row) => tile(row, combined(row, varying))));
    return node("section", { class: "sheet" }, heading(rows[0].prompt), inside);
  }

  // Neighbouring prompts with one picture each share a wall; the others have a sheet of their own.
  function sheets(groups) {
    const made = [];
    let wall = null;
    for (const rows of groups) {
      if (rows.length > 1) { made.push(sheet(rows)); wall = null; continue; }
      if (!wall) {
        wall = node("div", { class: "flow" });
        made.push(node("section", { class: "sheet" }, wall));
      }
      wall.append(tile(rows[0], node("span", { class: "clamp" }, short(rows[0].prompt))));
    }
    return made;
  }

  function grouped(files) {
    const groups = [];
    for (const file of files) {
      file.rows.forEach((row, index) => {
        const whole = { ...row, prompt: file.prompts[row.p], file, index };
        const last = groups.at(-1);
        if (last && last[0].prompt === whole.prompt) last.push(whole); else groups.push([whole]);
      });
    }
    return groups;
  }

  function wanted(groups) {
    const words = $("find").value.trim().toLowerCase();
    const only = $("only").value;
    const kept = words ? groups.filter(([row]) => row.prompt.toLowerCase().includes(words)) : groups;
    // A prompt sought on another page hides nothing of this one.
    const here = kept.length ? kept : groups;
    return only ? here.map((rows) => rows.filter(isFlagged)).filter((rows) => rows.length) : here;
  }

  async function draw() {
    const mine = page;
    let files;
    try {
      files = await Promise.all(data.pages[page].map(load));
    } catch (error) {
      $("note").textContent = error.message;
      return;
    }
    if (mine !== page) return;
    pictures = [];
    const groups = grouped(files), shown = wanted(groups);
    fill(groups);
    $("sheets").replaceChildren(...sheets(shown));
    const hidden = groups.flat().length - shown.flat().length;
    $("note").textContent = `Page ${page + 1} of ${data.pages.length}: ${pictures.length} pictures of `
      + [...new Set([files[0].file, files.at(-1).file])].join(" to ") + (hidden ? `; ${hidden} are hidden by the choice above` : "");
    const record = new URLSearchParams(location.hash.slice(1)).get("record");
    const target = record && $(`record-${record}`);
    if (target) { target.scrollIntoView({ block: "center" }); target.focus(); }
    document.body.dataset.page = page + 1;
    if (page + 1 < data.pages.length) data.pages[page + 1].forEach((name) => load(name).catch(() => {}));
  }

  // Only what varies within a prompt somewhere on this page can be an axis.
  function fill(groups) {
    const names = [...new Set(groups.flatMap((rows) => (rows.length > 1 ? axesOf(rows) : [])))];
    for (const id of ["rows", "columns"]) {
      const chosen = $(id).value;
      const options = ["", ...new Set(chosen ? [chosen, ...names] : names)];
      $(id).replaceChildren(...options.map((name) => node("option", { value: name }, name ? named(name) : "auto")));
      $(id).value = chosen;
      $(id).parentElement.hidden = options.length < 3;
    }
  }

  function pagers() {
    const last = data.pages.length - 1;
    for (const nav of document.querySelectorAll(".pager")) {
      const button = (text, label, to) => {
        const made = node("button", { type: "button", "aria-label": label, title: label, onclick: () => go(to) }, text);
        made.disabled = to < 0 || to > last || to === page;
        return made;
      };
      const jump = node("input", { type: "number", min: 1, max: last + 1, value: page + 1, "aria-label": "Page",
        onchange: (event) => go(Number(event.target.value) - 1) });
      nav.replaceChildren(button("«", "First page", 0), button("‹", "Previous page (left arrow)", page - 1), jump,
        node("span", { class: "quiet" }, `of ${last + 1}`), button("›", "Next page (right arrow)", page + 1),
        button("»", "Last page", last));
    }
  }

  function go(to) {
    location.hash = `page=${Math.min(Math.max(Math.trunc(to) || 0, 0), data.pages.length - 1) + 1}`;
  }

  function follow(event) {
    const hash = new URLSearchParams(location.hash.slice(1));
    page = Math.min(Math.max(Math.trunc(Number(hash.get("page") || 1)) - 1 || 0, 0), data.pages.length - 1);
    pagers();
    if (event) $("sheets-section").scrollIntoView();
    return draw();
  }

  async function show(at) {
    const row = pictures[at];
    if (!row) return;
    open = at;
    const isFile = data.suffix === "" && row.thumb;
    const place = row.file.file + (isFile ? `/${String(row.of.record).padStart(12, "0")}.${row.file.extension}` : "");
    const image = row.thumb ? node("img", { src: row.thumb, width: row.of.width, height: row.of.height,
      alt: short(row.prompt) }) : node("p", { class: "bad" }, row.of.error || "failed");
    const terms = everything(row).flatMap(([name, one]) => [node("dt", {}, name), node("dd", {}, one)]);
    const followed = (row.controls || []).map((src) => node("img", { src, class: "control", alt: "control picture",
      title: "The picture that this one follows" }));
    $("large").querySelector(".picture").replaceChildren(image, ...followed);
    $("large").querySelector(".facts").replaceChildren(node("p", {}, row.prompt), node("dl", {}, ...terms),
      node("p", { class: "quiet" },
        isFile ? "The whole picture: " : `Record ${row.of.record} is in `, node("a", { href: place }, place)));
    if (!$("large").open) $("large").showModal();
    if (isFile) { image.src = place; return; }
    if (!row.file.large || !row.thumb) return;
    const large = (await load(row.file.large))[row.index];
    if (large && open === at) image.src = large;
  }

  async function find() {
    const words = $("find").value.trim().toLowerCase();
    $("matches").hidden = !words;
    draw();
    if (!words) return;
    const matches = [];
    for (const name of data.prompts) {
      let part;
      try { part = await load(name); } catch (error) { $("note").textContent = error.message; return; }
      for (const [text, at] of part) if (text.toLowerCase().includes(words)) matches.push([text, at]);
      if (words !== $("find").value.trim().toLowerCase()) return;
    }
    found = matches; foundPage = 0;
    listMatches();
  }

  function listMatches() {
    const each = 50, from = foundPage * each, last = Math.ceil(found.length / each) - 1;
    const turn = (text, by) => {
      const made = node("button", { type: "button", onclick: () => { foundPage += by; listMatches(); } }, text);
      made.disabled = foundPage + by < 0 || foundPage + by > last;
      return made;
    };
    $("matches").replaceChildren(
      node("span", { class: "quiet" }, `${found.length.toLocaleString()} of ${data.numPrompts.toLocaleString()} prompts `),
      ...(last > 0 ? [turn("‹", -1), ` ${foundPage + 1} of ${last + 1} `, turn("›", 1)] : []),
      node("ol", {}, ...found.slice(from, from + each).map(([text, at]) =>
        node("li", {}, node("a", { href: `#page=${at + 1}` }, short(text, 160) || "(no prompt)"), ` · page ${at + 1}`))));
  }

  function keys(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey) return;
    if ($("large").open) { show(open + by); event.preventDefault(); return; }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (data.pages[page + by]) go(page + by);
  }

  async function alike(name) {
    if (!data[name]) return;
    for (const group of await load(data[name])) {
      $(name).append(node("div", { class: "group" },
        node("p", { class: "quiet" }, `${group.size.toLocaleString()} alike`),
        node("div", { class: "flow" }, ...group.rows.map((row) => node("figure", { class: "tile" },
          node("img", { src: row.thumb, alt: short(row.prompt), title: row.prompt, loading: "lazy" }),
          `record ${row.record}, seed ${row.seed}`)))));
    }
  }

  function start() {
    alike("duplicates");
    alike("semantic");
    if (!data.pages.length) return;
    $("tools").hidden = false;
    let timer;
    $("find").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(find, 150); });
    for (const id of ["only", "rows", "columns"]) $(id).addEventListener("change", draw);
    addEventListener("hashchange", follow);
    addEventListener("keydown", keys);
    $("large").addEventListener("click", (event) => { if (event.target === $("large")) $("large").close(); });
    follow();
  }

  return { take, start };
})();
report.start();

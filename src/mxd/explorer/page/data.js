"use strict";
// Where the pages' data come from: a server behind them, or files beside them that are loaded as scripts, because a page
// opened from disk may read nothing else.
window.explorer = { pages: {} };
explorer.data = (() => {
  const live = document.documentElement.dataset.mode === "live";
  const kept = new Map();
  const awaited = new Map();

  const once = (name, make) => {
    if (!kept.has(name)) {
      const made = make();
      made.catch(() => kept.delete(name));
      kept.set(name, made);
    }
    return kept.get(name);
  };

  async function answer(response) {
    const value = await response.json().catch(() => ({}));
    if (!response.ok) throw new Error(value.error || sentence(response.status));
    return value;
  }
  const sentence = (status) => status === 422 ? "The server could not use what was sent." : `The server answered with status ${status}.`;
  const unreachable = () => { throw new Error("The server does not answer; is mxd explore still running?"); };
  const get = (path, parameters) =>
    fetch(parameters ? `${path}?${new URLSearchParams(parameters)}` : path).catch(unreachable).then(answer);
  const send = (method, path, body, signal) =>
    fetch(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

  window.explorerData = (name, value) => awaited.get(name)?.(value);
  const file = (name) => once(name, () => new Promise((resolve, reject) => {
    awaited.set(name, resolve);
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onerror = () => reject(new Error(`The file data/${name}.js must stand beside this page; it does not.`));
    document.head.append(script);
  }));
  const place = async (student) => {
    const number = (await run()).students.findIndex((entry) => entry.name === student);
    if (number < 0) throw new Error(`There is no student ${student}.`);
    return number;
  };

  const run = () => live ? once("run", () => get("api/run")) : file("run");
  const map = (student) => live ? once(`map ${student}`, () => get("api/map", { student }))
    : place(student).then((number) => file(`map-${number}`));
  const labels = (student) => once(`labels ${student}`, async () => {
    const sent = live ? await get("api/labels", { student }) : await file(`labels-${await place(student)}`);
    const concepts = {};
    for (const [latent, name, score] of sent.concepts.latents) concepts[latent] = { concept: sent.concepts.names[name], score };
    return { labels: sent.labels, concepts };
  });

  async function latent(student, number) {
    if (live) return once(`latent ${student} ${number}`, () => get("api/latent", { student, latent: number }));
    const { shard } = await run();
    const found = (await file(`latents-${await place(student)}-${Math.floor(number / shard)}`))[number % shard];
    if (!found) throw new Error(`${student} has no latent ${number}.`);
    return found;
  }

  async function search(student, query) {
    if (live) return get("api/search", { student, query });
    const wanted = query.trim().toLowerCase(), raw = query.toLowerCase();
    if (!wanted) return [];
    const [{ labels: written, concepts }, rows] = await Promise.all([labels(student), file(`search-${await place(student)}`)]);
    const found = new Map();
    const add = (latent, why, what) => found.has(latent) || found.set(latent, { latent, why, what });
    if (/^\d+$/.test(wanted) && rows[Number(wanted)]) add(Number(wanted), "number", wanted);
    for (const [latent, { label, note }] of Object.entries(written))
      if (`${label}\n${note}`.toLowerCase().includes(wanted)) add(Number(latent), label.toLowerCase().includes(wanted) ? "label" : "note", label || note);
    for (const [latent, { concept }] of Object.entries(concepts))
      if (concept.toLowerCase().includes(wanted)) add(Number(latent), "concept", concept);
    const tokens = [];
    rows.forEach(([fires, promotes], latent) => {
      for (const [why, texts] of [["fires on", fires], ["promotes", promotes]])
        for (const text of texts) if (text.toLowerCase().includes(raw)) tokens.push({ latent, why, what: text });
    });
    tokens.sort((a, b) => a.what.length - b.what.length).forEach(({ latent, why, what }) => add(latent, why, what));
    rows.forEach(([, , text], latent) => text.toLowerCase().includes(raw) && add(latent, "context", text.slice(-40)));
    return [...found.values()].slice(0, 60);
  }

  // What was typed and not saved yet outlives a look at other pages.
  const drafts = new Map();
  addEventListener("beforeunload", (event) => { if (drafts.size) event.preventDefault(); });
  async function saveLabel(student, number, label, note) {
    const { labels: written } = await labels(student);
    const before = written[number] || { label: "", note: "" };
    const saved = await send("PUT", "api/label", { student, latent: number, label, note, before }).catch(unreachable).then(answer);
    if (saved.label || saved.note) written[number] = { label: saved.label, note: saved.note };
    else delete written[number];
  }
  const text = (student, words) => send("POST", "api/text", { student, text: words }).catch(unreachable).then(answer);

  async function steer(request, take, signal) {
    const response = await send("POST", "api/steer", request, signal);
    if (!response.ok) await answer(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) take(JSON.parse(line));
    }
  }
  return { live, run, map, labels, latent, search, drafts, saveLabel, text, steer };
})();

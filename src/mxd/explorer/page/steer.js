"use strict";
// The steering bench: a slider for each latent, two continuations side by side.
explorer.pages.steer = async ({ student, rest, run }) => {
  const { h, number, visible, latentLink, route, announce } = explorer.elements;
  const { data } = explorer;
  if (!data.live) return { element: h("p", {}, "This needs the model: run mxd explore on the run."), title: "Steer" };
  const MOST = 4;
  const labels = await data.labels(student.name);
  const kept = explorer.bench ||= { prompt: "", of: "", latents: new Map() };
  if (kept.of !== student.name) { kept.of = student.name; kept.latents = new Map(); }
  const state = h("span", { class: "note", role: "status" });
  const rows = h("ul", { class: "sliders" });

  async function add(latent) {
    if (kept.latents.has(latent)) return;
    const found = await data.latent(student.name, latent);
    kept.latents.set(latent, { p99: found.p99 || 1, how: "add", times: 1 });
  }
  function drawRows() {
    rows.replaceChildren(...[...kept.latents].map(([latent, setting]) => {
      const shown = h("output", {});
      const slider = h("input", { type: "range", min: -MOST, max: MOST, step: 0.25, value: setting.times, "aria-label": `Strength of latent ${latent}`, oninput: () => { setting.times = Number(slider.value); tell(); } });
      const how = h("select", { "aria-label": `What happens to latent ${latent}`, onchange: () => { setting.how = how.value; tell(); } },
        [["add", "add"], ["set", "set to"], ["ablate", "take away"]].map(([value, name]) => h("option", { value, selected: value === setting.how }, name)));
      const tell = () => {
        slider.disabled = setting.how === "ablate";
        shown.textContent = setting.how === "ablate" ? "0" : `${setting.times > 0 && setting.how === "add" ? "+" : ""}${number(setting.times * setting.p99)} = ${number(setting.times)} × p99`;
      };
      tell();
      return h("li", {}, latentLink(student.name, latent, labels), how, slider, shown, h("button", { type: "button", class: "quiet", "aria-label": `Remove latent ${latent}`, onclick: () => { kept.latents.delete(latent); drawRows(); } }, "✕"));
    }));
    if (!kept.latents.size) rows.append(h("li", { class: "note" }, "No latent yet: without one the steered text is that of the model with its MLP replaced."));
  }

  const numberField = h("input", { type: "number", min: 0, max: student.num_latents - 1, step: 1, id: "add", placeholder: `0 … ${student.num_latents - 1}` });
  const addForm = h("form", { class: "row", onsubmit: async (event) => {
    event.preventDefault();
    if (numberField.value === "") return;
    try { await add(Number(numberField.value)); numberField.value = ""; state.textContent = ""; drawRows(); } catch (error) { state.textContent = error.message; }
  } }, h("label", { class: "field" }, h("span", {}, "Latent"), numberField), h("button", { class: "quiet" }, "Add"), h("a", { class: "note", href: route("map", student.name) }, "find one on the map"));
  const prompt = h("textarea", { id: "prompt", rows: 3, spellcheck: "false", "aria-label": "Prompt", placeholder: "What shall the model write on?" }, kept.prompt);
  const option = (name, field) => h("label", { class: "field" }, h("span", {}, name), field);
  const beside = h("select", { id: "beside" }, h("option", { value: "original" }, "original model"), h("option", { value: "replaced" }, "replaced, not steered"));
  const fields = { new_tokens: h("input", { type: "number", min: 1, max: 256, value: 48 }), temperature: h("input", { type: "number", min: 0, max: 5, step: 0.1, value: 0 }), seed: h("input", { type: "number", min: 0, max: 4294967295, value: 0 }) };

  const side = (name) => { const text = h("pre", { class: "written", "aria-live": "off" }); return { text, heading: h("h2", {}, name), prompt: h("span", { class: "muted" }) }; };
  const sides = { beside: side("Original"), steered: side("Steered") };
  const outputs = h("div", { class: "beside", hidden: true }, Object.values(sides).map((entry) => h("section", {}, entry.heading, entry.text)));
  const go = h("button", {}, "Write"), stop = h("button", { type: "button", class: "quiet", hidden: true }, "Stop");
  let writing = null;
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); write(); } }, prompt,
    h("div", { class: "options" }, option("Beside it", beside), option("Tokens", fields.new_tokens), option("Temperature", fields.temperature), option("Seed", fields.seed)), h("div", { class: "row" }, go, stop, state));
  prompt.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); } });
  stop.addEventListener("click", () => writing?.abort());

  async function write() {
    kept.prompt = prompt.value;
    writing?.abort();
    const control = writing = new AbortController();
    const edits = [...kept.latents].map(([latent, setting]) => ({
      latents: [latent], positions: null,
      operation: setting.how === "ablate" ? { name: "ablate" } : { name: setting.how, amount: setting.times * setting.p99 },
    }));
    sides.beside.heading.textContent = beside.selectedOptions[0].textContent.replace(/^./, (letter) => letter.toUpperCase());
    for (const entry of Object.values(sides)) entry.text.replaceChildren(h("span", { class: "muted" }, visible(prompt.value)));
    outputs.hidden = false;
    stop.hidden = false;
    state.textContent = "writing …";
    const ended = new Set();
    try {
      await data.steer({ student: student.name, prompt: prompt.value, edits, beside: beside.value, new_tokens: Number(fields.new_tokens.value), temperature: Number(fields.temperature.value), seed: Number(fields.seed.value) }, (piece) => {
        if (piece.error) throw new Error(piece.error);
        if (piece.text) sides[piece.side].text.append(visible(piece.text));
        sides[piece.side].text.classList.toggle("busy", !piece.ends);
        if (piece.ends) ended.add(piece.side);
      }, control.signal);
      if (ended.size < 2) throw new Error("The server broke off before both continuations were written.");
      if (writing === control) { state.textContent = "done"; announce("Both continuations are written."); }
    } catch (error) { if (writing === control) state.textContent = error.name === "AbortError" ? "stopped" : error.message; }
    if (writing === control) { stop.hidden = true; Object.values(sides).forEach((entry) => entry.text.classList.remove("busy")); }
  }

  const asked = (rest[0] ?? "").split(",").filter((part) => /^\d+$/.test(part)).map(Number);
  // All are asked for before one is waited for; in the list they stand in their order.
  asked.forEach((latent) => data.latent(student.name, latent).catch(() => {}));
  for (const latent of asked) await add(latent);
  drawRows();
  return {
    element: h("div", {}, h("div", { class: "head" }, h("h1", {}, "Steering bench"), h("p", { class: "lede" }, `${run.kinds[student.kind]} stands in for the MLP of layer ${student.layer}. Each slider changes a latent's value on every token, in units of its own 99th percentile.`)),
      rows, addForm, form, outputs),
    title: "Steering bench", leave: () => writing?.abort(),
  };
};

"use strict";
// A latent's page.
explorer.pages.latent = async ({ student, rest, run }) => {
  const { h, number, percent, count, visible, running, alone, route, latentLink, announce } = explorer.elements;
  const { bars } = explorer.charts;
  const { data } = explorer;
  const latent = Number(rest[0]);
  if (!/^\d+$/.test(rest[0] ?? "")) throw new Error("A latent must be named by its number.");
  const [found, labels] = await Promise.all([data.latent(student.name, latent), data.labels(student.name)]);
  const GROUPS = [["top", "Strongest", "the largest value in each of its best contexts"], [3, "Upper quarter of its values", ""], [2, "Second quarter", ""], [1, "Third quarter", ""], [0, "Lowest quarter", ""]];

  function example(entry) {
    const values = new Map(entry.cells.map(([place, value]) => [place, value]));
    const tokens = entry.tokens.map((text, place) => {
      const value = values.get(place);
      if (value === undefined) return h("span", {}, running(text));
      return h(place === entry.peak ? "mark" : "span", { class: place === entry.peak ? "lit peak" : "lit", title: number(value), "--v": Math.min(value / found.maximum, 1).toFixed(3) }, running(text));
    });
    return h("figure", { class: "example" }, h("pre", {}, entry.before ? h("span", { class: "cut" }, "…") : null, tokens, entry.after ? h("span", { class: "cut" }, "…") : null),
      h("figcaption", {}, h("span", { class: "unseen" }, "Peak value "), number(entry.value)));
  }
  const groups = GROUPS.map(([group, name, note]) => {
    const entries = found.examples.filter((entry) => entry.group === group);
    if (!entries.length) return null;
    const open = group === "top" ? 5 : 3;
    return h("section", { class: "group" }, h("h2", {}, name, note ? h("small", {}, ` ${note}`) : null), entries.slice(0, open).map(example),
      entries.length > open ? h("details", {}, h("summary", {}, `${entries.length - open} more`), entries.slice(open).map(example)) : null);
  });

  const table = (heading, note, rows) => rows.length ? h("section", { class: "side" }, h("h2", {}, heading), note ? h("p", { class: "note" }, note) : null, h("ol", { class: "ranked" }, rows)) : null;
  const meter = (share, text, first) => h("li", { "--share": Math.min(Math.max(share, 0), 1).toFixed(3) }, first, h("span", { class: "amount" }, text));
  const largest = Math.max(...[...found.promoted, ...found.suppressed].map(([, effect]) => Math.abs(effect)), 1e-12);
  const effects = (rows) => rows.map(([text, effect]) => meter(Math.abs(effect) / largest, number(effect, 2), alone(text)));
  const positions = (place) => `tokens ${Math.floor(place * run.context / found.positions.length)} to ${Math.floor((place + 1) * run.context / found.positions.length) - 1} of the context`;
  const valueOf = (place) => number(place * found.maximum / found.histogram.length);

  const concept = labels.concepts[latent], written = labels.labels[latent] || { label: "", note: "" };
  const own = `${student.name}/${latent}`, draft = data.drafts.get(own);
  const state = h("span", { class: "note", role: "status" }, draft ? "not saved yet" : "");
  const label = h("input", { id: "label", maxlength: 200, value: draft?.label ?? written.label, placeholder: "what does it do?", autocomplete: "off" });
  const note = h("textarea", { id: "note", rows: 2, maxlength: 10000, placeholder: "notes" }, draft?.note ?? written.note);
  const form = h("form", { class: "label", oninput: () => { data.drafts.set(own, { label: label.value, note: note.value }); state.textContent = "not saved yet"; }, onsubmit: async (event) => {
    event.preventDefault();
    state.textContent = "saving …";
    const sent = [label.value, note.value];
    try {
      await data.saveLabel(student.name, latent, ...sent);
      name.textContent = title(sent[0]);
      const typedOn = sent[0] !== label.value || sent[1] !== note.value;
      if (!typedOn) data.drafts.delete(own);
      state.textContent = typedOn ? "not saved yet" : "saved in the database";
    } catch (error) { state.textContent = error.message; }
  } }, h("label", { class: "field" }, h("span", {}, "Label"), label), h("label", { class: "field wide" }, h("span", {}, "Note"), note), h("div", {}, h("button", {}, "Save"), state));
  const shownLabel = data.live ? form : written.label || written.note ? h("p", { class: "lede" }, visible([written.label, written.note].filter(Boolean).join(" — "))) : null;

  const title = (text) => text.trim() ? visible(text.trim()) : concept ? visible(concept.concept) : `Latent ${latent}`;
  const name = h("span", {}, title(written.label));
  const step = (to, key, text) => to >= 0 && to < student.num_latents ? h("a", { class: "button", href: route("latent", student.name, to), "data-key": key, title: `${key} (${key === "next" ? "j" : "k"})` }, text) : null;
  const fact = (term, text, meaning) => h("div", {}, h("dt", { title: meaning }, term), h("dd", {}, text));
  const facts = h("dl", { class: "facts" },
    fact("Fires on", `${percent(found.rate)}`, "share of the tokens"),
    fact("Firings", count(found.firings), `tokens of ${count(student.num_tokens)}`),
    fact("Mean value", number(found.mean), "where it fires"),
    fact("99th percentile", number(found.p99), "of its values where it fires; the unit of the steering bench"),
    fact("Largest", number(found.maximum), "its largest value"),
    fact("Token specialisation", number(found.specialisation, 2), "1: it fires on one token alone; 0: on as many different tokens as there could be"),
    fact("Distinctness", number(found.distinctness, 2), "1 − the cosine of its mean atom to the nearest other latent's"),
    concept ? fact("Probed concept", `${visible(concept.concept)} (${number(concept.score, 2)})`, "the concept that it detects best, and how well") : null);

  const head = h("div", { class: "head" }, h("div", { class: "title" }, h("h1", {}, h("span", { class: "tag" }, `${latent}`), " ", name), h("div", { class: "steps" }, step(latent - 1, "previous", "←"), step(latent + 1, "next", "→"), data.live ? h("a", { class: "button", href: route("steer", student.name, latent) }, "Steer it") : null)),
    h("p", { class: "lede" }, `${run.kinds[student.kind]}, layer ${student.layer}, K ${student.k}`), shownLabel, facts);
  const silent = h("p", {}, "It fired on no token of this text, so nothing is known of it.");
  const columns = h("div", { class: "columns" },
    h("div", {}, groups),
    h("div", { class: "sides" },
      h("section", { class: "side" }, h("h2", {}, "Values where it fires"), bars(found.histogram, { label: "Histogram of its values", name: (place) => `${valueOf(place)} to ${valueOf(place + 1)}`, low: "0", high: number(found.maximum) }),
        h("p", { class: "note" }, `A quarter of them lies below ${number(found.quantiles[0])}, half below ${number(found.quantiles[1])}, three quarters below ${number(found.quantiles[2])}.`)),
      table("Fires on", "tokens, by how often; beside it the share of the token's occurrences", found.fires_on.map(([text, times, share]) => meter(times / found.firings, `${count(times)} · ${percent(share)}`, alone(text)))),
      h("div", { class: "pair" }, table("Promotes", "", effects(found.promoted)), table("Suppresses", "", effects(found.suppressed))),
      found.promoted.length ? h("p", { class: "note under" }, "Change of the logits for each unit of its value: the mean of what it writes at its strongest activations, through the final norm, linearised, and the unembedding, past all later layers.") : null,
      table("Nearest latents", "by the cosine of what they write", found.nearest.map(([other, cosine]) => meter(cosine, number(cosine, 2), latentLink(student.name, other, labels)))),
      table("Fires together with", "share of its firings · Jaccard's index, by which they are ranked", found.company.map(([other, share, jaccard]) => meter(jaccard, `${percent(share)} · ${number(jaccard, 2)}`, latentLink(student.name, other, labels)))),
      h("section", { class: "side" }, h("h2", {}, "Where in the context"), bars(found.positions, { label: "Firings by position in the context", name: positions, low: "first token", high: "last", height: 56 }))));
  return { element: h("article", {}, head, found.firings ? columns : silent), title: `${latent} of ${student.name}`, ready: () => announce(`Latent ${latent}`) };
};

"use strict";
// Type a text, and see token by token which experts fire and what they account for.
explorer.pages.text = async ({ student }) => {
  const { h, number, percent, running, latentLink, announce, alone } = explorer.elements;
  const { data } = explorer;
  if (!data.live) return { element: h("p", {}, "This needs the model: run mxd explore on the run."), title: "Text" };
  const labels = await data.labels(student.name);
  const kept = explorer.typed ||= { text: "" };
  const SHOWN = 12;
  let answer = null, chosen = -1, followed = -1;

  const field = h("textarea", { id: "text", rows: 5, spellcheck: "false", "aria-label": "Text", placeholder: "Type or paste a text …" }, kept.text);
  const state = h("span", { class: "note", role: "status" });
  const button = h("button", {}, "Look");
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); look(); } }, field, h("div", { class: "row" }, button, state, h("span", { class: "note keys" }, "Ctrl + Enter")));
  field.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); look(); } });
  const tokens = h("pre", { class: "typed", role: "group", "aria-label": "Tokens" }), panel = h("section", { class: "side token-panel", "aria-live": "polite" }), whole = h("section", { class: "side" });
  const result = h("div", { class: "columns typed-result", hidden: true }, h("div", {}, h("p", { class: "note", id: "legend" }), tokens), h("div", { class: "sides" }, panel, whole));

  async function look() {
    kept.text = field.value;
    button.disabled = true;
    state.textContent = "reading …";
    try {
      answer = await data.text(student.name, field.value);
      followed = -1;
      state.textContent = "";
      result.hidden = false;
      drawTokens();
      choose(Math.max(answer.tokens.findLastIndex((token) => !token.special), 0));
      drawWhole();
    } catch (error) { state.textContent = error.message; announce(error.message); }
    button.disabled = false;
  }
  const shareOf = (token, latent) => token.experts.find(([number]) => number === latent)?.[2] ?? 0;
  function drawTokens() {
    const shade = (token) => followed >= 0 ? shareOf(token, followed) : token.experts[0]?.[2] ?? 0;
    const shades = answer.tokens.filter((token) => !token.special).map(shade);
    const most = Math.max(0.02, ...shades), least = followed >= 0 ? 0 : Math.min(most, ...shades) * 0.9;
    tokens.replaceChildren(...answer.tokens.map((token, place) => {
      const share = shade(token);
      // Not buttons, which no line can break inside.
      return h("span", { role: "button", class: share > 0 ? "lit" : "unlit", "--v": Math.min(Math.max((share - least) / (most - least || 1), 0), 1).toFixed(3), "aria-pressed": place === chosen ? "true" : "false", tabindex: place === chosen ? "0" : "-1",
        title: followed >= 0 ? percent(share) : undefined, onclick: () => choose(place, true) }, running(token.text));
    }));
    document.getElementById("legend").textContent = followed >= 0 ? `Shaded by what expert ${followed} accounts for.` : "Shaded by what the strongest expert of each token accounts for. Choose a token.";
  }
  function choose(place, focus = false) {
    chosen = place;
    [...tokens.children].forEach((button, other) => { button.setAttribute("aria-pressed", `${other === place}`); button.tabIndex = other === place ? 0 : -1; });
    if (focus) tokens.children[place].focus();
    const token = answer.tokens[place];
    panel.replaceChildren(h("h2", {}, "Token ", alone(token.text)),
      h("p", { class: "note" }, "What each expert adds, as a share of the layer's output, and its value. Shares and base sum to 100 %."),
      h("ol", { class: "ranked" }, row(token.base, percent(token.base), h("span", { class: "muted" }, "base, without any expert")),
        token.experts.slice(0, SHOWN).map(expert)),
      token.experts.length > SHOWN ? h("details", {}, h("summary", {}, `${token.experts.length - SHOWN} more`), h("ol", { class: "ranked" }, token.experts.slice(SHOWN).map(expert))) : "");
  }
  const expert = ([latent, value, share]) => row(share, `${percent(share)} · ${number(value, 2)}`, latentLink(student.name, latent, labels), latent);
  function row(share, text, first, latent) {
    return h("li", { "--share": Math.min(Math.abs(share), 1).toFixed(3), class: share < 0 ? "against" : null }, first,
      latent === undefined ? null : h("button", { type: "button", class: "follow", "aria-pressed": `${latent === followed}`, title: "Shade the text by this expert", onclick: () => follow(latent) }, "shade"), h("span", { class: "amount" }, text));
  }
  function follow(latent) { followed = latent === followed ? -1 : latent; drawTokens(); choose(chosen); drawWhole(); }
  function drawWhole() {
    const sums = new Map();
    const counted = answer.tokens.filter((token) => !token.special);
    for (const token of counted) for (const [latent, , share] of token.experts) sums.set(latent, (sums.get(latent) || 0) + share / counted.length);
    const ranked = [...sums].sort((a, b) => b[1] - a[1]).slice(0, 12);
    whole.replaceChildren(h("h2", {}, "Over the whole text"), h("p", { class: "note" }, "mean share of the output"), h("ol", { class: "ranked" }, ranked.map(([latent, share]) => row(share, percent(share), latentLink(student.name, latent, labels), latent))));
  }
  tokens.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return; }
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? answer.tokens.length - 1 : move ? chosen + move : -1;
    if (to >= 0 && to < answer.tokens.length) { event.preventDefault(); choose(to, true); }
  });
  return {
    element: h("div", {}, h("div", { class: "head" }, h("h1", {}, "Your own text"), h("p", { class: "lede" }, `Which experts of ${student.name} fire on it, and how much of the layer's output each accounts for.`)), form, result),
    title: "Your own text", ready: () => { if (kept.text) look(); },
  };
};

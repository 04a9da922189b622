"use strict";
(() => {
  const { tokens, rounds, origins, rule } = JSON.parse(document.getElementById("data").textContent);
  const text = document.getElementById("text"), panel = document.getElementById("panel");
  const strip = document.getElementById("strip"), here = document.getElementById("here");
  const spans = [...text.children], step = Number(strip.dataset.step);
  const firsts = rounds.map((_, round) => tokens.findIndex((token) => token[3] === round));
  let chosen = 0;

  const make = (name, content, kind) => {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    made.append(...[content].flat());
    return made;
  };
  const signs = { " ": "\u2423", "\n": "\u21B5", "\t": "\u21E5" };
  const code = (sign) => `[U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`;
  const visible = (shown) => shown.replace(/[ \p{Cc}\p{Cf}]/gu, (sign) => signs[sign] || code(sign));
  const percent = (p) => (p >= 0.001 ? (100 * p).toFixed(1) : p ? (100 * p).toExponential(1) : "0") + " %";

  const partOf = (index) => {  // a token of several that share a character shows the text of the first
    const [, , , , part = 1, parts = 1] = tokens[index];
    return { first: index - part + 1, part, parts };
  };
  const shownAs = (index) => {
    const own = spans[partOf(index).first].textContent || spans[index].dataset.unused;
    return own ? visible(own) : tokens[index][1] || "#" + tokens[index][0];
  };
  const guessed = (round) => {
    const [, accepted, period, levels, cut, back] = rounds[round];
    if (!levels) return "nothing was drafted";
    const end = cut ? "; the text ended within this round" : "";
    return `K = ${period}: ${levels} drafted, ${accepted} accepted, ${back.length} rolled back${end}`;
  };

  const show = (index) => {
    const [id, name, p, round] = tokens[index], { part, parts } = partOf(index), list = make("dl", []);
    const row = (term, content) => list.append(make("dt", term), make("dd", content));
    const group = parts > 1 ? `, part ${part} of ${parts} of this character` : "";
    row("Token", [make("bdi", shownAs(index), "token"), ` (id ${id}${name ? ", " + name : ""}${group})`]);
    if (spans[index].dataset.unused) row("End of the text", "this token completed a stop string, which the text leaves out");
    const kind = spans[index].className;
    row("Origin", [make("strong", origins[kind][0]), ". " + origins[kind][1]]);
    row(`Probability of the ${kind === "sparse" ? "draft" : "full"} model, temperature 1`, percent(p));
    row("Rule of acceptance", rule);
    row(`Round ${round} of ${rounds.length - 1}`, round ? guessed(round) : "the prompt's pass, in which the full model writes the first token");
    const back = rounds[round][5];
    if (back.length) {
      const guess = ([number, shown, likely]) => make("li", [make("bdi", visible(shown)), ` (id ${number}): ${percent(likely)}`]);
      row("Rolled back, each with the full model's probability after the guesses before it", make("ol", back.map(guess)));
    }
    panel.replaceChildren(list);
    here.setAttribute("x", round * step);
  };
  const choose = (index) => {
    spans[chosen].tabIndex = -1;
    spans[chosen].setAttribute("aria-selected", "false");
    chosen = index;
    spans[index].tabIndex = 0;
    spans[index].setAttribute("aria-selected", "true");
    show(index);
  };
  const focus = (index) => spans[Math.min(Math.max(index, 0), spans.length - 1)].focus();
  const ofRound = (round) => firsts[Math.min(Math.max(round, 0), rounds.length - 1)];

  text.setAttribute("role", "listbox");
  text.setAttribute("aria-orientation", "horizontal");
  spans.forEach((span, index) => {
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.setAttribute("aria-label", `${shownAs(index)}, ${origins[span.className][0]}`);
    span.tabIndex = index ? -1 : 0;
  });
  const indexOf = (event) => spans.indexOf(event.target.closest("#text > span"));
  text.addEventListener("focusin", (event) => indexOf(event) >= 0 && choose(indexOf(event)));
  text.addEventListener("mouseover", (event) => indexOf(event) >= 0 && show(indexOf(event)));
  text.addEventListener("mouseleave", () => spans[chosen].getAttribute("aria-selected") === "true" && show(chosen));
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
    const round = tokens[chosen][3];
    const targets = {
      ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: spans.length - 1,
      ArrowUp: ofRound(round - 1), ArrowDown: ofRound(round + 1),
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    focus(targets[event.key]);
  });
  strip.addEventListener("click", (event) => {
    const x = event.clientX - strip.getBoundingClientRect().left;
    focus(ofRound(Math.floor(x / step)));
  });

  const table = document.getElementById("table");
  table.addEventListener("toggle", () => {
    if (table.querySelector("table")) return;
    const heads = ["round", "K", "drafted", "accepted", "rolled back", "tokens"].map((name) => {
      const head = make("th", name);
      head.scope = "col";
      return head;
    });
    const rows = rounds.map(([count, accepted, period, levels, , back], round) =>
      make("tr", [round, period, levels, accepted, back.length, count].map((figure) => make("td", String(figure)))));
    table.append(make("table", [make("thead", make("tr", heads)), make("tbody", rows)]));
  });
})();

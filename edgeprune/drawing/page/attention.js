// Attention patterns: from bytes in the page to a map and a list.

const patterns = new Map(); // decoded, by run, prompt and side

// The weights of a head on a prompt: a function of query and key positions; null if not included.
function attentionOf(r, promptIndex, side, head) {
  const place = r.measured?.attention_heads.indexOf(head) ?? -1;
  const prompt = r.measured?.prompts[promptIndex];
  if (place < 0 || !prompt?.attention) return null;
  const key = `${r.index} ${promptIndex} ${side}`;
  if (!patterns.has(key)) {
    const text = atob(prompt.attention[side]);
    patterns.set(
      key,
      Uint8Array.from(text, (c) => c.charCodeAt(0)),
    );
  }
  const length = prompt.clean.length;
  const start = (place * (length * (length + 1))) / 2;
  const bytes = patterns.get(key);
  return (query, keyAt) =>
    keyAt > query ? 0 : bytes[start + (query * (query + 1)) / 2 + keyAt] / 255;
}

const promptsOf = (r) => r.measured?.prompts ?? [];
const promptOf = (r) => promptsOf(r)[clamp(state.prompt, 0, promptsOf(r).length - 1)];

// The part of the node panel about attention.
function attentionPanel(r, node) {
  const prompt = promptOf(r);
  if (node.type !== "head" || !prompt) return null;
  const index = r.measured.prompts.indexOf(prompt);
  const weight = attentionOf(r, index, state.side, node.name);
  const heading = h("h3", { text: "Attention of the full model" });
  if (!weight) {
    return h(
      "section",
      {},
      heading,
      h("p", {
        class: "note",
        text: r.measured.attention_heads.length
          ? "This page has no room for the pattern of this head; it carries those of the strongest."
          : "The model does not return its attention.",
      }),
    );
  }
  const tokens = prompt[state.side];
  const query = state.token >= 0 && state.token < tokens.length ? state.token : tokens.length - 1;
  const sides = h(
    "div",
    { class: "buttons small", role: "group", "aria-label": "Prompt" },
    ["clean", "corrupted"].map((side) =>
      button(side, () => change({ side }), { "aria-pressed": String(side === state.side) }),
    ),
  );
  const picker = h(
    "select",
    { "aria-label": "Prompt", onchange: (e) => change({ prompt: Number(e.target.value) }) },
    promptsOf(r).map((p, i) =>
      h("option", {
        value: i,
        selected: i === index,
        text: `${i + 1}. ${p.kind}: …${p.clean
          .slice(-7)
          .map((t) => tokenText(t, 12).replace("␣", " "))
          .join("")}`,
      }),
    ),
  );
  const strip = h(
    "div",
    { class: "tokens", role: "group", "aria-label": "Tokens" },
    tokens.map((token, i) => {
      const element = button(tokenText(token), () => change({ token: i }), {
        class: "token",
        title: i > query ? null : `${short(weight(query, i))} from “${tokenText(tokens[query])}”`,
        "aria-pressed": String(i === query),
      });
      if (i <= query) element.style.setProperty("--share", weight(query, i).toFixed(3));
      return element;
    }),
  );
  const strongest = tokens
    .map((token, i) => [i, weight(query, i)])
    .filter(([i]) => i <= query)
    .sort((a, b) => b[1] - a[1])
    .slice(0, 5);
  const list = table(
    `From “${tokenText(tokens[query], 14)}” (token ${query + 1}) to`,
    ["token", "place", "attention"],
    strongest.map(([i, w]) => [tokenText(tokens[i]), String(i + 1), w.toFixed(2)]),
    { numeric: [1, 2] },
  );
  return h(
    "section",
    {},
    h("div", { class: "bar" }, heading, sides),
    picker,
    strip,
    attentionMap(tokens, weight, query),
    list,
  );
}

// A map with a row per token that attends and a column per token attended to.
function attentionMap(tokens, weight, query) {
  const size = clamp(Math.floor(250 / tokens.length), 4, 16);
  const gap = size >= 9 ? 74 : 4;
  const edge = tokens.length * size;
  const ratio = 2;
  const element = h("canvas", {
    class: "map",
    role: "img",
    "aria-label": "Map of the attention: rows attend to columns",
  });
  element.width = (edge + gap) * ratio;
  element.height = (edge + 2) * ratio;
  element.style.width = `${edge + gap}px`;
  const context = element.getContext("2d");
  const colors = palette(isDark());
  context.scale(ratio, ratio);
  for (let q = 0; q < tokens.length; q += 1) {
    for (let k = 0; k <= q; k += 1) {
      context.fillStyle = mixed(colors.paper, colors.line.q, weight(q, k) ** 0.7);
      context.fillRect(gap + k * size, q * size, size - 0.5, size - 0.5);
    }
    if (size >= 9) {
      context.font = `${q === query ? 700 : 400} ${Math.min(size, 11)}px system-ui, sans-serif`;
      context.fillStyle = colors.soft;
      context.textAlign = "right";
      context.textBaseline = "middle";
      context.fillText(tokenText(tokens[q], 11), gap - 5, q * size + size / 2);
    }
  }
  context.strokeStyle = colors.pin;
  context.strokeRect(gap + 0.5, query * size + 0.5, (query + 1) * size - 1, size - 1);
  const where = (event) => {
    const frame = element.getBoundingClientRect();
    const scale = (edge + gap) / frame.width;
    return [
      Math.floor(((event.clientY - frame.top) * scale) / size),
      Math.floor(((event.clientX - frame.left) * scale - gap) / size),
    ];
  };
  element.addEventListener("pointermove", (event) => {
    const [q, k] = where(event);
    element.title =
      tokens[q] !== undefined && k >= 0 && k <= q
        ? `${tokenText(tokens[q])} → ${tokenText(tokens[k])}: ${short(weight(q, k))}`
        : "";
  });
  element.addEventListener("click", (event) => {
    const [q] = where(event);
    if (tokens[q] !== undefined) change({ token: q });
  });
  return element;
}

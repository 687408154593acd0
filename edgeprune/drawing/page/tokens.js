// To which tokens answers are due, as shaded text: what `edgeprune tokens` found.

// Tokens shaded by values; those of this size and larger ones have the full colour.
function shadedLine(tokens, values, largest, corrupted = null) {
  return h(
    "p",
    { class: "shaded", dir: "auto" },
    tokens.map((token, i) => {
      const differs = corrupted && corrupted[i] !== token;
      const element = h(
        "span",
        {
          class: `token${differs ? " changed" : ""}${values[i] < 0 ? " negative" : ""}`,
          title: differs ? `corrupted prompt: ${tokenText(corrupted[i])}` : `token ${i + 1}`,
        },
        token.replace(/\n/g, "⏎"),
        values[i] ? h("small", { text: signed(values[i]) }) : null,
      );
      element.style.setProperty("--share", largest ? Math.min(1, Math.abs(values[i]) / largest) : 0);
      return element;
    }),
  );
}

const magnitude = (values) => Math.max(...values.map(Math.abs));

const answerTitle = (answer, i) =>
  `${i + 1}. “${answer.answer.trim()}”${answer.distractor ? `, not “${answer.distractor.trim()}”` : ""}`;

function tokensPanel(r) {
  const found = r.tokens;
  if (!found) return [h("h2", { text: "Tokens" }), note("`edgeprune tokens` measures them.")];
  const errors = Object.entries(found.error).map(([model, e]) => `${model} ${percent(e)}`);
  return [
    h("h2", { text: "Tokens" }),
    note(
      `By how much each token raises (blue) or lowers (orange) ${found.about}, instead of the token in its place in the corrupted prompt. Framed tokens differ from it; only they can count.`,
    ),
    note(
      `On ${plural(found.answers.length, "answer")} to ${found.split} prompts. The attributions sum to the effect, with errors of: ${errors.join(", ")}.`,
    ),
    ...found.answers.map((answer, i) =>
      h(
        "section",
        {},
        h("h3", { text: answerTitle(answer, i) }),
        Object.entries(answer.through).map(([model, through]) => [
          h("h4", { text: `${model}: ${short(through.ends[0])} → ${short(through.ends[1])}` }),
          shadedLine(answer.tokens, through.tokens, magnitude(through.tokens), answer.corrupted),
          throughNodes(answer, through),
        ]),
      ),
    ),
  ];
}

// The nodes through which most of the effect passes, and where they write.
function throughNodes(answer, through, count = 5) {
  const places = Object.entries(through.nodes)
    .flatMap(([name, row]) => row.map(([position, value]) => ({ name, position, value })))
    .sort((a, b) => Math.abs(b.value) - Math.abs(a.value))
    .slice(0, count);
  if (!places.length) return null;
  return h(
    "p",
    { class: "note" },
    "through ",
    places.map(({ name, position, value }, i) => [
      i ? ", " : "",
      nodeLink(name),
      ` at “${tokenText(answer.tokens[position], 14)}” ${signed(value)}`,
    ]),
  );
}

// For the panel of a node: how much of each answer passes through it, by token.
function tokensOfNode(r, node) {
  const shown = (r.tokens?.answers ?? []).flatMap((answer, i) =>
    Object.entries(answer.through)
      .filter(([, through]) => through.nodes[node.name])
      .map(([model, through]) => [answer, i, model, through.nodes[node.name]]),
  );
  if (!shown.length) return null;
  return h(
    "section",
    {},
    h("h3", { text: "Where answers pass through it" }),
    note(
      "How much of the effect passes through what it writes at each token (conductance); as much as the effect has the full colour.",
    ),
    shown.slice(0, 6).map(([answer, i, model, row]) => {
      const values = answer.tokens.map(() => 0);
      for (const [position, value] of row) values[position] = value;
      const effect = Math.abs(answer.through[model].ends[1] - answer.through[model].ends[0]);
      return [
        h("h4", { text: `${answerTitle(answer, i)}, ${model}` }),
        shadedLine(answer.tokens, values, effect),
      ];
    }),
  );
}

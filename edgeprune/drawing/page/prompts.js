// Prompts: tokens, and the answers of the full model, the circuit and the empty circuit.

// The answers of a prompt's circuit of the measured size next to the size shown.
function answersAt(r, prompt, size) {
  const { sizes } = r.measured;
  const index = nearest([0, ...sizes], size);
  return index === 0
    ? { size: 0, ...prompt.answers.empty }
    : { size: sizes[index - 1], ...prompt.answers.circuits[index - 1] };
}

const firsts = (top) => top.map((row) => row[0]?.[0]).join("\u0000");

function failedPrompts(r, size) {
  const failed = promptsOf(r).flatMap((p, i) =>
    firsts(answersAt(r, p, size).top) !== firsts(p.answers.full) ? [i] : [],
  );
  return { failed, all: promptsOf(r).length };
}

// Where the answers are not measured at the size shown, at which they are: for a sentence's end.
function sizeNote(r) {
  const at = answersAt(r, promptsOf(r)[0], sizeOf()).size;
  return at === sizeOf()
    ? ""
    : ` (answers at ${plural(at, "edge")}, the measured size nearest to ${whole(sizeOf())})`;
}

function promptsPanel(r) {
  const prompts = promptsOf(r);
  if (!prompts.length) {
    return [
      h("h2", { text: "Prompts" }),
      note(
        "This page has no prompts. `edgeprune page RUN` measures answers, attention and cuts for a run.",
      ),
    ];
  }
  const size = sizeOf();
  const current = promptOf(r);
  const at = answersAt(r, current, size);
  const metric = r.measured.distance;
  const heading = { typical: "Typical", worst: "Where the chosen circuit is least faithful" };
  const list = ["typical", "worst"].flatMap((kind) => [
    h("h4", { text: heading[kind] }),
    h(
      "ul",
      { class: "prompts" },
      prompts.flatMap((prompt, i) => {
        if (prompt.kind !== kind) return [];
        const answer = answersAt(r, prompt, size);
        const same = firsts(answer.top) === firsts(prompt.answers.full);
        return h(
          "li",
          {},
          h(
            "button",
            {
              type: "button",
              class: "prompt",
              "aria-pressed": String(prompt === current),
              onclick: () => change({ prompt: i, token: -1 }),
            },
            h("span", {
              class: `verdict ${same ? "same" : "other"}`,
              text: same ? "✓" : "✗",
              title: same ? "the full model's answer" : "another answer than the full model's",
            }),
            h("span", {
              class: "text",
              dir: "auto",
              title: wholeText(prompt),
              text: brief(prompt),
            }),
            h("span", { class: "note", text: `${metric} ${short(answer.distance)}` }),
          ),
        );
      }),
    ),
  ]);
  const other = current.clean.map((token, i) => token !== current.corrupted[i]);
  const line = (side) =>
    h(
      "p",
      { class: "line", dir: "auto" },
      current[side].map((token, i) =>
        h("span", {
          class: `token${other[i] ? " differs" : ""}${current.predicted.includes(i) ? " predicts" : ""}`,
          text: tokenText(token),
          title: `token ${i + 1}`,
        }),
      ),
    );
  const isIn = r.measured.split ? `${r.measured.split} prompts` : "prompts";
  return [
    h("h2", { text: "Prompts" }),
    h(
      "p",
      {},
      h("b", { text: `Answers at ${plural(at.size, "edge")}` }),
      at.size === size
        ? null
        : [", ", h("span", { class: "label", text: `the measured size nearest to ${whole(size)}` })],
    ),
    note(`From the ${isIn}. ✗: the circuit answers differently from the full model.`),
    ...list,
    h("h3", { text: `Prompt ${prompts.indexOf(current) + 1}` }),
    h("h4", { text: "clean" }),
    line("clean"),
    h("h4", { text: "corrupted" }),
    line("corrupted"),
    note("Marked tokens differ between the two; after an underlined one an answer is predicted."),
    ...current.predicted.map((place, row) => answersTable(r, current, at, row, place)),
    note("Below the most likely answers, that of the full model where it is not among them."),
  ];
}

// A prompt as text; tokens that are names of their own, without spaces, are set apart.
function wholeText({ clean }) {
  const gap = clean.some((token) => /\s/.test(token)) ? "" : " ";
  return clean
    .map((token) => tokenText(token, 30).replace("␣", " "))
    .join(gap)
    .trim();
}

// The end of a prompt, from which the answer is predicted.
function brief(prompt, limit = 88) {
  const text = wholeText(prompt);
  return text.length > limit ? `…${text.slice(1 - limit).replace(/^\S* /, "")}` : text;
}

function answersTable(r, prompt, at, row, place) {
  const columns = [
    ["full model", prompt.answers.full],
    [`circuit, ${whole(at.size)} edges`, at.top],
    ["empty circuit", prompt.answers.empty.top],
  ];
  const best = prompt.answers.full[row]?.[0]?.[0];
  const isShare = r.measured.output === "logits";
  const cell = (entry) => {
    if (!entry) return "";
    const [token, value] = entry;
    const element = h(
      "span",
      { class: `answer${token === best ? " best" : ""}`, dir: "auto" },
      h("span", { class: "token", text: tokenText(token), title: tokenText(token, 400) }),
      " ",
      h("span", { class: "value", text: isShare ? percent(value) : short(value) }),
    );
    element.style.setProperty("--share", isShare ? value : 0);
    return element;
  };
  const length = Math.max(...columns.map(([, top]) => top[row]?.length ?? 0));
  const rows = Array.from({ length }, (_, i) => columns.map(([, top]) => cell(top[row]?.[i])));
  const after = prompt.predicted.length > 1 ? ` after “${tokenText(prompt.clean[place], 14)}”` : "";
  const element = table(
    `Answers${after}`,
    columns.map(([name]) => name),
    rows,
  );
  element.classList.add("answers");
  return element;
}

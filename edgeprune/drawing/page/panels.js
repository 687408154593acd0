// The panel at the side: what is selected, prompts, edges, groups, and the comparison of runs.

const TABS = {
  details: "Details",
  prompts: "Prompts",
  edges: "Edges",
  groups: "Groups",
  ...(RUNS.some((r) => r.tokens) ? { tokens: "Tokens" } : {}),
  ...(RUNS.length > 1 ? { runs: "Compare" } : {}),
};
const MAX_ROWS = 200;

function drawPanel() {
  refill(
    $("tabs"),
    Object.entries(TABS).map(([id, text]) =>
      h("button", {
        type: "button",
        role: "tab",
        id: `tab-${id}`,
        text,
        "aria-selected": String(state.tab === id),
        "aria-controls": "panel",
        tabindex: state.tab === id ? 0 : -1,
        onclick: () => change({ tab: id }),
      }),
    ),
  );
  const panel = $("panel");
  panel.setAttribute("aria-labelledby", `tab-${state.tab}`);
  const subject = `${state.tab} ${state.select}`;
  const top = panel.dataset.subject === subject ? panel.scrollTop : 0;
  panel.dataset.subject = subject;
  const draw =
    {
      prompts: promptsPanel,
      edges: edgesPanel,
      groups: groupsPanel,
      tokens: tokensPanel,
      runs: runsPanel,
    }[state.tab] ?? detailsPanel;
  refill(panel, [draw(run())].flat().filter(Boolean));
  panel.scrollTop = top;
}

$("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const ids = Object.keys(TABS);
  change({ tab: ids[(ids.indexOf(state.tab) + step + ids.length) % ids.length] });
  requestAnimationFrame(() => requestAnimationFrame(() => $(`tab-${state.tab}`)?.focus()));
});

// ------------------------------------------------------------------------------- pieces

const nodeLink = (name, text = NODES.get(name).title) =>
  button(text, () => select(name), { class: "link", title: name });
const edgeLink = (edge, text) =>
  button(text, () => select(edge.name), { class: "link", title: `${edge.title} (${edge.name.replace(">", " → ")})` });
const kindMark = (kind) => h("span", { class: `kind ${kind}`, text: KINDS[kind] });
const scoreText = (r, edge) => {
  const rank = r.rank.get(edge.key);
  return rank === undefined || !r.importance ? "–" : short(r.scores[rank]);
};
const rankText = (r, edge) =>
  r.rank.has(edge.key) && r.importance ? whole(r.rank.get(edge.key) + 1) : "–";
const byImportance = (r) => (a, b) => importanceOf(r, b) - importanceOf(r, a);
const readerLink = (reader) =>
  reader.feeds.length > 1 ? h("span", { text: reader.title }) : nodeLink(reader.feeds[0]);

function effectText(r, kind, name) {
  const cuts = r.measured?.cuts;
  const found = cuts?.[kind][name];
  if (!found) return null;
  const [after, flips] = found;
  return { before: cuts.distance, after, flips, prompts: cuts.prompts, label: r.measured.distance };
}

const chosenText = (r) => `the chosen circuit (${plural(r.chosen.size, "edge")})`;
const cutPrompts = (r) =>
  `${plural(r.measured.cuts.prompts, `${r.measured.split ?? ""} prompt`.trim())} used for cuts`;

function changeText({ before, after }) {
  return signed(after - before);
}

// What a column of cuts holds, below a table's heading.
const aboutCuts = (r) =>
  r.measured
    ? `${r.measured.distance} if cut: by how much it changes, measured in ${chosenText(r)} on the ${cutPrompts(r)}, whatever the slider says.`
    : "";

function effectPanel(r, kind, name, inChosen) {
  if (!r.measured) return null;
  const heading = h("h3", { text: "Effect of cutting it" });
  const effect = effectText(r, kind, name);
  const where = `from ${chosenText(r)}`;
  if (!effect) {
    return h(
      "section",
      {},
      heading,
      note(
        inChosen
          ? `Not measured ${where}.`
          : "It takes no part in the run's chosen circuit, or was not measured.",
      ),
    );
  }
  return h(
    "section",
    {},
    heading,
    h(
      "div",
      { class: "facts" },
      fact(`change of ${effect.label}`, changeText(effect)),
      fact("predictions flipped", `${effect.flips} of ${effect.prompts}`),
    ),
    note(
      `Cut ${where}. On the ${cutPrompts(r)}: ${effect.label} ${short(effect.before)} → ${short(effect.after)}.`,
    ),
  );
}

const note = (text) => h("p", { class: "note", text });
const fact = (label, value, title = null) =>
  h("div", { class: "fact", title }, h("b", { text: value }), h("span", { text: label }));

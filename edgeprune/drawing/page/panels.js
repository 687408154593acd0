// The panel at the side: what is selected, prompts, edges, groups, and the comparison of runs.

const TABS = {
  details: "Details",
  prompts: "Prompts",
  edges: "Edges",
  groups: "Groups",
  ...(RUNS.length > 1 ? { runs: "Compare" } : {}),
};
const MAX_ROWS = 200;

function drawPanel() {
  $("tabs").replaceChildren(...Object.entries(TABS).map(([id, text]) =>
    h("button", { type: "button", role: "tab", id: `tab-${id}`, text, "aria-selected": String(state.tab === id),
      "aria-controls": "panel", tabindex: state.tab === id ? 0 : -1, onclick: () => change({ tab: id }) })));
  const panel = $("panel");
  panel.setAttribute("aria-labelledby", `tab-${state.tab}`);
  const subject = `${state.tab} ${state.select}`;
  const focused = document.activeElement?.closest?.("#panel") ? focusPath(document.activeElement) : null;
  const top = panel.dataset.subject === subject ? panel.scrollTop : 0;
  panel.dataset.subject = subject;
  const draw = { prompts: promptsPanel, edges: edgesPanel, groups: groupsPanel, runs: runsPanel }[state.tab] ?? detailsPanel;
  panel.replaceChildren(...[draw(run())].flat().filter(Boolean));
  panel.scrollTop = top;
  if (focused !== null) panel.querySelectorAll("button, select, input")[focused]?.focus({ preventScroll: true });
}

// Which control of the panel has the focus, so that it keeps it when the panel is drawn again.
function focusPath(element) {
  const index = [...$("panel").querySelectorAll("button, select, input")].indexOf(element);
  return index < 0 ? null : index;
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
const edgeLink = (edge, text) => button(text, () => select(edge.name), { class: "link", title: edge.name.replace(">", " → ") });
const kindMark = (kind) => h("span", { class: `kind ${kind}`, text: KINDS[kind] });
const scoreText = (r, edge) => {
  const rank = r.rank.get(edge.key);
  return rank === undefined || !r.importance ? "–" : short(r.scores[rank]);
};
const rankText = (r, edge) => (r.rank.has(edge.key) && r.importance ? whole(r.rank.get(edge.key) + 1) : "–");
const byImportance = (r) => (a, b) => importanceOf(r, b) - importanceOf(r, a);
const readerLink = (reader) => (reader.feeds.length > 1 ? h("span", { text: reader.title }) : nodeLink(reader.feeds[0]));

function effectText(r, kind, name) {
  const cuts = r.measured?.cuts;
  const found = cuts?.[kind][name];
  if (!found) return null;
  const [after, flips] = found;
  return { before: cuts.distance, after, flips, prompts: cuts.prompts, label: r.measured.distance };
}

function effectPanel(r, kind, name, inChosen) {
  if (!r.measured) return null;
  const heading = h("h3", { text: "Effect of cutting it" });
  const effect = effectText(r, kind, name);
  const where = `from the chosen circuit (${plural(r.chosen.size, "edge")})`;
  if (!effect) {
    return h("section", {}, heading, h("p", { class: "note", text: inChosen
      ? `Not measured ${where}.` : "It takes no part in the run's chosen circuit, or was not measured." }));
  }
  return h("section", {}, heading,
    h("div", { class: "facts" },
      fact(`${effect.label} from the full model`, `${short(effect.before)} → ${short(effect.after)}`),
      fact("predictions flipped", `${effect.flips} of ${effect.prompts}`)),
    h("p", { class: "note", text: `Cut ${where}, on ${plural(effect.prompts, "prompt")}.` }));
}

const fact = (label, value) => h("div", { class: "fact" }, h("b", { text: value }), h("span", { text: label }));

// ------------------------------------------------------------------------------- details

function detailsPanel(r) {
  if (NODES.has(state.select)) return nodePanel(r, NODES.get(state.select));
  const edge = state.select && edgeByName(state.select);
  return edge ? edgePanel(r, edge) : overviewPanel(r);
}

function overviewPanel(r) {
  const size = sizeOf();
  const shown = shownEdges();
  const edges = shown.map(({ edge }) => edge);
  const toOutput = edges.filter((edge) => edge.reader.kind === "output").sort(byImportance(r));
  const degree = new Map();
  for (const { edge, isConnected } of shown) {
    if (!isConnected) continue;
    for (const name of [edge.from.name, ...edge.reader.feeds]) degree.set(name, (degree.get(name) ?? 0) + 1);
  }
  const busiest = [...degree].filter(([name]) => name !== "resid_post").sort((a, b) => b[1] - a[1]).slice(0, 8);
  const facts = [fact("edges", whole(size)), fact("of all edges", `${(100 * size / DATA.graph.num_edges).toPrecision(2)} %`)];
  for (const name of ["kl", "error", "exact_match"]) {
    const metric = metricsOf(r).find((m) => m.name === name);
    if (metric) facts.push(fact(metric.label, `${r.curve.sizes.includes(size) ? "" : "≈ "}${short(valueAt(r, metric, size))}`));
  }
  const failures = promptsOf(r).length ? failedPrompts(r, size) : null;
  return [
    h("h2", { text: r.title || r.name }),
    r.about ? h("p", { class: "note", text: r.about }) : null,
    h("div", { class: "facts" }, facts),
    failures && h("p", {}, failures.failed.length
      ? [`Of ${plural(failures.all, "prompt")} shown here, the circuit answers `, h("b", { text: `${failures.failed.length} differently` }), ": ",
        ...failures.failed.slice(0, 10).flatMap((i, n) => [n ? ", " : "", button(`prompt ${i + 1}`, () => change({ tab: "prompts", prompt: i }), { class: "link" })])]
      : `On all ${failures.all} prompts shown here, the circuit gives the full model's answer.`),
    table("What feeds the output", ["from", "score", "rank", ...(r.measured ? ["if cut"] : [])],
      toOutput.slice(0, 12).map((edge) => [nodeLink(edge.from.name), edgeLink(edge, scoreText(r, edge)), rankText(r, edge),
        ...(r.measured ? [cutCell(r, edge.from.name)] : [])]), { numeric: [1, 2, 3] }),
    table("Nodes with the most edges", ["node", "edges", ...(r.measured ? ["if cut"] : [])],
      busiest.map(([name, count]) => [nodeLink(name), String(count), ...(r.measured ? [cutCell(r, name)] : [])]), { numeric: [1, 2] }),
    h("p", { class: "note", text: "Click a node or an edge, or find one by name. Drag the slider to change the size. Press ? for the keys." }),
  ];
}

function cutCell(r, name) {
  const effect = effectText(r, "nodes", name);
  return effect ? `${effect.label} ${short(effect.after)}` : "–";
}

function nodePanel(r, node) {
  const edges = shownEdges().map(({ edge }) => edge);
  const writes = edges.filter((edge) => edge.from === node).sort(byImportance(r));
  const reads = edges.filter((edge) => edge.reader.feeds.includes(node.name)).sort(byImportance(r));
  const isPinned = state.pins.includes(node.name);
  const inChosen = circuitAt(r, r.chosen.edges ? "chosen" : r.chosen.size).edges.some((e) => e.from === node);
  const groupNote = node.type === "head" && GROUPED
    ? `Shares key and value ${node.layer}.${Math.floor(node.head / (HEADS / KV_HEADS))} with the other heads of its group.` : null;
  return [
    h("div", { class: "bar" }, h("h2", { text: node.title }), h("code", { text: node.name }), h("span", { class: "spring" }),
      button(isPinned ? "unpin" : "pin", () => togglePin(node.name), { "aria-pressed": String(isPinned) }),
      button("✕", () => select(""), { "aria-label": "Close" })),
    r.labels[node.name] ? h("p", {}, h("span", { class: "label", text: r.labels[node.name] })) : null,
    groupNote ? h("p", { class: "note", text: groupNote }) : null,
    RUNS.length > 1 ? runsOfNode(node) : null,
    node.type === "output" ? null : effectPanel(r, "nodes", node.name, inChosen),
    node.type === "embed" ? null : edgeTable(r, "Reads", reads, (edge) => nodeLink(edge.from.name), "from"),
    node.type === "output" ? null : edgeTable(r, "Writes to", writes, (edge) => readerLink(edge.reader), "to"),
    attentionPanel(r, node),
    node.type === "output" ? null : pathsPanel(r, edges, node),
  ];
}

const expanded = new Set(); // captions of tables that are shown whole

function edgeTable(r, caption, edges, end, heading) {
  const count = expanded.has(caption) ? MAX_ROWS : 7;
  const rows = edges.slice(0, count).map((edge) => [end(edge), kindMark(edge.reader.kind), edgeLink(edge, scoreText(r, edge)), rankText(r, edge)]);
  const toggle = () => {
    if (!expanded.delete(caption)) expanded.add(caption);
    drawPanel();
  };
  const more = edges.length > 7 ? button(expanded.has(caption) ? "show fewer" : `show ${Math.min(edges.length, MAX_ROWS) - 7} more`, toggle, { class: "quiet" }) : null;
  return h("section", {}, table(`${caption} (${edges.length})`, [heading, "as", "score", "rank"], rows, { numeric: [2, 3] }), more);
}

function pathsPanel(r, edges, node) {
  const paths = strongestPaths(r, edges, node.name);
  return h("section", {}, h("h3", { text: "Strongest paths to the output" }),
    paths.length ? h("ol", { class: "paths" }, paths.map((path) => h("li", {}, nodeLink(node.name),
      path.edges.flatMap((edge, i) => {
        const next = path.edges[i + 1]?.from.name ?? "resid_post";
        return [h("span", { class: `arrow ${edge.reader.kind}`, text: " → ", title: KINDS[edge.reader.kind] }), nodeLink(next)];
      }),
      h("span", { class: "note", text: ` weakest score ${r.importance ? short(path.strength) : "–"}` }))))
      : h("p", { class: "note", text: "At this size no path of shown edges leads to the output." }));
}

function edgePanel(r, edge) {
  const rank = r.rank.get(edge.key);
  const { edges, kept } = circuitAt(r, state.size);
  const isIn = edges.includes(edge);
  const status = !isIn ? "not in the circuit at this size" : kept.has(edge.key) ? "in the circuit" : "in the circuit, but dangling: on no path from the input to the output";
  return [
    h("div", { class: "bar" }, h("h2", { text: `${edge.from.title} → ${edge.reader.title}` }), h("span", { class: "spring" }),
      button("✕", () => select(""), { "aria-label": "Close" })),
    h("p", {}, kindMark(edge.reader.kind), " ", h("code", { text: `${edge.from.name} → ${edge.reader.name}` })),
    h("div", { class: "facts" },
      fact("score", scoreText(r, edge)),
      fact("rank", rank === undefined || !r.importance ? "–" : whole(rank + 1)),
      fact("of all edges", rank === undefined || !r.importance ? "–" : `${(100 * (rank + 1) / DATA.graph.num_edges).toPrecision(2)} %`)),
    h("p", { class: "note", text: rank === undefined ? `Not among the ${whole(r.limit)} edges of this run that the page carries.`
      : r.importance ? `Circuits of ${whole(rank + 1)} or more edges have it; now it is ${status}.` : `It is ${status}.` }),
    RUNS.length > 1 ? table("In each run", ["run", "rank", "in the circuit"], RUNS.map((one) => [one.name, rankText(one, edge), circuitAt(one, state.size).edges.includes(edge) ? "yes" : "no"]), { numeric: [1] }) : null,
    effectPanel(r, "edges", `${edge.from.name} ${edge.reader.name}`, isIn),
    h("section", {}, h("h3", { text: "Ends" }), h("p", {}, "from ", nodeLink(edge.from.name), " into ",
      edge.reader.feeds.flatMap((name, i) => [i ? ", " : "", nodeLink(name)]))),
    r.importance && rank !== undefined && rank < r.limit
      ? button(`Show the circuit in which it appears (${plural(rank + 1, "edge")})`, () => change({ size: rank + 1 })) : null,
    isIn ? pathsPanel(r, edges, NODES.get(edge.reader.feeds[0])) : null,
  ];
}

// ------------------------------------------------------------------------------- prompts

// The answers of a prompt's circuit of the measured size next to the size shown.
function answersAt(r, prompt, size) {
  const { sizes } = r.measured;
  const index = nearest([0, ...sizes], size);
  return index === 0 ? { size: 0, ...prompt.answers.empty } : { size: sizes[index - 1], ...prompt.answers.circuits[index - 1] };
}

const firsts = (top) => top.map((row) => row[0]?.[0]).join("\u0000");

function failedPrompts(r, size) {
  const failed = promptsOf(r).flatMap((p, i) => (firsts(answersAt(r, p, size).top) !== firsts(p.answers.full) ? [i] : []));
  return { failed, all: promptsOf(r).length };
}

function promptsPanel(r) {
  const prompts = promptsOf(r);
  if (!prompts.length) {
    return [h("h2", { text: "Prompts" }), h("p", { class: "note", text: "This page has no prompts. `edgeprune page RUN` measures answers, attention and cuts for a run." })];
  }
  const size = sizeOf();
  const current = promptOf(r);
  const at = answersAt(r, current, size);
  const metric = r.measured.distance;
  const heading = { typical: "Typical", worst: "Where the chosen circuit is least faithful" };
  const list = ["typical", "worst"].flatMap((kind) => [h("h4", { text: heading[kind] }), h("ul", { class: "prompts" }, prompts.flatMap((prompt, i) => {
    if (prompt.kind !== kind) return [];
    const answer = answersAt(r, prompt, size);
    const same = firsts(answer.top) === firsts(prompt.answers.full);
    return h("li", {}, h("button", { type: "button", class: "prompt", "aria-pressed": String(prompt === current), onclick: () => change({ prompt: i, token: -1 }) },
      h("span", { class: `verdict ${same ? "same" : "other"}`, text: same ? "✓" : "✗", title: same ? "the full model's answer" : "another answer than the full model's" }),
      h("span", { class: "text", dir: "auto", title: wholeText(prompt), text: brief(prompt) }),
      h("span", { class: "note", text: `${metric} ${short(answer.distance)}` })));
  }))]);
  const other = current.clean.map((token, i) => token !== current.corrupted[i]);
  const line = (side) => h("p", { class: "line", dir: "auto" }, current[side].map((token, i) =>
    h("span", { class: `token${other[i] ? " differs" : ""}${current.predicted.includes(i) ? " predicts" : ""}`, text: tokenText(token), title: `token ${i + 1}` })));
  const note = at.size === size ? `The circuit has ${plural(size, "edge")}.` : `Measured at ${plural(at.size, "edge")}, the size next to ${whole(size)}.`;
  const isIn = r.measured.split ? `${r.measured.split} prompts` : "prompts";
  return [
    h("h2", { text: "Prompts" }),
    h("p", { class: "note", text: `From the ${isIn}. ✗: at the size shown, the circuit answers differently from the full model.` }),
    ...list,
    h("h3", { text: `Prompt ${prompts.indexOf(current) + 1}` }),
    h("h4", { text: "clean" }), line("clean"), h("h4", { text: "corrupted" }), line("corrupted"),
    h("p", { class: "note", text: "Marked tokens differ between the two; after an underlined one an answer is predicted." }),
    ...current.predicted.map((place, row) => answersTable(r, current, at, row, place)),
    h("p", { class: "note", text: note }),
  ];
}

const wholeText = (prompt) => prompt.clean.map((t) => tokenText(t, 30).replace("␣", " ")).join("").trim();

// The end of a prompt, from which the answer is predicted.
function brief(prompt) {
  const text = wholeText(prompt);
  return text.length > 38 ? `…${text.slice(-37).replace(/^\S* /, "")}` : text;
}

function answersTable(r, prompt, at, row, place) {
  const columns = [["full model", prompt.answers.full], [`circuit, ${whole(at.size)} edges`, at.top], ["empty circuit", prompt.answers.empty.top]];
  const best = prompt.answers.full[row]?.[0]?.[0];
  const isShare = r.measured.output === "logits";
  const cell = (entry) => {
    if (!entry) return "";
    const [token, value] = entry;
    const element = h("span", { class: `answer${token === best ? " best" : ""}`, dir: "auto" }, h("span", { class: "token", text: tokenText(token, 18) }), h("span", { class: "value", text: isShare ? `${(100 * value).toFixed(value < 0.0995 ? 1 : 0)} %` : short(value) }));
    element.style.setProperty("--share", isShare ? value : 0);
    return element;
  };
  const length = Math.max(...columns.map(([, top]) => top[row]?.length ?? 0));
  const rows = Array.from({ length }, (_, i) => columns.map(([, top]) => cell(top[row]?.[i])));
  const after = prompt.predicted.length > 1 ? ` after “${tokenText(prompt.clean[place], 14)}”` : "";
  const element = table(`Answers${after}`, columns.map(([name]) => name), rows);
  element.classList.add("answers");
  return element;
}

// ------------------------------------------------------------------------------- edges

function edgesPanel(r) {
  const shown = shownEdges().sort((a, b) => importanceOf(r, b.edge) - importanceOf(r, a.edge));
  const rows = shown.slice(0, MAX_ROWS).map(({ edge, isConnected, runs }) => [
    nodeLink(edge.from.name), readerLink(edge.reader), kindMark(edge.reader.kind),
    edgeLink(edge, scoreText(r, edge)), isConnected ? "" : "dangling",
    ...(state.compare ? [runs.map((i) => RUNS[i].name).join(", ")] : [])]);
  const copyAll = button(`copy all ${whole(shown.length)} edges`, () =>
    copyText(["from\tto\tscore\trank", ...shown.map(({ edge }) => [edge.from.name, edge.reader.name, scoreText(r, edge), rankText(r, edge)].join("\t"))].join("\n") + "\n", "Edges copied"));
  return [
    h("h2", { text: `${plural(shown.length, "edge")} shown` }), copyAll,
    table("Edges, the strongest first", ["from", "into", "as", "score", "", ...(state.compare ? ["runs"] : [])], rows, { numeric: [3] }),
    shown.length > MAX_ROWS ? h("p", { class: "note", text: `and ${whole(shown.length - MAX_ROWS)} weaker ones` }) : null,
  ];
}

// ------------------------------------------------------------------------------- groups

function groupsPanel() {
  const name = h("input", { type: "text", placeholder: "Name of the group", "aria-label": "Name of the group", maxlength: 60 });
  const make = () => groupPins(name.value);
  name.addEventListener("keydown", (event) => event.key === "Enter" && make());
  return [
    h("h2", { text: "Groups" }),
    h("p", { class: "note", text: "Pin nodes (Shift and click, or Enter at a node), then make them a group. A closed group is drawn as one node." }),
    h("p", {}, state.pins.length ? ["Pinned: ", state.pins.flatMap((p, i) => [i ? ", " : "", nodeLink(p)]), " ", button("unpin all", () => change({ pins: [] }), { class: "quiet" })] : "Nothing is pinned."),
    h("div", { class: "bar" }, name, button("Group the pinned nodes", make, { disabled: state.pins.length < 2 })),
    ...state.groups.map((group, i) => h("section", { class: "group" },
      h("div", { class: "bar" }, h("h3", { dir: "auto", text: tokenText(group.name, 60) }), h("span", { class: "spring" }),
        button(group.collapsed ? "open" : "close", () => changeGroup(i, { collapsed: !group.collapsed }), { "aria-label": `${group.collapsed ? "Open" : "Close"} the group ${group.name}` }),
        button("remove", () => changeGroup(i, null), { "aria-label": `Remove the group ${group.name}` })),
      h("p", {}, group.members.flatMap((m, n) => [n ? ", " : "", nodeLink(m)])))),
  ];
}

// ------------------------------------------------------------------------------- runs

function runsOfNode(node) {
  const rows = RUNS.map((r) => {
    const { edges, kept } = circuitAt(r, state.size);
    const reads = edges.filter((e) => e.reader.feeds.includes(node.name) && kept.has(e.key)).length;
    const writes = edges.filter((e) => e.from === node && kept.has(e.key)).length;
    return [r.name, String(reads), String(writes), cutCell(r, node.name)];
  });
  return table("In each run", ["run", "reads", "writes", "if cut"], rows, { numeric: [1, 2, 3] });
}

function runsPanel(r) {
  const sets = RUNS.map((one) => new Set(circuitAt(one, state.size).edges.map((e) => e.key)));
  const all = [...new Set(sets.flatMap((set) => [...set]))];
  const count = (key) => sets.filter((set) => set.has(key)).length;
  const shared = all.filter((key) => count(key) === RUNS.length);
  const own = RUNS.map((_, i) => all.filter((key) => count(key) === 1 && sets[i].has(key)));
  const iou = (a, b) => {
    const both = [...sets[a]].filter((key) => sets[b].has(key)).length;
    return both / (sets[a].size + sets[b].size - both || 1);
  };
  const rows = RUNS.map((one, i) => {
    const metric = metricsOf(one)[0];
    const size = state.size === "chosen" ? one.chosen.size : Math.min(state.size, one.limit);
    return [h("span", {}, compareMark(i), one.name), whole(sets[i].size), whole(own[i].length), metric ? short(valueAt(one, metric, size)) : "–"];
  });
  const strongest = (keys, one) => keys.map((key) => EDGES.get(key)).sort(byImportance(one)).slice(0, 15);
  return [
    h("h2", { text: "Runs compared" }),
    h("p", { class: "note", text: "All runs at the same number of edges; set it with the slider." }),
    h("label", { class: "check" }, checkbox(state.compare, (on) => change({ compare: on })), " draw all runs, coloured by which have an edge"),
    h("div", { class: "facts" }, fact("edges in all runs", whole(shared.length)), fact("edges in any", whole(all.length)), RUNS.length === 2 ? fact("intersection over union", iou(0, 1).toFixed(2)) : null),
    table("Runs", ["run", "edges", "only here", metricsOf(r)[0]?.label ?? "KL"], rows, { numeric: [1, 2, 3] }),
    RUNS.length > 2 ? table("Intersection over union", ["", ...RUNS.map((one) => one.name)], RUNS.map((one, a) => [one.name, ...RUNS.map((_, b) => iou(a, b).toFixed(2))])) : null,
    ...RUNS.map((one, i) => table(`Only in ${one.name} (${own[i].length})`, ["edge", "score here", ...RUNS.filter((o) => o !== one).map((o) => `rank in ${o.name}`)],
      strongest(own[i], one).map((edge) => [edgeLink(edge, edge.name.replace(">", " → ")), scoreText(one, edge), ...RUNS.filter((o) => o !== one).map((o) => rankText(o, edge))]), { numeric: RUNS.map((_, n) => n + 1) })),
  ];
}

function compareMark(index) {
  const mark = h("span", { class: "swatch" });
  const colors = palette(isDark());
  mark.style.background = colors.only[index % colors.only.length];
  return mark;
}

function checkbox(checked, action) {
  const element = h("input", { type: "checkbox", onchange: (event) => action(event.target.checked) });
  element.checked = checked;
  return element;
}

// The other panels: all edges, groups of nodes, and the comparison of runs.

// ------------------------------------------------------------------------------- edges

function edgesPanel(r) {
  const shown = shownEdges().sort((a, b) => importanceOf(r, b.edge) - importanceOf(r, a.edge));
  const rows = shown
    .slice(0, MAX_ROWS)
    .map(({ edge, isConnected, runs }) => [
      nodeLink(edge.from.name),
      readerLink(edge.reader),
      kindMark(edge.reader.kind),
      edgeLink(edge, scoreText(r, edge)),
      isConnected ? "" : "dangling",
      ...(state.compare ? [runs.map((i) => RUNS[i].name).join(", ")] : []),
    ]);
  const copyAll = button(`copy all ${whole(shown.length)} edges`, () =>
    copyText(
      [
        "from\tto\tscore\trank",
        ...shown.map(({ edge }) =>
          [edge.from.name, edge.reader.name, scoreText(r, edge), rankText(r, edge)].join("\t"),
        ),
      ].join("\n") + "\n",
      "Edges copied",
    ),
  );
  return [
    h("h2", { text: `${plural(shown.length, "edge")} ${state.compare ? "in any run" : "shown"}` }),
    state.compare ? note(`Scores are those of ${r.name}.`) : null,
    copyAll,
    table(
      "Edges, the strongest first",
      ["from", "into", "as", "score", "", ...(state.compare ? ["runs"] : [])],
      rows,
      { numeric: [3] },
    ),
    shown.length > MAX_ROWS ? note(`and ${whole(shown.length - MAX_ROWS)} weaker ones`) : null,
  ];
}

// ------------------------------------------------------------------------------- groups

function groupsPanel() {
  const name = h("input", {
    type: "text",
    placeholder: "Name of the group",
    "aria-label": "Name of the group",
    maxlength: 60,
  });
  const make = () => groupPins(name.value);
  name.addEventListener("keydown", (event) => event.key === "Enter" && make());
  return [
    h("h2", { text: "Groups" }),
    note(
      "Pin nodes (Shift and click, or Enter at a node), then make them a group. A closed group is drawn as one node.",
    ),
    h(
      "p",
      {},
      state.pins.length
        ? [
            "Pinned: ",
            state.pins.flatMap((p, i) => [i ? ", " : "", nodeLink(p)]),
            " ",
            button("unpin all", () => change({ pins: [] }), { class: "quiet" }),
          ]
        : "Nothing is pinned.",
    ),
    h(
      "div",
      { class: "bar" },
      name,
      button("Group the pinned nodes", make, { disabled: state.pins.length < 2 }),
    ),
    ...state.groups.map((group, i) =>
      h(
        "section",
        { class: "group" },
        h(
          "div",
          { class: "bar" },
          h("h3", { dir: "auto", text: tokenText(group.name, 60) }),
          h("span", { class: "spring" }),
          button(
            group.collapsed ? "open" : "close",
            () => changeGroup(i, { collapsed: !group.collapsed }),
            { "aria-label": `${group.collapsed ? "Open" : "Close"} the group ${group.name}` },
          ),
          button("remove", () => changeGroup(i, null), {
            "aria-label": `Remove the group ${group.name}`,
          }),
        ),
        h(
          "p",
          {},
          group.members.flatMap((m, n) => [n ? ", " : "", nodeLink(m)]),
        ),
      ),
    ),
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
  return table(
    "In each run",
    ["run", "reads", "writes", `${RUNS[0].measured?.distance ?? "KL"} if cut`],
    rows,
    { numeric: [1, 2, 3] },
  );
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
  const metrics = metricsOf(r).filter(({ name }) => ["kl", "error", "exact_match"].includes(name));
  const rows = RUNS.map((one, i) => [
    h("span", {}, compareMark(i), one.name),
    whole(sets[i].size),
    whole(own[i].length),
    ...metrics.map(({ name }) => {
      const metric = metricsOf(one).find((m) => m.name === name);
      return metric ? valueText(one, metric) : "–";
    }),
  ]);
  const nodes = RUNS.map((one) => nodesOf(circuitAt(one, state.size)));
  const ownNodes = (i) =>
    [...nodes[i]].filter((name) => nodes.every((set, other) => other === i || !set.has(name)));
  const strongest = (keys, one) =>
    keys
      .map((key) => EDGES.get(key))
      .sort(byImportance(one))
      .slice(0, 15);
  return [
    h("h2", { text: "Runs compared" }),
    note("All runs at the same number of edges; set it with the slider."),
    h(
      "label",
      { class: "check" },
      checkbox(state.compare, (on) => change({ compare: on })),
      " draw all runs, coloured by which have an edge",
    ),
    h(
      "div",
      { class: "facts" },
      fact("edges in all runs", whole(shared.length)),
      fact("edges in any", whole(all.length)),
      RUNS.length === 2 ? fact("intersection over union", iou(0, 1).toFixed(2)) : null,
    ),
    table("Runs", ["run", "edges", "only here", ...metrics.map((m) => m.label)], rows, {
      numeric: [1, 2, 3, 4],
      about: [...new Set(RUNS.map(approximation))].filter(Boolean).join(" "),
    }),
    table(
      "Nodes in one run only",
      ["run", "nodes"],
      RUNS.map((one, i) => [
        h("span", {}, compareMark(i), one.name),
        ownNodes(i).flatMap((name, n) => [n ? ", " : "", nodeLink(name)]),
      ]),
      { about: "Without nodes at which only dangling edges meet." },
    ),
    RUNS.length > 2
      ? table(
          "Intersection over union",
          ["", ...RUNS.map((one) => one.name)],
          RUNS.map((one, a) => [one.name, ...RUNS.map((_, b) => iou(a, b).toFixed(2))]),
        )
      : null,
    ...RUNS.map((one, i) =>
      table(
        `Only in ${one.name} (${own[i].length})`,
        ["edge", "score here", ...RUNS.filter((o) => o !== one).map((o) => `rank in ${o.name}`)],
        strongest(own[i], one).map((edge) => [
          edgeLink(edge, edge.title),
          scoreText(one, edge),
          ...RUNS.filter((o) => o !== one).map((o) => rankText(o, edge)),
        ]),
        { numeric: RUNS.map((_, n) => n + 1) },
      ),
    ),
  ];
}

// Names of the nodes of a circuit, but for those that only dangling edges have.
function nodesOf({ edges, kept }) {
  const used = edges.filter((edge) => kept.has(edge.key));
  const names = new Set(used.map((edge) => edge.from.name));
  return new Set([...NODES.keys()].filter((name) => names.has(name)));
}

function compareMark(index) {
  const mark = h("span", { class: "swatch" });
  const colors = palette(isDark());
  mark.style.background = colors.only[index % colors.only.length];
  return mark;
}

function checkbox(checked, action) {
  const element = h("input", {
    type: "checkbox",
    onchange: (event) => action(event.target.checked),
  });
  element.checked = checked;
  return element;
}

// What is selected: an overview, a node or an edge.

function detailsPanel(r) {
  if (NODES.has(state.select)) return nodePanel(r, NODES.get(state.select));
  const edge = state.select && edgeByName(state.select);
  return edge ? edgePanel(r, edge) : overviewPanel(r);
}

function overviewPanel(r) {
  const shown = shownEdges();
  const toOutput = shown
    .map(({ edge }) => edge)
    .filter((edge) => edge.reader.kind === "output")
    .sort(byImportance(r));
  const cutColumn = r.measured ? [`${r.measured.distance} if cut`] : [];
  const cut = (name) => (r.measured ? [cutCell(r, name)] : []);
  return [
    h("h2", { text: r.title || r.name }),
    r.about ? note(r.about) : null,
    RUNS.length > 1 ? whoseNote(r) : null,
    h("div", { class: "facts" }, sizeFacts(r)),
    r.curve
      ? note(
          `Measured on ${plural(r.curve.num_examples, `${r.curve.prompts} prompt`)}. ${approximation(r)}`,
        )
      : null,
    promptsOf(r).length ? failuresNote(r) : null,
    longTable(
      "What feeds the output",
      ["from", "score", "rank", ...cutColumn],
      toOutput,
      (edge) => [
        nodeLink(edge.from.name),
        edgeLink(edge, scoreText(r, edge)),
        rankText(r, edge),
        ...cut(edge.from.name),
      ],
      { numeric: [1, 2, 3], rows: 12, about: aboutCuts(r) },
    ),
    table(
      "Nodes with the most edges",
      ["node", "edges", ...cutColumn],
      busiestNodes(shown).map(([name, count]) => [nodeLink(name), String(count), ...cut(name)]),
      { numeric: [1, 2], about: aboutCuts(r) },
    ),
    note(
      "Click a node or an edge, or find one by name. Drag the slider to change the size. " +
        "Press ? for the keys.",
    ),
  ];
}

// The size, and how good the circuit is.
function sizeFacts(r) {
  const size = sizeOf();
  const facts = [
    fact("edges", whole(size)),
    fact("of all edges", `${((100 * size) / DATA.graph.num_edges).toPrecision(2)} %`),
  ];
  for (const metric of metricsOf(r)) {
    if (!["kl", "error", "exact_match"].includes(metric.name)) continue;
    facts.push(fact(metric.label, valueText(r, metric), approximation(r) || metric.description));
  }
  return facts;
}

// Of which run the details are, where there are several.
const whoseNote = (r) =>
  note(
    state.compare
      ? `Scores, ranks and measurements are those of ${r.name}; edges are those in any run.`
      : `Run shown: ${r.name}.`,
  );

// On which prompts the circuit does not give the full model's answer.
function failuresNote(r) {
  const { failed, all } = failedPrompts(r, sizeOf());
  if (!failed.length) {
    return h("p", {
      text: `On all ${all} prompts shown here, the circuit gives the full model's answer${sizeNote(r)}.`,
    });
  }
  const link = (i) =>
    button(`prompt ${i + 1}`, () => change({ tab: "prompts", prompt: i }), { class: "link" });
  return h(
    "p",
    {},
    `Of ${plural(all, "prompt")} shown here, half of them the hardest, the circuit answers `,
    h("b", { text: `${failed.length} differently` }),
    `${sizeNote(r)}: `,
    failed.slice(0, 10).flatMap((i, n) => [n ? ", " : "", link(i)]),
  );
}

// [name, number of edges] of the nodes at which most edges meet; dangling edges do not count.
function busiestNodes(shown) {
  const counts = new Map();
  for (const { edge, isConnected } of shown) {
    if (!isConnected) continue;
    for (const name of [edge.from.name, ...edge.reader.feeds]) {
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
  }
  counts.delete("resid_post");
  return [...counts].sort((a, b) => b[1] - a[1]).slice(0, 8);
}

// By how much cutting a node from the chosen circuit moves it from the full model.
function cutCell(r, name) {
  const effect = effectText(r, "nodes", name);
  return effect ? changeText(effect) : "–";
}

function nodePanel(r, node) {
  const edges = shownEdges().map(({ edge }) => edge);
  const writes = edges.filter((edge) => edge.from === node).sort(byImportance(r));
  const reads = edges.filter((edge) => edge.reader.feeds.includes(node.name)).sort(byImportance(r));
  const isPinned = state.pins.includes(node.name);
  const inChosen = circuitAt(r, r.chosen.edges ? "chosen" : r.chosen.size).edges.some(
    (e) => e.from === node,
  );
  const groupNote =
    node.type === "head" && GROUPED
      ? `Shares key and value ${node.layer}.${Math.floor(node.head / (HEADS / KV_HEADS))} with the other heads of its group.`
      : null;
  return [
    h(
      "div",
      { class: "bar close" },
      h("h2", { text: node.title }),
      h("code", { text: node.name }),
      h("span", { class: "spring" }),
      button(isPinned ? "unpin" : "pin", () => togglePin(node.name), {
        "aria-pressed": String(isPinned),
      }),
      button("✕", () => select(""), { "aria-label": "Close" }),
    ),
    r.labels[node.name]
      ? h("p", {}, h("span", { class: "label", text: r.labels[node.name] }))
      : null,
    groupNote ? note(groupNote) : null,
    RUNS.length > 1 ? [whoseNote(r), runsOfNode(node)] : null,
    node.type === "output"
      ? null
      : (explainedPanel(r, "nodes", node.name) ?? effectPanel(r, "nodes", node.name, inChosen)),
    attentionPanel(r, node),
    node.type === "embed"
      ? null
      : edgeTable(r, "Reads", reads, (edge) => nodeLink(edge.from.name), "from"),
    node.type === "output"
      ? null
      : edgeTable(r, "Writes to", writes, (edge) => readerLink(edge.reader), "to"),
    node.type === "output" ? null : pathsPanel(r, edges, node),
    tokensOfNode(r, node),
  ].flat();
}

const expanded = new Set(); // captions of tables that are shown whole

function edgeTable(r, caption, edges, end, heading) {
  const row = (edge) => [
    end(edge),
    kindMark(edge.reader.kind),
    edgeLink(edge, scoreText(r, edge)),
    rankText(r, edge),
  ];
  return longTable(caption, [heading, "as", "score", "rank"], edges, row, { numeric: [2, 3] });
}

// A table with a row per item, of which some are shown at first.
function longTable(caption, columns, items, rowOf, { rows = 7, ...options }) {
  const isWhole = expanded.has(caption);
  const shown = items.slice(0, isWhole ? MAX_ROWS : rows);
  const toggle = () => {
    if (!expanded.delete(caption)) expanded.add(caption);
    drawPanel();
  };
  const all =
    items.length > MAX_ROWS
      ? `the first ${MAX_ROWS} of ${whole(items.length)}`
      : `all ${items.length}`;
  const more = button(isWhole ? "show fewer" : `show ${all}`, toggle, {
    class: "quiet",
    id: `more ${caption}`,
  });
  return h(
    "section",
    {},
    table(`${caption} (${whole(items.length)})`, columns, shown.map(rowOf), options),
    items.length > rows ? more : null,
  );
}

// Paths over these edges from a node; those through one edge, if it alone leaves the node.
function pathsPanel(r, edges, node) {
  const paths = strongestPaths(r, edges, node.name);
  return h(
    "section",
    {},
    h("h3", { text: "Strongest paths to the output" }),
    paths.length
      ? h(
          "ol",
          { class: "paths" },
          paths.map((path) =>
            h(
              "li",
              {},
              nodeLink(node.name),
              path.edges.flatMap((edge, i) => {
                const next = path.edges[i + 1]?.from.name ?? "resid_post";
                return [
                  h("span", {
                    class: `arrow ${edge.reader.kind}`,
                    text: " → ",
                    title: KINDS[edge.reader.kind],
                  }),
                  nodeLink(next),
                ];
              }),
              h("span", {
                class: "note",
                text: ` weakest score ${r.importance ? short(path.strength) : "–"}`,
              }),
            ),
          ),
        )
      : note("At this size no path of shown edges leads to the output."),
  );
}

function edgePanel(r, edge) {
  const rank = r.rank.get(edge.key);
  const { edges, kept } = circuitAt(r, state.size);
  const isIn = edges.includes(edge);
  const status = !isIn
    ? "not in the circuit at this size"
    : kept.has(edge.key)
      ? "in the circuit"
      : "in the circuit, but dangling: on no path from the input to the output";
  return [
    h(
      "div",
      { class: "bar close" },
      h("h2", { text: edge.title }),
      h("span", { class: "spring" }),
      button("✕", () => select(""), { "aria-label": "Close" }),
    ),
    h(
      "p",
      {},
      kindMark(edge.reader.kind),
      " ",
      h("code", { text: `${edge.from.name} → ${edge.reader.name}` }),
    ),
    h(
      "div",
      { class: "facts" },
      fact("score", scoreText(r, edge)),
      fact("rank", rank === undefined || !r.importance ? "–" : whole(rank + 1)),
      fact(
        "of all edges",
        rank === undefined || !r.importance
          ? "–"
          : `${((100 * (rank + 1)) / DATA.graph.num_edges).toPrecision(2)} %`,
      ),
    ),
    note(
      rank === undefined
        ? `Not among the ${whole(r.limit)} edges of this run that the page carries.`
        : r.importance
          ? `Circuits of ${whole(rank + 1)} or more edges have it; now it is ${status}.`
          : `It is ${status}.`,
    ),
    RUNS.length > 1
      ? table(
          "In each run",
          ["run", "rank", "in the circuit"],
          RUNS.map((one) => [
            one.name,
            rankText(one, edge),
            circuitAt(one, state.size).edges.includes(edge) ? "yes" : "no",
          ]),
          { numeric: [1] },
        )
      : null,
    risePanel(r, edge),
    explainedPanel(r, "edges", `${edge.from.name} ${edge.reader.name}`) ??
      effectPanel(r, "edges", `${edge.from.name} ${edge.reader.name}`, isIn),
    h(
      "section",
      {},
      h("h3", { text: "Ends" }),
      h(
        "p",
        {},
        "from ",
        nodeLink(edge.from.name),
        " into ",
        edge.reader.feeds.flatMap((name, i) => [i ? ", " : "", nodeLink(name)]),
      ),
    ),
    r.importance && rank !== undefined && rank < r.limit
      ? button(`Show the circuit in which it appears (${plural(rank + 1, "edge")})`, () =>
          change({ size: rank + 1 }),
        )
      : null,
    isIn
      ? pathsPanel(
          r,
          edges.filter((other) => other === edge || other.from !== edge.from),
          edge.from,
        )
      : null,
  ];
}

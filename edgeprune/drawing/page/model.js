// The data of the page, and pure functions of it.
//
// A node is a writer or the output. A reader is where an edge ends: the query, key or value of a
// head (of a group of heads, where these share keys and values), an MLP, or the output.

const DATA = JSON.parse($("data").textContent);
const { layers: LAYERS, heads: HEADS, kv_heads: KV_HEADS } = DATA.graph;
const GROUPED = HEADS !== KV_HEADS;
const KINDS = { q: "query", k: "key", v: "value", mlp: "MLP", output: "output" };
const EMBEDDINGS = {
  tok_embeds: "Token embedding",
  pos_embeds: "Position embedding",
  embeds: "Embedding",
};

const NODES = new Map([...DATA.graph.writers, "resid_post"].map((name) => [name, makeNode(name)]));
const READERS = DATA.graph.readers.map(makeReader);
const READER = new Map(READERS.map((reader) => [reader.name, reader]));
const EDGES = new Map(); // by key; edges of all runs
const RUNS = DATA.runs.map(makeRun);

function makeNode(name) {
  if (name === "resid_post") return { name, type: "output", layer: LAYERS, title: "Output" };
  if (name in EMBEDDINGS) return { name, type: "embed", layer: -1, title: EMBEDDINGS[name] };
  const [, layer, head] = name.match(/^[am](\d+)(?:\.h(\d+))?$/).map(Number);
  if (name[0] === "m") return { name, type: "mlp", layer, title: `MLP ${layer}` };
  return { name, type: "head", layer, head, title: `Head ${layer}.${head}` };
}

function makeReader(name, index) {
  if (name === "resid_post") {
    return { name, index, kind: "output", layer: LAYERS, feeds: ["resid_post"], title: "Output" };
  }
  const layer = Number(name.match(/\d+/)[0]);
  if (name[0] === "m") {
    return { name, index, kind: "mlp", layer, feeds: [name], title: `MLP ${layer}` };
  }
  const [, number, kind] = name.match(/\.h(\d+)\.([qkv])$/);
  const head = Number(number);
  const size = kind === "q" ? 1 : HEADS / KV_HEADS;
  const feeds = Array.from({ length: size }, (_, i) => `a${layer}.h${head * size + i}`);
  const whose =
    size > 1
      ? `Heads ${layer}.${head * size}–${layer}.${head * size + size - 1}`
      : `Head ${layer}.${head}`;
  return { name, index, kind, layer, head, feeds, title: `${whose}, ${KINDS[kind]}` };
}

// The edge from a writer to a reader, by their indices; the same object in all runs.
function edgeOf(w, r) {
  const key = w * READERS.length + r;
  if (!EDGES.has(key)) {
    const from = NODES.get(DATA.graph.writers[w]);
    const reader = READERS[r];
    const title = `${from.title} → ${reader.title}`;
    EDGES.set(key, { key, from, reader, name: `${from.name}>${reader.name}`, title });
  }
  return EDGES.get(key);
}

function edgeByName(name) {
  const [writer, reader] = name.split(">");
  const w = DATA.graph.writers.indexOf(writer);
  return w >= 0 && READER.has(reader) ? edgeOf(w, READER.get(reader).index) : null;
}

function makeRun(data, index) {
  const pairs = ([writers, readers]) => writers.map((w, i) => edgeOf(w, readers[i]));
  const edges = pairs(data.edges);
  const importance = data.scores && data.scores.map((s) => (data.by_magnitude ? Math.abs(s) : s));
  return {
    ...data,
    index,
    edges,
    importance,
    limit: edges.length,
    ordered: [...edges].sort((a, b) => a.reader.index - b.reader.index),
    rank: new Map(edges.map((edge, rank) => [edge.key, rank])),
    labels: data.labels ?? {},
    chosen: { ...data.chosen, edges: data.chosen.edges && pairs(data.chosen.edges) },
  };
}

// ------------------------------------------------------------------------------- circuits

// The edges of a run at a size, the strongest first.
function circuitOf(run, size) {
  return size === "chosen" && run.chosen.edges
    ? run.chosen.edges
    : run.edges.slice(0, size === "chosen" ? run.chosen.size : size);
}

// Keys of the edges on some path from the input to the output; the others dangle.
// `ordered` are in the order of the forward pass.
function connected(ordered) {
  const hasInput = DATA.graph.writers[0] in EMBEDDINGS;
  const alive = new Set(hasInput ? Object.keys(EMBEDDINGS) : DATA.graph.writers);
  const fed = ordered.filter((edge) => {
    if (!alive.has(edge.from.name)) return false;
    for (const node of edge.reader.feeds) alive.add(node);
    return true;
  });
  const useful = new Set(["resid_post"]);
  const kept = new Set();
  for (const edge of fed.reverse()) {
    if (!edge.reader.feeds.some((node) => useful.has(node))) continue;
    useful.add(edge.from.name);
    kept.add(edge.key);
  }
  return kept;
}

// How important an edge is for a run; edges that it does not carry come last.
function importanceOf(run, edge) {
  const rank = run.rank.get(edge.key);
  return rank === undefined ? -Infinity : run.importance ? run.importance[rank] : 0;
}

// Up to `count` paths from a node to the output; a path is as strong as its weakest edge.
function strongestPaths(run, edges, start, count = 3) {
  const leaving = new Map();
  for (const edge of edges) {
    if (!leaving.has(edge.from.name)) leaving.set(edge.from.name, []);
    leaving.get(edge.from.name).push(edge);
  }
  const best = new Map([["resid_post", [{ strength: Infinity, edges: [] }]]]);
  const from = (name) => {
    if (!best.has(name)) {
      const paths = [];
      for (const edge of leaving.get(name) ?? []) {
        for (const node of edge.reader.feeds) {
          for (const rest of from(node)) {
            const strength = Math.min(importanceOf(run, edge), rest.strength);
            paths.push({ strength, edges: [edge, ...rest.edges], through: node });
          }
        }
      }
      paths.sort((a, b) => b.strength - a.strength || a.edges.length - b.edges.length);
      best.set(name, paths.slice(0, count));
    }
    return best.get(name);
  };
  return from(start);
}

// The measured size next to a size, on a logarithmic scale: its index in `sizes`.
function nearest(sizes, size) {
  const distance = (s) => Math.abs(Math.log((s || 0.5) / (size || 0.5)));
  return sizes.reduce((best, s, i) => (distance(s) < distance(sizes[best]) ? i : best), 0);
}

// What a text finds, the best first: nodes, by name or label; edges, by both ends ("0.13 2.10",
// "a0.h13 -> a2.h10.v"); prompts, by their words. Each is {title, name, note, go}, where `go` are
// the changes of the state that show it.
function search(text, run) {
  const query = text.trim().toLowerCase().replace(/\s+/g, " ");
  if (!query) return [];
  const nodes = [];
  for (const node of NODES.values()) {
    const label = (run.labels[node.name] ?? "").toLowerCase();
    const names = namesOf(node);
    const places = [
      names.includes(query),
      names.some((n) => n.startsWith(query)),
      label.includes(query),
      names.some((n) => n.includes(query)),
    ];
    const place = places.indexOf(true);
    if (place >= 0) nodes.push({ node, place });
  }
  nodes.sort((a, b) => a.place - b.place);
  return [
    ...nodes.slice(0, 12).map(({ node }) => ({
      title: node.title,
      name: node.name,
      node,
      go: { select: node.name, tab: "details" },
    })),
    ...edgesFound(query, run).map((edge) => ({
      title: edge.title,
      name: edge.name.replace(">", " → "),
      note: run.importance ? `rank ${run.rank.get(edge.key) + 1}` : "",
      go: { select: edge.name, tab: "details" },
    })),
    ...promptsFound(query, run).map((prompt) => ({
      title: `Prompt ${prompt + 1}`,
      name: brief(promptsOf(run)[prompt], 40),
      go: { prompt, token: -1, tab: "prompts" },
    })),
  ];
}

const namesOf = (node) => [
  node.name,
  node.title.toLowerCase(),
  node.type === "head" ? `${node.layer}.${node.head}` : node.name,
];

function edgesFound(query, run) {
  const [from, to, ...rest] = query.split(/ ?(?:->|→|>) ?/.test(query) ? / ?(?:->|→|>) ?/ : " ");
  if (!from || !to || rest.length) return [];
  const isReader = ({ name, title, feeds }) =>
    name === to ||
    title.toLowerCase() === to ||
    feeds.some((node) => namesOf(NODES.get(node)).includes(to));
  return run.edges
    .filter((edge) => namesOf(edge.from).includes(from) && isReader(edge.reader))
    .slice(0, 12);
}

function promptsFound(query, run) {
  if (query.length < 3) return [];
  const matches = (prompt) => wholeText(prompt).toLowerCase().includes(query);
  return promptsOf(run)
    .flatMap((prompt, i) => (matches(prompt) ? [i] : []))
    .slice(0, 6);
}

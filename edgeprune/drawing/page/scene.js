// What is drawn where: pure functions of the state and the size of the view.

const MARGIN = { left: 46, right: 14, top: 12, bottom: 12 };

// Which edges are shown, and how each stands out.
function shownEdges(s = state) {
  const isOf = (edge) =>
    !s.hide.includes(edge.reader.kind) &&
    (edge.from.layer < 0 || (edge.from.layer >= s.layers[0] && edge.from.layer <= s.layers[1])) &&
    (edge.reader.layer === LAYERS ||
      (edge.reader.layer >= s.layers[0] && edge.reader.layer <= s.layers[1]));
  const result = new Map(); // edge key -> {edge, runs, isConnected}
  for (const r of s.compare ? RUNS : [RUNS[s.run]]) {
    const { edges, kept } = circuitAt(r, s.size);
    for (const edge of edges) {
      if (!isOf(edge) || (s.dangling === "hidden" && !kept.has(edge.key))) continue;
      if (!result.has(edge.key)) result.set(edge.key, { edge, runs: [], isConnected: false });
      const item = result.get(edge.key);
      item.runs.push(r.index);
      item.isConnected ||= kept.has(edge.key);
    }
  }
  return [...result.values()];
}

const circuits = new Map(); // the last circuits that were asked for

function circuitAt(r, size) {
  const key = `${r.index} ${size}`;
  if (!circuits.has(key)) {
    if (circuits.size > 40) circuits.clear();
    const edges = circuitOf(r, size);
    const ordered =
      edges === r.chosen.edges
        ? edges
        : r.ordered.filter((edge) => r.rank.get(edge.key) < edges.length);
    circuits.set(key, { edges, kept: connected(ordered) });
  }
  return circuits.get(key);
}

// ------------------------------------------------------------------------------- places

// Boxes of all nodes and the places where edges end, for a view of this size in pixels.
// A row per layer, from the bottom; a column per head, and the MLPs at the right, half a row up.
function layout(width, height, [dx, dy, zoom]) {
  const columns = HEADS + 1.15;
  const rows = LAYERS + 1.6;
  const stepX = ((width - MARGIN.left - MARGIN.right) / columns) * zoom;
  const stepY = ((height - MARGIN.top - MARGIN.bottom) / rows) * zoom;
  const originX = MARGIN.left + (width / 2 - MARGIN.left) * (1 - zoom) + dx * width;
  const originY = height - MARGIN.bottom - (height / 2 - MARGIN.bottom) * (1 - zoom) + dy * height;
  const w = Math.min(0.82 * stepX, 120);
  const tall = clamp((stepY < 26 ? 0.6 : 0.46) * stepY, 5, 46);
  const x = (column) => originX + (column + 0.5) * stepX;
  const y = (row) => originY - (row + 0.3) * stepY;
  const boxes = new Map();
  for (const node of NODES.values()) {
    const box = { node, w, h: tall };
    if (node.type === "head") Object.assign(box, { x: x(node.head), y: y(node.layer + 1) });
    else if (node.type === "mlp") Object.assign(box, { x: x(HEADS + 0.1), y: y(node.layer + 1.5) });
    else {
      const inputs = DATA.graph.writers.filter((name) => name in EMBEDDINGS);
      const isInput = node.type === "embed";
      const place = isInput ? (inputs.indexOf(node.name) + 1) / (inputs.length + 1) : 0.5;
      Object.assign(box, {
        x: originX + place * (isInput ? Math.max(HEADS, 2) : HEADS) * stepX,
        y: y(isInput ? 0 : LAYERS + 0.95),
        w: Math.max(w, Math.min(150, 2.2 * stepX)),
      });
      if (node.type === "output" && LAYERS < 12) box.h = Math.min(tall, 30);
      if (node.type === "embed") box.h = Math.min(tall, 30);
    }
    boxes.set(node.name, box);
  }
  return {
    boxes,
    stepX,
    stepY,
    w,
    tall,
    width,
    height,
    zoom,
    ports: READERS.map((reader) => portOf(boxes, reader)),
  };
}

// Where an edge into a reader ends: the middle of a port's lower side, and the port's box.
function portOf(boxes, reader) {
  const box = boxes.get(reader.feeds[0]);
  if (reader.kind === "mlp" || reader.kind === "output") {
    return { x: box.x, y: box.y + box.h / 2, w: box.w, h: 0 };
  }
  if (!GROUPED) {
    const third = box.w / 3;
    const x = box.x + { q: -third, k: 0, v: third }[reader.kind];
    return { x, y: box.y + box.h / 2, w: third, h: box.h * 0.4 };
  }
  if (reader.kind === "q") return { x: box.x, y: box.y + box.h / 2, w: box.w, h: box.h * 0.32 };
  const last = boxes.get(reader.feeds.at(-1));
  const width = last.x - box.x + box.w;
  const x = (box.x + last.x) / 2 + (reader.kind === "k" ? -width / 4 : width / 4);
  const high = Math.max(3, box.h * 0.36);
  return { x, y: box.y + box.h / 2 + high + 1, w: width / 2, h: high };
}

// ------------------------------------------------------------------------------- the scene

// Everything that is drawn: boxes, ports and edges with their colours and weights.
// `hover` is the name of a node or an edge under the pointer.
function makeScene(s, places, colors, hover = "") {
  const groupOf = new Map();
  const groups = s.groups.map((group, index) => {
    for (const member of group.members) if (group.collapsed) groupOf.set(member, index);
    const boxes = group.members.map((member) => places.boxes.get(member));
    const mean = (pick) => boxes.reduce((sum, box) => sum + pick(box), 0) / boxes.length;
    return {
      ...group,
      x: mean((b) => b.x),
      y: mean((b) => b.y),
      w: Math.max(places.w, 96),
      h: Math.max(places.tall, 26),
    };
  });
  const shown = shownEdges(s);
  const used = new Set();
  for (const { edge } of shown) {
    used.add(edge.from.name);
    if (edge.reader.feeds.length === 1) used.add(edge.reader.feeds[0]);
  }
  markSharedKeys(shown, used);
  const focus = new Set([hover, s.select, ...s.pins].filter(Boolean));
  const isFocused = (edge) =>
    focus.has(edge.name) ||
    focus.has(edge.from.name) ||
    edge.reader.feeds.some((node) => focus.has(node)) ||
    (groupOf.has(edge.from.name) && focus.has(`group ${groupOf.get(edge.from.name)}`));
  const edges = [];
  for (const item of shown) {
    const { edge } = item;
    const ends = edgeEnds(edge, places, groupOf, groups);
    if (!ends) continue; // within a collapsed group
    const isRanked = RUNS[item.runs[0]].importance;
    const rank = isRanked
      ? Math.min(...item.runs.map((i) => RUNS[i].rank.get(edge.key) ?? Infinity))
      : 0;
    const strong = isRanked ? strength(Math.min(rank, largest()), largest()) : 0.5;
    const focused = focus.size > 0 && isFocused(edge);
    let alpha = 0.14 + 0.78 * strong;
    if (focus.size) alpha = focused ? 0.95 : alpha * 0.16;
    if (!item.isConnected) alpha *= focused ? 0.5 : 0.4;
    edges.push({
      edge,
      rank,
      ...ends,
      color: s.compare ? compareColor(item.runs, colors) : colors.line[edge.reader.kind],
      width: (0.55 + 2.3 * strong * strong) * (focused ? 1.25 : 1),
      alpha: clamp(alpha, 0.04, 1),
      dashed: !item.isConnected,
      order: (focused ? 10 : 0) + strong,
    });
  }
  edges.sort(
    (a, b) =>
      a.order - b.order || (a.color < b.color ? -1 : a.color > b.color ? 1 : a.dashed - b.dashed),
  );
  return { edges, groups, groupOf, used, focus, places, shown, state: s };
}

// Of the heads that share a key or value, those take part that write; all if none does.
function markSharedKeys(shown, used) {
  if (!GROUPED) return;
  for (const { edge } of shown) {
    const { feeds } = edge.reader;
    if (feeds.length > 1 && !feeds.some((node) => used.has(node)))
      feeds.forEach((node) => used.add(node));
  }
}

// From 0 for the weakest edge that the page carries to 1 for the strongest, on a logarithmic scale
// of ranks, so that an edge looks the same at every size. There are few steps: neighbours in the
// order of drawing then look alike, which pens use.
function strength(rank, limit) {
  return Math.round(10 * (1 - Math.log(rank + 1) / Math.log(limit + 1))) / 10;
}

function compareColor(runs, colors) {
  if (RUNS.length > 1 && runs.length === RUNS.length) return colors.shared;
  if (runs.length > 1) return colors.partly;
  return colors.only[runs[0] % colors.only.length];
}

// A curve from the top of its writer to the lower side of its reader.
function edgeEnds(edge, places, groupOf, groups) {
  const from = groups[groupOf.get(edge.from.name)] ?? places.boxes.get(edge.from.name);
  const first = groupOf.size ? groupOf.get(edge.reader.feeds[0]) : undefined;
  const isInside =
    first !== undefined && edge.reader.feeds.every((node) => groupOf.get(node) === first);
  const group = isInside ? groups[first] : null;
  if (group && group === from) return null;
  const to = group ? { x: group.x, y: group.y + group.h / 2 } : places.ports[edge.reader.index];
  const [x1, y1, x2, y2] = [from.x, from.y - from.h / 2, to.x, to.y];
  const lift = Math.max(14, 0.42 * Math.abs(y1 - y2));
  // Between nodes above each other, a bow: else it would hide behind those between.
  const bow =
    Math.abs(x1 - x2) < 10 && y1 - y2 > places.stepY * 0.6
      ? Math.min(0.6 * places.stepX, 8 + 0.09 * (y1 - y2))
      : 0;
  return { x1, y1, cx1: x1 + bow, cy1: y1 - lift, cx2: x2 + bow, cy2: y2 + lift, x2, y2 };
}

// ------------------------------------------------------------------------------- drawing it

// Draw a scene with a pen (pens.js), the same into a canvas and into an SVG.
function drawScene(pen, scene, colors, { labels = true } = {}) {
  const { places, used, focus, groupOf } = scene;
  const { tall, stepY } = places;
  if (labels) drawRows(pen, places, colors);
  const font = Math.min(0.85 * tall, 0.15 * tall + 6.5, 13 * pen.textScale);
  const isUsed = ({ node }) =>
    used.has(node.name) || node.name === "resid_post" || focus.has(node.name);
  const boxes = [...places.boxes.values()].filter(({ node }) => !groupOf.has(node.name));
  for (const box of boxes.filter((one) => !isUsed(one))) drawGhost(pen, box, colors);
  pen.curves(scene.edges);
  for (const box of boxes.filter((one) => !isUsed(one))) drawGhostName(pen, box, font, colors);
  for (const box of boxes.filter(isUsed)) {
    const name = box.node.name;
    const inUse = used.has(name) || name === "resid_post";
    const isSelected = scene.state.select === name;
    const isPinned = scene.state.pins.includes(name);
    const fill = inUse
      ? colors.fill[box.node.type === "embed" ? name : box.node.type]
      : colors.paper;
    const ring = isSelected
      ? colors.accent
      : isPinned
        ? colors.pin
        : inUse
          ? colors.outline
          : colors.ghost;
    pen.box(
      box.x - box.w / 2,
      box.y - box.h / 2,
      box.w,
      box.h,
      fill,
      ring,
      isSelected || isPinned ? 2.4 : 0.9,
    );
    if (box.node.type === "head" && !GROUPED && inUse && tall >= 9)
      drawPorts(pen, scene, box, colors);
    const [text, size] = nodeText(box, font);
    if (text) {
      const lift = box.node.type === "head" && tall >= 16 && !GROUPED ? box.h * 0.2 : 0;
      const ink = !inUse
        ? colors.ghostText
        : box.node.type === "output"
          ? colors.onOutput
          : colors.onFill;
      pen.text(text, box.x, box.y - lift, size, ink, "center", focus.has(name) ? 700 : 400);
    }
  }
  if (GROUPED && stepY > 9) drawSharedPorts(pen, scene, colors);
  for (const [index, group] of scene.groups.entries()) {
    if (!group.collapsed) continue;
    const ring = focus.has(`group ${index}`) ? colors.accent : colors.outline;
    pen.box(group.x - group.w / 2, group.y - group.h / 2, group.w, group.h, colors.group, ring, 2);
    pen.text(tokenText(group.name, 15), group.x, group.y - 5, 12, colors.onFill, "center", 700);
    pen.text(
      `${group.members.length} nodes`,
      group.x,
      group.y + 8,
      10,
      colors.onFill,
      "center",
      400,
    );
  }
}

// A node outside the circuit: its box lies below the edges, its name above them.
function drawGhost(pen, box, colors) {
  pen.box(box.x - box.w / 2, box.y - box.h / 2, box.w, box.h, colors.paper, colors.ghost, 0.8);
}

function drawGhostName(pen, box, font, colors) {
  const [text, size] = nodeText(box, font);
  if (!text) return;
  const [w, h] = [Math.min(0.62 * size * text.length + 3, box.w - 1.6), Math.min(size, box.h - 1.6)];
  pen.box(box.x - w / 2, box.y - h / 2, w, h, colors.paper, null, 0, 2);
  pen.text(text, box.x, box.y, size, colors.ghostText);
}

// The longest name of a node that fits into its box, and its size; "" if none does.
function nodeText({ node, w }, font) {
  const names = {
    head: [`${node.layer}.${node.head}`, `${node.head}`],
    mlp: [node.title, `m${node.layer}`],
    embed: [node.title, node.title.split(" ")[0], node.title[0]],
    output: [node.title, "out"],
  }[node.type];
  for (const name of names) {
    const room = name.includes(".") ? `${LAYERS - 1}.${HEADS - 1}` : name; // all heads alike
    const width = node.type === "head" ? 0.61 : 0.7; // of a letter; names stand out in bold
    const size = Math.min(font, (w - 3) / (width * room.length));
    if (size >= Math.min(8, font) && size >= 6.5) return [name, size];
  }
  return ["", 0];
}

function drawRows(pen, places, colors) {
  let last = Infinity;
  const size = 10.5 * pen.textScale;
  for (let layer = 0; layer < LAYERS; layer += 1) {
    const { y } = places.boxes.get(`a${layer}.h0`);
    if (last - y < size + 1) continue;
    pen.text(`${layer}`, 18, y, size, colors.soft, "center", 400);
    last = y;
  }
  if (places.stepY > 30)
    pen.text(
      "layer",
      18,
      clamp(places.boxes.get("a0.h0").y + places.stepY * 0.5, 10, places.height - 6),
      size * 0.9,
      colors.soft,
      "center",
      400,
    );
}

// The inputs of a head, where an edge reads them.
function drawPorts(pen, scene, box, colors) {
  for (const kind of "qkv") {
    const reader = READER.get(`${box.node.name}.${kind}`);
    if (!scene.ports) scene.ports = new Set(scene.shown.map(({ edge }) => edge.reader.name));
    if (!scene.ports.has(reader.name)) continue;
    const port = scene.places.ports[reader.index];
    pen.box(
      port.x - port.w / 2 + 1,
      port.y - port.h,
      port.w - 2,
      port.h - 1,
      colors.fill[kind],
      null,
      0,
      2,
    );
    if (port.h >= 10 && port.w >= 10)
      pen.text(
        kind.toUpperCase(),
        port.x,
        port.y - port.h / 2,
        Math.min(10, port.h * 0.8),
        colors.onFill,
        "center",
        400,
      );
  }
}

// Keys and values that heads share: one box under all heads of the group.
function drawSharedPorts(pen, scene, colors) {
  scene.ports ??= new Set(scene.shown.map(({ edge }) => edge.reader.name));
  for (const reader of READERS) {
    if (!scene.ports.has(reader.name) || !"qkv".includes(reader.kind)) continue;
    const port = scene.places.ports[reader.index];
    pen.box(
      port.x - port.w / 2 + 1,
      port.y - port.h,
      port.w - 2,
      port.h - 0.5,
      colors.fill[reader.kind],
      null,
      0,
      2,
    );
    if (port.h >= 7)
      pen.text(
        reader.kind.toUpperCase(),
        port.x,
        port.y - port.h / 2,
        Math.min(10, port.h),
        colors.onFill,
        "center",
        400,
      );
  }
}

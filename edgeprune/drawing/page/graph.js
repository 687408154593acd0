// The graph on the page: drawing, and what pointer and keyboard do to it.

const canvas = $("canvas");
const tip = $("tip");
let hover = ""; // name of the node, edge or group under the pointer
let cursor = ""; // name of the node that the arrow keys are at
let scene = null;
const pictures = new Map(); // blocks of edges, see DraftPen

function drawGraph() {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return;
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  const colors = palette(isDark());
  context.fillStyle = colors.paper;
  context.fillRect(0, 0, width, height);
  const textScale = clamp(
    parseFloat(getComputedStyle(document.documentElement).fontSize) / 16,
    1,
    2,
  );
  scene = makeScene(state, layout(width, height, state.view), colors, hover || cursor);
  const { view, hide, layers, dangling, run: shownRun, groups } = state;
  const same = [
    view,
    hide,
    layers,
    dangling,
    shownRun,
    groups,
    canvas.width,
    canvas.height,
    isDark(),
  ];
  if (JSON.stringify(same) !== drawGraph.same) pictures.clear();
  drawGraph.same = JSON.stringify(same);
  const isFast = isChanging() && !scene.focus.size && !state.compare && run().importance;
  const pen = isFast
    ? new DraftPen(context, textScale, pictures)
    : new CanvasPen(context, textScale);
  drawScene(pen, scene, colors);
  $("view").classList.toggle(
    "moved",
    state.view[2] !== 1 || state.view[0] !== 0 || state.view[1] !== 0,
  );
}

// ------------------------------------------------------------------------------- what is where

// Name of the group, node or edge at a place, or "".
function thingAt(x, y) {
  const within = (b, pad) =>
    Math.abs(x - b.x) <= b.w / 2 + pad && Math.abs(y - b.y) <= b.h / 2 + pad;
  const index = scene.groups.findIndex((g) => g.collapsed && within(g, 2));
  if (index >= 0) return `group ${index}`;
  for (const pad of [0, 3]) {
    for (const box of scene.places.boxes.values()) {
      if (within(box, pad) && !scene.groupOf.has(box.node.name)) return box.node.name;
    }
  }
  let best = 36; // squared distance in pixels
  let name = "";
  for (const e of scene.edges) {
    if (e.alpha < 0.06 && scene.focus.size) continue;
    const low = Math.min(e.x1, e.x2, e.cx1, e.cx2) - 6;
    const high = Math.max(e.x1, e.x2, e.cx1, e.cx2) + 6;
    if (x < low || x > high || y > Math.max(e.y1, e.cy2) + 6 || y < Math.min(e.y2, e.cy1) - 6)
      continue;
    for (let t = 0.02; t < 1; t += 0.03) {
      const u = 1 - t;
      const [a, b, c, d] = [u * u * u, 3 * u * u * t, 3 * u * t * t, t * t * t];
      const dx = a * e.x1 + b * e.cx1 + c * e.cx2 + d * e.x2 - x;
      const dy = a * e.y1 + b * e.cy1 + c * e.cy2 + d * e.y2 - y;
      const distance = dx * dx + dy * dy;
      if (distance < best) [best, name] = [distance, e.edge.name];
    }
  }
  return name;
}

function tipText(name) {
  if (name.startsWith("group ")) {
    const group = state.groups[Number(name.slice(6))];
    const titles = group.members.map((member) => NODES.get(member).title);
    return `${tokenText(group.name, 60)}: ${titles.join(", ")}`;
  }
  if (NODES.has(name)) {
    const node = NODES.get(name);
    const at = scene.shown.filter(
      ({ edge }) => edge.from.name === name || edge.reader.feeds.includes(name),
    );
    const out = at.filter(({ edge }) => edge.from.name === name).length;
    const label = run().labels[name] ? `, ${run().labels[name]}` : "";
    return `${node.title} (${name})${label}: reads ${at.length - out}, writes ${out}`;
  }
  const edge = edgeByName(name);
  const rank = run().rank.get(edge.key);
  const score =
    run().importance && rank !== undefined ? `, score ${short(run().scores[rank])}` : "";
  return `${edge.title}${rank === undefined ? "" : `: rank ${whole(rank + 1)}${score}`}`;
}

function showTip(name, x, y) {
  tip.hidden = !name;
  if (!name) return;
  tip.textContent = tipText(name);
  const { clientWidth } = canvas;
  tip.style.left = `${clamp(x + 12, 4, Math.max(4, clientWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${y > 60 ? y - tip.offsetHeight - 10 : y + 18}px`;
}

// ------------------------------------------------------------------------------- pointer

const pointers = new Map();
let dragged = 0; // pixels moved since the pointer went down

const placeOf = (event) => {
  const frame = canvas.getBoundingClientRect();
  return { x: event.clientX - frame.left, y: event.clientY - frame.top };
};

// Zoom so that what is at (x, y) stays there.
function zoomAt(x, y, factor) {
  tip.hidden = true;
  const [dx, dy, zoom] = state.view;
  const next = clamp(zoom * factor, 1, 24);
  const { clientWidth: width, clientHeight: height } = canvas;
  const grow = next / zoom;
  // Places are origin + zoom * something, see `layout`; so both axes are solved alike.
  const originX = MARGIN.left + (width / 2 - MARGIN.left) * (1 - zoom) + dx * width;
  const originY = height - MARGIN.bottom - (height / 2 - MARGIN.bottom) * (1 - zoom) + dy * height;
  const newX = x + (originX - x) * grow;
  const newY = y + (originY - y) * grow;
  moveView(
    (newX - MARGIN.left - (width / 2 - MARGIN.left) * (1 - next)) / width,
    (newY - height + MARGIN.bottom + (height / 2 - MARGIN.bottom) * (1 - next)) / height,
    next,
  );
}

// The graph cannot leave the view.
function moveView(dx, dy, zoom) {
  const limit = (zoom - 1) / 2;
  change({
    view: zoom === 1 ? [0, 0, 1] : [clamp(dx, -limit, limit), clamp(dy, -limit, limit), zoom],
  });
}

canvas.addEventListener(
  "wheel",
  (event) => {
    // Where the wheel scrolls what is around the graph, it zooms only when asked for.
    const scrolls = document.documentElement.scrollHeight > window.innerHeight + 1;
    const isAsked = event.ctrlKey || document.activeElement === canvas;
    if ((scrolls || window.parent !== window) && !isAsked) return;
    event.preventDefault();
    const { x, y } = placeOf(event);
    zoomAt(x, y, Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)));
  },
  { passive: false },
);

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, placeOf(event));
  dragged = 0;
});

canvas.addEventListener("pointermove", (event) => {
  const now = placeOf(event);
  const before = pointers.get(event.pointerId);
  if (before) {
    dragged += Math.abs(now.x - before.x) + Math.abs(now.y - before.y);
    const others = [...pointers].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const [, other] = others[0];
      const distance = (a) => Math.hypot(a.x - other.x, a.y - other.y) || 1;
      zoomAt((now.x + other.x) / 2, (now.y + other.y) / 2, distance(now) / distance(before));
    } else if (dragged > 4) {
      const [dx, dy, zoom] = state.view;
      moveView(
        dx + (now.x - before.x) / canvas.clientWidth,
        dy + (now.y - before.y) / canvas.clientHeight,
        zoom,
      );
    }
    pointers.set(event.pointerId, now);
    return;
  }
  if (!scene) return;
  const name = thingAt(now.x, now.y);
  showTip(name, now.x, now.y);
  canvas.style.cursor = name ? "pointer" : "grab";
  if (name !== hover) {
    [hover, cursor] = [name, ""];
    requestRender();
  }
});

for (const type of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(type, (event) => {
    pointers.delete(event.pointerId);
    if (type === "pointerup" && dragged <= 4)
      clickAt(
        placeOf(event),
        event.shiftKey || event.ctrlKey || event.metaKey,
        event.pointerType === "touch",
      );
  });
}

canvas.addEventListener("pointerleave", () => {
  hover = "";
  tip.hidden = true;
  requestRender();
});

canvas.addEventListener("dblclick", (event) => {
  const { x, y } = placeOf(event);
  if (!thingAt(x, y)) zoomAt(x, y, 2);
});

function clickAt({ x, y }, isPinning, isTouch) {
  const name = thingAt(x, y);
  if (isTouch) showTip(name, x, y);
  if (name.startsWith("group ")) return change({ tab: "groups" });
  if (isPinning && NODES.has(name)) return togglePin(name);
  select(name === state.select ? "" : name);
}

// ------------------------------------------------------------------------------- keyboard

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// The nearest node of the circuit in a direction.
function neighbour(name, [dx, dy]) {
  const boxes = [...scene.places.boxes.values()].filter(
    ({ node }) => scene.used.has(node.name) || node.name === "resid_post",
  );
  const here = scene.places.boxes.get(name);
  if (!here) return boxes[0]?.node.name ?? "";
  let best = null;
  for (const box of boxes) {
    const along = dx ? (box.x - here.x) * dx : (box.y - here.y) * dy;
    const across = dx ? Math.abs(box.y - here.y) : Math.abs(box.x - here.x);
    if (along < 1 || (dx && across > 2)) continue;
    const distance = along + (dx ? 0 : 0.3) * across;
    if (!best || distance < best.distance) best = { name: box.node.name, distance };
  }
  return best?.name ?? name;
}

// What the tip says may be wrong after a key.
document.addEventListener("keydown", () => (tip.hidden = true), { capture: true });

canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key } = event;
  if (key in STEPS)
    cursor = neighbour(cursor || (NODES.has(state.select) ? state.select : ""), STEPS[key]);
  else if (key === "Enter" && cursor) togglePin(cursor);
  else if (key === " " && cursor) select(cursor);
  else if (key === "+" || key === "=") zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, 1.4);
  else if (key === "-") zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, 1 / 1.4);
  else if (key === "0") moveView(0, 0, 1);
  else if (key === "Escape") {
    cursor = "";
    change({ select: "", pins: [] });
  } else return;
  event.preventDefault();
  if (key in STEPS && cursor) {
    select(cursor);
    const box = scene.places.boxes.get(cursor);
    showTip(cursor, box.x, box.y);
    tell(tipText(cursor));
  }
  requestRender();
});

canvas.addEventListener("blur", () => {
  cursor = "";
  tip.hidden = true;
  requestRender();
});

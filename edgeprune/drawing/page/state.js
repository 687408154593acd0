// What the reader has chosen: one object, which the address holds completely.
//
// `change` is the only way to alter it; it draws everything again in the next frame. Values that
// equal the defaults are left out of the address.

const START = {
  run: 0, // index of the run shown
  compare: false, // whether all runs are drawn, coloured by which of them have an edge
  size: firstSize(), // number of edges; "chosen": the chosen circuit, after its clean-up
  select: "", // name of a node, or of an edge: writer>reader
  pins: [], // names of nodes whose edges stand out
  hide: [], // kinds of readers whose edges are hidden
  layers: [0, LAYERS - 1], // the first and the last layer whose edges are shown
  dangling: "faint", // or "hidden"
  tab: "details",
  prompt: 0, // index of the chosen prompt
  side: "clean", // whose attention is shown, or "corrupted"
  token: -1, // position from which attention is read; -1: the last
  metric: "", // of the curve; "": the first
  groups: [], // {name, members, collapsed}
  theme: "auto", // or "light", "dark"
  view: [0, 0, 1], // x and y of the graph's centre as fractions of the view, and the zoom
};

let state = { ...START };
let steps = { past: [], future: [], key: "", time: 0 };

function firstSize() {
  const { chosen, limit } = RUNS[0];
  if (chosen.edges) return "chosen";
  return clamp(chosen.size, Math.min(1, limit), limit);
}

const run = () => RUNS[state.run];
const sizeOf = (r = run()) =>
  state.size === "chosen" ? r.chosen.size : Math.min(state.size, r.limit);

const LISTS = {
  pins: [(list) => list.join(","), (text) => text.split(",").filter((name) => NODES.has(name))],
  hide: [(list) => list.join(","), (text) => text.split(",").filter((kind) => kind in KINDS)],
  layers: [
    (list) => list.join("-"),
    (text) => text.split("-").map((n) => clamp(Number(n) || 0, 0, LAYERS - 1)),
  ],
  view: [
    (list) => list.map((x) => Number(x.toFixed(3))).join(","),
    (text) => text.split(",").map(Number),
  ],
};

function toAddress(s) {
  const parts = new URLSearchParams();
  for (const [name, start] of Object.entries(START)) {
    if (JSON.stringify(s[name]) === JSON.stringify(start)) continue;
    if (name === "groups") {
      for (const group of s.groups) {
        const members = group.members.join(",");
        parts.append("group", `${group.collapsed ? "closed" : "open"}:${members}:${group.name}`);
      }
    } else if (name in LISTS) parts.set(name === "pins" ? "pin" : name, LISTS[name][0](s[name]));
    else parts.set(name, String(s[name]));
  }
  return parts.toString().replace(/%2C/g, ",").replace(/%3E/g, ">").replace(/%3A/g, ":");
}

// The state of an address; what it gets wrong is left as at the start.
function fromAddress(text) {
  const parts = new URLSearchParams(text.replace(/^#/, ""));
  const found = { ...START };
  for (const name of Object.keys(START)) {
    const value = parts.get(name === "pins" ? "pin" : name);
    if (value === null) continue;
    if (name in LISTS) found[name] = LISTS[name][1](value);
    else if (typeof START[name] === "boolean") found[name] = value === "true";
    else if (name === "size" && value === "chosen") found.size = value;
    else if (typeof START[name] === "number" || name === "size") {
      found[name] = Number.isInteger(Number(value)) ? Number(value) : START[name];
    } else found[name] = value;
  }
  found.groups = parts
    .getAll("group")
    .map((value) => {
      const [, how, members, name] = value.match(/^(closed|open):([^:]*):(.*)$/s) ?? [];
      const known = (members ?? "").split(",").filter((member) => NODES.has(member));
      return { name, members: known, collapsed: how === "closed" };
    })
    .filter((group) => group.members.length);
  found.run = clamp(found.run, 0, RUNS.length - 1);
  if (found.size !== "chosen")
    found.size = clamp(found.size, 0, Math.max(...RUNS.map((r) => r.limit)));
  if (!(NODES.has(found.select) || (found.select.includes(">") && edgeByName(found.select))))
    found.select = "";
  if (found.layers.length !== 2) found.layers = START.layers;
  if (found.view.length !== 3 || !found.view.every(Number.isFinite)) found.view = START.view;
  return found;
}

// Change the state. Quick changes of the same value, as of a slider, are undone together.
function change(changes) {
  const now = Date.now();
  const key = Object.keys(changes).join();
  const before = toAddress(state);
  state = { ...state, ...changes };
  if (toAddress(state) === before) return;
  if (key !== steps.key || now - steps.time > 700) {
    steps.past = [...steps.past.slice(-199), before];
    steps.future = [];
  }
  Object.assign(steps, { key, time: now });
  writeAddress();
  requestRender();
}

function undo(from = "past", to = "future") {
  if (!steps[from].length) return;
  steps[to].push(toAddress(state));
  state = fromAddress(steps[from].pop());
  steps.key = "";
  writeAddress();
  requestRender();
}

let written = "";

function writeAddress() {
  clearTimeout(writeAddress.timer);
  written = `#${toAddress(state)}`;
  writeAddress.timer = setTimeout(() => {
    try {
      history.replaceState(null, "", written);
    } catch {
      // in a notebook's frame, which has no address of its own
    }
  }, 120); // browsers allow some hundred changes in half a minute
}

window.addEventListener("hashchange", () => {
  if (location.hash === written) return;
  state = fromAddress(location.hash);
  requestRender();
});

// ---------------------------------------------------------------------- changes that readers make

const select = (name) => change({ select: name, ...(name ? { tab: "details" } : {}) });

function togglePin(name) {
  if (!NODES.has(name)) return;
  const pins = state.pins.includes(name)
    ? state.pins.filter((p) => p !== name)
    : [...state.pins, name];
  change({ pins });
}

function groupPins(name) {
  const members = state.pins;
  if (members.length < 2) return announce("Pin at least two nodes first");
  const groups = state.groups
    .map((g) => ({ ...g, members: g.members.filter((m) => !members.includes(m)) }))
    .filter((g) => g.members.length);
  const title = name.trim() || `Group ${groups.length + 1}`;
  change({ groups: [...groups, { name: title, members, collapsed: true }], pins: [] });
}

function changeGroup(index, changes) {
  const groups = state.groups.map((g, i) => (i === index ? { ...g, ...changes } : g));
  change({ groups: changes === null ? state.groups.filter((_, i) => i !== index) : groups });
}

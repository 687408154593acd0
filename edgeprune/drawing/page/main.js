// Putting the page together: header, legend, search, keys, and drawing once per frame.

function drawHeader() {
  refill(
    $("runs"),
    RUNS.length > 1
      ? [
          ...RUNS.map((r) =>
            button(r.name, () => change({ run: r.index, compare: false }), {
              "aria-pressed": String(state.run === r.index && !state.compare),
              title: r.title,
            }),
          ),
          button(
            "compare",
            () => change(state.compare ? { compare: false } : { compare: true, tab: "runs" }),
            { class: "compare", "aria-pressed": String(state.compare) },
          ),
        ]
      : [],
  );
  $("undo").disabled = !steps.past.length;
  $("redo").disabled = !steps.future.length;
  const { dataset, style } = document.documentElement;
  dataset.theme = isDark() ? "dark" : "light";
  for (const [kind, color] of Object.entries(palette(isDark()).line))
    style.setProperty(`--${kind}`, color);
}

function drawLegend() {
  const colors = palette(isDark());
  const swatch = (color) => {
    const element = h("span", { class: "swatch" });
    element.style.background = color;
    return element;
  };
  const label = h("span", { class: "note", text: state.compare ? "edges in" : "edges into" });
  const parts = [label];
  if (state.compare) {
    parts.push(h("span", { class: "key" }, swatch(colors.shared), "all runs"));
    if (RUNS.length > 2) parts.push(h("span", { class: "key" }, swatch(colors.partly), "several"));
    RUNS.forEach((r, i) =>
      parts.push(
        h(
          "span",
          { class: "key" },
          swatch(colors.only[i % colors.only.length]),
          `only ${tokenText(r.name)}`,
        ),
      ),
    );
  } else {
    for (const kind of Object.keys(KINDS)) {
      const isOn = !state.hide.includes(kind);
      const toggle = () =>
        change({ hide: isOn ? [...state.hide, kind] : state.hide.filter((k) => k !== kind) });
      parts.push(
        h(
          "button",
          {
            type: "button",
            class: "key",
            "aria-pressed": String(isOn),
            title: `show or hide edges into ${KINDS[kind]}`,
            onclick: toggle,
          },
          swatch(colors.line[kind]),
          KINDS[kind],
        ),
      );
    }
  }
  const layer = (end) => {
    const input = h("input", {
      type: "number",
      min: 0,
      max: LAYERS - 1,
      value: state.layers[end],
      "aria-label": end ? "Last layer" : "First layer",
      onchange: (event) => {
        const value = clamp(Math.round(Number(event.target.value)) || 0, 0, LAYERS - 1);
        change({
          layers: end
            ? [Math.min(state.layers[0], value), value]
            : [value, Math.max(state.layers[1], value)],
        });
      },
    });
    return input;
  };
  parts.push(
    h("span", { class: "spring" }),
    h(
      "label",
      { class: "check" },
      checkbox(state.dangling === "faint", (on) => change({ dangling: on ? "faint" : "hidden" })),
      " dangling edges",
    ),
  );
  if (LAYERS > 1) parts.push(h("span", { class: "key" }, "layers ", layer(0), "–", layer(1)));
  const signature = JSON.stringify([
    state.hide,
    state.layers,
    state.dangling,
    state.compare,
    isDark(),
  ]);
  if (drawLegend.last === signature) return;
  drawLegend.last = signature;
  refill($("legend"), parts);
}

// ------------------------------------------------------------------------------- drawing

let isRequested = false;
let panelTimer = 0;
let panelDrawn = "";

// Whether the last change was a moment ago, as while the slider is dragged. The graph is then drawn
// fast, and once more in full when it rests.
let changed = 0;
let restTimer = 0;

function isChanging() {
  const now = performance.now();
  const result = now - changed < 150;
  changed = now;
  clearTimeout(restTimer);
  if (result) restTimer = setTimeout(requestRender, 200);
  return result;
}

function requestRender() {
  if (isRequested) return;
  isRequested = true;
  requestAnimationFrame(render);
}

function render() {
  isRequested = false;
  drawHeader();
  drawLegend();
  drawGraph();
  drawSize();
  // While the size changes quickly the panel follows a little later.
  const wanted = toAddress({ ...state, view: START.view }) + isDark();
  if (wanted === panelDrawn) return;
  clearTimeout(panelTimer);
  const draw = () => {
    panelDrawn = wanted;
    drawPanel();
  };
  const onlySize = panelDrawn.replace(/size=\w+&?/, "") === wanted.replace(/size=\w+&?/, "");
  if (onlySize && panelDrawn) panelTimer = setTimeout(draw, 140);
  else draw();
}

// ------------------------------------------------------------------------------- search

const searchBox = $("search");
const foundList = $("found");
let found = []; // see `search`
let marked = 0;

function showFound() {
  found = search(searchBox.value, run());
  marked = 0;
  foundList.hidden = !searchBox.value.trim();
  searchBox.setAttribute("aria-expanded", String(!foundList.hidden));
  foundList.replaceChildren(
    ...(found.length
      ? found.map((item, i) => {
          const { node } = item;
          const inCircuit = !node || scene?.used.has(node.name) || node.type === "output";
          const label = node && run().labels[node.name];
          return h(
            "li",
            {
              role: "option",
              id: `found-${i}`,
              "aria-selected": String(i === 0),
              onpointerdown: (event) => {
                event.preventDefault();
                pick(item);
              },
            },
            h("span", { text: item.title }),
            h("code", { dir: "auto", text: item.name }),
            h("span", {
              class: "note",
              text: label ?? item.note ?? (inCircuit ? "" : "not in the circuit"),
            }),
          );
        })
      : [h("li", { class: "note", text: "nothing found" })]),
  );
}

function pick({ title, go }) {
  searchBox.value = "";
  showFound();
  change(go);
  tell(title);
}

searchBox.addEventListener("input", showFound);
searchBox.addEventListener("blur", () => {
  foundList.hidden = true;
  searchBox.setAttribute("aria-expanded", "false");
});
searchBox.addEventListener("keydown", (event) => {
  const options = [...foundList.querySelectorAll("[role=option]")];
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    marked = clamp(
      marked + (event.key === "ArrowDown" ? 1 : -1),
      0,
      Math.max(options.length - 1, 0),
    );
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === marked)));
    searchBox.setAttribute("aria-activedescendant", `found-${marked}`);
  } else if (event.key === "Enter" && found[marked]) pick(found[marked]);
  else if (event.key === "Escape") {
    searchBox.value = "";
    showFound();
    canvas.focus();
  }
});

// ------------------------------------------------------------------------------- header, keys, help

function buildHeader() {
  $("title").textContent = DATA.title;
  const save = h(
    "details",
    { class: "menu" },
    h("summary", { text: "Save" }),
    h(
      "div",
      {},
      button("Picture (SVG)", saveSvg),
      button("Picture (PNG)", savePng),
      button("Shown edges (edges.json)", saveEdges),
      button("Copy link to this view", () =>
        copyText(location.href.split("#")[0] + `#${toAddress(state)}`, "Link copied"),
      ),
      button("Print", () => window.print()),
    ),
  );
  save.addEventListener("click", (event) => event.target.closest("button") && (save.open = false));
  save.addEventListener(
    "focusout",
    (event) => save.contains(event.relatedTarget) || !event.relatedTarget || (save.open = false),
  );
  $("menu").replaceChildren(
    save,
    button("↶", () => undo(), { id: "undo", title: "Undo (Ctrl Z)", "aria-label": "Undo" }),
    button("↷", () => undo("future", "past"), { id: "redo", title: "Redo", "aria-label": "Redo" }),
    button("◐", () => change({ theme: isDark() ? "light" : "dark" }), {
      id: "theme",
      title: "Light or dark colours",
      "aria-label": "Light or dark colours",
    }),
    button("?", () => $("help").showModal(), {
      id: "help-button",
      title: "Help",
      "aria-label": "Help",
    }),
  );
  const zoom = (factor) => () => zoomAt(canvas.clientWidth / 2, canvas.clientHeight / 2, factor);
  $("zoom").replaceChildren(
    button("+", zoom(1.5), { "aria-label": "Zoom in" }),
    button("−", zoom(1 / 1.5), { "aria-label": "Zoom out" }),
    button("⤢", () => moveView(0, 0, 1), { "aria-label": "Whole graph", title: "Whole graph" }),
  );
}

document.addEventListener("keydown", (event) => {
  const isTyping =
    event.target.matches?.("input, select, textarea") && event.target.type !== "range";
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !isTyping) {
    event.preventDefault();
    if (event.shiftKey) undo("future", "past");
    else undo();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping || $("help").open) return;
  const actions = {
    "/": () => searchBox.focus(),
    "?": () => $("help").showModal(),
    "[": () => run().importance && change({ size: Math.max(0, Math.floor(sizeOf() / 1.1)) }),
    "]": () =>
      run().importance && change({ size: Math.min(largest(), Math.ceil(sizeOf() * 1.1 + 0.5)) }),
    c: () => RUNS.length > 1 && change({ compare: !state.compare }),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});

media.addEventListener("change", requestRender);
new ResizeObserver(requestRender).observe($("view"));
new ResizeObserver(requestRender).observe($("size"));

// Pictures in print are of the whole view, in light colours.
let themeBefore = null;
window.addEventListener("beforeprint", () => {
  themeBefore = state.theme;
  state.theme = "light";
  render();
});
window.addEventListener("afterprint", () => {
  state.theme = themeBefore;
  render();
});

buildHeader();
$("close-help").addEventListener("click", () => $("help").close());
state = fromAddress(location.hash);
render();

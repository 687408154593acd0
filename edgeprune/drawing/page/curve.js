// The size: slider, number and the curve below the graph, which share one logarithmic axis.

const THUMB = 16; // width of the slider's thumb, so that the marker stands above it
const CURVE_HEIGHT = 116;
const BELOW = 27; // room for the marks of rules and the sizes
const LEFT = 46;
const LINEAR = 0.05; // share of the axis for sizes below the smallest of the logarithmic part

const largest = () => Math.max(...RUNS.map((r) => r.limit), 1);
const smallest = () => Math.min(5, largest());
const toShare = (size) =>
  size < smallest()
    ? (LINEAR * size) / smallest()
    : LINEAR +
      ((1 - LINEAR) * Math.log(size / smallest())) / (Math.log(largest() / smallest()) || 1);
const toSize = (share) =>
  Math.round(
    share < LINEAR
      ? (smallest() * share) / LINEAR
      : smallest() * (largest() / smallest()) ** ((share - LINEAR) / (1 - LINEAR)),
  );

const slider = $("slider");
const number = $("number");

slider.addEventListener("input", () => change({ size: toSize(Number(slider.value) / 1000) }));
slider.addEventListener("keydown", (event) => {
  const step = {
    ArrowLeft: -1,
    ArrowDown: -1,
    ArrowRight: 1,
    ArrowUp: 1,
    PageUp: 10,
    PageDown: -10,
  }[event.key];
  if (!step) return;
  event.preventDefault(); // whole edges instead of parts of the axis
  const size = sizeOf();
  change({ size: clamp(size + step * Math.max(1, Math.round(size / 60)), 0, largest()) });
});
number.addEventListener("change", () => {
  const size = Number(number.value);
  if (number.value !== "" && Number.isFinite(size))
    change({ size: clamp(Math.round(size), 0, largest()) });
  number.value = sizeOf();
});
$("metric").addEventListener("change", (event) => change({ metric: event.target.value }));

const metricsOf = (r) => r.curve?.metrics ?? [];
const metricOf = (r) => metricsOf(r).find((m) => m.name === state.metric) ?? metricsOf(r)[0];

// A measured value at a size, or between two sizes the interpolated one.
function valueAt(r, metric, size) {
  const { sizes } = r.curve;
  const above = sizes.findIndex((s) => s >= size);
  if (above < 0) return metric.values.at(-1);
  if (sizes[above] === size || above === 0) return metric.values[above];
  const [a, b] = [Math.max(sizes[above - 1], 1), sizes[above]];
  const share = Math.log(size / a) / Math.log(b / a);
  return metric.values[above - 1] + share * (metric.values[above] - metric.values[above - 1]);
}

// Whether a run's curve has been measured at the size shown; a clean-up's circuit is not on it.
const isMeasured = (r) =>
  r.curve.sizes.includes(sizeOf(r)) && !(state.size === "chosen" && r.chosen.edges);

const valueText = (r, metric) =>
  `${isMeasured(r) ? "" : "≈ "}${short(valueAt(r, metric, sizeOf(r)))}`;

// What "≈" means here, or "".
function approximation(r) {
  if (!r.curve || isMeasured(r)) return "";
  const { sizes } = r.curve;
  const above = sizes.findIndex((s) => s > sizeOf(r));
  const between =
    above > 0
      ? `between the measured sizes ${whole(sizes[above - 1])} and ${whole(sizes[above])}`
      : "from the nearest measured size";
  const cleaned = state.size === "chosen" && r.chosen.edges ? ", without the clean-up" : "";
  return `≈: interpolated ${between}${cleaned}.`;
}

function drawSize() {
  const r = run();
  const size = sizeOf();
  if (document.activeElement !== number) number.value = size;
  number.max = largest();
  slider.value = 1000 * toShare(size);
  slider.setAttribute("aria-valuetext", plural(size, "edge"));
  const isFixed = !r.importance;
  slider.hidden = number.disabled = isFixed;
  const { edges, kept } = circuitAt(r, state.size);
  const dangling = edges.length - kept.size;
  $("summary").textContent =
    `of ${whole(DATA.graph.num_edges)} (${((100 * size) / DATA.graph.num_edges).toPrecision(2)} %)` +
    (dangling ? `, ${whole(dangling)} dangling` : "") +
    (state.size === "chosen" ? ", cleaned up" : "") +
    (state.size > r.limit ? `; this page carries the strongest ${whole(r.limit)}` : "");
  $("curve").toggleAttribute("hidden", !r.curve);
  $("metric").parentElement.hidden = $("key").hidden = !r.curve;
  drawRules(r, size);
  if (r.curve) drawCurve(r, size);
}

function drawRules(r, size) {
  const chosen = r.chosen;
  const entries = [];
  if (r.importance) {
    const by = { max_share_lost: "default rule" }[String(chosen.by).split("=")[0]] ?? chosen.by;
    if (chosen.by) {
      const over = chosen.size > r.limit ? ", more than this page carries" : "";
      entries.push({
        text: `chosen by ${RUNS.length > 1 ? tokenText(r.name) : "the run"} (${by}${over})`,
        size: chosen.size,
        value: chosen.edges ? "chosen" : chosen.size,
        strong: true,
        far: chosen.size > r.limit,
      });
    }
    for (const rule of r.curve?.rules ?? []) {
      if (rule.by !== chosen.by)
        entries.push({ ...rule, value: Math.min(rule.size, r.limit), far: rule.size > r.limit });
    }
  }
  const signature = JSON.stringify([entries, state.size, r.index]);
  if (drawRules.last === signature) return;
  drawRules.last = signature;
  const heading = h("span", { class: "note", text: "▲ Sizes that rules choose:" });
  refill($("rules"), [
    ...(entries.length ? [heading] : []),
    ...entries.map((e) =>
      button(`${e.text}: ${whole(e.size)}`, () => change({ size: e.value }), {
        class: `chip${e.strong ? " strong" : ""}`,
        disabled: e.far,
        title: e.far ? "more edges than this page carries" : null,
        "aria-pressed": state.size === e.value ? "true" : "false",
      }),
    ),
    ...(r.limit < DATA.graph.num_edges && r.importance
      ? [
          h("span", {
            class: "note",
            text: `The page carries the strongest ${whole(r.limit)} of ${whole(DATA.graph.num_edges)} edges.`,
          }),
        ]
      : []),
  ]);
}

// Which line is which run's.
function drawKey(lines) {
  const text = (one) => (state.compare || one !== run() ? one.name : `${one.name} (shown)`);
  $("key").replaceChildren(
    ...(RUNS.length > 1
      ? lines.map(({ one }) =>
          h("span", { class: "key" }, compareMark(one.index), tokenText(text(one), 30)),
        )
      : []),
  );
}

function drawCurve(r, size) {
  const root = $("curve");
  const width = root.clientWidth || 600;
  const colors = palette(isDark());
  const metric = metricOf(r);
  fillMetrics(r, metric);
  const inner = width - LEFT - THUMB;
  slider.style.marginLeft = `${LEFT}px`;
  slider.style.width = `${inner + THUMB}px`;
  const x = (s) => LEFT + THUMB / 2 + inner * toShare(s);
  const lines = RUNS.filter((one) => one.curve)
    .map((one) => ({ one, metric: metricsOf(one).find((m) => m.name === metric.name) }))
    .filter((l) => l.metric);
  drawKey(lines);
  const values = lines
    .flatMap((l) =>
      l.one.curve.sizes
        .flatMap((s, i) => (s < largest() ? [l.metric.values[i]] : []))
        .concat(valueAt(l.one, l.metric, largest())),
    )
    .filter((v) => v != null);
  const isLog = metric.better === "lower";
  const positive = values.filter((v) => v > 0);
  const floor = isLog
    ? Math.max(Math.min(...positive, 1) * 0.8, Math.max(...positive, 1e-9) / 1e7)
    : Math.min(0, ...values);
  const isCut = isLog && Math.min(...values) < floor; // as for the distance 0 of the full model
  const isShare = !isLog && floor === 0 && Math.max(...values) <= 1;
  const most = isShare ? 1 : Math.max(...values, isLog ? floor * 10 : 1e-9);
  const top = most * (isLog ? 1.3 : 1.02);
  const scale = (v) =>
    isLog
      ? Math.log(Math.max(v, floor) / floor) / Math.log(top / floor)
      : (v - floor) / (top - floor);
  const bottom = CURVE_HEIGHT - BELOW;
  const y = (v) => bottom - (bottom - 22) * clamp(scale(v), 0, 1);
  const parts = [];
  const text = (t, tx, ty, anchor, extra = {}) =>
    svg("text", { x: tx, y: ty, "text-anchor": anchor, class: "tick", ...extra }, t);
  for (const tick of isLog
    ? logTicks(floor, top, isCut)
    : isShare
      ? [0, 0.5, 1]
      : [floor, (floor + most) / 2, most]) {
    parts.push(svg("line", { x1: LEFT, x2: width - 4, y1: y(tick), y2: y(tick), class: "grid" }));
    const lowest = isCut && tick === floor ? "≤ " : "";
    parts.push(text(lowest + tickText(tick), LEFT - 6, y(tick) + 4, "end"));
  }
  let taken = -Infinity; // by the ticks further left
  for (const tick of sizeTicks()) {
    const half = 3.4 * whole(tick).length;
    if (x(tick) - half < taken + 6) continue;
    parts.push(text(whole(tick), x(tick), CURVE_HEIGHT - 4, "middle"));
    taken = x(tick) + half;
  }
  const marks = r.curve.rules.filter((rule) => rule.size <= r.limit);
  for (const rule of marks) {
    const mark = svg("path", { d: `M${x(rule.size)} ${bottom}l-4 7h8z`, class: "rule" });
    mark.append(svg("title", {}, `${rule.text}: ${rule.size} edges`));
    parts.push(mark);
  }
  for (const { one, metric: m } of lines) {
    const points = one.curve.sizes
      .map((s, i) => [s, m.values[i]])
      .filter(([s, v]) => s <= largest() && v != null);
    if (one.curve.sizes.at(-1) > largest()) points.push([largest(), valueAt(one, m, largest())]);
    const isCurrent = one === r || state.compare;
    const color = RUNS.length > 1 ? colors.only[one.index % colors.only.length] : colors.line.q;
    const attributes = {
      class: `line${isCurrent ? " current" : ""}`,
      stroke: color,
      points: points.map(([s, v]) => `${x(s).toFixed(1)},${y(v).toFixed(1)}`).join(" "),
    };
    parts.push(svg("polyline", attributes));
    if (isCurrent)
      for (const [s, v] of points)
        parts.push(svg("circle", { cx: x(s), cy: y(v), r: 2.2, fill: color }));
  }
  const here = valueAt(r, metric, size);
  const at = x(size);
  parts.push(svg("line", { x1: at, x2: at, y1: 4, y2: bottom, class: "marker" }));
  parts.push(svg("circle", { cx: at, cy: y(here), r: 4.5, class: "marker" }));
  const side = at > width * 0.7 ? "end" : "start";
  const whose = RUNS.length > 1 ? `${tokenText(r.name)}: ` : "";
  const label = `${whose}${metric.label} ${valueText(r, metric)}`;
  const value = text(label, at + (side === "end" ? -8 : 8), 13, side, { class: "tick value" });
  value.append(svg("title", {}, approximation(r) || "measured at this size"));
  parts.push(value);
  root.setAttribute("viewBox", `0 0 ${width} ${CURVE_HEIGHT}`);
  root.setAttribute(
    "aria-label",
    `${metric.description} by number of edges, on ${plural(r.curve.num_examples, `${r.curve.prompts} prompt`)}: ${short(here)} at ${size} edges`,
  );
  root.replaceChildren(...parts);
}

function fillMetrics(r, metric) {
  const names = metricsOf(r)
    .map((m) => m.name)
    .join();
  if (fillMetrics.names !== names) {
    fillMetrics.names = names;
    $("metric").replaceChildren(
      ...metricsOf(r).map((m) => h("option", { value: m.name, text: m.label })),
    );
  }
  $("metric").value = metric.name;
  $("metric").title =
    `${metric.description}; measured on ${plural(r.curve.num_examples, `${r.curve.prompts} prompt`)}`;
}

// Powers of ten, at most four, and the lower end if lower values are drawn there.
function logTicks(low, high, isCut) {
  const powers = [];
  for (let p = Math.floor(Math.log10(high)); p >= Math.log10(low); p -= 1) powers.push(10 ** p);
  const every = Math.ceil(powers.length / 4);
  const ticks = powers.filter((power, i) => i % every === 0 && !(isCut && power < 9 * low));
  return isCut ? [...ticks, low] : ticks;
}

// A number without zeros at its end.
function tickText(value) {
  const text = short(value);
  return text.includes("e") ? text : String(Number(text));
}

function sizeTicks() {
  const ticks = [0];
  for (let power = 1; power <= largest(); power *= 10) {
    for (const m of [1, 2, 5])
      if (m * power >= smallest() && m * power <= largest()) ticks.push(m * power);
  }
  const room = ($("curve").clientWidth || 600) / 48;
  return ticks.length > room ? ticks.filter((t) => /^[15]/.test(String(t))) : ticks;
}

$("curve").addEventListener("click", (event) => {
  if (!run().importance) return;
  const frame = $("curve").getBoundingClientRect();
  const share = (event.clientX - frame.left - LEFT - THUMB / 2) / (frame.width - LEFT - THUMB);
  change({ size: toSize(clamp(share, 0, 1)) });
});

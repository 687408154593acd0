// The size: slider, number and the curve below the graph, which share one logarithmic axis.

const THUMB = 16; // width of the slider's thumb, so that the marker stands above it
const CURVE_HEIGHT = 108;
const LEFT = 46;

const largest = () => Math.max(...RUNS.map((r) => r.limit), 1);
const smallest = () => Math.min(5, largest());
const toShare = (size) =>
  Math.log(Math.max(size, smallest()) / smallest()) / Math.log(largest() / smallest() || 2);
const toSize = (share) => Math.round(smallest() * (largest() / smallest()) ** share);

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
  requestRender();
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
  $("metric").parentElement.hidden = !r.curve;
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
        text: `chosen by the run (${by}${over})`,
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
  $("rules").replaceChildren(
    ...(entries.length ? [h("span", { class: "note", text: "Sizes that rules choose:" })] : []),
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
  const values = lines
    .flatMap((l) =>
      l.one.curve.sizes
        .flatMap((s, i) => (s && s < largest() ? [l.metric.values[i]] : []))
        .concat(valueAt(l.one, l.metric, largest()), valueAt(l.one, l.metric, smallest())),
    )
    .filter((v) => v != null);
  const isLog = metric.better === "lower";
  const positive = values.filter((v) => v > 0);
  const floor = isLog
    ? Math.max(Math.min(...positive, 1) * 0.8, Math.max(...positive, 1e-9) / 3e4)
    : Math.min(0, ...values);
  const top = Math.max(...values, isLog ? floor * 10 : 1e-9) * (isLog ? 1.3 : 1.02);
  const scale = (v) =>
    isLog
      ? Math.log(Math.max(v, floor) / floor) / Math.log(top / floor)
      : (v - floor) / (top - floor);
  const bottom = CURVE_HEIGHT - 18;
  const y = (v) => bottom - (bottom - 14) * clamp(scale(v), 0, 1);
  const parts = [];
  const text = (t, tx, ty, anchor, extra = {}) =>
    svg("text", { x: tx, y: ty, "text-anchor": anchor, class: "tick", ...extra }, t);
  for (const tick of isLog
    ? logTicks(floor, top)
    : [floor, (floor + top) / 2, Math.min(top, Math.max(...values))]) {
    parts.push(svg("line", { x1: LEFT, x2: width - 4, y1: y(tick), y2: y(tick), class: "grid" }));
    parts.push(text(short(tick).replace(/\.?0+$/, "") || "0", LEFT - 6, y(tick) + 4, "end"));
  }
  for (const tick of sizeTicks())
    parts.push(text(whole(tick), x(tick), CURVE_HEIGHT - 4, "middle"));
  const marks = r.curve.rules.filter((rule) => rule.size <= r.limit);
  for (const rule of marks) {
    const mark = svg("path", { d: `M${x(rule.size)} ${bottom}l-4 7h8z`, class: "rule" });
    mark.append(svg("title", {}, `${rule.text}: ${rule.size} edges`));
    parts.push(mark);
  }
  for (const { one, metric: m } of lines) {
    const points = one.curve.sizes
      .map((s, i) => [s, m.values[i]])
      .filter(([s, v]) => s >= smallest() && s <= largest() * 1.001 && v != null);
    if (one.curve.sizes.at(-1) > largest()) points.push([largest(), valueAt(one, m, largest())]);
    const isCurrent = one === r;
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
  const isMeasured = r.curve.sizes.includes(size);
  const side = at > width * 0.7 ? "end" : "start";
  parts.push(
    text(
      `${metric.label} ${isMeasured ? "" : "≈ "}${short(here)}`,
      at + (side === "end" ? -8 : 8),
      13,
      side,
      { class: "tick value" },
    ),
  );
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

function logTicks(low, high) {
  const powers = [];
  for (let p = Math.ceil(Math.log10(low)); p <= Math.log10(high); p += 1) powers.push(10 ** p);
  return powers.length > 4 ? powers.filter((_, i) => i % 2 === (powers.length - 1) % 2) : powers;
}

function sizeTicks() {
  const ticks = [];
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

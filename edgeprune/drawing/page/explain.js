// When an edge rose, and what `edgeprune explain` found out about a node or an edge.

const RISE = { width: 320, height: 96, left: 44, bottom: 18, top: 6 };

// The rank of an edge over the steps of the run, on a logarithmic axis, with rank 1 on top.
function risePanel(r, edge) {
  const ranks = r.rose?.ranks[r.rank.get(edge.key)];
  if (!ranks) return null;
  const { steps } = r.rose;
  const last = steps.at(-1);
  const all = Math.log(DATA.graph.num_edges);
  const x = (step) => RISE.left + ((RISE.width - RISE.left - 8) * step) / last;
  const y = (rank) =>
    RISE.top + ((RISE.height - RISE.top - RISE.bottom) * Math.log(rank)) / all;
  const size = Math.max(sizeOf(), 1);
  const picture = svg("svg", {
    viewBox: `0 0 ${RISE.width} ${RISE.height}`,
    width: "100%",
    role: "img",
    "aria-label": `rank ${whole(ranks[0])} before training, ${whole(ranks.at(-1))} at the end`,
  });
  const text = (content, at, anchor) =>
    svg("text", { ...at, "font-size": 10, fill: "currentColor", "text-anchor": anchor }, content);
  for (const rank of [1, size, DATA.graph.num_edges]) {
    const line = { x1: RISE.left, x2: RISE.width - 8, y1: y(rank), y2: y(rank) };
    picture.append(
      svg("line", { ...line, stroke: "currentColor", "stroke-opacity": 0.25 }),
      text(whole(rank), { x: RISE.left - 5, y: y(rank) + 3 }, "end"),
    );
  }
  picture.append(
    svg("polyline", {
      points: ranks.map((rank, i) => `${x(steps[i]).toFixed(1)},${y(rank).toFixed(1)}`).join(" "),
      fill: "none",
      stroke: "currentColor",
      "stroke-width": 1.6,
    }),
    text("step 0", { x: RISE.left, y: RISE.height - 4 }, "start"),
    text(whole(last), { x: RISE.width - 8, y: RISE.height - 4 }, "end"),
  );
  const since = steps[ranks.findLastIndex((rank) => rank > size) + 1];
  return h(
    "section",
    {},
    h("h3", { text: "Rank during training" }),
    picture,
    note(
      since === undefined
        ? `At the end it is not among the ${plural(size, "strongest edge")}.`
        : `Among the ${plural(size, "strongest edge")} for good since step ${whole(since)}.`,
    ),
  );
}

const KINDS_OF_FLIPS = {
  full: "the full model's answer",
  distractor: "a distractor",
  empty: "the empty circuit's answer",
  corrupted: "a token of the corrupted prompt",
  other: "another answer",
};

function explainedPanel(r, kind, name) {
  const found = r.explained?.[kind][name];
  if (!found) return null;
  const effects = [
    ["circuit", found.in_circuit],
    ["full model", found.in_full],
  ];
  const { prompts, split, distance } = r.explained;
  const flips = effects.find(([, effect]) => effect.num_tokens);
  return h(
    "section",
    {},
    table(
      "What it does",
      ["cut from", distance, "95 %", "prompts flipped"],
      effects.map(([where, { rise, num_flips }]) => [
        where,
        signed(rise.mean),
        `${signed(rise.low)} to ${signed(rise.high)}`,
        num_flips ? `${whole(num_flips)} (${percent(num_flips / prompts)})` : "0",
      ]),
      {
        numeric: [1, 2, 3],
        about: `Cut alone from ${chosenText(r)} and from the full model, on ${plural(prompts, `${split} prompt`)}.`,
      },
    ),
    flips ? flipsTable(flips) : null,
    neededTable(effects),
    found.pushed ? pushedTable(r, found.pushed) : null,
  );
}

function flipsTable([where, effect]) {
  const kinds = Object.entries(effect.kinds)
    .map(([kind, share]) => `${percent(share)} become ${KINDS_OF_FLIPS[kind]}`)
    .join(", ");
  return table(
    "Flips",
    ["from → to", "share", "count"],
    effect.changes.map(({ text, share, count }) => [text, percent(share), whole(count)]),
    {
      numeric: [1, 2],
      about: `Cut from the ${where}, ${plural(effect.num_tokens, "predicted token")} changed: ${kinds}.`,
    },
  );
}

function neededTable(effects) {
  const rows = effects.flatMap(([where, effect]) =>
    effect.prompts.map(({ prompt, rise, before, after }) => [
      prompt,
      where,
      signed(rise),
      before === after ? before : `${before} → ${after}`,
    ]),
  );
  return table("Prompts that need it most", ["prompt", "cut from", "change", "answer"], rows, {
    numeric: [2],
  });
}

function pushedTable(r, pushed) {
  const rows = [...pushed.most, ...pushed.least].map(([prompt, push]) => [
    prompt,
    signed(push),
  ]);
  return table("Training pairs that pushed it most and least", ["pair", "push"], rows, {
    numeric: [1],
    about:
      `${percent(pushed.share_up)} of ${plural(r.explained.num_pairs, "pair")} pushed it up; ` +
      `${plural(pushed.num_outliers, "outlier")}. 1 is the mean size of a push. Between halves of ` +
      `the snapshots, pushes correlate by ${pushed.consistency.toFixed(2)} (0: chance).`,
  });
}

// Saving what is shown: SVG, PNG, edges.json.

function download(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  announce(`${name} saved`);
}

const fileStem = () => `${run().name}-${sizeOf()}`.replace(/[^\w.=-]+/g, "-").slice(0, 80);

function saveSvg() {
  download(
    `${fileStem()}.svg`,
    new XMLSerializer().serializeToString(svgOfGraph()),
    "image/svg+xml",
  );
}

// The graph as an SVG, in light colours, as it lies in the view.
function svgOfGraph() {
  const { clientWidth: width, clientHeight: height } = canvas;
  const root = svg("svg", { xmlns: SVG, viewBox: `0 0 ${width} ${height}`, width, height });
  root.append(svg("title", {}, `${run().title || run().name}, ${plural(sizeOf(), "edge")}`));
  root.append(svg("rect", { width, height, fill: "#ffffff" }));
  const colors = palette(false);
  drawScene(new SvgPen(root), makeScene(state, layout(width, height, state.view), colors), colors);
  return root;
}

function savePng() {
  const ratio = 3;
  const { clientWidth: width, clientHeight: height } = canvas;
  const picture = h("canvas", {});
  picture.width = width * ratio;
  picture.height = height * ratio;
  const context = picture.getContext("2d");
  const colors = palette(false);
  context.scale(ratio, ratio);
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, width, height);
  drawScene(
    new CanvasPen(context),
    makeScene(state, layout(width, height, state.view), colors),
    colors,
  );
  picture.toBlob((blob) => download(`${fileStem()}.png`, blob), "image/png");
}

function saveEdges() {
  const edges = shownEdges()
    .map(({ edge }) => edge)
    .sort((a, b) => a.reader.index - b.reader.index || a.key - b.key);
  download(
    "edges.json",
    `${JSON.stringify(edges.map((e) => [e.from.name, e.reader.name]))}\n`,
    "application/json",
  );
}

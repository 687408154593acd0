// Two pens with the same strokes: one draws into a canvas, the other makes an SVG.

class CanvasPen {
  constructor(context, textScale = 1) {
    Object.assign(this, { context, textScale });
  }

  // Neighbours in the order of drawing that look alike are one path, which is drawn much faster.
  curves(edges) {
    const { context } = this;
    let before = "";
    for (const e of edges) {
      const style = `${e.color} ${e.width.toFixed(1)} ${e.alpha.toFixed(1)} ${e.dashed}`;
      if (style !== before) {
        if (before) context.stroke();
        context.beginPath();
        context.globalAlpha = e.alpha;
        context.strokeStyle = e.color;
        context.lineWidth = e.width;
        context.setLineDash(e.dashed ? [3, 3] : []);
        before = style;
      }
      context.moveTo(e.x1, e.y1);
      context.bezierCurveTo(e.cx1, e.cy1, e.cx2, e.cy2, e.x2, e.y2);
    }
    if (before) context.stroke();
    context.globalAlpha = 1;
    context.setLineDash([]);
  }

  box(x, y, w, h, fill, stroke, width, radius = 4) {
    const { context } = this;
    context.beginPath();
    context.roundRect(x, y, w, h, Math.min(radius, h / 2, w / 2));
    context.fillStyle = fill;
    context.fill();
    if (!stroke) return;
    context.strokeStyle = stroke;
    context.lineWidth = width;
    context.stroke();
  }

  text(text, x, y, size, color, align = "center", weight = 400) {
    const { context } = this;
    context.font = `${weight} ${size}px system-ui, sans-serif`;
    context.fillStyle = color;
    context.textAlign = align;
    context.textBaseline = "middle";
    context.fillText(text, x, y);
  }
}

// While the size changes: whole blocks of edges, by rank, are drawn once and then only copied.
class DraftPen extends CanvasPen {
  constructor(context, textScale, pictures) {
    super(context, textScale);
    this.pictures = pictures; // a Map, to be emptied when anything but the size changes
  }

  curves(edges) {
    const { canvas } = this.context;
    const lowest = edges.reduce((most, e) => Math.max(most, e.rank), 0);
    const count = Math.floor(lowest / DraftPen.BLOCK); // of blocks that are whole
    const members = Array.from({ length: count + 1 }, () => []);
    for (const e of edges) members[Math.floor(e.rank / DraftPen.BLOCK)].push(e);
    super.curves(members[count]);
    for (let block = count - 1; block >= 0; block -= 1) {
      if (!this.pictures.has(block)) {
        const picture = new OffscreenCanvas(canvas.width, canvas.height);
        const context = picture.getContext("2d");
        context.setTransform(this.context.getTransform());
        new CanvasPen(context).curves(members[block]);
        this.pictures.set(block, picture);
      }
      this.context.save();
      this.context.resetTransform();
      this.context.drawImage(this.pictures.get(block), 0, 0);
      this.context.restore();
    }
  }
}
DraftPen.BLOCK = 600;

class SvgPen {
  constructor(root) {
    this.root = root;
    this.textScale = 1;
  }

  curves(edges) {
    const n = (x) => x.toFixed(1);
    for (const e of edges) {
      const d = `M${n(e.x1)} ${n(e.y1)}C${n(e.cx1)} ${n(e.cy1)} ${n(e.cx2)} ${n(e.cy2)} ${n(e.x2)} ${n(e.y2)}`;
      const path = svg("path", {
        d,
        fill: "none",
        stroke: e.color,
        "stroke-width": e.width.toFixed(2),
        "stroke-opacity": e.alpha.toFixed(2),
        ...(e.dashed ? { "stroke-dasharray": "3 3" } : {}),
      });
      path.append(svg("title", {}, e.edge.name.replace(">", " → ")));
      this.root.append(path);
    }
  }

  box(x, y, w, h, fill, stroke, width, radius = 4) {
    this.root.append(
      svg("rect", {
        x: x.toFixed(1),
        y: y.toFixed(1),
        width: w.toFixed(1),
        height: Math.max(h, 0).toFixed(1),
        rx: Math.min(radius, h / 2, w / 2).toFixed(1),
        fill,
        ...(stroke ? { stroke, "stroke-width": width } : {}),
      }),
    );
  }

  text(text, x, y, size, color, align = "center", weight = 400) {
    this.root.append(
      svg(
        "text",
        {
          x: x.toFixed(1),
          y: y.toFixed(1),
          fill: color,
          "font-size": size.toFixed(1),
          "font-family": "Helvetica, Arial, sans-serif",
          "font-weight": weight,
          "text-anchor": { center: "middle", left: "start" }[align],
          "dominant-baseline": "central",
        },
        text,
      ),
    );
  }
}

// ------------------------------------------------------------------------------- colours

const media = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => state.theme === "dark" || (state.theme === "auto" && media.matches);

// All colours of the graph; in dark mode lines are lighter and boxes a little darker.
function palette(dark) {
  const { fill, line, shared, partly, only } = DATA.colors;
  const lighter = (color) => (dark ? mixed(color, "#ffffff", 0.42) : color);
  const each = (colors, change) =>
    Object.fromEntries(Object.entries(colors).map(([k, c]) => [k, change(c)]));
  return {
    fill: {
      ...each(fill, (c) => (dark ? mixed(c, "#16181d", 0.12) : c)),
      output: dark ? "#c9ced8" : fill.output,
    },
    line: each(line, lighter),
    shared: dark ? "#c9ced8" : shared,
    partly: dark ? "#7c828e" : partly,
    only: only.map(lighter),
    paper: dark ? "#16181d" : "#ffffff",
    outline: dark ? "#878d99" : "#6b6f78",
    ghost: dark ? "#3a3f49" : "#d5d8de",
    ghostText: dark ? "#7b818d" : "#8b909b",
    onFill: "#15171b",
    onOutput: dark ? "#15171b" : "#ffffff",
    soft: dark ? "#a3a9b5" : "#5a5f69",
    accent: dark ? "#ffd24a" : "#111318",
    pin: dark ? "#ff9d4d" : "#b4450b",
    group: dark ? "#d8c79a" : "#f3e3b3",
  };
}

// A colour moved towards another by a share.
function mixed(color, other, share) {
  const parts = [1, 3, 5].map((i) => {
    const [a, b] = [color, other].map((c) => parseInt(c.slice(i, i + 2), 16));
    return Math.round(a + (b - a) * share)
      .toString(16)
      .padStart(2, "0");
  });
  return `#${parts.join("")}`;
}

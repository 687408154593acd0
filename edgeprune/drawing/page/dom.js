// Making and filling elements. Text from data only ever becomes the text of an element.

const $ = (id) => document.getElementById(id);

// An element with attributes, properties (`text`, `on...`) and children (elements or strings).
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes = {}, text = null) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

function button(text, action, attributes = {}) {
  return h("button", { type: "button", text, onclick: action, ...attributes });
}

// Give an element new children; a control that has the focus keeps it (found by its id, or else by
// its place), and if it is gone the element itself gets it.
function refill(element, children) {
  const controls = () => [...element.querySelectorAll("button, select, input")];
  const focused = element.contains(document.activeElement) ? document.activeElement : null;
  const place = controls().indexOf(focused);
  element.replaceChildren(...children);
  if (!focused || focused === element) return;
  const next = (focused.id && $(focused.id)) || controls()[place] || element;
  next.focus({ preventScroll: true });
}

// A table with a heading row and a button that copies it; cells are strings or elements.
function table(caption, columns, rows, { numeric = [], about = "" } = {}) {
  const cell = (tag) => (content, i) =>
    h(
      tag,
      { class: numeric.includes(i) ? "number" : null, scope: tag === "th" ? "col" : null },
      content,
    );
  const element = h(
    "table",
    {},
    h("thead", {}, h("tr", {}, columns.map(cell("th")))),
    h(
      "tbody",
      {},
      rows.map((row) => h("tr", {}, row.map(cell("td")))),
    ),
  );
  element.setAttribute("aria-label", caption);
  const copy = button("copy", () => copyText(tableText(element), `${caption} copied`), {
    class: "quiet",
    "aria-label": `Copy the table: ${caption}`,
  });
  return h(
    "div",
    { class: "table" },
    h("div", { class: "bar" }, h("h3", { text: caption }), copy),
    about ? h("p", { class: "note", text: about }) : null,
    rows.length ? h("div", { class: "wide" }, element) : h("p", { class: "note", text: "none" }),
  );
}

function tableText(element) {
  const rows = [...element.rows].map((row) => [...row.cells].map((c) => c.textContent.trim()));
  return rows.map((row) => row.join("\t")).join("\n") + "\n";
}

async function copyText(text, message) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce(message);
}

// Told to screen readers only.
function tell(message) {
  clearTimeout(announce.timer);
  $("status").classList.add("hidden");
  $("status").textContent = message;
}

// Told to screen readers, and shown for a moment.
function announce(message) {
  const status = $("status");
  status.textContent = message;
  status.classList.remove("hidden");
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => status.classList.add("hidden"), 1800);
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

// Three significant digits; small and large numbers stay short.
function short(x) {
  if (x == null) return "–";
  if (x !== 0 && Math.abs(x) < 0.0005) return x.toExponential(0);
  const digits = Math.abs(x) >= 100 ? 0 : Math.abs(x) >= 10 ? 1 : Math.abs(x) >= 1 ? 2 : 3;
  return x.toFixed(digits);
}

const signed = (x) => `${x < 0 ? "−" : "+"}${short(Math.abs(x))}`;

const percent = (share) =>
  share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

const whole = (x) => x.toLocaleString("en-US");
const plural = (count, noun) => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;

// A token for display: a visible space, line break and direction mark; long ones are cut.
function tokenText(token, limit = 24) {
  const visible = token
    .replace(/\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/^ /, "␣")
    .replace(/^$/, "∅")
    .replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "�");
  return visible.length > limit ? `${visible.slice(0, limit - 1)}…` : visible;
}

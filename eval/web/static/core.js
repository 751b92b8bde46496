// Elements, numbers in words, the API, the choice of runs. Data becomes text nodes, never markup.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

export const note = (...text) => el("p", { className: "note" }, ...text);

const scaled = (value, units) => {
  for (const [size, unit] of units) if (Math.abs(value) >= size * 0.9995) return `${parseFloat((value / size).toPrecision(3))}${unit}`;
  return `${parseFloat(value.toPrecision(3))}`;
};

export const count = (value) => (value === null || value === undefined ? "" : scaled(value, [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]));

export const bytes = (value) => scaled(value, [[1e12, " TB"], [1e9, " GB"], [1e6, " MB"], [1e3, " kB"], [1, " B"]]);

export const power = (value) => {
  if (!value) return value === 0 ? "0" : "";
  const exponent = Math.floor(Math.log10(value) + 1e-9);
  const digits = [...`${exponent}`].map((c) => "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"["0123456789".indexOf(c)] ?? "\u207b");
  const mantissa = parseFloat((value / 10 ** exponent).toPrecision(2));
  return (mantissa === 1 ? "" : `${mantissa}\u00d7`) + "10" + digits.join("");
};

export const sig = (value, digits = 3) =>
  value === null || value === undefined ? "" : Math.abs(value) >= 1e5 ? count(value) : Math.abs(value) < 0.001 ? `${parseFloat(value.toFixed(4))}` : `${parseFloat(value.toPrecision(digits))}`;

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const whole = Math.round(seconds), two = (n) => `${n}`.padStart(2, "0");
  if (seconds < 0.9995) return seconds ? `${sig(1000 * seconds)} ms` : "0 s";
  if (seconds < 9.95) return `${sig(seconds, 2)} s`;
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 172800) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${two(Math.floor((whole % 86400) / 3600))} h`;
}

// Beside others in a column: with all its digits, so that they stand below each other.
export const steady = (value, digits) => {
  if (!Number.isFinite(value) || Math.abs(value) >= 1e5) return sig(value, digits);
  const whole = Math.abs(value) <= 1 ? 0 : Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toFixed(Math.max(0, digits - whole));
};

export const words = (text) => text.replaceAll("_", " ").replaceAll("/", ", ");

export const range = (point, digits = 2) =>
  point.low === null || point.high === null ? null : el("small", {}, ` ${steady(point.low, digits)}\u2013${steady(point.high, digits)}`);

export const cell = (point, digits = 3, best = false) =>
  point ? el("td", { className: best ? "best" : "", title: `${point.count} samples at ${count(point.images)} images` }, steady(point.value, digits), range(point)) : el("td", {}, el("small", {}, "\u2013"));

export async function api(path, parameters = {}, body = null) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters))
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") query.append(name, one);
  const options = body === null ? {} : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(`/api/${path}${query.size ? `?${query}` : ""}`, options);
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(typeof told.detail === "string" ? told.detail : `${path}: ${answer.status}`);
  return told;
}

// What is shown is in the address: it can be sent to somebody else.
export const address = {
  get: (name, otherwise = null) => new URLSearchParams(location.search).get(name) ?? otherwise,
  all: (name) => new URLSearchParams(location.search).getAll(name),
  set(changes) {
    const query = new URLSearchParams(location.search);
    for (const [name, value] of Object.entries(changes)) {
      query.delete(name);
      for (const one of [value].flat()) if (one !== null && one !== undefined) query.append(name, one);
    }
    history.replaceState(null, "", `${location.pathname}${query.size ? `?${query}` : ""}`);
    keepChoiceInMenu();
  },
};

export function keepChoiceInMenu() {
  const query = new URLSearchParams();
  for (const run of address.all("run")) query.append("run", run);
  for (const link of document.querySelectorAll("nav a")) {
    const target = new URL(link.href);
    target.search = ["/api", "/failures", "/"].includes(target.pathname) ? "" : query;
    link.href = target;
  }
}

const AT_FIRST = 12;

// The runs a page is about: those in the address, else all of a few, else the latest twelve.
export function chosen(runs) {
  const asked = new Set(address.all("run"));
  const picked = runs.filter((run) => asked.has(run.name));
  if (picked.length || address.get("all")) return picked.length ? picked : runs;
  if (runs.length <= AT_FIRST) return runs;
  const latest = new Set([...runs].sort((a, b) => b.last.localeCompare(a.last)).slice(0, AT_FIRST).map((run) => run.name));
  return runs.filter((run) => latest.has(run.name));
}

export function chooser(runs, changed) {
  const place = document.getElementById("chooser");
  const open = place.querySelector("details")?.open ?? false;
  const filter = place.querySelector("input[type=search]")?.value ?? "";
  if (runs.length < 2 || place.contains(document.activeElement)) {
    if (runs.length < 2) place.replaceChildren();
    return;
  }
  const on = new Set(chosen(runs).map((run) => run.name));
  const summary = el("summary", {});
  const say = () => (summary.textContent = `Showing ${on.size} of ${runs.length} runs`);
  const apply = () => {
    say();
    address.set({ run: on.size === runs.length ? [] : [...on], all: on.size === runs.length ? 1 : null });
    changed();
  };
  const boxes = runs.map((run) => {
    const box = el("input", { type: "checkbox", checked: on.has(run.name), onchange: () => (box.checked ? on.add(run.name) : on.delete(run.name), apply()) });
    return { run, box, label: el("label", { title: run.name }, box, el("span", {}, run.name)) };
  });
  const search = el("input", { type: "search", value: filter, placeholder: "filter by name", "aria-label": "filter runs by name" });
  const visible = () => boxes.filter(({ run }) => run.name.toLowerCase().includes(search.value.toLowerCase()));
  const narrow = () => { const kept = new Set(visible()); for (const b of boxes) b.label.hidden = !kept.has(b); };
  const all = (value) => () => { for (const b of visible()) { b.box.checked = value; value ? on.add(b.run.name) : on.delete(b.run.name); } apply(); };
  search.addEventListener("input", narrow);
  say();
  place.replaceChildren(el("details", { className: "chooser", open }, summary,
    el("div", { className: "controls" }, search, el("button", { className: "plain", onclick: all(true) }, "All"), el("button", { className: "plain", onclick: all(false) }, "None")),
    el("div", { className: "list" }, boxes.map((b) => b.label))));
  narrow();
}

export function segments(options, value, picked, label) {
  const made = el("div", { className: "segments", role: "group", "aria-label": label });
  made.append(...Object.entries(options).map(([key, text]) => el("button", {
    type: "button", "aria-pressed": `${key === value}`,
    onclick: (event) => { for (const b of made.children) b.setAttribute("aria-pressed", `${b === event.target}`); picked(key); },
  }, text)));
  return made;
}

export function select(options, value, picked, label) {
  const made = el("select", { onchange: () => picked(made.value) }, Object.entries(options).map(([key, text]) => el("option", { value: key }, text)));
  made.value = value;
  return el("label", {}, label, made);
}

// Columns: {title, value(row), show(row) -> td content, text}. A click on a head sorts.
export function table(columns, rows, { tall = false, sort = null } = {}) {
  const body = el("tbody");
  let [by, direction] = sort ?? [null, 1];
  const fill = () => {
    const order = by === null ? rows : [...rows].sort((a, b) => {
      const [x, y] = [columns[by].value(a), columns[by].value(b)];
      if (x === null || x === undefined || x === "") return 1;
      if (y === null || y === undefined || y === "") return -1;
      return direction * (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
    });
    body.replaceChildren(...order.map((row) => el("tr", {}, columns.map((column) => {
      const shown = column.show ? column.show(row) : column.value(row);
      return shown instanceof HTMLTableCellElement ? shown : el("td", { className: column.text ? "text" : "" }, shown ?? "");
    }))));
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === by ? (direction > 0 ? "ascending" : "descending") : "none"));
  };
  const heads = columns.map((column, i) => el("th", { scope: "col", className: column.text ? "text" : column.title.length > 16 ? "long" : "" }, el("button", {
    onclick: () => { direction = by === i ? -direction : 1; by = i; fill(); },
  }, column.title)));
  fill();
  return el("div", { className: tall ? "scroll tall" : "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
}

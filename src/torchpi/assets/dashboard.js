"use strict";
// Polls the server for the state of the robots and shows it. Client data is inserted as text or numbers, never as HTML.

const PAUSE_MS = 400, SECONDS = 60;
const SVG = "http://www.w3.org/2000/svg";

// Keep the token only in this variable: not in the URL, which browsers store and share, and not on disk.
const inAddress = location.search.match(/^\?token=([^&]*)/);
const token = inAddress ? decodeURIComponent(inAddress[1]) : null;
if (location.search) history.replaceState(null, "", location.pathname);

// ---- elements ----

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children);
// Let long names wrap after their parts: left_ wrist_ rotate.
const breakable = (name) => name.split(/(?<=[_.])/).flatMap((part) => [part, el("wbr")]);
const byId = (id) => document.getElementById(id);

function short(value) {
  if (value === null) return "NaN";
  if (value !== 0 && (Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
const ms = (value) => (value >= 1000 ? `${short(value / 1000)} s` : `${short(value)} ms`);
const seconds = (value) => (value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`);
const rate = (value) => `${short(value)}/s`;
const isWide = () => window.innerWidth > 720;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// ---- plots ----

// One bar per second of the last minute: inference, with the time in the queue on top; a line marks the slowest request.
function latencyPlot(rows, width, height) {
  const left = 54, right = width - 6, top = 10, bottom = height - 20;
  if (!rows.length) return el("p", { class: "empty" }, `no answer in the last ${SECONDS} s`);
  const most = Math.max(...rows.map((row) => row.slowest_ms));
  const step = (right - left) / SECONDS, y = (value) => bottom - ((bottom - top) * value) / most;
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "latency over time" });
  for (const value of [0, most / 2, most]) {
    plot.append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, ms(value)),
    );
  }
  for (const row of rows) {
    const x = right - (row.ago + 1) * step, infer = y(row.infer_ms), queue = y(row.infer_ms + row.queue_ms);
    const bar = { x: x + 0.15 * step, width: 0.7 * step };
    const label = `${row.ago} s ago: ${plural(row.requests, "request")}, queue ${ms(row.queue_ms)}, ` +
      `inference ${ms(row.infer_ms)}, slowest ${ms(row.slowest_ms)}`;
    plot.append(
      svg("g", {},
        svg("title", {}, label),
        svg("rect", { class: "infer", y: infer, height: bottom - infer, ...bar }),
        svg("rect", { class: "queue", y: queue, height: infer - queue, ...bar }),
        svg("line", { class: "slowest", x1: x + 0.1 * step, x2: x + 0.9 * step, y1: y(row.slowest_ms), y2: y(row.slowest_ms) }),
      ),
    );
  }
  plot.append(
    svg("text", { x: left, y: height - 4 }, `${SECONDS} s ago`),
    svg("text", { x: right, y: height - 4, "text-anchor": "end" }, "now"),
  );
  return plot;
}

const key = (...entries) => el("p", { class: "key" },
  ...entries.map(([css, shape, text]) => el("span", {}, el("i", { class: `${css} ${shape}` }), text)));
const latencyKey = () => key(["prefix", "", "inference"], ["suffix", "", "queue"], ["plain", "line", "slowest request"]);

// One dimension of a chunk over its steps. The first `executed` steps are done; null: unknown. With several samples, a band
// shows one standard deviation.
function jointPlot({ name, unit, span: trained, values, std }, executed) {
  const width = 200, height = 70, left = 50, right = width - 5, top = 7, bottom = height - 7;
  const known = values.filter((value) => value !== null);
  const off = values.map((value, i) => (value === null ? 0 : std[i] ?? 0)), spread = off.some((value) => value > 0);
  const edge = (sign) => values.map((value, i) => (value === null ? null : value + sign * off[i])).filter((value) => value !== null);
  const low = Math.min(...edge(-1)), high = Math.max(...edge(1));
  // Rounding and the jitter of a joint at rest must not look like motion.
  const span = Math.max(high - low, 0.01 * Math.max(Math.abs(low), Math.abs(high)), 0.1 * (trained ?? 0));
  const x = (i) => left + ((right - left) * i) / Math.max(1, values.length - 1);
  const y = (value) => (top + bottom) / 2 - (span > 0 ? ((bottom - top) * (value - (low + high) / 2)) / span : 0);
  const line = (from, to) => values.slice(from, to).flatMap((value, i) =>
    value === null ? [] : [`${x(from + i).toFixed(1)},${y(value).toFixed(1)}`]).join(" ");
  const at = Math.min(executed ?? 0, values.length - 1);
  const plot = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name });
  if (spread) {
    const side = (sign) => values.flatMap((value, i) =>
      value === null ? [] : [`${x(i).toFixed(1)},${y(value + sign * off[i]).toFixed(1)}`]);
    plot.append(svg("polygon", { class: "spread", points: [...side(1), ...side(-1).reverse()].join(" ") }));
  }
  if (executed) {
    plot.append(svg("rect", { class: "past", x: left, y: 0, width: x(at) - left, height }));
  }
  plot.append(svg("polyline", { class: "ahead", points: line(at, values.length) }));
  if (executed) plot.append(svg("polyline", { class: "done", points: line(0, at + 1) }));
  if (executed !== null && values[at] !== null) {
    plot.append(svg("circle", { class: "head", cx: x(at), cy: y(values[at]), r: 3.2 }));
  }
  if (known.length) {
    const at = (value) => ({ x: left - 6, y: y(value) + 4, "text-anchor": "end" });
    plot.append(svg("text", at(high), short(high)));
    if (y(low) - y(high) > 12) plot.append(svg("text", at(low), short(low)));
  }
  const value = unit ? `${short(values[at])} ${unit}` : short(values[at]);
  const caption = el("figcaption", {}, el("span", {}, ...breakable(name)), el("small", {}, value));
  return el("figure", {}, caption, plot);
}

// ---- robots ----

const cards = new Map();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) entry.target.dataset.seen = entry.isIntersecting ? "yes" : "";
}, { rootMargin: "200px" });

function cardOf(robot) {
  if (cards.has(robot.number)) return cards.get(robot.number);
  const part = {};
  for (const name of ["header", "error", "prompt", "cameras", "state", "latency", "executed", "joints"]) part[name] = el("div");
  part.header = el("header");
  part.error.className = "error";
  part.prompt.className = "prompt";
  part.cameras.className = "cameras";
  part.state.className = "state";
  part.latency.className = "latency";
  part.joints.className = "multiples";
  part.body = el("div", { class: "body", hidden: "" },
    el("div", {}, part.cameras, el("h4", {}, "State"), part.state),
    el("div", {}, el("h4", {}, "Action chunk"), part.executed, part.joints, el("h4", {}, "Latency"), part.latency));
  const card = { root: el("article", { class: "panel robot", id: `robot-${robot.number}` }, part.header, part.error, part.prompt, part.body),
    part, figures: new Map(), chunk: null, shown: 0 };
  watcher.observe(card.root);
  byId("robots").append(card.root);
  cards.set(robot.number, card);
  return card;
}

function dropCard(number) {
  const card = cards.get(number);
  for (const figure of card.figures.values()) URL.revokeObjectURL(figure.firstChild.src);
  watcher.unobserve(card.root);
  card.root.remove();
  cards.delete(number);
}

function statusOf(robot) {
  if (robot.left) return "disconnected";
  if (robot.waits_seconds !== null) return `waiting for an answer for ${seconds(robot.waits_seconds)}`;
  return robot.answered ? `answered ${seconds(robot.answered.seconds_ago)} ago` : "no request yet";
}

function executedText({ executed, horizon, control_hz }) {
  if (executed === null) return `${horizon} actions; the number of executed ones is unknown without a control rate`;
  return executed.source === "reported"
    ? `${executed.steps} of ${horizon} actions executed, reported by the robot`
    : `about ${executed.steps} of ${horizon} actions executed, estimated from the time at ${short(control_hz)} Hz`;
}

function uncertaintyText({ num_samples, uncertainty }) {
  if (uncertainty === null) return null;
  return el("p", { class: "uncertainty" }, `uncertainty ${short(100 * uncertainty)} % of the training range, ` +
    `the standard deviation of ${num_samples} samples; the band is one on either side`);
}

function drawCard(card, robot) {
  const { part } = card, answered = robot.answered;
  card.root.classList.toggle("left", robot.left);
  part.header.replaceChildren(
    el("h3", {}, `Robot ${robot.number}`), el("span", { class: "mono" }, `/${robot.policy}`), el("span", {}, robot.address),
    el("span", {}, plural(robot.requests, "request")), el("span", {}, rate(robot.requests_per_second)),
    el("span", { class: "status" }, statusOf(robot)));
  part.error.textContent = robot.error ?? "";
  part.error.hidden = robot.error === null;
  part.prompt.hidden = answered === null;
  part.body.hidden = answered === null || card.chunk === null;
  if (answered === null) return;
  part.prompt.replaceChildren(el("small", {}, "prompt"), answered.prompt);
  part.state.replaceChildren(...answered.state.map(({ name, value }) =>
    el("div", {}, el("span", {}, ...breakable(name)), short(value))));
  part.latency.replaceChildren(latencyPlot(robot.timeline, isWide() ? 720 : 360, 110));
  if (card.chunk === null) return;
  part.executed.replaceChildren(el("p", { class: "executed" }, executedText(answered)),
    key(["prefix", "line", "executed"], ["suffix", "line dash", "predicted"]), ...[uncertaintyText(answered)].filter(Boolean));
  part.joints.replaceChildren(...card.chunk.dimensions.map((dimension) =>
    jointPlot(dimension, answered.executed && answered.executed.steps)));
}

// Fetch the images and the chunk of a robot's last answer, if they are not loaded yet.
async function readAnswer(card, robot) {
  if (robot.answered === null || card.shown === robot.requests) return;
  const read = [ask(`chunk/${robot.number}.json`).then((response) => response.json()).then((chunk) => { card.chunk = chunk; })];
  for (const camera of robot.answered.cameras) read.push(showCamera(card, robot.number, camera));
  await Promise.all(read);
  card.shown = card.chunk.request;
}

async function showCamera(card, number, camera) {
  if (!card.figures.has(camera.name)) {
    const figure = el("figure", {}, el("span"), el("figcaption", {}, ...breakable(camera.key ?? camera.name)));
    card.figures.set(camera.name, figure);
    card.part.cameras.append(figure);
  }
  const shown = card.figures.get(camera.name).firstChild;
  if (!camera.sent) {
    shown.replaceWith(el("div", { class: "absent" }, "not sent"));
  } else {
    const response = await ask(`frame/${number}/${encodeURIComponent(camera.name)}.jpg`);
    const image = el("img", { alt: `camera ${camera.key}` });
    image.src = URL.createObjectURL(await response.blob());
    await image.decode();
    shown.replaceWith(image);
  }
  URL.revokeObjectURL(shown.src);
}

// ---- the server ----

function drawServer(server) {
  const last = server.timeline.filter((row) => row.ago <= 10);
  const requests = last.reduce((sum, row) => sum + row.requests, 0);
  const mean = (name) => (requests ? ms(last.reduce((sum, row) => sum + row[name] * row.requests, 0) / requests) : "–");
  const facts = [
    [server.connections, server.connections === 1 ? "robot connected" : "robots connected"],
    [rate(server.requests_per_second), "requests answered"],
    [`${server.waiting} of ${server.max_queue}`, "waiting for the model"],
    [mean("queue_ms"), "in the queue, mean of 10 s"],
    [mean("infer_ms"), "inference, mean of 10 s"],
  ];
  byId("facts").replaceChildren(...facts.map(([value, text]) => el("div", {}, el("b", {}, value), el("span", {}, text))));
  byId("latency").replaceChildren(el("h2", {}, "Latency"),
    el("div", { class: "panel latency" }, latencyKey(), latencyPlot(server.timeline, isWide() ? 1080 : 360, 150)));
  const heads = ["policy", "embodiment", "chunk", "control", "robots", "requests"];
  const cells = (policy) => [
    `/${policy.name}`, policy.embodiment, `${policy.action_horizon} × ${policy.action_size}`,
    policy.control_hz === null ? "–" : `${short(policy.control_hz)} Hz`, policy.robots, rate(policy.requests_per_second),
  ];
  byId("policies").replaceChildren(el("h2", {}, "Policies"), el("div", { class: "panel scroll" }, el("table", {},
    el("tr", {}, ...heads.map((text) => el("th", {}, text))),
    ...server.policies.map((policy) => el("tr", {}, ...cells(policy).map((text) => el("td", {}, text)))))));
}

async function ask(path) {
  const headers = token === null ? {} : { Authorization: `Bearer ${token}` };
  const response = await fetch(path, { headers, cache: "no-store" });
  if (!response.ok) throw Object.assign(new Error(await response.text()), { status: response.status });
  return response;
}

function note(text, bad) {
  byId("note").textContent = text;
  byId("note").classList.toggle("bad", bad);
}

async function refresh() {
  const server = await (await ask("dashboard.json")).json();
  drawServer(server);
  for (const number of [...cards.keys()]) if (!server.robots.some((robot) => robot.number === number)) dropCard(number);
  if (!byId("robots").firstChild) byId("robots").append(el("h2", {}, "Robots"), el("p", { class: "empty" }, "no robot is connected"));
  byId("robots").querySelector(".empty").hidden = server.robots.length > 0;
  const shown = server.robots.map((robot) => [cardOf(robot), robot]).filter(([card]) => card.root.dataset.seen !== "");
  // A robot may disconnect meanwhile, which is not an error.
  await Promise.all(shown.map(([card, robot]) => readAnswer(card, robot).catch((error) => { if (error.status !== 404) throw error; })));
  for (const [card, robot] of shown) drawCard(card, robot);
  note(server.ready ? "" : "the policies are being loaded and warmed up, or the server is stopping", false);
}

let running = false;
async function run() {
  if (running) return;
  running = true;
  while (!document.hidden) {
    try {
      await refresh();
    } catch (error) {
      if (error.status === 401) {
        note("the server requires a token: open /?token=TOKEN", true);
        break;
      }
      note(`no answer from the server, trying again (${error.message})`, true);
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
  running = false;
}

document.addEventListener("visibilitychange", run);
run();

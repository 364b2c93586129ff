// The screens of the page of one run: start, trial, end. session.js has the answers.

const NARROW = 700; // pixels of width, as in the style
const SMALLEST_CELL = 48; // pixels
const RETRIES = [100, 1000]; // milliseconds of waiting before a picture is loaded again
const ARROWS = { left: "ArrowLeft", same: "ArrowDown", right: "ArrowRight" };
const ARROW_SIGNS = { ArrowLeft: "←", ArrowDown: "↓", ArrowRight: "→" };

// The trial on the screen. `state`: "loading", "ready" or "broken". `since`: the time from which
// the present question can be answered.
let view = null; // {trial, state, since}
let zoomed = 0; // the index of the enlarged pictures

// The start screen

function showNumberError(text) {
  const last = study.schedules.length;
  byId("error").textContent = `There is no rater number ${text}: enter a number from 1 to ${last}.`;
}

function showStart(linked) {
  const known = validNumber(linked);
  byId("consent").textContent = study.consent;
  byId("warning").textContent = study.warning;
  byId("warning").hidden = !study.warning;
  byId("number-help").textContent =
    `From 1 to ${study.schedules.length}. If you have none, leave the field empty.`;
  byId("number").value = known || "";
  byId("number-asked").hidden = known > 0;
  byId("number-known").hidden = !known;
  byId("number-known").textContent = `Your number is ${known}.`;
  if (linked && !known) showNumberError(linked);
  showScreen("start");
  (known ? document.querySelector("#start button") : byId("number")).focus();
}

function submitStart(event) {
  event.preventDefault();
  const text = byId("number").value.trim();
  const n = text ? validNumber(text) : drawnNumber();
  if (n) begin(n);
  else showNumberError(text);
}

function begin(n) {
  number = n;
  session = stored(n) ?? { rater: randomHex(6), position: 0, records: [], open: {} };
  save();
  location.replace(`#rater=${n}`); // a reload finds the number here
  show();
}

// Trials and their questions

const given = () => session.open[session.position] ?? { answers: {}, ms: {} };

/** Whether the trial on the screen has been finished before. */
const revisited = () => session.position < session.records.length;

/** The index of the first question without an answer. */
function askedIndex() {
  return view.trial.questions.findIndex((name) => !(name in given().answers));
}

function answer(value) {
  if (view.state !== "ready") return;
  const { answers, ms } = given();
  const name = view.trial.questions[askedIndex()];
  answers[name] = value;
  ms[name] = Math.round(performance.now() - view.since);
  session.open[session.position] = { answers, ms };
  if (askedIndex() < 0) {
    finish({ answers, ms, skipped: false });
  } else {
    save();
    showQuestions();
    view.since = performance.now();
  }
}

const skip = () => finish({ answers: {}, ms: {}, skipped: true });

function finish(record) {
  const earlier = session.records[session.position];
  const revision = earlier ? earlier.revision + 1 : 0;
  session.records[session.position] = { ...record, revision };
  leave(session.records.length);
}

const keepEarlier = () => leave(session.records.length);

/** Goes to another trial and drops the open answers of this one. */
function leave(position) {
  delete session.open[session.position];
  goTo(position);
}

/** Keeps the open answers: a rater who returns to this trial goes on at the same question. */
function back() {
  if (session.position > 0) goTo(session.position - 1);
}

function goTo(position) {
  session.position = position;
  save();
  show();
}

// The screen of a trial

function showScreen(name) {
  for (const screen of ["start", "trial", "end"]) byId(screen).hidden = screen !== name;
  document.body.dataset.screen = name;
}

function show() {
  if (session.position < schedule().length) showTrial();
  else showEnd();
}

function showTrial() {
  view = { trial: trialAt(session.position), state: "loading", since: 0 };
  showScreen("trial");
  showProgress();
  showSides();
  showState();
  fit();
  load(view);
}

function showProgress() {
  const count = schedule().length;
  byId("progress-text").textContent = `${session.position + 1} of ${count}`;
  byId("progress").max = count;
  byId("progress").value = session.records.length;
}

/** The names of the sides: the labels of the answers "left" and "right". */
function sideNames() {
  const labels = new Map(view.trial.questions.flatMap((name) => study.questions[name].answers));
  return view.trial.sides.length > 1 ? [labels.get("left"), labels.get("right")] : [""];
}

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** One side: its name and some of its pictures, by index. */
function sideElement(token, name, indices, onClick) {
  const pictures = indices.map((k) => {
    const label = `${name} picture ${k + 1}`.trim();
    const img = element("img", { src: study.pictures[token][k], alt: label, draggable: false });
    const button = element("button", { type: "button", className: "picture", tabIndex: -1 }, [img]);
    button.addEventListener("click", () => onClick(k));
    return button;
  });
  const grid = element("div", { className: "grid" }, pictures);
  const heading = name ? [element("h2", { textContent: name })] : [];
  return element("section", { className: "side", ariaLabel: name || null }, [...heading, grid]);
}

function showSides() {
  const names = sideNames();
  const sides = view.trial.sides.map((token, i) =>
    sideElement(token, names[i], [...study.pictures[token].keys()], openZoom),
  );
  byId("sides").replaceChildren(...sides);
}

function pause(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Resolves to whether the picture loads in one of a few attempts. */
async function loaded(img) {
  for (const wait of RETRIES) {
    if (await outcome(img)) return true;
    await pause(wait);
    img.src = img.src; // loads it again
  }
  return outcome(img);
}

/** Resolves to whether the present attempt succeeds. */
function outcome(img) {
  if (img.complete) return Promise.resolve(img.naturalWidth > 0);
  return new Promise((resolve) => {
    img.addEventListener("load", () => resolve(true), { once: true });
    img.addEventListener("error", () => resolve(false), { once: true });
  });
}

async function load(own) {
  const all = await Promise.all([...byId("sides").querySelectorAll("img")].map(loaded));
  if (own !== view) return; // another trial is on the screen
  view.state = all.every(Boolean) ? "ready" : "broken";
  showState();
  view.since = performance.now();
  preload(session.position + 1);
}

function preload(position) {
  if (position >= schedule().length) return;
  for (const token of trialAt(position).sides) {
    for (const source of study.pictures[token]) new Image().src = source;
  }
}

function showState() {
  byId("trial").dataset.state = view.state;
  byId("status").textContent = {
    loading: "Loading the pictures…",
    ready: revisited() ? "New answers will replace your earlier ones." : "",
    broken: "A picture could not be loaded. Reload the page to try again, or skip this trial.",
  }[view.state];
  byId("back").disabled = session.position === 0;
  byId("zoom-open").disabled = view.state !== "ready";
  byId("save").disabled = session.records.length === 0;
  byId("keep").hidden = !revisited();
  showQuestions();
}

function showQuestions() {
  const { questions } = view.trial;
  const asked = askedIndex();
  const hidden = study.order === "hidden";
  const sections = questions.map((name, index) => questionElement(name, index, index === asked));
  byId("questions").classList.toggle("stacked", hidden);
  byId("questions").replaceChildren(...sections);
  const seen = hidden ? questions.slice(0, asked + 1) : questions;
  const captioned = seen.some((name) => study.questions[name].caption);
  byId("caption").textContent = captioned ? view.trial.caption : "";
  byId("help").textContent = helpLine();
  sections[asked].focus({ preventScroll: true });
}

function questionElement(name, index, isAsked) {
  const { text, answers } = study.questions[name];
  const count = view.trial.questions.length;
  const title = element("h3", { id: `question-${name}` });
  if (count > 1) {
    const place = `Question ${index + 1} of ${count}`;
    title.append(element("span", { className: "count", textContent: place }));
  }
  title.append(text);
  const buttons = answers.map((item, i) => answerButton(name, item, i, isAsked));
  const row = element("div", { className: "answers" }, buttons);
  const className = isAsked ? "question asked" : "question";
  const section = element("section", { className, tabIndex: -1 }, [title, row]);
  section.dataset.question = name;
  section.setAttribute("aria-labelledby", title.id);
  section.setAttribute("aria-describedby", "caption");
  return section;
}

function answerButton(name, [value, label], index, isAsked) {
  const key = element("kbd", { textContent: index + 1, ariaHidden: "true" });
  const button = element("button", { type: "button" }, [key, ` ${label}`]);
  button.dataset.value = value;
  button.disabled = !isAsked || view.state !== "ready";
  if (given().answers[name] === value) button.setAttribute("aria-pressed", "true");
  button.addEventListener("click", () => answer(value));
  return button;
}

function helpLine() {
  const keys = Object.keys(answerActions());
  const digits = keys.filter((key) => key.length === 1).join(" ");
  const arrows = keys.filter((key) => key.length > 1).map((key) => ARROW_SIGNS[key]);
  const answers = arrows.length ? `${digits} or ${arrows.join(" ")}` : digits;
  const parts = [`Keys: ${answers} answer`, "Z zoom, then ↑ ↓", "S skip", "Backspace back"];
  if (revisited()) parts.push("K keep");
  const unbroken = parts.map((part) => part.replaceAll(" ", "\u00a0")); // lines end between parts
  return unbroken.join("\u00a0· ");
}

// Sizes

/** Gives all pictures of both sides the largest size with which the trial fits the window. */
function fit() {
  if (document.body.dataset.screen !== "trial") return;
  reserveCaption();
  const sides = byId("sides");
  const grid = sides.querySelector(".grid");
  const { columns, rows } = shape(study.pictures[view.trial.sides[0]].length);
  const gap = parseFloat(getComputedStyle(grid).columnGap);
  const between = parseFloat(getComputedStyle(sides).columnGap);
  const count = view.trial.sides.length;
  const width = (sides.clientWidth - between * (count - 1)) / count;
  const height = window.innerHeight - (document.body.offsetHeight - grid.offsetHeight);
  const cell = Math.min((width + gap) / columns, (height + gap) / rows) - gap;
  sides.style.setProperty("--columns", columns);
  sides.style.setProperty("--cell", `${Math.max(SMALLEST_CELL, Math.floor(cell))}px`);
}

function shape(count) {
  const wide = window.innerWidth >= NARROW;
  const columns = count === 8 && wide ? 4 : count === 8 ? 2 : Math.ceil(Math.sqrt(count));
  return { columns, rows: Math.ceil(count / columns) };
}

/** Reserves the height of the longest caption: it must not move the pictures when it appears. */
function reserveCaption() {
  const caption = byId("caption");
  const { textContent } = caption;
  caption.style.minHeight = 0;
  const heights = schedule().map((_, position) => {
    caption.textContent = trialAt(position).caption;
    return caption.offsetHeight;
  });
  caption.textContent = textContent;
  caption.style.minHeight = `${Math.max(...heights)}px`;
}

// Zoom

function openZoom(k) {
  if (view.state !== "ready") return;
  showZoomed(k);
  byId("zoom").showModal();
}

const closeZoom = () => byId("zoom").close();

function showZoomed(k) {
  const names = sideNames();
  const count = study.pictures[view.trial.sides[0]].length;
  zoomed = (k + count) % count;
  const sides = view.trial.sides.map((token, i) =>
    sideElement(token, names[i], [zoomed], closeZoom),
  );
  byId("zoom-sides").replaceChildren(...sides);
  byId("zoom-text").textContent = `${zoomed + 1} of ${count}`;
  byId("zoom-previous").disabled = byId("zoom-next").disabled = count === 1;
}

// Export

function download() {
  // A type without a registered extension: the browser must not rename the file.
  const url = URL.createObjectURL(new Blob([exported()], { type: "application/octet-stream" }));
  const name = `ratings_${study.run}_${number}_${session.rater}.jsonl`;
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

function showEnd() {
  view = null;
  showScreen("end");
  byId("lines").value = exported();
  byId("download").focus();
}

function copy() {
  byId("lines").select();
  // navigator.clipboard is missing on pages that are not served over a secure connection.
  const done = document.execCommand("copy");
  byId("copied").textContent = done ? "Copied." : "Press Ctrl+C to copy.";
}

// Keys

/** What the keys of answers do: 1, 2, 3, and arrows for sides. */
function answerActions() {
  const actions = {};
  const { answers } = study.questions[view.trial.questions[askedIndex()]];
  answers.forEach(([value], index) => {
    actions[index + 1] = () => answer(value);
    if (ARROWS[value]) actions[ARROWS[value]] = () => answer(value);
  });
  return actions;
}

function actions() {
  if (byId("zoom").open) {
    const move = (step) => () => showZoomed(zoomed + step);
    return { z: closeZoom, Escape: closeZoom, ArrowDown: move(1), ArrowUp: move(-1) };
  }
  const screens = {
    start: () => ({}),
    trial: () => ({
      ...answerActions(),
      z: () => openZoom(0),
      s: skip,
      Backspace: back,
      ...(revisited() && { k: keepEarlier }),
    }),
    end: () => ({ Backspace: back }),
  };
  return screens[document.body.dataset.screen]();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.matches("input, textarea")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const action = actions()[key];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) action(); // a key that is held down must not rate several trials
}

function connect() {
  const clicks = {
    back,
    skip,
    save: download,
    keep: keepEarlier,
    "zoom-open": () => openZoom(0),
    "zoom-previous": () => showZoomed(zoomed - 1),
    "zoom-next": () => showZoomed(zoomed + 1),
    "zoom-close": closeZoom,
    download,
    copy,
    "end-back": back,
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  byId("start-form").addEventListener("submit", submitStart);
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", fit);
}

function main() {
  connect();
  byId("notice").hidden = local !== null;
  const parameter = (text) => new URLSearchParams(text).get("rater");
  const texts = [parameter(location.search) ?? "", parameter(location.hash.slice(1)) ?? ""];
  const linked = texts.find(validNumber) ?? texts.find(Boolean) ?? "";
  const n = validNumber(linked);
  // The same number in a second tab: reload, so that no tab overwrites the answers of the other.
  // A tab that still shows the start goes on where the other one is.
  window.addEventListener("storage", (event) => {
    if (event.key === `${STORE}/${number || n}`) location.reload();
  });
  if (n && stored(n)) begin(n);
  else showStart(linked);
}

main();

// The demo page: choose a picture, ask, watch the answer come, see boxes, and see what each word rests on.

const $ = (id) => document.getElementById(id);
const GENERAL = ["caption en", "answer en how many shapes are there?", "answer en is there a red star?", "detect red star"];
const SENT_AS_IT_IS = new Set(["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]);
const MOST_BYTES = 4e6; // beyond, or beyond MOST_SIDE pixels, a copy is sent: the model itself sees 896 pixels at most
const MOST_SIDE = 4096;
const COPY_SIDE = 1792;
const BINS = 1024;
const EDGES = ["top", "left", "bottom", "right"];

const state = {
  picture: null, // {blob, bitmap, width, height, name}: the bitmap may be smaller than the picture is
  boxes: [],
  looks: [], // [{text, weights}], from /explain
  pinned: -1,
  shown: -1,
  asking: null, // the AbortController of the question that runs
  looking: null, // and that of its explanation
  turn: 0, // grows with each picture and question: what comes late for an earlier one is dropped
  pick: 0, // grows with each picture that is chosen, before it is known to be one
  settled: 0, // the last of them that came, or that will not come
  mute: false, // whether the server has said that it does not explain: then it is not asked again
};

// ---- sentences -------------------------------------------------------------------------------------------------

function fail(sentence) {
  $("error").textContent = sentence;
}

/** The server's own sentence about a response that is no success. */
async function sentenceOf(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? (typeof body.detail === "string" ? body.detail : body.detail?.[0]?.msg) ?? "";
  } catch {
    // no JSON: the status has to do
  }
  if (response.status === 401 || response.status === 403) {
    $("settings").open = true;
    return `${said || "The server wants an API key"}. Enter a key under Settings.`;
  }
  if (response.status === 429) {
    const wait = response.headers.get("Retry-After");
    return said || `The server is busy: try again in ${wait ? `${wait} s` : "a moment"}.`;
  }
  if (response.status === 413) return said || "The picture is larger than the server takes: choose a smaller one.";
  return said || `The server answered ${response.status} ${response.statusText}.`.replace(" .", ".");
}

function reasonOf(error) {
  return error instanceof TypeError ? "The server cannot be reached: is it still running?" : String(error.message ?? error);
}

function headers() {
  const key = $("key").value.trim();
  if (/[^\x21-\x7e]/.test(key)) {
    $("settings").open = true;
    throw new Error("The API key has a sign that no key has: type it anew under Settings.");
  }
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// ---- the picture -----------------------------------------------------------------------------------------------

async function takePicture(blob, name, scene = null) {
  const pick = (state.pick += 1);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    lost(pick, `“${name}” is not a picture that this browser can read: choose a JPEG, PNG, WebP or GIF.`);
    return;
  }
  const { width, height } = bitmap;
  let sent = blob;
  const large = blob.size > MOST_BYTES || Math.max(width, height) > MOST_SIDE;
  try {
    bitmap = await shrunk(bitmap);
    if (large || !SENT_AS_IT_IS.has(blob.type)) sent = await copyOf(bitmap);
  } catch (error) {
    bitmap.close();
    lost(pick, `“${name}” could not be made smaller: ${reasonOf(error)}`);
    return;
  }
  if (pick !== state.pick) {
    bitmap.close();
    return;
  }
  state.settled = pick;
  forget();
  state.picture?.bitmap.close();
  state.picture = { blob: sent, bitmap, width, height, name };
  const sides = `${width} × ${height} pixels`;
  const copied = sent === blob ? "" : `, sent as a copy of at most ${COPY_SIDE} pixels`;
  $("shown").textContent = scene ? `Really there: ${scene.shows}.` : `${name}, ${sides}${copied}`;
  $("picture").setAttribute("aria-label", scene ? `Drawn scene: ${scene.shows}` : `Picture ${name}`);
  $("empty").hidden = true;
  $("picture").hidden = $("over").hidden = false;
  $("stage").classList.remove("empty-stage");
  for (const button of $("scenes").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.file === scene?.file));
  }
  offer(scene ? scene.prompts : GENERAL);
  paint();
}

/** The bitmap, of at most COPY_SIDE pixels a side: it stays in memory and is drawn again at each token. */
async function shrunk(bitmap) {
  const factor = COPY_SIDE / Math.max(bitmap.width, bitmap.height);
  if (factor >= 1) return bitmap;
  const [resizeWidth, resizeHeight] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * factor)));
  const small = await createImageBitmap(bitmap, { resizeWidth, resizeHeight, resizeQuality: "high" });
  bitmap.close();
  return small;
}

async function copyOf(bitmap) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  drawOnWhite(canvas, bitmap);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  if (!blob) throw new Error("the browser has no room for it");
  return blob;
}

/** Fill a canvas with a bitmap; what is transparent is white, as for the processor. */
function drawOnWhite(canvas, bitmap) {
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "white";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

async function takeScene(scene) {
  const pick = (state.pick += 1);
  try {
    const response = await fetch(`static/${scene.file}`);
    if (!response.ok) throw new Error(await sentenceOf(response));
    const blob = await response.blob();
    if (pick === state.pick) await takePicture(blob, scene.file.split("/").pop(), scene);
  } catch (error) {
    lost(pick, reasonOf(error));
  }
}

/** A picture that was chosen will not come; nothing is said where another was chosen since. */
function lost(pick, sentence) {
  if (pick !== state.pick) return;
  state.settled = pick;
  fail(sentence);
}

/** Forget question, answer and maps; gives the number of the new turn. */
function forget() {
  state.asking?.abort();
  state.looking?.abort();
  state.turn += 1;
  Object.assign(state, { boxes: [], looks: [], pinned: -1, shown: -1 });
  for (const id of ["answer", "spoken", "note", "error", "where"]) $(id).textContent = "";
  $("boxes").replaceChildren();
  $("tokens").replaceChildren();
  $("boxes").hidden = $("why").hidden = true;
  document.body.classList.remove("seeing");
  paint();
  return state.turn;
}

/** Draw the picture, and above it the map of the word shown, or the boxes. */
function paint() {
  if (!state.picture) return;
  const { picture } = state;
  const narrow = matchMedia("(max-width: 52rem)").matches;
  const room = { width: $("stage").clientWidth, height: innerHeight * (narrow ? 0.42 : 0.62) };
  const scale = Math.min(room.width / picture.width, Math.max(room.height, 140) / picture.height);
  const width = Math.max(1, Math.round(picture.width * scale));
  const height = Math.max(1, Math.round(picture.height * scale));
  const sharp = window.devicePixelRatio || 1;
  for (const canvas of [$("picture"), $("over")]) {
    canvas.width = Math.round(width * sharp);
    canvas.height = Math.round(height * sharp);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  drawOnWhite($("picture"), picture.bitmap);
  const over = $("over").getContext("2d");
  over.setTransform(sharp, 0, 0, sharp, 0, 0);
  const look = state.looks[state.shown];
  $("over").dataset.shows = look ? "map" : state.boxes.length ? "boxes" : "nothing";
  if (look) paintMap(over, look.weights, width, height);
  else paintBoxes(over, state.boxes, width, height);
}

/** Darken each patch by how little it matters, and outline the one that matters most. */
function paintMap(pen, weights, width, height) {
  const side = weights.length;
  const most = Math.max(...weights.flat());
  const edge = (index, length) => Math.round((index * length) / side);
  for (let row = 0; row < side; row += 1) {
    for (let column = 0; column < side; column += 1) {
      const [x, y] = [edge(column, width), edge(row, height)];
      const share = most > 0 ? weights[row][column] / most : 0;
      pen.fillStyle = `rgb(12 16 22 / ${(0.84 * (1 - share)).toFixed(3)})`;
      pen.fillRect(x, y, edge(column + 1, width) - x, edge(row + 1, height) - y);
    }
  }
  if (most <= 0) return;
  const { row, column } = topOf(weights);
  const [x, y] = [edge(column, width), edge(row, height)];
  frame(pen, x, y, edge(column + 1, width) - x, edge(row + 1, height) - y, "#e69f00");
}

function frame(pen, x, y, width, height, colour) {
  pen.lineJoin = "round";
  for (const [line, style] of [[5, "rgb(0 0 0 / 0.75)"], [2.5, colour]]) {
    pen.lineWidth = line;
    pen.strokeStyle = style;
    pen.strokeRect(x, y, width, height);
  }
}

function paintBoxes(pen, boxes, width, height) {
  pen.font = "600 13px system-ui, sans-serif";
  pen.textBaseline = "top";
  for (const box of boxes) {
    frame(pen, box.left * width, box.top * height, (box.right - box.left) * width, (box.bottom - box.top) * height, "#fff");
  }
  for (const box of boxes) {
    const room = pen.measureText(box.label).width + 12;
    const x = Math.min(Math.max(0, box.left * width - 2), Math.max(0, width - room));
    const above = box.top * height - 24;
    const y = above >= 0 ? above : Math.min(box.bottom * height + 4, height - 21);
    pen.fillStyle = "#14171a";
    pen.fillRect(x, y, room, 21);
    pen.fillStyle = "#fff";
    pen.fillText(box.label, x + 6, y + 4, room - 12);
  }
}

function topOf(weights) {
  let best = { row: 0, column: 0 };
  weights.forEach((line, row) => line.forEach((weight, column) => {
    if (weight > weights[best.row][best.column]) best = { row, column };
  }));
  return best;
}

// ---- asking ----------------------------------------------------------------------------------------------------

function offer(prompts) {
  $("examples").replaceChildren(...prompts.map((prompt) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = prompt;
    button.addEventListener("click", () => {
      $("prompt").value = prompt;
      ask();
    });
    return button;
  }));
}

async function ask() {
  const prompt = $("prompt").value;
  const most = $("most").value ? Number($("most").value) : undefined; // the server has a default
  const temperature = Number($("heat").value);
  if (state.picture && state.settled !== state.pick) {
    return fail("The picture that you chose is still on its way: ask again when it is here.");
  }
  const turn = forget();
  if (!state.picture) return fail("There is no picture yet: choose one, drop one, or take a drawn scene.");
  if (!prompt.trim()) {
    $("prompt").focus();
    return fail("The prompt is empty: write a question, or take an example.");
  }
  if ($("most").validity.badInput || (most !== undefined && !(Number.isInteger(most) && most >= 1))) {
    return fail("“Most tokens” is a whole number, 1 or more, or empty.");
  }
  if (!$("heat").value || !(temperature >= 0)) return fail("“Temperature” is a number, 0 or more.");
  const { picture } = state;

  const stop = new AbortController();
  state.asking = stop;
  showRunning();
  if (!state.model) await nameModel(); // there may be a key by now
  let end = { reason: "stopped", text: "" };
  try {
    const question = await asked(picture.blob, prompt, most, temperature);
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(question),
      signal: stop.signal,
    });
    if (!response.ok) throw new Error(await sentenceOf(response));
    await readAnswer(response, (piece, reason) => {
      if (turn !== state.turn) return;
      end = { reason: reason ?? end.reason, text: end.text + piece };
      showAnswer(end.text);
    });
    if (end.reason === "stopped") throw new Error("The answer broke off: the connection ended before it was whole.");
  } catch (error) {
    if (turn === state.turn && error.name !== "AbortError") fail(reasonOf(error));
  } finally {
    if (state.asking === stop) {
      state.asking = null;
      showRunning();
    }
  }
  if (turn !== state.turn) return;
  // one change, when all is there: screen readers leave out a region that was busy, or read it anew at each token
  $("spoken").textContent = [...$("boxes").children].map((item) => item.textContent).join("; ") || end.text;
  if (stop.signal.aborted) $("note").textContent = "Stopped.";
  else if (end.reason === "length") {
    $("note").textContent = most
      ? `Cut at ${most} tokens: Settings has the limit.`
      : "Cut at the length that the server gives by itself: Settings can ask for more.";
  }
  else if (end.reason === "stop" && !end.text) $("note").textContent = "The model had nothing to say.";
  if (end.text && !stop.signal.aborted) await explainAnswer(turn, picture.blob, prompt, end.text);
}

async function asked(blob, prompt, most, temperature) {
  const url = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => done(reader.result));
    reader.addEventListener("error", () => failed(new Error("The picture can no longer be read: choose it again.")));
    reader.readAsDataURL(blob);
  });
  const content = [{ type: "image_url", image_url: { url } }, { type: "text", text: prompt }];
  return { model: state.model, messages: [{ role: "user", content }], max_tokens: most, temperature, stream: true };
}

/** Read server-sent events; `take` gets each piece of text, and the reason with the last. */
async function readAnswer(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    waiting += value ?? "";
    const events = waiting.split(/\r?\n\r?\n/);
    waiting = done ? "" : events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
      if (!data.length || data[0] === "[DONE]") continue;
      const part = JSON.parse(data.join("\n"));
      if (part.error) throw new Error(part.error.message ?? "The server could not finish the answer.");
      const choice = part.choices?.[0];
      if (choice) take(choice.delta?.content ?? "", choice.finish_reason);
    }
    if (done) return;
  }
}

function showRunning() {
  $("send").setAttribute("aria-disabled", String(Boolean(state.asking))); // `disabled` would take the focus from it
  $("stop").setAttribute("aria-disabled", String(!state.asking && !state.looking));
  $("answer").setAttribute("aria-busy", String(Boolean(state.asking)));
}

function showAnswer(text) {
  $("answer").replaceChildren(...text.split(/((?:<(?:loc\d{4}|seg\d{3})>)+)/).filter(Boolean).map((part) => {
    if (!part.startsWith("<")) return document.createTextNode(part);
    const place = document.createElement("span");
    place.className = "place";
    place.textContent = part;
    return place;
  }));
  state.boxes = boxesOf(text);
  $("boxes").hidden = !state.boxes.length;
  $("boxes").replaceChildren(...state.boxes.map((box) => {
    const item = document.createElement("li");
    const name = document.createElement("b");
    name.dir = "auto";
    name.textContent = box.label;
    const percent = (place) => `${Math.round(100 * place)} %`;
    item.append(name, `: ${percent(box.left)} to ${percent(box.right)} from the left, `,
      `${percent(box.top)} to ${percent(box.bottom)} from the top`);
    for (const edge of EDGES) item.dataset[edge] = box[edge].toFixed(4);
    return item;
  }));
  paint();
}

/** Boxes of an answer, from 0 to 1: four loc tokens (y1 x1 y2 x2) and a label, as chapter 14 reads them. */
function boxesOf(text) {
  const found = [];
  for (const [, tokens, label] of text.matchAll(/((?:<loc\d{4}>){4})(?:<loc\d{4}>)*(?:<seg\d{3}>)*([^<;]*)/g)) {
    const [top, left, bottom, right] = tokens.match(/\d{4}/g).map((bin) => Number(bin) / (BINS - 1));
    if (Math.max(top, left, bottom, right) > 1 || bottom < top || right < left) continue;
    found.push({ top, left, bottom, right, label: label.trim() || "unnamed" });
  }
  return found;
}

// ---- why -------------------------------------------------------------------------------------------------------

async function explainAnswer(turn, blob, prompt, answer) {
  const before = $("note").textContent;
  const note = (sentence) => {
    if (turn === state.turn) $("note").textContent = `${before} ${sentence}`.trim();
  };
  if (state.mute) return note("This server does not explain its answers.");
  const form = new FormData();
  form.append("file", blob, "picture");
  form.append("prompt", prompt);
  form.append("answer", answer);
  const stop = new AbortController(); // the next question or picture aborts it, and is another turn
  state.looking = stop;
  showRunning();
  try {
    note("Looking for what each word rests on …");
    const response = await fetch("explain", { method: "POST", headers: headers(), body: form, signal: stop.signal });
    if (turn !== state.turn) return;
    if ([404, 405, 501].includes(response.status)) {
      state.mute = true;
      return note("This server does not explain its answers.");
    }
    if (!response.ok) throw new Error(await sentenceOf(response));
    const { tokens } = await response.json();
    if (turn !== state.turn) return;
    note("");
    state.looks = tokens;
    showTokens();
  } catch (error) {
    note(error.name === "AbortError" ? "Stopped." : `No explanation: ${reasonOf(error)}`);
  } finally {
    if (state.looking === stop) {
      state.looking = null;
      showRunning();
    }
  }
}

function showTokens() {
  const places = { count: 0 };
  $("tokens").replaceChildren(...state.looks.map(({ text }, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    const bin = /^\s*<loc(\d{4})>$/.exec(text);
    const edge = bin && EDGES[places.count % 4];
    places.count = bin ? places.count + 1 : 0;
    const plain = text.trim() || (text.includes("\n") ? "⏎" : "␣");
    button.textContent = bin ? `${edge} ${Number(bin[1])}` : plain;
    button.classList.toggle("place", Boolean(bin));
    if (!text.trim()) button.setAttribute("aria-label", text.includes("\n") ? "line break" : "space");
    button.addEventListener("mouseenter", () => show(index));
    button.addEventListener("focus", () => show(index));
    button.addEventListener("mouseleave", () => show(kept()));
    button.addEventListener("blur", () => show(state.pinned));
    button.addEventListener("click", () => {
      const letGo = state.pinned === index;
      const gone = letGo && matchMedia("(hover: none)").matches; // a mouse would still point at it
      pin(letGo ? -1 : index, gone ? -1 : index);
    });
    return button;
  }));
  $("why").hidden = !state.looks.length;
  document.body.classList.toggle("seeing", Boolean(state.looks.length));
}

/** The word that the keyboard is on, or else the one that was pressed. */
function kept() {
  const focused = [...$("tokens").children].findIndex((button) => button.matches(":focus-visible"));
  return focused < 0 ? state.pinned : focused;
}

function pin(index, shown = index) {
  state.pinned = index;
  for (const [place, button] of [...$("tokens").children].entries()) {
    button.setAttribute("aria-pressed", String(place === index));
  }
  show(shown);
}

/** Show the map of one word, or the boxes if it is none. */
function show(index) {
  state.shown = index;
  const buttons = [...$("tokens").children];
  for (const [place, button] of buttons.entries()) button.classList.toggle("lit", place === index);
  const look = state.looks[index];
  const word = buttons[index]?.getAttribute("aria-label") ?? buttons[index]?.textContent;
  $("where").textContent = look ? sayWhere(`“${word}”`, look.weights) : "";
  paint();
}

function sayWhere(word, weights) {
  const side = weights.length;
  const { row, column } = topOf(weights);
  const share = weights[row][column];
  if (!(share > 0)) return `${word} rests on no patch: the picture made no difference.`;
  const third = (index, names) => names[Math.min(2, Math.floor((3 * (index + 0.5)) / side))];
  const down = third(row, ["upper", "middle", "lower"]);
  const along = third(column, ["left", "middle", "right"]);
  const where = down === "middle" && along === "middle" ? "middle" : `${down} ${along}`;
  const percent = share < 0.01 ? "less than 1" : Math.round(100 * share);
  return `${word} rests most on the ${where}: row ${row + 1}, column ${column + 1} of ${side}, ${percent} % of the evidence.`;
}

// ---- wiring ----------------------------------------------------------------------------------------------------

function takeFiles(files) {
  const [file] = files;
  if (file) takePicture(file, file.name || "the pasted picture");
}

function inField(event) {
  return event.target.matches?.("input:not([type=file])");
}

function wire() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!state.asking) ask();
  });
  $("stop").addEventListener("click", () => (state.asking ?? state.looking)?.abort());
  $("file").addEventListener("change", () => {
    takeFiles($("file").files);
    $("file").value = ""; // so that the same file may be chosen again
  });
  document.addEventListener("paste", (event) => {
    const given = event.clipboardData;
    if (!given?.files.length) return;
    // Word and Excel put a picture beside their text; file managers only put the file's name beside the file
    if (inField(event) && ["text/html", "text/rtf"].some((type) => given.types.includes(type))) return;
    takeFiles(given.files);
  });
  document.addEventListener("dragover", (event) => {
    if (inField(event) && !event.dataTransfer.types.includes("Files")) return; // text, for the field
    event.preventDefault();
    $("stage").classList.add("drop");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) $("stage").classList.remove("drop");
  });
  document.addEventListener("drop", (event) => {
    $("stage").classList.remove("drop");
    if (inField(event) && !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    if (event.dataTransfer.files.length) takeFiles(event.dataTransfer.files);
    else fail("What you dropped is no file: save the picture first, then drop it.");
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.looks.length) pin(-1);
  });
  $("tokens").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return; // those are the browser's own
    const buttons = [...$("tokens").children];
    const along = getComputedStyle($("tokens")).direction === "rtl" ? -step : step;
    event.preventDefault();
    buttons[(buttons.indexOf(document.activeElement) + along + buttons.length) % buttons.length].focus();
  });
  new ResizeObserver(paint).observe($("stage"));
  addEventListener("resize", paint);
}

async function start() {
  wire();
  offer(GENERAL);
  $("stage").classList.add("empty-stage");
  try {
    const scenes = await (await fetch("static/scenes.json")).json();
    $("scenes").replaceChildren(...scenes.map((scene) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.file = scene.file;
      button.setAttribute("aria-pressed", "false");
      const image = document.createElement("img");
      image.src = `static/${scene.file}`;
      image.alt = `Scene: ${scene.shows}`;
      image.width = image.height = 112;
      button.append(image);
      button.addEventListener("click", () => takeScene(scene));
      item.append(button);
      return item;
    }));
    if (!state.pick) await takeScene(scenes[0]); // unless something else has been chosen
  } catch (error) {
    fail(`The drawn scenes cannot be fetched. ${reasonOf(error)}`);
  }
  await nameModel();
}

async function nameModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await sentenceOf(response));
    state.model = (await response.json()).data[0].id;
    $("model").textContent = `Model: ${state.model}.`;
  } catch (error) {
    fail(reasonOf(error));
  }
}

start();

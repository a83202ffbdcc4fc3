/* The page of one title. One state; whoever changes it calls select(), zoomTo() or compareBy(). */
const SHOTS = DATA.shots, COUNT = SHOTS.start.length, END = SHOTS.end[COUNT - 1] || 1;
const SPACES = DATA.spaces, SCENES = DATA.scenes;
const SEEN = ["video", "audio", "text"];
const BOUNDARIES = { start: "start of the title", cut: "cut", gradual: "gradual transition", split: "split, no transition: the longest allowed" };
const AXIS = 20, SCENE = SCENES.length ? 24 : 0, FILM = 76, SOUND = SHOTS.levels ? 46 : 0, WORDS = SHOTS.text.some(Boolean) ? 26 : 0;
const HEIGHT = AXIS + SCENE + FILM + SOUND + WORDS;
const QUIETEST = -60; // dBFS at the foot of the sound strip
const CLOSEST = 240; // pixels a second at the most
const NARROWEST = 4; // pixels of a picture in the strip
const KEPT_HEIGHT = 76; // pixels of pictures kept for the strip
const COMPARABLE = COUNT > 1 && Object.keys(SPACES).length > 0;
const state = { selected: 0, scale: 1, whole: true, space: Object.keys(SPACES)[0] || "", cell: [0, 0], playhead: null }; // playhead: seconds, where there is a player

const textOf = (index) => SHOTS.text[index];
const counted = (shots) => `${shots.toLocaleString("en")} shot${shots === 1 ? "" : "s"}`;
const saw = (index, bit) => Boolean(SHOTS.seen[index] & (1 << bit));
const lengthOf = (index) => SHOTS.end[index] - SHOTS.start[index];

/* The last position of a rising list whose value is not above the given one. */
function lastNotAbove(list, value) {
  let low = 0, high = list.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (list[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}
const sceneOf = (index) => lastNotAbove(SCENES, index);
const shotAt = (seconds) => lastNotAbove(SHOTS.start, seconds);

/* ------------------------------------------------------------------------------------------------------- timeline */

const strip = byId("strip"), tracks = byId("tracks"), extent = byId("extent");
const fit = () => strip.clientWidth / END;
let colours = {};
let waiting = false;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ground", "surface", "sunken", "line", "text", "quiet", "accent", "select", "video", "audio", "text-modality", "scene-a", "scene-b"])
    colours[name] = style.getPropertyValue(`--${name}`).trim();
}

/* Levels of sound of the whole title, and where each shot's begin. */
const LEVELS = SHOTS.levels ? new Int8Array(bytesOf(SHOTS.levels.dbfs).buffer) : new Int8Array(0);
const LEVEL_STARTS = [0];
if (SHOTS.levels) for (const count of SHOTS.levels.counts) LEVEL_STARTS.push(LEVEL_STARTS.at(-1) + count);

/* Pictures decoded for the strip: shot -> ImageBitmap, or null while it is on its way. */
const bitmaps = new Map();
function bitmap(index) {
  if (!bitmaps.has(index)) {
    bitmaps.set(index, null);
    if (SHOTS.picture[index])
      createImageBitmap(new Blob([bytesOf(SHOTS.picture[index])], { type: "image/jpeg" }), { resizeHeight: KEPT_HEIGHT, resizeQuality: "medium" })
        .then((found) => { bitmaps.set(index, found); draw(); }, () => {}); // a picture that is none stays grey
  }
  return bitmaps.get(index);
}

function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawTracks(); });
}

function drawTracks() {
  const width = strip.clientWidth, density = window.devicePixelRatio || 1;
  if (tracks.width !== Math.round(width * density)) {
    tracks.width = Math.round(width * density);
    tracks.height = Math.round(HEIGHT * density);
    tracks.style.width = `${width}px`;
    tracks.style.height = `${HEIGHT}px`;
  }
  const pen = tracks.getContext("2d"), left = strip.scrollLeft;
  const x = (seconds) => seconds * state.scale - left;
  const first = shotAt(left / state.scale), last = shotAt((left + width) / state.scale);
  pen.setTransform(density, 0, 0, density, 0, 0);
  pen.fillStyle = colours.sunken;
  pen.fillRect(0, 0, width, HEIGHT);
  pen.textBaseline = "middle";
  drawAxis(pen, x, left, width);
  let top = AXIS;
  if (SCENE) drawScenes(pen, x, top, first, last, width);
  top += SCENE;
  drawFilm(pen, x, top, first, last, width);
  const film = top;
  top += FILM;
  if (SOUND) drawSound(pen, x, top, first, last, width);
  top += SOUND;
  if (WORDS) drawWords(pen, x, top, first, last, width);
  const from = x(SHOTS.start[state.selected]), to = Math.max(x(SHOTS.end[state.selected]), from + 2);
  pen.strokeStyle = colours.select;
  pen.lineWidth = 2.5;
  pen.strokeRect(from, film + 1, to - from, HEIGHT - film - 2);
  if (state.playhead === null) return;
  pen.fillStyle = colours.text;
  pen.fillRect(Math.round(x(state.playhead)) - 1, AXIS, 2, HEIGHT - AXIS);
}

function drawAxis(pen, x, left, width) {
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
  const step = steps.find((one) => one * state.scale >= 76) || 14400;
  pen.font = "11px system-ui, sans-serif";
  pen.textAlign = "left";
  for (let index = Math.floor(left / state.scale / step); ; index++) {
    const seconds = index * step, at = x(seconds);
    if (at > width || seconds > END) break;
    pen.fillStyle = colours.line;
    pen.fillRect(Math.round(at), 0, 1, AXIS);
    pen.fillStyle = colours.quiet;
    pen.fillText(step < 1 || seconds % 1 ? clock(seconds) : clock(seconds).replace(/\.0$/, ""), at + 4, AXIS / 2);
  }
}

function drawScenes(pen, x, top, first, last, width) {
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "left";
  for (let scene = sceneOf(first); scene <= sceneOf(last); scene++) {
    const from = x(SHOTS.start[SCENES[scene]]), to = x(SHOTS.end[(SCENES[scene + 1] ?? COUNT) - 1]);
    pen.fillStyle = colours[scene % 2 ? "scene-b" : "scene-a"];
    pen.fillRect(from, top, to - from, SCENE);
    const begin = Math.max(from, 0), room = Math.min(to, width) - begin;
    pen.fillStyle = colours.text;
    if (room > 60) pen.fillText(`Scene ${scene}`, begin + 6, top + SCENE / 2);
    else if (room > 26) pen.fillText(`${scene}`, begin + 4, top + SCENE / 2);
  }
}

function drawFilm(pen, x, top, first, last, width) {
  let begin = Math.max(x(SHOTS.start[first]), 0); // shots narrower than a few pixels share one picture
  for (let index = first; index <= last; index++) {
    const end = Math.min(x(SHOTS.end[index]), width);
    if (end < begin + NARROWEST && index < last) continue;
    const image = bitmap(index);
    if (image) {
      const shown = Math.min(end - begin, (image.width * FILM) / image.height), part = (shown * image.height) / FILM;
      pen.drawImage(image, (image.width - part) / 2, 0, part, image.height, begin, top, shown, FILM);
      pen.globalAlpha = 0.3; // a long shot goes on as a faint repetition
      for (let at = begin + shown; at < end; at += shown) {
        const rest = Math.min(shown, end - at);
        pen.drawImage(image, 0, 0, (rest * image.height) / FILM, image.height, at, top, rest, FILM);
      }
      pen.globalAlpha = 1;
    }
    begin = end;
  }
  for (let index = Math.max(first, 1); index <= last; index++) {
    const at = x(SHOTS.start[index]), gradual = SHOTS.kind[index] === "gradual";
    if (Math.min(x(SHOTS.end[index]) - at, at - x(SHOTS.start[index - 1])) < 6) continue;
    pen.fillStyle = gradual ? colours.accent : colours.surface;
    pen.fillRect(at - (gradual ? 2 : 0.75), top, gradual ? 4 : 1.5, FILM);
  }
}

function drawSound(pen, x, top, first, last, width) {
  const middle = top + SOUND / 2;
  pen.fillStyle = colours.surface;
  pen.fillRect(0, top, width, SOUND);
  pen.fillStyle = colours.audio;
  const loudest = new Int8Array(Math.ceil(width)).fill(-128);
  for (let index = first; index <= last; index++) {
    for (let level = LEVEL_STARTS[index]; level < LEVEL_STARTS[index + 1]; level++) {
      const seconds = SHOTS.start[index] + (level - LEVEL_STARTS[index]) / 10;
      const from = Math.max(Math.floor(x(seconds)), 0), to = Math.min(Math.max(Math.ceil(x(Math.min(seconds + 0.1, SHOTS.end[index]))), from + 1), width);
      for (let column = from; column < to; column++) loudest[column] = Math.max(loudest[column], LEVELS[level]);
    }
  }
  for (let column = 0; column < loudest.length; column++) {
    const height = Math.max(loudest[column] / -QUIETEST + 1, 0) ** 2 * (SOUND - 6); // squared: between decibels and amplitude, so that words show
    if (height) pen.fillRect(column, middle - height / 2, 1, Math.max(height, 1));
  }
}

function drawWords(pen, x, top, first, last, width) {
  pen.font = "12px system-ui, sans-serif";
  pen.textAlign = "left";
  pen.fillStyle = colours.surface;
  pen.fillRect(0, top, width, WORDS);
  for (let index = first; index <= last; index++) {
    if (!textOf(index)) continue;
    const from = x(SHOTS.start[index]), to = x(SHOTS.end[index]), begin = Math.max(from, 0), room = Math.min(to, width) - begin;
    pen.fillStyle = colours["text-modality"];
    pen.fillRect(begin, top + WORDS - 4, Math.max(room - 1, 1), 3);
    if (room < 30) continue;
    pen.save();
    pen.beginPath();
    pen.rect(begin, top, room - 4, WORDS);
    pen.clip();
    pen.fillStyle = colours.text;
    pen.fillText(textOf(index).slice(0, 300), begin + 4, top + WORDS / 2 - 2);
    pen.restore();
  }
}

/* Zoom so that a second has so many pixels; what is at ``anchor`` seconds stays where it is. */
function zoomTo(scale, anchor) {
  const offset = anchor * state.scale - strip.scrollLeft;
  state.scale = Math.min(Math.max(scale, fit()), Math.max(CLOSEST, fit()));
  extent.style.width = `${Math.max(END * state.scale, 1)}px`;
  strip.scrollLeft = anchor * state.scale - offset;
  state.whole = state.scale <= fit() * 1.001; // the whole title is in view, and stays so when the window changes
  byId("zoom-out").disabled = byId("zoom-fit").disabled = state.whole;
  byId("zoom-in").disabled = state.scale >= Math.max(CLOSEST, fit());
  draw();
}

function zoomBy(factor) {
  const middle = (SHOTS.start[state.selected] + SHOTS.end[state.selected]) / 2, at = middle * state.scale - strip.scrollLeft;
  const seen = at >= 0 && at <= strip.clientWidth;
  zoomTo(state.scale * factor, seen ? middle : (strip.scrollLeft + strip.clientWidth / 2) / state.scale);
}

function reveal(index) {
  const from = SHOTS.start[index] * state.scale, to = SHOTS.end[index] * state.scale;
  if (from < strip.scrollLeft || to > strip.scrollLeft + strip.clientWidth)
    strip.scrollLeft = Math.min(from, (from + to - strip.clientWidth) / 2);
}

/* ---------------------------------------------------------------------------------------------------- selected shot */

function select(index, options = {}) {
  state.selected = Math.min(Math.max(index, 0), COUNT - 1);
  const shot = state.selected;
  const words = [`Shot ${shot}, the last is ${COUNT - 1}`, `${clock(SHOTS.start[shot])} to ${clock(SHOTS.end[shot])}`];
  if (SCENES.length) words.push(`scene ${sceneOf(shot)}`);
  if (textOf(shot)) words.push(textOf(shot).slice(0, 200));
  strip.setAttribute("aria-valuenow", shot);
  strip.setAttribute("aria-valuetext", words.join(", "));
  if (options.reveal !== false) reveal(shot);
  showShot(shot);
  showNearest();
  for (const card of document.querySelectorAll('.card[aria-current="true"]')) card.removeAttribute("aria-current");
  const card = cards[shot];
  if (card) {
    card.setAttribute("aria-current", "true");
    makeReachable(card);
  }
  draw();
  drawMap();
  document.dispatchEvent(new CustomEvent("shot", { detail: { shot, seconds: options.seconds ?? SHOTS.start[shot], playing: options.playing } }));
}

function fact(list, label, value) {
  list.push(element("dt", {}, label), element("dd", {}, value));
}

function showShot(shot) {
  byId("shot-frame").replaceChildren(SHOTS.picture[shot] ? picture(SHOTS.picture[shot], `Middle frame of shot ${shot}`) : "no picture stored");
  byId("shot-name").textContent = `Shot ${shot}`;
  const facts = [];
  fact(facts, "Time", `${clock(SHOTS.start[shot])} to ${clock(SHOTS.end[shot])}`);
  fact(facts, "Length", `${lengthOf(shot).toFixed(2)} s`);
  fact(facts, "Frames", `${SHOTS.frame[shot]} to ${(shot + 1 < COUNT ? SHOTS.frame[shot + 1] : SHOTS.lastFrame) - 1}`);
  if (SCENES.length) fact(facts, "Scene", `${sceneOf(shot)}`);
  const detected = SHOTS.kind[shot] === "cut" || SHOTS.kind[shot] === "gradual";
  fact(facts, "Begins with", `${BOUNDARIES[SHOTS.kind[shot]] || SHOTS.kind[shot]}${detected ? `, probability ${SHOTS.probability[shot].toFixed(2)}` : ""}`);
  if (SHOTS.dropped[shot]) fact(facts, "Left out", `${SHOTS.dropped[shot]} weaker boundaries or flashes inside`);
  if (SHOTS.levels && saw(shot, 1)) {
    const levels = LEVELS.subarray(LEVEL_STARTS[shot], LEVEL_STARTS[shot + 1]);
    if (levels.length) fact(facts, "Sound", `up to ${Math.max(...levels.slice(0, 36000))} dBFS`);
  }
  if (SHOTS.language[shot]) fact(facts, "Language", SHOTS.language[shot]);
  byId("shot-facts").replaceChildren(...facts);
  const text = byId("shot-text");
  text.textContent = textOf(shot) || "no text in this shot";
  text.classList.toggle("none", !textOf(shot));
  const bars = [];
  SEEN.forEach((name, bit) => {
    const share = SHOTS.shares.length ? SHOTS.shares[shot][bit] : 0;
    const bar = element("progress", { max: 100, value: share, class: name, "aria-label": `${name}: share of the fused vector` });
    bars.push(element("span", {}, name), bar, element("span", {}, saw(shot, bit) ? `${share.toFixed(1)} %` : "absent"));
  });
  byId("shot-shares").replaceChildren(...bars);
}

/* --------------------------------------------------------------------------------------------------------- nearest */

for (const space of Object.values(SPACES)) {
  space.nearest = new Int32Array(bytesOf(space.nearest).buffer);
  space.cosines = new Int16Array(bytesOf(space.cosines).buffer);
  space.map = bytesOf(space.map);
}

function cardOf(shot, right, alt) {
  const frame = element("div", { class: "frame" }, SHOTS.picture[shot] ? picture(SHOTS.picture[shot], "") : "");
  const line = element("div", { class: "line" }, element("b", {}, `${shot}`), element("span", {}, right));
  const card = element("button", { type: "button", class: "card", "aria-label": alt, "data-shot": shot }, frame, line);
  card.addEventListener("click", () => select(shot));
  return card;
}

function showNearest() {
  const space = SPACES[state.space], list = [];
  for (let rank = 0; space && rank < space.perShot; rank++) {
    const at = state.selected * space.perShot + rank, shot = space.nearest[at];
    if (shot < 0) break;
    const cosine = (space.cosines[at] / 10000).toFixed(3);
    list.push(element("li", {}, cardOf(shot, cosine, `Shot ${shot} at ${clock(SHOTS.start[shot])}, cosine ${cosine}`)));
  }
  byId("nearest-heading").textContent = `Nearest to shot ${state.selected} by ${state.space} embedding`;
  byId("nearest").replaceChildren(...(list.length ? list : [element("li", { class: "quiet" }, COUNT > 1 ? `This shot has no ${state.space} embedding to compare.` : "The title is a single shot.")]));
}

function compareBy(space) {
  state.space = space;
  for (const input of document.querySelectorAll("[data-choice] input")) input.checked = input.value === space;
  paintMap();
  showNearest();
}

/* ------------------------------------------------------------------------------------------------------- similarity */

const map = byId("map"), painted = document.createElement("canvas");
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis: even to the eye, safe for colour blindness
const PALETTE = new Uint8ClampedArray(256 * 4);
for (let code = 1; code < 256; code++) {
  const at = ((code - 1) / 254) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  for (let channel = 0; channel < 3; channel++) PALETTE[4 * code + channel] = RAMP[low][channel] + (at - low) * (RAMP[low + 1][channel] - RAMP[low][channel]);
  PALETTE[4 * code + 3] = 255;
}
const cellOf = (shot) => lastNotAbove(SPACES[state.space].first, shot);
const lastOf = (cell) => (SPACES[state.space].first[cell + 1] ?? COUNT) - 1;

function paintMap() {
  if (!COMPARABLE) return;
  const space = SPACES[state.space];
  painted.width = painted.height = space.cells;
  const pen = painted.getContext("2d"), image = pen.createImageData(space.cells, space.cells);
  for (let index = 0; index < space.map.length; index++) image.data.set(PALETTE.subarray(4 * space.map[index], 4 * space.map[index] + 4), 4 * index);
  pen.putImageData(image, 0, 0);
  const scale = byId("scale").getContext("2d"), ramp = scale.createImageData(256, 1);
  ramp.data.set(PALETTE.subarray(4, 1024));
  for (let y = 0; y < 10; y++) scale.putImageData(ramp, 0, y);
  byId("scale-low").textContent = `\u2264 ${space.low.toFixed(2)}`;
  byId("scale-high").textContent = `\u2265 ${space.high.toFixed(2)}`;
  state.cell = state.cell.map((one) => Math.min(one, space.cells - 1));
  byId("pair").textContent = "";
  drawMap();
}

function drawMap() {
  if (!COMPARABLE) return;
  const space = SPACES[state.space];
  const density = window.devicePixelRatio || 1, side = Math.round(map.clientWidth * density);
  if (map.width !== side) map.width = map.height = side;
  const pen = map.getContext("2d"), cell = side / space.cells;
  pen.fillStyle = colours.sunken;
  pen.fillRect(0, 0, side, side);
  pen.imageSmoothingEnabled = space.cells > side;
  pen.drawImage(painted, 0, 0, side, side);
  pen.lineWidth = density;
  pen.strokeStyle = "#ffffff";
  SCENES.forEach((first, scene) => {
    const from = cellOf(first) * cell, to = (cellOf((SCENES[scene + 1] ?? COUNT) - 1) + 1) * cell;
    pen.strokeRect(from, from, to - from, to - from);
  });
  const selected = (cellOf(state.selected) + 0.5) * cell;
  pen.strokeStyle = colours.select;
  pen.globalAlpha = 0.8;
  pen.beginPath();
  pen.moveTo(0, selected); pen.lineTo(side, selected);
  pen.moveTo(selected, 0); pen.lineTo(selected, side);
  pen.stroke();
  pen.globalAlpha = 1;
  if (document.activeElement === map) {
    pen.lineWidth = 2 * density;
    pen.strokeRect(state.cell[1] * cell, state.cell[0] * cell, Math.max(cell, 4), Math.max(cell, 4));
  }
}

function tellPair(row, column) {
  const space = SPACES[state.space], code = space.map[row * space.cells + column];
  const name = (cell) => (space.first[cell] === lastOf(cell) ? `Shot ${space.first[cell]}` : `Shots ${space.first[cell]} to ${lastOf(cell)}`);
  const value = space.low + ((code - 1) / 254) * (space.high - space.low);
  const sign = code === 1 ? "at most " : code === 255 ? "at least " : "";
  state.cell = [row, column];
  byId("pair").textContent = `${name(row)} and ${name(column).toLowerCase()}: ${code ? `cosine ${sign}${value.toFixed(2)}` : `no ${state.space} embedding`}`;
}

function pairAt(event) {
  const box = map.getBoundingClientRect(), cells = SPACES[state.space].cells;
  const at = (offset, size) => Math.min(Math.max(Math.floor((offset / size) * cells), 0), cells - 1);
  return [at(event.clientY - box.top, box.height), at(event.clientX - box.left, box.width)];
}

/* --------------------------------------------------------------------------------------------------------- all shots */

const cards = [];
let reachable = null;

/* One card of the sheet can be reached with Tab; arrow keys go on from there. */
function makeReachable(card) {
  if (reachable) reachable.tabIndex = -1;
  reachable = card;
  card.tabIndex = 0;
}

function fillSheet() {
  const wanted = byId("find").value.trim().toLowerCase(), kind = byId("kind").value;
  const keeps = {
    "": () => true, text: (shot) => saw(shot, 2), silent: (shot) => !saw(shot, 1),
    gradual: (shot) => SHOTS.kind[shot] === "gradual", dropped: (shot) => SHOTS.dropped[shot] > 0,
  }[kind];
  const sheet = byId("sheet"), parts = [];
  let group = null, heading = -1, found = 0;
  cards.length = 0;
  reachable = null;
  for (let shot = 0; shot < COUNT; shot++) {
    if (!keeps(shot) || (wanted && !textOf(shot).toLowerCase().includes(wanted))) continue;
    const scene = SCENES.length ? sceneOf(shot) : Math.floor(shot / 60); // without scenes: groups that the browser need not lay out unseen
    if (scene !== heading) {
      heading = scene;
      group = element("ol", { class: "thumbs" });
      if (SCENES.length) {
        const last = (SCENES[scene + 1] ?? COUNT) - 1;
        parts.push(element("h3", { class: "group" }, `Scene ${scene}: ${clock(SHOTS.start[SCENES[scene]])} to ${clock(SHOTS.end[last])}, ${counted(last - SCENES[scene] + 1)}`));
      }
      parts.push(group);
    }
    const seen = SEEN.filter((_, bit) => saw(shot, bit)).join(" \u00b7 ") || "nothing seen";
    const card = cardOf(shot, `${clock(SHOTS.start[shot])} \u00b7 ${lengthOf(shot).toFixed(1)} s`, `Shot ${shot}, ${clock(SHOTS.start[shot])}, ${lengthOf(shot).toFixed(1)} seconds, ${seen}`);
    card.tabIndex = -1;
    card.append(element("div", { class: "seen" }, seen));
    if (textOf(shot)) card.append(element("div", { class: "words", dir: "auto" }, textOf(shot).slice(0, 300)));
    group.append(element("li", {}, card));
    cards[shot] = card;
    found += 1;
  }
  sheet.replaceChildren(...parts);
  byId("found").textContent = found === COUNT ? counted(COUNT) : `${found.toLocaleString("en")} of ${counted(COUNT)}`;
  const current = cards[state.selected] || cards.find(Boolean);
  if (cards[state.selected]) cards[state.selected].setAttribute("aria-current", "true");
  if (current) makeReachable(current);
}

function moveInSheet(event) {
  const card = event.target.closest(".card");
  if (!card) return;
  const there = cards.filter(Boolean), at = there.indexOf(card);
  const columns = getComputedStyle(card.closest(".thumbs")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: there.length - 1 - at }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  const next = there[Math.min(Math.max(at + step, 0), there.length - 1)];
  makeReachable(next);
  next.focus();
}

/* ------------------------------------------------------------------------------------------------------------ wiring */

function labelTracks() {
  const rows = [["", AXIS], ["Scenes", SCENE], ["Shots", FILM], ["Sound", SOUND], ["Text", WORDS]];
  byId("labels").replaceChildren(...rows.filter(([, height]) => height).map(([name, height]) => {
    const label = element("div", {}, name);
    label.style.height = `${height}px`;
    return label;
  }));
}

function onStripKey(event) {
  const scene = SCENES.length ? sceneOf(state.selected) : 0;
  const go = {
    ArrowLeft: () => select(state.selected - 1), ArrowRight: () => select(state.selected + 1),
    ArrowDown: () => select(state.selected - 1), ArrowUp: () => select(state.selected + 1),
    Home: () => select(0), End: () => select(COUNT - 1),
    PageUp: () => select(SCENES.length ? SCENES[Math.max(scene - 1, 0)] : state.selected - 10),
    PageDown: () => select(SCENES.length ? SCENES[Math.min(scene + 1, SCENES.length - 1)] : state.selected + 10),
    "+": () => zoomBy(1.6), "=": () => zoomBy(1.6), "-": () => zoomBy(1 / 1.6), 0: () => zoomTo(fit(), 0),
  }[event.key];
  if (!go || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  go();
}

function onMapKey(event) {
  const cells = SPACES[state.space].cells, [row, column] = state.cell, clip = (value) => Math.min(Math.max(value, 0), cells - 1);
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Enter") select(SPACES[state.space].first[row]);
  else if (move) tellPair(clip(row + move[0]), clip(column + move[1]));
  else return;
  event.preventDefault();
  drawMap();
}

function begin() {
  readColours();
  labelTracks();
  strip.addEventListener("keydown", onStripKey);
  strip.addEventListener("scroll", draw, { passive: true });
  strip.addEventListener("click", (event) => {
    const seconds = (event.clientX - strip.getBoundingClientRect().left + strip.scrollLeft) / state.scale;
    select(shotAt(seconds), { reveal: false, seconds });
  });
  strip.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // the plain wheel scrolls the page
    event.preventDefault();
    zoomTo(state.scale * Math.exp(-event.deltaY / 300), (event.clientX - strip.getBoundingClientRect().left + strip.scrollLeft) / state.scale);
  }, { passive: false });
  byId("zoom-in").addEventListener("click", () => zoomBy(1.6));
  byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.6));
  byId("zoom-fit").addEventListener("click", () => zoomTo(fit(), 0));
  for (const input of document.querySelectorAll("[data-choice] input")) input.addEventListener("change", () => compareBy(input.value));
  if (COMPARABLE) {
    map.addEventListener("pointermove", (event) => tellPair(...pairAt(event)));
    map.addEventListener("click", (event) => { tellPair(...pairAt(event)); select(SPACES[state.space].first[state.cell[0]]); });
    map.addEventListener("keydown", onMapKey);
    map.addEventListener("focus", drawMap);
    map.addEventListener("blur", drawMap);
  } else {
    byId("similarity").replaceChildren(element("h2", {}, "Similarity of shots"), element("p", { class: "quiet" }, state.space ? "The title is a single shot: there is nothing to compare." : "No embeddings were given to this page."));
    byId("nearest-part").hidden = !state.space;
  }
  byId("find").addEventListener("input", fillSheet);
  byId("kind").addEventListener("change", fillSheet);
  byId("sheet").addEventListener("keydown", moveInSheet);
  new ResizeObserver(() => { zoomTo(state.whole ? fit() : state.scale, SHOTS.start[state.selected]); drawMap(); }).observe(document.documentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); draw(); drawMap(); });
  state.scale = fit();
  zoomTo(fit(), 0);
  paintMap();
  select(0);
  setTimeout(() => { fillSheet(); performance.mark("ready"); }, 0); // after the timeline is there
}

begin();

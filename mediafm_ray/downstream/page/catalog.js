/* The list of a catalog: columns of all titles in memory, the rows of one page of them in the document. */
const PER_PAGE = 50;
const TITLES = DATA.id.length;
const STATES = ["failed", "outdated", "ok"]; // what wants attention comes first
const state = { sort: "id", rising: true, page: 0, order: [] };
const rate = (title) => (DATA.duration[title] ? (60 * DATA.shots[title]) / DATA.duration[title] : 0);
const lowered = DATA.id.map((id, title) => [id, DATA.failure[title], ...DATA.warnings[title]].join("\n").toLowerCase());
const collator = new Intl.Collator("en", { numeric: true });
const KEYS = {
  status: (title) => STATES.indexOf(DATA.status[title]),
  duration: (title) => DATA.duration[title],
  shots: (title) => DATA.shots[title],
  rate,
  notes: (title) => DATA.warnings[title].length + (DATA.failure[title] ? 1000 : 0),
};
const alphabetical = new Int32Array(TITLES); // position of each title in the order of names, found once
[...Array(TITLES).keys()].sort((one, other) => collator.compare(DATA.id[one], DATA.id[other])).forEach((title, place) => { alphabetical[title] = place; });

function arrange() {
  const wanted = byId("find").value.trim().toLowerCase(), status = byId("status").value;
  const keeps = (title) => (!status || (status === "warned" ? DATA.warnings[title].length > 0 : DATA.status[title] === status)) && (!wanted || lowered[title].includes(wanted));
  const key = KEYS[state.sort], sign = state.rising ? 1 : -1;
  state.order = [...Array(TITLES).keys()].filter(keeps);
  state.order.sort((one, other) => (key ? sign * (key(one) - key(other)) || alphabetical[one] - alphabetical[other] : sign * (alphabetical[one] - alphabetical[other])));
  show(0);
}

function show(page) {
  const pages = Math.max(Math.ceil(state.order.length / PER_PAGE), 1);
  state.page = Math.min(Math.max(page, 0), pages - 1);
  const begin = state.page * PER_PAGE, shown = state.order.slice(begin, begin + PER_PAGE);
  byId("rows").replaceChildren(...shown.map(rowOf));
  const count = (number) => number.toLocaleString("en");
  byId("found").textContent = state.order.length ? `${count(begin + 1)} to ${count(begin + shown.length)} of ${count(state.order.length)}${state.order.length < TITLES ? ` (${count(TITLES)} listed)` : ""}` : "no title fits";
  byId("first").disabled = byId("previous").disabled = state.page === 0;
  byId("last").disabled = byId("next").disabled = state.page === pages - 1;
}

function rowOf(title) {
  const name = element("bdi", {}, DATA.id[title]);
  const label = DATA.page[title] ? element("a", { href: DATA.page[title] }, name) : name;
  const line = element("div", { class: "name-line" });
  if (DATA.picture.length && DATA.picture[title]) line.append(picture(DATA.picture[title], ""));
  line.append(label);
  const notes = [DATA.failure[title], ...DATA.warnings[title]].filter(Boolean).map((note) => element("li", {}, element("bdi", {}, note)));
  const done = DATA.shots[title] > 0;
  return element("tr", {},
    element("td", { class: "name" }, line),
    element("td", {}, element("span", { class: `badge ${DATA.status[title]}` }, DATA.status[title])),
    element("td", { class: "number" }, done ? clock(DATA.duration[title]) : ""),
    element("td", { class: "number", "data-unit": "shots" }, done ? DATA.shots[title].toLocaleString("en") : ""),
    element("td", { class: "number", "data-unit": "a minute" }, done ? rate(title).toFixed(1) : ""),
    element("td", { class: "message" }, notes.length ? element("ul", {}, ...notes) : ""));
}

function sortBy(sort) {
  state.rising = state.sort === sort ? !state.rising : sort === "id" || sort === "status";
  state.sort = sort;
  for (const button of document.querySelectorAll("[data-sort]")) {
    const heading = button.closest("th");
    if (button.dataset.sort === sort) heading.setAttribute("aria-sort", state.rising ? "ascending" : "descending");
    else heading.removeAttribute("aria-sort");
  }
  arrange();
}

for (const button of document.querySelectorAll("[data-sort]")) button.addEventListener("click", () => sortBy(button.dataset.sort));
byId("find").addEventListener("input", arrange);
byId("status").addEventListener("change", arrange);
byId("first").addEventListener("click", () => show(0));
byId("previous").addEventListener("click", () => show(state.page - 1));
byId("next").addEventListener("click", () => show(state.page + 1));
byId("last").addEventListener("click", () => show(Infinity));
arrange();
performance.mark("ready");

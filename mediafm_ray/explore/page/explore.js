"use strict";
/* The selection of shots, which stays in this browser, and the search by a picture. */
const Selection = (() => {
  const find = (id) => document.getElementById(id);
  const key = `mediafm-explore ${document.documentElement.dataset.version}`;
  const same = (one, other) => one.title === other.title && one.shot === other.shot;

  function read() {
    try {
      const found = JSON.parse(localStorage.getItem(key) || "[]");
      return Array.isArray(found) ? found.filter((one) => one && typeof one.title === "string" && Number.isInteger(one.shot)) : [];
    } catch { return []; }
  }

  function has(place) { return read().some((one) => same(one, place)); }

  function set(place, chosen) {
    const others = read().filter((one) => !same(one, place));
    localStorage.setItem(key, JSON.stringify(chosen ? [...others, place] : others));
    show();
  }

  function placeOf(box) { return { title: box.dataset.title, shot: Number(box.dataset.shot), start: Number(box.dataset.start) }; }

  function show() {
    const places = read();
    find("selection").hidden = !places.length;
    find("selection-count").textContent = `${places.length} shot${places.length === 1 ? "" : "s"} selected`;
    find("places").value = JSON.stringify(places.map((one) => [one.title, one.shot]));
    find("selection-list").replaceChildren(...places.map((one) => {
      const item = document.createElement("li"), link = document.createElement("a");
      link.href = `/title?${new URLSearchParams({ id: one.title, shot: one.shot })}`;
      link.textContent = `${one.title}, shot ${one.shot}`;
      item.append(link);
      return item;
    }));
    for (const box of document.querySelectorAll("input[data-title]")) box.checked = places.some((one) => same(one, placeOf(box)));
    document.dispatchEvent(new CustomEvent("selection"));
  }

  document.addEventListener("change", (event) => {
    if (event.target.matches("input[data-title]")) set(placeOf(event.target), event.target.checked);
  });
  find("selection-clear").addEventListener("click", () => { localStorage.removeItem(key); show(); });
  window.addEventListener("storage", show);
  window.addEventListener("pageshow", show); // also when the browser goes back to a page that it kept

  const picture = find("picture"), said = find("picture-said");
  if (picture) picture.addEventListener("change", async () => {
    const [file] = picture.files;
    if (!file) return;
    said.textContent = "Looking at the picture\u2026";
    const answer = await fetch("/picture", { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } }).catch(() => null);
    if (answer && answer.ok) location.assign(`/?${new URLSearchParams({ picture: (await answer.json()).picture })}`);
    else said.textContent = answer ? await answer.text() : "The server does not answer.";
  });

  show();
  return { has, set };
})();

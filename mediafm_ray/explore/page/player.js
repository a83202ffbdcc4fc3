/* The player of a title's page: playback moves the timeline, and choosing a shot moves the playback. After common.js and title.js. */
(() => {
  const video = byId("video"), MARGIN = 0.02; // seconds after a shot's start, so that its first frame is shown
  let shown = -1;

  function placeOf(shot) { return { title: DATA.id, shot, start: SHOTS.start[shot] }; }

  function cannot(reason) {
    byId("unplayable").textContent = `${reason} The thumbnails are shown instead.`;
    byId("unplayable").hidden = false;
    byId("still").hidden = false;
    video.hidden = true;
  }

  function show(shot) {
    if (shot === shown) return;
    shown = shot;
    byId("now-shot").textContent = `Shot ${shot}, ${clock(SHOTS.start[shot])} to ${clock(SHOTS.end[shot])}${SCENES.length ? `, scene ${sceneOf(shot)}` : ""}`;
    byId("now-text").textContent = textOf(shot);
    const still = byId("still-picture");
    still.alt = `Middle frame of shot ${shot}`;
    still.src = SHOTS.picture[shot] ? `data:image/jpeg;base64,${SHOTS.picture[shot]}` : `/thumbnail?${new URLSearchParams({ id: DATA.id, shot })}`;
    for (const link of document.querySelectorAll("#more a[data-by]")) {
      const bit = SEEN.indexOf(link.dataset.by);
      link.href = `/?${new URLSearchParams({ like: DATA.id, shot, by: link.dataset.by })}`;
      link.hidden = bit >= 0 && !saw(shot, bit);
    }
    const compare = document.querySelector("#more a[data-compare]");
    if (compare) compare.href = `/compare?${new URLSearchParams({ like: DATA.id, shot })}`;
    byId("pick").checked = Selection.has(placeOf(shot));
  }

  document.addEventListener("shot", (event) => {
    const { shot, seconds, playing } = event.detail;
    show(shot);
    history.replaceState(null, "", `?${new URLSearchParams({ id: DATA.id, shot })}`);
    if (!video || video.hidden || playing) return;
    video.currentTime = Math.max(seconds, SHOTS.start[shot] + Math.min(MARGIN, lengthOf(shot) / 2));
  });
  document.addEventListener("selection", () => { byId("pick").checked = Selection.has(placeOf(state.selected)); });
  byId("pick").addEventListener("change", (event) => Selection.set(placeOf(state.selected), event.target.checked));
  byId("previous-shot").addEventListener("click", () => select(state.selected - 1));
  byId("next-shot").addEventListener("click", () => select(state.selected + 1));

  function follow() {
    if (video.hidden) return;
    state.playhead = video.currentTime;
    const shot = shotAt(video.currentTime);
    if (shot !== state.selected && !video.seeking) {
      if (byId("only-shot").checked && !video.paused && shot > state.selected) {
        video.currentTime = SHOTS.start[state.selected] + Math.min(MARGIN, lengthOf(state.selected) / 2);
        return;
      }
      select(shot, { playing: true });
    }
    draw();
  }

  function everyFrame() {
    follow();
    if (!video.paused && !video.ended) requestAnimationFrame(everyFrame);
  }

  const wanted = Number(new URLSearchParams(location.search).get("shot") || 0);
  if (video) {
    const type = byId("player").dataset.mime;
    video.addEventListener("error", () => cannot(`This browser cannot play the video (${type}).`));
    video.addEventListener("play", everyFrame);
    video.addEventListener("seeked", follow);
    video.addEventListener("timeupdate", follow);
    if (video.error || !video.canPlayType(type)) cannot(`This browser cannot play the video (${type}).`);
  }
  select(Number.isInteger(wanted) ? wanted : 0);
})();

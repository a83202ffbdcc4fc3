"use strict";
const byId = (id) => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);

/* An element with attributes and children; strings become text nodes, never markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let index = 0; index < text.length; index++) bytes[index] = text.charCodeAt(index);
  return bytes;
}

/* Seconds as m:ss.d, or h:mm:ss from an hour on. */
function clock(seconds) {
  const tenths = Math.round(seconds * 10), hours = Math.floor(tenths / 36000), minutes = Math.floor(tenths / 600) % 60;
  const whole = String(Math.floor(tenths / 10) % 60).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${whole}` : `${minutes}:${whole}.${tenths % 10}`;
}

/* Pictures get their bytes when they come near the window. */
const pictures = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    entry.target.src = `data:image/jpeg;base64,${entry.target.base64}`;
    pictures.unobserve(entry.target);
  }
}, { rootMargin: "400px" });

function picture(base64, alt) {
  const made = element("img", { alt });
  made.base64 = base64;
  pictures.observe(made);
  return made;
}

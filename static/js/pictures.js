// <img data-refresh="MS">: a picture that is asked for again while it can be seen. The old one stays until the new one is whole;
// one that cannot be had any more is dimmed, so that it does not look live.

const TICK_MS = 250;
const asked = new WeakMap(); // picture -> when it was asked for last

setInterval(() => {
  if (document.hidden) return;
  const now = performance.now();
  for (const picture of document.querySelectorAll("img[data-refresh]")) {
    if (!asked.has(picture)) asked.set(picture, now);
    if (now - asked.get(picture) < Number(picture.dataset.refresh) || !inView(picture)) continue;
    asked.set(picture, Infinity);
    refresh(picture);
  }
}, TICK_MS);

function inView(element) {
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.bottom > 0 && box.top < innerHeight;
}

async function refresh(picture) {
  const fresh = picture.cloneNode();
  const url = new URL(picture.src);
  url.searchParams.set("t", Date.now());
  fresh.loading = "eager";
  fresh.src = url;
  try {
    await fresh.decode();
    fresh.classList.remove("stale");
    asked.set(fresh, performance.now());
    picture.replaceWith(fresh);
  } catch {
    picture.classList.add("stale");
    asked.set(picture, performance.now());
  }
}

// [data-follow]: a text that grows at its end. It shows its end, also when more comes, until the reader scrolls up.

const NEAR_PX = 24;
const left = new WeakSet(); // the reader is elsewhere in it

function toEnd() {
  for (const text of document.querySelectorAll("[data-follow]")) if (!left.has(text)) text.scrollTop = text.scrollHeight;
}

document.addEventListener(
  "scroll",
  ({ target }) => {
    if (!target.matches?.("[data-follow]")) return;
    if (target.scrollHeight - target.scrollTop - target.clientHeight < NEAR_PX) left.delete(target);
    else left.add(target);
  },
  true,
);
document.addEventListener("htmx:after:swap", toEnd);
toEnd();

// What every page has: live fragments, times that age, copying, menus, the filter, uploads. Every page works without it.

import "htmx.org"; // puts itself on window, where its extension looks for it
import "htmx.org/dist/ext/hx-sse.js";
import "./follow.js";
import "./time-ago.js";
import "./image-upload.js";
import "./live.js";
import "./pictures.js";

/* ---- copy ---- */

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  button.dataset.copied = "";
  setTimeout(() => delete button.dataset.copied, 1200);
});

/* ---- menus: one open at a time; a click elsewhere or Escape closes; near the bottom they open upwards ---- */

const openMenus = () => document.querySelectorAll("details.menu[open]");

document.addEventListener("click", (event) => {
  for (const menu of openMenus()) if (!menu.contains(event.target)) menu.open = false;
  // An item that opens a question has done its work; one that submits is about to leave the page.
  event.target.closest("[popovertarget], [data-key]")?.closest("details.menu")?.removeAttribute("open");
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of openMenus()) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
document.addEventListener(
  "toggle",
  ({ target }) => {
    if (!target.matches?.("details.menu[open]")) return;
    for (const menu of openMenus()) if (menu !== target) menu.open = false;
    const body = target.querySelector(".menu-body");
    body.classList.remove("menu-up");
    const room = document.documentElement.clientHeight - (document.querySelector(".rail")?.offsetTop > 200 ? 64 : 0);
    if (body.getBoundingClientRect().bottom > room) body.classList.add("menu-up");
  },
  true,
);

/* ---- the filter of a list: as you type, kept in the address, applied again when rows change ---- */

const filter = document.querySelector("[data-filters]");

function applyFilter() {
  if (!filter) return;
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const list = document.querySelector(filter.dataset.filters);
  let shown = 0;
  for (const row of list?.querySelectorAll("[data-filter]") ?? []) {
    row.hidden = !words.every((word) => row.dataset.filter.toLowerCase().includes(word));
    shown += !row.hidden;
  }
  const none = list?.querySelector(".no-match");
  if (none) none.hidden = shown > 0;
}

filter?.addEventListener("input", () => {
  applyFilter();
  const url = new URL(location);
  if (filter.value) url.searchParams.set("q", filter.value);
  else url.searchParams.delete("q");
  history.replaceState(null, "", url);
});
document.addEventListener("htmx:after:swap", applyFilter);
applyFilter();

document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest?.("input, select, textarea, guest-screen, guest-terminal")) return;
  event.preventDefault();
  (filter ?? document.getElementById("search"))?.focus();
});

/* ---- a button that was pressed says so at once, and counts once ---- */

document.addEventListener("submit", (event) => {
  if (event.defaultPrevented || event.target.method !== "post") return;
  if (event.target.dataset.sent) return event.preventDefault();
  event.target.dataset.sent = "yes";
  event.submitter?.setAttribute("aria-busy", "true");
});
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("[data-sent]")) delete form.dataset.sent;
  for (const button of document.querySelectorAll("button[aria-busy]")) button.removeAttribute("aria-busy");
});

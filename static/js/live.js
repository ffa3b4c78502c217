// Whether the page is live: says so in the top bar, says since when it is not, and asks for the stream again by itself.

import { loggedOut, sayLoggedOut } from "./session.js";
import { clock } from "./words.js";

const RETRY_MS = 3000;
const stream = document.getElementById("stream");
const said = document.getElementById("live-state");
let lostAt = null;

function tell(live) {
  if (!said) return;
  lostAt = live ? null : (lostAt ?? clock());
  said.dataset.state = live ? "live" : "lost";
  const words = live ? "live" : `not live since ${lostAt}`;
  if (said.textContent !== words) said.textContent = words;
}

function leave() {
  stream.replaceWith();
  sayLoggedOut();
}

if (stream) {
  stream.addEventListener("htmx:sse:after:connection", () => tell(true));
  stream.addEventListener("htmx:sse:after:message", () => tell(true));
  stream.addEventListener("htmx:sse:error", ({ detail }) => {
    tell(false);
    if (detail?.status === 401) leave();
  });
  // The first connection failed, or the stream was given up: a reconnect is ours to ask for.
  const again = () => {
    if (stream._htmx?.sse || !stream.isConnected) return;
    tell(false);
    loggedOut().then((out) => out && leave());
    setTimeout(() => stream.isConnected && window.htmx.trigger(stream, "reconnect"), RETRY_MS);
  };
  stream.addEventListener("htmx:finally:request", () => setTimeout(again));
  stream.addEventListener("htmx:sse:close", () => setTimeout(again));
  addEventListener("pagehide", () => stream.replaceWith()); // leaving is not losing
  addEventListener("pageshow", (event) => event.persisted && location.reload());
}

// What the two consoles share: a WebSocket that comes back by itself, words about it, full screen, a way out of the keyboard.

import { loggedOut } from "./session.js";
import { clock } from "./words.js";

const RETRY_MIN_MS = 500;
const RETRY_MAX_MS = 8000;
const QUIET_MS = 3000;

/** A console element. Subclasses have `open(socket)`, called with a fresh socket, `focusGuest()` and `blurGuest()`. */
export class GuestConsole extends HTMLElement {
  connectedCallback() {
    this.stage = this.querySelector(".console-stage");
    this.bar = this.querySelector(".console-bar");
    this.viewOnly = this.hasAttribute("data-view-only");
    this.off = this.hasAttribute("data-off");
    this.retryMs = RETRY_MIN_MS;
    this.bar.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) this.press(button);
    });
    this.followHead();
    this.followFullScreen();
    this.addEventListener("keydown", (event) => this.wayOut(event), true);
    this.stage.addEventListener("focusin", () => this.hint());
    this.start();
    this.off ? this.tell("off", this.offWords()) : this.connect();
  }

  disconnectedCallback() {
    this.gone = true;
    clearTimeout(this.retry);
    this.socket?.close();
  }

  /* ---- the connection ---- */

  connect() {
    clearTimeout(this.retry);
    if (this.gone || this.socket) return;
    const socket = (this.socket = new WebSocket(new URL(this.url(), location.href.replace(/^http/, "ws"))));
    socket.binaryType = "arraybuffer";
    socket.addEventListener("close", () => this.lost());
    this.open(socket);
  }

  url() {
    return this.dataset.ws;
  }

  /** Bytes arrive: the picture on the page is what the guest shows now. */
  live(words) {
    this.retryMs = RETRY_MIN_MS;
    this.lostAt = null;
    this.tell("live", words);
  }

  lost() {
    this.socket = null;
    if (this.gone) return;
    if (this.off) return this.tell("off", this.offWords());
    this.lostAt ??= clock();
    this.tell("lost", `Connection lost since ${this.lostAt}, trying again`);
    this.retry = setTimeout(() => this.again(), this.retryMs);
    this.retryMs = Math.min(this.retryMs * 2, RETRY_MAX_MS);
  }

  async again() {
    if (await loggedOut()) this.tell("out", "You are logged out");
    else this.connect();
  }

  offWords() {
    return document.getElementById("guest-head")?.dataset.words ?? `${this.dataset.name} is stopped`;
  }

  tell(link, words) {
    this.dataset.link = link;
    const said = this.querySelector(".console-said");
    if (said.textContent !== words) said.textContent = words;
  }

  /** The header is live: a guest that was started is connected to at once, one that stopped is not asked again and again. */
  followHead() {
    const look = () => {
      const head = document.getElementById("guest-head");
      const off = head?.dataset.screen === "no";
      if (off === this.off) {
        if (off) this.tell("off", this.offWords());
        return;
      }
      this.off = off;
      if (off && !this.socket) this.tell("off", this.offWords());
      if (!off) this.started();
    };
    document.addEventListener("htmx:after:swap", look);
  }

  started() {
    this.retryMs = RETRY_MIN_MS;
    this.connect();
  }

  /* ---- buttons ---- */

  press(button) {
    if (button.dataset.do === "full") this.fullScreen();
  }

  fullScreen() {
    if (document.fullscreenElement) return document.exitFullscreen();
    return this.requestFullscreen().then(() => {
      this.focusGuest();
      return navigator.keyboard?.lock?.().catch(() => {});
    });
  }

  followFullScreen() {
    const quiet = () => {
      delete this.dataset.quiet;
      clearTimeout(this.quiet);
      this.quiet = setTimeout(() => (this.dataset.quiet = ""), QUIET_MS);
    };
    this.addEventListener("fullscreenchange", () => {
      this.bar.querySelector('[data-do="full"]').setAttribute("aria-pressed", String(Boolean(document.fullscreenElement)));
      if (document.fullscreenElement) return quiet();
      clearTimeout(this.quiet);
      delete this.dataset.quiet;
      navigator.keyboard?.unlock?.();
    });
    this.addEventListener("pointermove", (event) => {
      if (document.fullscreenElement && event.clientY < 4) quiet();
    });
  }

  /* ---- the keyboard belongs to the guest; Ctrl+Alt+Shift gives it back ---- */

  wayOut(event) {
    if (!(event.ctrlKey && event.altKey && event.shiftKey) || !this.stage.contains(event.target)) return;
    event.preventDefault();
    event.stopPropagation();
    this.blurGuest();
    this.bar.querySelector("button:not(:disabled)").focus();
  }

  hint() {
    const hint = this.querySelector(".console-hint");
    if (this.hinted) return;
    this.hinted = true;
    hint.dataset.show = "";
    setTimeout(() => delete hint.dataset.show, QUIET_MS);
  }

  /** Asks for a text, for what types or pastes it. Ctrl+Enter sends. */
  askText(title, send) {
    this.querySelector(".console-typing")?.remove();
    const form = document.createElement("form");
    form.className = "console-typing";
    form.innerHTML = '<label></label><textarea rows="4" spellcheck="false"></textarea><div class="buttons"><button type="button">Cancel</button><button class="primary"></button></div>';
    const [label, text, cancel, go] = ["label", "textarea", "button", ".primary"].map((part) => form.querySelector(part));
    label.textContent = `${title} into ${this.dataset.name}`;
    go.textContent = title;
    text.id = "console-text";
    label.htmlFor = text.id;
    cancel.addEventListener("click", () => form.remove());
    form.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") form.remove();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      form.remove();
      send(text.value);
    });
    this.append(form);
    text.focus();
    navigator.clipboard?.readText?.().then((clip) => (text.value ||= clip), () => {});
  }
}

// <time-ago age="SECONDS">: "3 min ago", kept true. The age is the server's, so a wrong clock in the browser does no harm.

import { span } from "./words.js";

const shown = new Set();
setInterval(() => shown.forEach((element) => element.tell()), 5000);

class TimeAgo extends HTMLElement {
  static observedAttributes = ["age"];

  connectedCallback() {
    shown.add(this);
    this.tell();
  }

  disconnectedCallback() {
    shown.delete(this);
  }

  attributeChangedCallback() {
    this.since = performance.now();
    this.tell();
  }

  tell() {
    const time = this.firstElementChild;
    if (!time || this.since === undefined) return;
    const away = Number(this.getAttribute("age")) + (performance.now() - this.since) / 1000;
    const seconds = Math.abs(away);
    const words = seconds < 5 ? "just now" : away < 0 ? `in ${span(seconds)}` : `${span(seconds)} ago`;
    if (time.textContent !== words) time.textContent = words;
  }
}

customElements.define("time-ago", TimeAgo);

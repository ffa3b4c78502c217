// <guest-terminal data-ws>: a guest's serial console. Every byte has an offset; a new connection goes on after the last byte shown.

import "./nonce.js";
import { Terminal } from "@xterm/xterm";
import { FitAddon } from "@xterm/addon-fit";
import "@xterm/xterm/css/xterm.css";
import { GuestConsole } from "./console.js";
import { clock } from "./words.js";

const KEPT_LINES = 20_000;
const THEME = {
  background: "#07090d", foreground: "#dcdad5", cursor: "#e9a83f", cursorAccent: "#07090d", selectionBackground: "#6b5328",
  black: "#1c2029", red: "#e5695e", green: "#7fc28a", yellow: "#e0b15a", blue: "#7ea6dc", magenta: "#c792c9", cyan: "#70bfc4", white: "#cfcdc8",
  brightBlack: "#767c89", brightRed: "#f08a80", brightGreen: "#9bd6a4", brightYellow: "#f0c878", brightBlue: "#9dbeeb", brightMagenta: "#dbaadd", brightCyan: "#8fd3d8", brightWhite: "#f4f2ee",
};

class GuestTerminal extends GuestConsole {
  start() {
    this.offset = 0;
    const term = (this.term = new Terminal({
      scrollback: KEPT_LINES, theme: THEME, disableStdin: this.viewOnly, cursorBlink: true, fontSize: 14, lineHeight: 1.15, minimumContrastRatio: 1,
      fontFamily: getComputedStyle(document.documentElement).getPropertyValue("--mono"),
    }));
    const fit = new FitAddon();
    term.loadAddon(fit);
    const host = document.createElement("div");
    this.stage.append(host);
    term.open(host);
    new ResizeObserver(() => fit.fit()).observe(this.stage);
    term.onData((text) => this.send(new TextEncoder().encode(text)));
    term.onBinary((text) => this.send(Uint8Array.from(text, (c) => c.charCodeAt(0))));
    term.attachCustomKeyEventHandler((event) => !(event.ctrlKey && event.altKey && event.shiftKey));
    term.textarea.setAttribute("aria-label", `Serial console of ${this.dataset.name}`);
    if (this.off) this.mark(this.offWords());
    else term.focus();
  }

  url() {
    return `${this.dataset.ws}?from=${this.offset}`;
  }

  open(socket) {
    socket.addEventListener("open", () => this.live(this.viewOnly ? "Live, view only" : "Live"));
    socket.addEventListener("message", ({ data }) => {
      if (typeof data === "string") return this.note(JSON.parse(data));
      this.offset += data.byteLength;
      this.term.write(new Uint8Array(data));
    });
  }

  /** What the server says between the bytes. */
  note({ offset, skipped, reset, closed }) {
    if (offset !== undefined) {
      if (offset < this.offset) this.mark("started anew");
      else if (skipped > 0) this.mark(`${skipped.toLocaleString()} bytes ${this.offset ? "skipped" : "before this are gone"}`);
      this.offset = offset;
    }
    if (reset !== undefined) this.mark(`reset at ${clock()}`);
    if (closed !== undefined) {
      this.mark(closed || "the guest ended");
      this.offset = 0; // the next engine counts from the beginning
    }
  }

  /** A line of ours among the guest's: out of any mode the guest left the terminal in, amber, on a line of its own. */
  mark(words) {
    this.term.write(`\x1b[?47l\x1b[0m\x1b[?25h\r\n\x1b[33m--- ${words} ---\x1b[0m\r\n`);
  }

  send(bytes) {
    if (this.socket?.readyState === WebSocket.OPEN && !this.viewOnly) this.socket.send(bytes);
  }

  focusGuest() {
    this.term.focus();
  }

  blurGuest() {
    this.term.blur();
  }

  press(button) {
    super.press(button);
    if (button.dataset.do === "paste") this.askText("Paste", (text) => (this.term.paste(text), this.focusGuest()));
    if (button.dataset.do === "copy") this.copyAll(button);
  }

  async copyAll(button) {
    this.term.selectAll();
    await navigator.clipboard.writeText(this.term.getSelection().trimEnd() + "\n");
    this.term.clearSelection();
    button.setAttribute("aria-pressed", "true");
    setTimeout(() => button.removeAttribute("aria-pressed"), 1200);
  }
}

customElements.define("guest-terminal", GuestTerminal);

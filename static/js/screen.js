// <guest-screen data-ws>: a guest's screen by RFB over a WebSocket. Fit, 1:1, or the guest takes the size of the window; the last picture stays, dimmed, when the connection is lost.

import RFB from "@novnc/novnc";
import { GuestConsole } from "./console.js";
import { CTRL, ALT, SUPER, MODIFIERS, chord, typed } from "./keys.js";

const TYPE_PAUSE_MS = 15; // a PS/2 keyboard's buffer is short
const HELD = { ControlLeft: CTRL, AltLeft: ALT, MetaLeft: SUPER };

class GuestScreen extends GuestConsole {
  start() {
    this.key = `innkeeper-view-${this.dataset.id}`;
    const kept = localStorage.getItem(this.key);
    this.view(["one", "resize"].includes(kept) && this.bar.querySelector(`[data-view="${kept}"]`) ? kept : "fit");
    this.softKeyboard();
  }

  open(socket) {
    this.querySelector(".console-said").textContent ||= "Connecting…";
    const glass = document.createElement("div");
    this.stage.append(glass);
    // Before RFB hears of it and clears its canvas.
    socket.addEventListener("close", () => this.keepPicture(glass));
    const rfb = (this.rfb = new RFB(glass, socket, { shared: true }));
    rfb.viewOnly = this.viewOnly;
    rfb.focusOnClick = true;
    rfb.background = "transparent";
    rfb.showDotCursor = true;
    rfb.addEventListener("connect", () => {
      this.stage.querySelectorAll(".last-picture").forEach((picture) => picture.remove());
      this.pictured = true;
      this.applyView();
      this.live(this.viewOnly ? "Live, view only" : "Live");
      if (document.activeElement === document.body || this.contains(document.activeElement)) rfb.focus({ preventScroll: true });
    });
    // noVNC asks for no size while it waits for an answer: the last one of a drag is asked for when it rests.
    let rest;
    const resized = new ResizeObserver(() => {
      clearTimeout(rest);
      rest = setTimeout(() => this.rfb === rfb && this.applyView(), 300);
    });
    resized.observe(this.stage);
    rfb.addEventListener("disconnect", () => {
      resized.disconnect();
      glass.remove();
      if (this.rfb === rfb) this.rfb = null;
      for (const button of this.bar.querySelectorAll('[aria-pressed="true"][data-hold]')) button.setAttribute("aria-pressed", "false");
    });
  }

  /** A copy of what was shown last stands in until there is a new picture. */
  keepPicture(glass) {
    const shown = glass.querySelector("canvas");
    if (!shown?.width || !this.pictured) return;
    this.pictured = false;
    this.stage.querySelectorAll(".last-picture").forEach((picture) => picture.remove());
    const frame = document.createElement("div");
    frame.className = "last-picture";
    const copy = document.createElement("canvas");
    [copy.width, copy.height] = [shown.width, shown.height];
    [copy.style.width, copy.style.height] = [shown.style.width, shown.style.height]; // in the same place: nothing jumps
    copy.getContext("2d").drawImage(shown, 0, 0);
    frame.append(copy);
    this.stage.prepend(frame);
  }

  focusGuest() {
    this.rfb?.focus({ preventScroll: true });
  }

  blurGuest() {
    for (const [keysym, code] of MODIFIERS) this.rfb?.sendKey(keysym, code, false);
    this.rfb?.blur();
  }

  /* ---- view ---- */

  view(mode) {
    this.dataset.view = mode;
    localStorage.setItem(this.key, mode);
    for (const button of this.bar.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", String(button.dataset.view === mode));
    this.applyView();
  }

  applyView() {
    if (!this.rfb) return;
    this.rfb.scaleViewport = this.dataset.view !== "one"; // a guest may not do as it is asked
    this.rfb.resizeSession = this.dataset.view === "resize";
  }

  /* ---- keys ---- */

  press(button) {
    super.press(button);
    const { view, key, hold } = button.dataset;
    if (view) this.view(view);
    if (key === "cad") this.rfb?.sendCtrlAltDel();
    else if (key) this.strike(chord(key));
    if (hold) this.hold(button, HELD[hold]);
    if (button.dataset.do === "type") this.askText("Type", (text) => this.typeText(text));
    if (button.dataset.do === "keyboard") this.soft.focus();
    if (view || key) this.rfb?.focus();
  }

  strike(keys) {
    for (const [keysym, code] of keys) this.rfb?.sendKey(keysym, code, true);
    for (const [keysym, code] of keys.toReversed()) this.rfb?.sendKey(keysym, code, false);
  }

  hold(button, [keysym, code]) {
    const down = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(down));
    this.rfb?.sendKey(keysym, code, down);
  }

  async typeText(text) {
    for (const character of text.replaceAll("\r\n", "\n")) {
      if (!this.rfb) return;
      this.strike(typed(character));
      await new Promise((done) => setTimeout(done, TYPE_PAUSE_MS));
    }
    this.rfb?.focus();
  }

  /** A phone shows its keyboard for a text field only: this one is invisible and hands on what is typed. */
  softKeyboard() {
    const soft = (this.soft = document.createElement("textarea"));
    soft.className = "console-soft-keys";
    soft.setAttribute("aria-label", "Keyboard");
    soft.autocapitalize = "off";
    soft.tabIndex = -1;
    soft.addEventListener("beforeinput", (event) => {
      if (event.inputType === "insertCompositionText") return;
      event.preventDefault();
      if (event.inputType === "insertLineBreak") this.strike(chord("enter"));
      else if (event.inputType.startsWith("delete")) this.strike(chord("backspace"));
      else for (const character of event.data ?? "") this.strike(typed(character));
    });
    soft.addEventListener("compositionend", (event) => {
      for (const character of event.data) this.strike(typed(character));
      soft.value = "";
    });
    this.append(soft);
  }
}

customElements.define("guest-screen", GuestScreen);

// <image-upload data-url>: sends the chosen file as it is, with progress, rate and a way to stop; the plain form inside works without it.

import { span } from "./words.js";

const size = (bytes) => (bytes >= 1 << 30 ? `${(bytes / 2 ** 30).toFixed(1)} GiB` : `${Math.round(bytes / 2 ** 20)} MiB`);

class ImageUpload extends HTMLElement {
  connectedCallback() {
    this.addEventListener("submit", (event) => {
      event.preventDefault();
      const form = event.target;
      const file = form.elements.file.files[0];
      if (!file) return;
      if (file.size === 0) return this.tell("This file is empty.", true);
      this.send(form, file);
    });
    this.querySelector(".upload-cancel").addEventListener("click", () => this.request?.abort());
  }

  send(form, file) {
    const named = new URLSearchParams({
      name: form.elements.name.value.trim(),
      kind: form.elements.kind.value,
      file: file.name,
    });
    const request = (this.request = new XMLHttpRequest());
    const bar = this.querySelector("progress");
    const began = performance.now();
    const stay = (event) => event.preventDefault();
    addEventListener("beforeunload", stay);
    this.busy(true);
    bar.value = 0;
    this.tell("Starting…");
    request.upload.addEventListener("progress", ({ loaded, total }) => {
      const rate = loaded / ((performance.now() - began) / 1000);
      bar.value = loaded / total;
      this.tell(`${size(loaded)} of ${size(total)}, ${size(rate)}/s, ${span((total - loaded) / Math.max(rate, 1))} left`);
    });
    request.upload.addEventListener("load", () => this.tell("Checking what arrived…"));
    request.addEventListener("loadend", () => {
      removeEventListener("beforeunload", stay);
      this.busy(false);
      if (request.status >= 200 && request.status < 300) location.assign("/images");
      else this.tell(this.whyNot(request), true);
    });
    request.addEventListener("abort", () => (this.stopped = true));
    this.stopped = false;
    request.open("PUT", `${this.dataset.url}?${named}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.setRequestHeader("X-CSRF-Token", document.querySelector('meta[name="csrf"]').content);
    request.send(file);
  }

  whyNot(request) {
    if (this.stopped) return "Stopped. Nothing was kept.";
    if (request.status === 0) return "The connection was lost. Nothing was kept; try again.";
    try {
      return JSON.parse(request.responseText).detail;
    } catch {
      return `The server refused it (${request.status}).`;
    }
  }

  busy(on) {
    for (const field of this.querySelectorAll("input, select")) field.disabled = on;
    this.querySelector(".primary").disabled = on;
    this.querySelector(".upload-cancel").hidden = !on;
    this.querySelector("progress").hidden = !on;
  }

  tell(words, bad = false) {
    this.querySelector(".upload-state").hidden = false;
    const said = this.querySelector(".upload-said");
    said.textContent = words;
    said.classList.toggle("error", bad);
    if (bad) this.querySelector("progress").hidden = true;
  }
}

customElements.define("image-upload", ImageUpload);

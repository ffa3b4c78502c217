// What a test is made of: a sentence, a body, and words for what it expects.

import assert from "node:assert/strict";

export { assert };
export const tests = [];

/** Adds a test that wants a running guest; it is skipped where none can run. */
export function test(name, body, limitMs = 60_000) {
  tests.push({ name, body, limitMs, guests: true });
}

/** Adds a test that needs no guest to run. */
export function pageTest(name, body, limitMs = 60_000) {
  tests.push({ name, body, limitMs, guests: false });
}

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/** Waits until `look` gives something true; its value. What it throws counts as not yet. */
export async function until(what, look, limitMs = 10_000) {
  const end = performance.now() + limitMs;
  let last;
  while (performance.now() < end) {
    try {
      const seen = await look();
      if (seen) return seen;
      last = seen;
    } catch (error) {
      last = error;
    }
    await sleep(50);
  }
  throw new Error(`not within ${limitMs / 1000} s: ${what}${last ? ` (${String(last).split("\n")[0]})` : ""}`);
}

// The picture in README.md: `tests/browser/run --picture docs/screenshot.png`.

import { mkdirSync, statSync } from "node:fs";
import { dirname } from "node:path";
import { House } from "./house.mjs";
import { litTyped, openScreen } from "./screen.mjs";
import { assert, sleep, until } from "./test.mjs";
import { Visitor } from "./visitor.mjs";

const BYTES_MAX = 200_000;
const SETTLE_MS = 3000;

export async function picture(file) {
  const house = await House.withBoss();
  const { page } = await Visitor.in(house, { colorScheme: "dark" });
  await call(page, "/api/v1/guests", { name: "lantern", boot: { kind: "test" }, cpus: 1, memory_bytes: 16 << 20, network: "none" });
  await call(page, "/api/v1/guests/lantern/start");
  await openScreen(page, "lantern");
  await page.click("guest-screen canvas");
  const before = await litTyped(page);
  await page.keyboard.type("good evening", { delay: 40 });
  await until("the guest echoes", async () => (await litTyped(page)) > before + 200);
  await page.mouse.move(640, 780);
  await page.goto("/guests/lantern");
  await page.waitForSelector('#live-state[data-state="live"]');
  await sleep(SETTLE_MS);
  mkdirSync(dirname(file), { recursive: true });
  await page.screenshot({ path: file });
  const { size } = statSync(file);
  assert.ok(size < BYTES_MAX, `the picture has ${size} bytes`);
  console.log(`${file}: ${size} bytes`);
}

/** One call of the API with the login of the page. */
async function call(page, path, body) {
  const status = await page.evaluate(async ([to, json]) => {
    const headers = { "Content-Type": "application/json", "X-CSRF-Token": document.querySelector('meta[name="csrf"]').content };
    const answer = await fetch(to, { method: "POST", headers, body: json && JSON.stringify(json) });
    return `${answer.status} ${await answer.text()}`;
  }, [path, body]);
  assert.match(status, /^2/, `${path}: ${status}`);
}

// Runs the tests, file after file, and counts them. A file adds its tests with `test`; everything in it shares one house.

import { readdirSync } from "node:fs";
import { accessSync, constants, mkdirSync, rmSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { closeBrowsers, complaintsOf, openPages } from "./visitor.mjs";
import { closeHouses } from "./house.mjs";
import { tests } from "./test.mjs";

const here = dirname(fileURLToPath(import.meta.url));
const results = process.env.INNKEEPER_RESULTS;
const count = { passed: 0, failed: 0, skipped: 0 };

rmSync(results, { recursive: true, force: true });
mkdirSync(results, { recursive: true });

if (process.argv[2] === "--picture") {
  const { picture } = await import("./picture.mjs");
  await picture(resolve(process.argv[3]));
  await closeAll();
} else {
  await runAll(process.argv.slice(2));
}

async function runAll(wanted) {
  const why = noGuests();
  const files = readdirSync(here).filter((name) => name.endsWith(".test.mjs")).sort();
  for (const file of files) {
    const name = basename(file, ".test.mjs");
    if (wanted.length > 0 && !wanted.includes(name)) continue;
    await import(`./${file}`);
    for (const one of tests.splice(0)) await runOne(name, one, why);
    await closeAll();
  }
  console.log(`browser: ${count.passed} passed, ${count.failed} failed, ${count.skipped} skipped`);
  process.exitCode = count.failed > 0 || count.passed + count.skipped === 0 ? 1 : 0;
}

async function runOne(file, { name, body, limitMs, guests }, why) {
  const full = `${file}: ${name}`;
  if (guests && why) {
    count.skipped += 1;
    return console.log(`skipped: ${full}: ${why}`);
  }
  const began = performance.now();
  let timer;
  try {
    const late = new Promise((_, no) => (timer = setTimeout(() => no(new Error(`took more than ${limitMs / 1000} s`)), limitMs)));
    await Promise.race([body(), late]);
    const complaints = complaintsOf();
    if (complaints.length > 0) throw new Error(`the browser complained:\n  ${complaints.join("\n  ")}`);
    count.passed += 1;
    console.log(`ok ${full} (${((performance.now() - began) / 1000).toFixed(1)} s)`);
  } catch (error) {
    count.failed += 1;
    console.log(`FAILED ${full}`);
    console.log(String(error.stack ?? error).replace(/^/gm, "  "));
    await pictures(full);
    complaintsOf();
  } finally {
    clearTimeout(timer);
  }
}

/** What every open page showed when a test failed. */
async function pictures(name) {
  let number = 0;
  for (const page of openPages()) {
    const file = join(results, `${name.replace(/[^a-z0-9]+/gi, "-").slice(0, 80)}-${++number}.png`);
    await page.screenshot({ path: file, timeout: 5000 }).then(() => console.log(`  see ${file} (${page.url()})`), () => {});
  }
}

async function closeAll() {
  await closeBrowsers();
  await closeHouses();
}

/** Why no guest can run here, or nothing. */
function noGuests() {
  try {
    accessSync("/dev/kvm", constants.R_OK | constants.W_OK);
    return null;
  } catch (error) {
    return `no guest can run here: /dev/kvm: ${error.code === "ENOENT" ? "there is none" : "no permission"}`;
  }
}

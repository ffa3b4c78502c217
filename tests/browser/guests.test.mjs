// Guests from their pages: made by the form, led through their lives by buttons, deleted by name; images added and refused.

import { rmSync, writeFileSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { House } from "./house.mjs";
import { assert, pageTest, test, until } from "./test.mjs";
import { Visitor, expectComplaints } from "./visitor.mjs";

const REFUSED_FORM = /status of 422/;
const CD_BYTES = 24 << 20;
let house, boss, page;

/** Fills a form by the names of its fields; a choice is taken by its value. */
async function fill(values) {
  for (const [name, value] of Object.entries(values)) {
    const field = page.locator(`[name=${name}]`);
    const kind = await field.first().evaluate((element) => element.localName + (element.type === "radio" ? " radio" : ""));
    if (kind === "input radio") await page.locator(`[name=${name}][value=${value}]`).check();
    else if (kind === "select") await field.selectOption(value);
    else await field.fill(value);
  }
}

async function refused(field, words) {
  await page.click("form .primary");
  await page.waitForLoadState();
  assert.match(await page.locator(`#error-${field}`).innerText(), words);
  assert.equal(await page.locator(`[name=${field}]`).getAttribute("aria-invalid"), "true");
}

const state = (word) => page.waitForSelector(`#guest-head .state-${word}`);

async function menu(item) {
  await page.click("#guest-head details.menu summary");
  await page.click(`#guest-head .menu-body >> text=${item}`);
}

pageTest("the form says at each field what is wrong, and keeps what was typed", async () => {
  house = await House.withBoss();
  boss = await Visitor.in(house);
  page = boss.page;
  expectComplaints(REFUSED_FORM);
  await page.goto("/guests");
  await page.click("text=Create a guest");
  await fill({ name: "../etc", cpus: "1", memory: "64M", disk_size: "64M", network: "none" });
  await refused("name", /letters|digits|hyphens/i);
  assert.equal(await page.inputValue("[name=name]"), "../etc");
  assert.equal(await page.inputValue("[name=memory]"), "64M");
  await fill({ name: "web01", memory: "lots" });
  await refused("memory", /512M|2G|size/i);
  await fill({ memory: "-5G" });
  await refused("memory", /.{5}/);
  await fill({ memory: "64M", cpus: "0" });
  await refused("cpus", /.{5}/);
  await fill({ cpus: "1", disk_size: "9999999T" });
  await refused("disk_size", /.{5}/);
  assert.equal(await page.inputValue("[name=name]"), "web01", "the name is still there");
  assert.equal(JSON.parse(await house.command(["guest", "ls", "--json"])).length, 0, "nothing was made");
});

pageTest("a guest with a disk is made by the form, and its page says what it is made of", async () => {
  await page.goto("/guests/new");
  await fill({ name: "web01", cpus: "1", memory: "64M", disk_size: "64M", disk_bus: "ahci", firmware: "bios", network: "none" });
  await page.locator("[name=start]").uncheck();
  await page.click("form .primary");
  await state("stopped");
  assert.match(await page.locator("main").innerText(), /1 vCPU, 64 MiB, BIOS, one disk of 64 MiB, network none/);
  expectComplaints(REFUSED_FORM);
  await page.goto("/guests/new");
  await fill({ name: "web01", memory: "64M", network: "none" });
  await refused("name", /another guest/i);
});

pageTest("its boot order is chosen, and one start may go another way", async () => {
  await page.goto("/guests/web01/hardware");
  await page.selectOption("[name=boot_order_0]", "cd");
  await page.selectOption("[name=boot_order_1]", { label: "disk 1" });
  await page.click("text=Save the hardware");
  await page.goto("/guests/web01");
  assert.match(await page.locator("main").innerText(), /Boot order\s+CD, disk 1/);
  await page.click(".guest-buttons .menu summary");
  const menu = page.locator(".guest-buttons .menu-body");
  assert.match(await menu.innerText(), /Start from disk 1[^]*Start with the boot menu/);
  expectComplaints(REFUSED_FORM);
  await page.goto("/guests/web01/hardware");
  await page.selectOption("[name=boot_order_1]", "cd");
  await page.click("text=Save the hardware");
  assert.match(await page.locator("#error-boot_order").innerText(), /twice/);
});

pageTest("its hardware is changed while it is stopped, and the page of its history tells", async () => {
  await page.goto("/guests/web01/hardware");
  expectComplaints(REFUSED_FORM);
  await fill({ memory: "1" });
  await page.click("text=Save the hardware");
  assert.ok((await page.locator("#error-memory").innerText()).length > 5);
  await fill({ memory: "96M" });
  await page.click("text=Save the hardware");
  await page.waitForSelector(".flash");
  await page.goto("/guests/web01");
  assert.match(await page.locator("main").innerText(), /1 vCPU, 96 MiB/);
  assert.match(await page.locator("ol.events").innerText(), /Changed[\s\S]*Created/);
});

pageTest("a disk gets a limit and loses it, and a wrong one is said at its disk", async () => {
  await house.command(["guest", "create", "slow", "--test-guest", "--disk", "1M", "--network", "none"]);
  await page.goto("/guests/slow/hardware");
  const disk = page.locator("ul.disks li").first();
  const set = async (bytes, operations) => {
    if (!(await disk.locator("details").evaluate((details) => details.open))) await disk.locator("summary").click();
    await disk.locator("[name=bytes_per_s]").fill(bytes);
    await disk.locator("[name=operations_per_s]").fill(operations);
    await disk.locator("details button").click();
  };
  expectComplaints(REFUSED_FORM);
  await set("1K", "100");
  assert.match(await disk.locator(".error").innerText(), /1 MiB a second or more/);
  assert.equal(await disk.locator("[name=bytes_per_s]").inputValue(), "1K", "what was typed is kept");
  await disk.locator("[name=bytes_per_s]").fill("50M");
  await disk.locator("details button").click();
  await page.waitForSelector(".flash");
  assert.match(await disk.innerText(), /at most 50 MiB and 100 operations a second/);
  await set("", "");
  await page.waitForSelector(".flash");
  assert.doesNotMatch(await disk.innerText(), /at most/);
  await house.command(["guest", "rm", "slow", "--yes"]);
});

test("start, pause, resume, shut down, reset and power off from the page", async () => {
  await house.command(["guest", "create", "life", "--test-guest", "--memory", "16M", "--network", "none"]);
  await page.goto("/guests/life");
  const { id } = await house.guest("life");
  await page.click("#guest-head .primary >> text=Start");
  await state("running");
  await menu("Pause");
  await state("paused");
  await page.click("#guest-head .primary >> text=Resume");
  await state("running");
  await menu("Reset…");
  const ask = page.locator(`#ask-reset-${id}`);
  assert.ok(await ask.isVisible(), "it asks first");
  assert.equal(await page.locator(":focus").innerText(), "Cancel");
  await page.keyboard.press("Escape");
  assert.ok(!(await ask.isVisible()));
  await menu("Reset…");
  await ask.locator(".danger").click();
  await state("running");
  await menu("Power off…");
  await page.click(`#ask-poweroff-${id} .danger`);
  await state("stopped");
  assert.equal((await house.guest("life")).state, "stopped");
  const history = await page.locator("ol.events").innerText();
  for (const word of ["Started", "Paused", "Resumed", "Reset", "Powered off"]) assert.ok(history.includes(word), `${word} in ${history}`);
});

test("a guest is suspended from its menu, goes on, and its saved state may be discarded", async () => {
  await house.command(["guest", "start", "life"]);
  await page.goto("/guests/life");
  const { id } = await house.guest("life");
  await menu("Suspend");
  await state("suspended");
  assert.equal(await page.locator("#guest-head .primary").innerText(), "Resume");
  await page.goto("/guests/life/hardware");
  assert.ok(await page.locator("[name=cpus]").isDisabled(), "it is not changed meanwhile");
  await page.goto("/guests");
  const row = page.locator("tr", { hasText: "life" });
  assert.match(await row.innerText(), /suspended[\s\S]*Resume/);
  await row.locator("button.small", { hasText: "Resume" }).click();
  await until("the list says that it goes on", async () => /running/.test(await row.innerText()), 5000);
  await page.goto("/guests/life");
  await state("running");
  assert.match(await house.command(["guest", "console", "life", "--dump"]), /Welcome/, "what was said before is kept");
  await menu("Suspend");
  await state("suspended");
  await menu("Discard saved state…");
  await page.click(`#ask-poweroff-${id} .danger`);
  await state("stopped");
  assert.match(await page.locator("ol.events").innerText(), /Suspended/);
});

test("a running guest gives memory back from its hardware page, and wrong sizes are said there", async () => {
  await house.command(["guest", "create", "roomy", "--test-guest", "--memory", "128M", "--network", "none"]);
  await house.command(["guest", "start", "roomy"]);
  await page.goto("/guests/roomy/hardware");
  await page.fill("[name=memory_now]", "64M");
  await page.click("form[action$='/memory'] button");
  await page.waitForSelector(".flash");
  assert.equal(await page.inputValue("[name=memory_now]"), "64M");
  await page.goto("/guests/roomy");
  assert.match(await page.locator("dl.facts").innerText(), /64 MiB of 128 MiB/);
  await page.goto("/guests/roomy/hardware");
  expectComplaints(REFUSED_FORM);
  await page.fill("[name=memory_now]", "1T");
  await page.click("form[action$='/memory'] button");
  assert.match(await page.locator("#error-memory_now").innerText(), /32 MiB to 128 MiB/);
  assert.equal(await page.inputValue("[name=memory_now]"), "1T");
  await house.command(["guest", "poweroff", "roomy"]);
  await house.command(["guest", "rm", "roomy", "--yes"]);
});

test("a change made elsewhere shows on the open pages within a second, without a reload", async () => {
  await page.goto("/guests");
  const row = page.locator("tr", { hasText: "life" });
  await page.waitForSelector('#live-state[data-state="live"]');
  await page.evaluate(() => (window.sameDocument = true));
  await house.command(["guest", "start", "life"]);
  await until("the list says so", async () => /running/.test(await row.innerText()), 2000);
  await house.command(["guest", "poweroff", "life"]);
  await until("the list says so again", async () => /stopped/.test(await row.innerText()), 3000);
  assert.equal(await page.evaluate(() => window.sameDocument), true);
});

test("shut down is asked of the guest, and its page waits for it", async () => {
  await house.command(["guest", "start", "life"]);
  await page.goto("/guests/life");
  await page.click("#guest-head >> text=Shut down");
  await state("stopping");
  // The Test guest has no ears for its power button.
  await house.command(["guest", "poweroff", "life"]);
  await state("stopped");
});

test("the log of a guest grows on its open page", async () => {
  await page.goto("/guests/life/log");
  const length = async () => (await page.locator("#guest-log").innerText()).length;
  const before = await length();
  await house.command(["guest", "start", "life"]);
  await until("the log is longer", async () => (await length()) > before + 10, 6000);
  await house.command(["guest", "poweroff", "life"]);
});

pageTest("a guest is deleted only by its name", async () => {
  await page.goto("/guests/web01");
  await menu("Delete…");
  await page.waitForURL(/\/delete$/);
  assert.match(await page.locator("main").innerText(), /64 MiB/);
  expectComplaints(REFUSED_FORM);
  await page.fill("[name=confirm]", "web02");
  await page.click(".danger");
  assert.match(await page.locator("#error-confirm").innerText(), /web01/);
  await page.fill("[name=confirm]", "web01");
  await page.click(".danger");
  await page.waitForURL((url) => url.pathname === "/guests");
  assert.match(await page.locator(".flash").innerText(), /web01 is deleted/);
  assert.equal(await page.locator("#guest-rows", { hasText: "web01" }).count(), 0);
});

pageTest("the filter of the list works as you type, and is in the address", async () => {
  for (const name of ["alpha", "beta"]) await house.command(["guest", "create", name, "--memory", "64M", "--network", "none"]);
  await page.goto("/guests");
  await page.keyboard.press("/");
  await page.keyboard.type("alp");
  assert.deepEqual(await page.locator("tbody tr:visible th a").allInnerTexts(), ["alpha"]);
  assert.equal(new URL(page.url()).search, "?q=alp");
  await page.reload();
  assert.deepEqual(await page.locator("tbody tr:visible th a").allInnerTexts(), ["alpha"]);
});

pageTest("an image is uploaded with its progress shown, is offered as a CD, and is deleted", async () => {
  const folder = mkdtempSync(join(tmpdir(), "innkeeper-upload-"));
  const cd = Buffer.alloc(CD_BYTES);
  cd.write("\x01CD001\x01", 0x8000, "latin1");
  writeFileSync(join(folder, "tools.iso"), cd);
  await page.goto("/images");
  await page.click("summary >> text=Upload a file");
  const network = await boss.context.newCDPSession(page);
  await network.send("Network.emulateNetworkConditions", { offline: false, latency: 0, downloadThroughput: -1, uploadThroughput: 12 << 20 });
  await page.setInputFiles("[name=file]", join(folder, "tools.iso"));
  await page.click("image-upload .primary");
  await until("its progress", async () => /of 24 MiB, .*\/s/.test(await page.locator(".upload-said").innerText()));
  const row = page.locator("#image-rows tr", { hasText: "tools.iso" });
  await until("the list says that it arrives", async () => /arriving/.test(await row.innerText()));
  await until("it is there", async () => /CD[\s\S]*24 MiB/.test(await row.innerText()), 30_000);
  await network.detach();
  await page.goto("/guests/new");
  assert.ok((await page.locator("[name=cdrom]").innerText()).includes("tools.iso"));
  await page.goto("/images");
  await page.click("#image-rows >> text=Delete…");
  await page.click(".ask:popover-open .danger");
  await page.waitForSelector("text=No images yet");
  rmSync(folder, { recursive: true });
});

pageTest("a zip that is called iso, an empty file and a host's path that is none are refused at their field", async () => {
  expectComplaints(REFUSED_FORM, /status of 4\d\d/);
  const folder = mkdtempSync(join(tmpdir(), "innkeeper-upload-"));
  writeFileSync(join(folder, "linux.iso"), Buffer.concat([Buffer.from("PK\x03\x04"), Buffer.alloc(4096)]));
  writeFileSync(join(folder, "empty.iso"), "");
  await page.goto("/images");
  await page.click("summary >> text=Upload a file");
  await page.setInputFiles("[name=file]", join(folder, "linux.iso"));
  await page.click("image-upload .primary");
  await until("the reason", async () => /zip/i.test(await page.locator(".upload-said").innerText()));
  await page.setInputFiles("[name=file]", join(folder, "empty.iso"));
  await page.click("image-upload .primary");
  await until("the reason", async () => /empty/i.test(await page.locator(".upload-said").innerText()));
  await page.click("summary >> text=Take a file of the host");
  await page.fill("[name=path]", "/no/such/file.iso");
  await page.click("details[open] .primary");
  await until("the reason", async () => (await page.locator("details[open] .error").innerText()).length > 5);
  assert.equal(await page.inputValue("[name=path]"), "/no/such/file.iso");
  await page.goto("/images");
  assert.match(await page.locator("#image-rows").innerText(), /No images yet/);
  rmSync(folder, { recursive: true });
});

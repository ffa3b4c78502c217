// For everybody: with the keyboard alone, on a phone, in light and in dark, with a screen reader.

import { House } from "./house.mjs";
import { assert, pageTest, sleep, test } from "./test.mjs";
import { Visitor, axeSource, expectComplaints } from "./visitor.mjs";

const PHONE = { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true, deviceScaleFactor: 2 };
const DOOR = ["/login", "/trust", "/setup?token=none"];
const INSIDE = [
  "/", "/guests", "/guests/new", "/guests/lamp", "/guests/lamp/console", "/guests/lamp/serial", "/guests/lamp/hardware", "/guests/lamp/log", "/guests/still",
  "/guests/still/hardware", "/guests/still/delete", "/images", "/tasks", "/host", "/users", "/account", "/trust", "/about", "/nothing-here",
];
let house, boss;

async function furnish() {
  house = await House.withBoss();
  await house.command(["guest", "create", "still", "--memory", "64M", "--disk", "64M", "--network", "none"]);
  await house.command(["guest", "create", "lamp", "--test-guest", "--memory", "16M", "--network", "none"]);
  await house.command(["guest", "start", "lamp"]).catch(() => {}); // where no guest can run, its pages say so
  await house.command(["admin", "create-token", "backup"]);
  boss = await Visitor.in(house);
}

/** Opens each page and hands it to `check`; what it finds, by page. */
async function everyPage(visitor, paths, check) {
  const found = [];
  for (const path of paths) {
    await visitor.page.goto(path);
    await visitor.page.waitForLoadState();
    await sleep(path.endsWith("console") || path.endsWith("serial") ? 600 : 150);
    for (const line of await check(visitor.page)) found.push(`${path}: ${line}`);
  }
  assert.equal(found.length, 0, `\n${found.join("\n")}`);
}

const looksRight = async (page) => [...(await sideways(page)), ...(await violations(page))];

/** What a checker of accessibility calls serious. */
async function violations(page) {
  await page.evaluate(axeSource);
  const { violations: all } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  const bad = all.filter(({ impact }) => impact === "serious" || impact === "critical");
  return bad.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.slice(0, 3).map((node) => `${node.html.slice(0, 120)} (${node.any[0]?.message ?? ""})`).join(" | ")}`);
}

async function sideways(page) {
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  return wide > 0 ? [`scrolls ${wide} px sideways`] : [];
}

for (const colorScheme of ["light", "dark"]) {
  pageTest(`every page in ${colorScheme} is in order for a checker of accessibility, on a desk and on a phone`, async () => {
    if (!house) await furnish();
    expectComplaints(/status of 404 .*nothing-here/);
    for (const size of [{}, PHONE]) {
      const reader = await Visitor.to(house, { colorScheme, ...size });
      await everyPage(reader, DOOR, looksRight);
      await reader.login();
      await everyPage(reader, INSIDE, looksRight);
      await reader.close();
    }
  }, 300_000);
}

pageTest("an open menu, an open question and a form with messages are in order, too", async () => {
  const { page } = boss;
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    await page.goto("/guests/lamp");
    await page.click("#guest-head details.menu summary");
    assert.deepEqual(await violations(page), []);
    const question = page.locator("#guest-head [popovertarget]").first();
    if (await question.count()) {
      await question.click();
      assert.deepEqual(await violations(page), []);
    }
    await page.goto("/images");
    for (const adder of await page.locator(".adder > summary").all()) {
      await adder.click();
      assert.deepEqual(await violations(page), []);
    }
  }
}, 120_000);

/** Goes through a page with Tab; the stops, and those that cannot be seen. */
async function tabStops(page) {
  const stops = [], unseen = [];
  for (let step = 0; step < 60; step += 1) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(() => {
      const element = document.activeElement;
      if (!element || element === document.body || element.dataset.counted) return null;
      element.dataset.counted = "yes";
      const words = (element.getAttribute("aria-label") || element.innerText || element.name || "").trim().replace(/\s+/g, " ");
      // The mark may be on the thing that holds it: a radio's card, a thumbnail's frame.
      let shown = false;
      for (let at = element; at && at !== document.body && !shown; at = at.parentElement) {
        const { outlineStyle, outlineWidth } = getComputedStyle(at);
        shown = outlineStyle !== "none" && parseFloat(outlineWidth) >= 1;
      }
      return { words, shown };
    });
    if (!stop) break;
    stops.push(stop.words);
    if (!stop.shown) unseen.push(stop.words);
  }
  return { stops, unseen };
}

pageTest("with Tab alone the primary action of each page is reached, and one always sees where one is", async () => {
  const { page } = boss;
  await page.emulateMedia({ colorScheme: "light" });
  const wanted = { "/": "All guests", "/guests": "Create a guest", "/guests/still": "Start", "/guests/new": "Create the guest", "/images": "Upload a file", "/users": "Add a user", "/account": "Change the password" };
  for (const [path, action] of Object.entries(wanted)) {
    await page.goto(path);
    await page.evaluate(() => {
      // From the top, also where a field has the focus at first.
      document.body.tabIndex = -1;
      document.body.focus();
      document.body.removeAttribute("tabindex");
    });
    const { stops, unseen } = await tabStops(page);
    assert.deepEqual(unseen, [], `on ${path} the focus cannot be seen`);
    assert.ok(stops.includes(action), `${action} on ${path}, the stops: ${stops.join(", ")}`);
    assert.equal(stops[0], "Skip to the page", `the first stop of ${path}`);
  }
});

pageTest("a guest is made, and its menu used, with keys alone", async () => {
  const { page } = boss;
  await page.goto("/guests/new");
  await page.keyboard.type("keys");
  await page.keyboard.press("Enter");
  await page.waitForURL(/\/guests\/(?!new)/);
  assert.match(await page.locator("h1").innerText(), /keys/);
  await page.locator("#guest-head details.menu summary").focus();
  await page.keyboard.press("Enter");
  assert.ok(await page.locator("#guest-head .menu-body").isVisible());
  await page.keyboard.press("Escape");
  assert.ok(!(await page.locator("#guest-head .menu-body").isVisible()));
  assert.equal(await page.locator(":focus").evaluate((element) => element.localName), "summary", "the focus is where it was");
});

test("with keys alone one gets into a console and out of it again", async () => {
  const { page } = boss;
  await page.goto("/guests/lamp/console");
  await page.waitForSelector('guest-screen[data-link="live"]');
  await page.waitForFunction(() => document.activeElement.localName === "canvas");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.localName), "canvas", "Tab belongs to the guest");
  await page.keyboard.press("Control+Alt+Shift");
  await page.waitForFunction(() => document.activeElement.matches(".console-bar button"));
});

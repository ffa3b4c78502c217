// The first start: from the link that the server prints to a login, with a certificate that a browser can trust.

import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { BOSS, House } from "./house.mjs";
import { assert, pageTest, test } from "./test.mjs";
import { Visitor, expectComplaints, launch } from "./visitor.mjs";

const REFUSED_FORM = /status of 422/;
let house, link;

pageTest("the start prints a link, and its page asks for the first administrator", async () => {
  house = await House.open();
  link = await house.setupLink();
  const { page } = await Visitor.to(house);
  await page.goto("/");
  assert.equal(new URL(page.url()).pathname, "/setup", "without anybody to log in, everything leads to the set-up");
  assert.match(await page.locator("main").innerText(), /innkeeper admin setup-link/);
  await page.goto(link);
  assert.match(await page.locator("h1").innerText(), /Welcome/);
  assert.equal(await page.locator(":focus").getAttribute("name"), "name");
});

pageTest("passwords that cannot be taken get a message at their field, and the name stays", async () => {
  expectComplaints(REFUSED_FORM);
  const { page } = await Visitor.to(house);
  await page.goto(link);
  const offer = async (name, password, again) => {
    await page.fill("[name=name]", name);
    await page.fill("[name=password]", password);
    await page.fill("[name=password_again]", again);
    await page.click("button.primary");
    await page.waitForLoadState();
  };
  const saidAt = async (field) => {
    const input = page.locator(`[name=${field}]`);
    assert.equal(await input.getAttribute("aria-invalid"), "true", `${field} is marked`);
    return page.locator(`#error-${field}`).innerText();
  };
  await offer(BOSS.name, "short", "short");
  assert.match(await saidAt("password"), /8 characters/);
  assert.equal(await page.inputValue("[name=name]"), BOSS.name);
  await offer(BOSS.name, BOSS.password, "something else");
  assert.match(await saidAt("password_again"), /differ/);
  await offer("../boss", BOSS.password, BOSS.password);
  assert.ok((await saidAt("name")).length > 5);
});

pageTest("the form makes the administrator and logs in, and the link is spent", async () => {
  const { page } = await Visitor.to(house);
  await page.goto(link);
  await page.fill("[name=name]", BOSS.name);
  await page.fill("[name=password]", BOSS.password);
  await page.fill("[name=password_again]", BOSS.password);
  await page.click("button.primary");
  await page.waitForURL((url) => url.pathname === "/");
  assert.match(await page.locator("h1").innerText(), /house is empty/);
  const other = await Visitor.to(house);
  expectComplaints(/status of 4\d\d/);
  await other.page.goto(link);
  assert.equal(await other.page.locator("[name=password_again]").count(), 0, "there is no form any more");
  await other.page.goto("/");
  assert.equal(new URL(other.page.url()).pathname, "/login");
});

pageTest("a wrong password is refused without saying which part was wrong", async () => {
  expectComplaints(REFUSED_FORM, /status of 401/);
  const { page } = await Visitor.to(house);
  const refuse = async (name) => {
    await page.goto("/login");
    await page.fill("[name=name]", name);
    await page.fill("[name=password]", "not this one");
    await page.press("[name=password]", "Enter");
    return page.locator("#login-error").innerText();
  };
  assert.equal(await refuse(BOSS.name), await refuse("nobody"));
});

pageTest("a login survives a restart of the server", async () => {
  const visitor = await Visitor.in(house);
  await visitor.page.goto("/about"); // nothing on it is live, so nothing is missed
  // The pages of the tests before this one are, and try to reach the server while it is away.
  expectComplaints(/ERR_(CONNECTION_\w+|INCOMPLETE_CHUNKED_ENCODING|EMPTY_RESPONSE) .*\/events/, /htmx:sse:error/);
  house.server.kill("SIGTERM");
  await house.ended;
  await house.serve();
  await visitor.page.goto("/guests");
  assert.match(await visitor.page.locator("h1").innerText(), /Guests/);
  await visitor.close();
});

test("a browser that trusts the local authority reaches the login and a console without any exception", async () => {
  await house.testGuest("trusted");
  const home = mkdtempSync(join(tmpdir(), "innkeeper-home-"));
  const nss = join(home, ".pki", "nssdb");
  mkdirSync(nss, { recursive: true });
  const fetcher = await Visitor.to(house);
  const ca = await (await fetcher.context.request.get("/trust/ca.pem")).text();
  writeFileSync(join(home, "ca.pem"), ca);
  const certutil = (...words) => execFileSync("certutil", ["-d", `sql:${nss}`, ...words]);
  certutil("-N", "--empty-password");
  certutil("-A", "-n", "innkeeper", "-t", "C,,", "-i", join(home, "ca.pem"));
  const browser = await launch({ env: { ...process.env, HOME: home } });
  const visitor = await Visitor.to(house, { ignoreHTTPSErrors: false }, browser);
  await visitor.login();
  assert.equal(await visitor.page.evaluate(() => window.isSecureContext), true);
  await visitor.page.goto("/guests/trusted/console");
  await visitor.page.waitForSelector('guest-screen[data-link="live"]');
  await browser.close();
  rmSync(home, { recursive: true, force: true });
});

// Without JavaScript: everything but live consoles.

import { BOSS, House } from "./house.mjs";
import { assert, test, until } from "./test.mjs";
import { Visitor } from "./visitor.mjs";

/** Whether something still moves is asked by a script, which a page like this does not run. */
const STILL = { force: true };
let house, visitor, page;

test("without JavaScript one logs in, makes and starts a guest", async () => {
  house = await House.withBoss();
  visitor = await Visitor.to(house, { javaScriptEnabled: false });
  page = visitor.page;
  await page.goto("/guests");
  assert.equal(new URL(page.url()).pathname, "/login");
  await page.fill("[name=name]", BOSS.name);
  await page.fill("[name=password]", BOSS.password);
  await page.click("button.primary");
  assert.equal(new URL(page.url()).pathname, "/guests", "and comes back to where one wanted to go");
  await page.click("text=Create a guest");
  await page.fill("[name=name]", "plain");
  await page.check("[name=boot][value=test]");
  await page.fill("[name=memory]", "16M");
  await page.click("form .primary");
  assert.match(await page.locator("#guest-head").innerText(), /plain[\s\S]*running/);
  assert.match(await page.locator("main").innerText(), /Test guest, no disk/);
});

test("without JavaScript the console page has a picture, what the serial console said, and a command for a terminal", async () => {
  await page.click(".tabs >> text=Console");
  await until("the guest has spoken", async () => {
    await page.reload();
    return /Welcome to Innkeeper/.test(await page.locator(".fallback").innerText());
  });
  const picture = page.locator(".fallback img");
  assert.ok(await picture.isVisible());
  const answer = await page.request.get(await picture.getAttribute("src"));
  assert.equal(answer.headers()["content-type"], "image/png");
  const words = await page.locator(".fallback").innerText();
  assert.match(words, /innkeeper guest console plain/);
  assert.equal(await page.locator(".console-bar:visible").count(), 0, "buttons that cannot work are not there");
  await page.click(".tabs >> text=Serial");
  assert.match(await page.locator(".fallback").innerText(), /Welcome to Innkeeper/);
});

test("without JavaScript the guest is stopped and deleted, and one logs out", async () => {
  await page.goto("/guests/plain");
  await page.click("#guest-head details.menu summary");
  await page.click("#guest-head >> text=Power off…", STILL);
  await page.click("#guest-head .ask:popover-open .danger", STILL);
  assert.match(await page.locator("#guest-head").innerText(), /stopped/);
  await page.click("#guest-head details.menu summary");
  await page.click("#guest-head >> text=Delete…", STILL);
  await page.fill("[name=confirm]", "plain");
  await page.click(".danger");
  assert.match(await page.locator("main").innerText(), /plain is deleted/);
  await page.click(".user-menu summary");
  await page.click("text=Log out", STILL);
  await page.goto("/guests");
  assert.equal(new URL(page.url()).pathname, "/login");
});

// A host that cannot run guests: every page that matters says so, with what to do.

import { existsSync } from "node:fs";
import { House } from "./house.mjs";
import { assert, pageTest } from "./test.mjs";
import { Visitor } from "./visitor.mjs";

const root = process.getuid() === 0 && existsSync("/dev/kvm");

if (root) pageTest("without KVM the pages say that no guest can run, why, and what to do", async () => {
  const house = await House.withBoss({ noKvm: true });
  const { page } = await Visitor.in(house);
  const said = (selector) => page.locator(selector).first().innerText();
  assert.match(await said("#home-headline"), /KVM/);
  await page.click("#home-headline >> text=Show the host");
  assert.match(await said("main"), /missing/);
  assert.ok((await said(".finding.level-missing .remedy")).length > 10);
  await page.goto("/guests");
  assert.match(await said("main .findings"), /KVM/);
  assert.match(await said("main .findings .remedy"), /.{10}/);
  await page.click("text=Run the Test guest");
  await page.waitForSelector("#guest-head .state-failed");
  assert.match(await said("#guest-head .banner"), /could not start/);
  assert.match(await said("main .findings"), /KVM/, "its page says what keeps it from running");
});

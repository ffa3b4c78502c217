// The consoles of a guest: the Test guest by one click, its screen and its serial console, what several people see, what is lost and comes back.

import { House } from "./house.mjs";
import { lit, litTyped, openScreen, openSerial, serialText, typedPicture, wire } from "./screen.mjs";
import { assert, sleep, test, until } from "./test.mjs";
import { Visitor, expectComplaints } from "./visitor.mjs";

const LOST_CONNECTION = [/ERR_(CONNECTION_REFUSED|CONNECTION_RESET|CONNECTION_CLOSED|INCOMPLETE_CHUNKED_ENCODING|HTTP2_\w+|SOCKET_NOT_CONNECTED|EMPTY_RESPONSE|NETWORK_\w+)/, /WebSocket connection to .* failed/, /Failed when connecting/i, /htmx:/];
const DELETE_KEYSYM = Buffer.from([0, 0, 0xff, 0xff]);
const CTRL_KEYSYM = Buffer.from([0, 0, 0xff, 0xe3]);
let house, boss, page;

test("the empty page offers the Test guest, and one click later its screen is live", async () => {
  house = await House.withBoss();
  boss = await Visitor.in(house);
  page = boss.page;
  await page.goto("/guests");
  assert.match(await page.locator("main").innerText(), /The house is empty/);
  const began = performance.now();
  await page.click("text=Run the Test guest");
  await page.waitForSelector("#guest-head .state-running");
  await page.click("text=Open console");
  await page.waitForSelector('guest-screen[data-link="live"]');
  await until("the screen shows something", async () => (await lit(page)) > 100);
  const took = performance.now() - began;
  assert.ok(took < 8000, `from the click to the picture it took ${Math.round(took)} ms`);
});

test("the list and the guest's page show its picture", async () => {
  await page.goto("/guests");
  const loaded = (selector) => page.locator(selector).evaluate((picture) => picture.complete && picture.naturalWidth);
  assert.equal(await until("the thumbnail", () => loaded(".thumb img")), 320);
  await page.click("#guest-rows tbody th a");
  assert.equal(await until("the picture", () => loaded(".screen-link img")), 720);
});

test("keys typed on the screen appear on the screen and on the serial console, for everybody who looks", async () => {
  await openScreen(page, "test-guest");
  const other = await Visitor.in(house);
  await openScreen(other.page, "test-guest");
  const serial = await boss.tab();
  await openSerial(serial, "test-guest");
  const before = await litTyped(page);
  await page.click("guest-screen canvas");
  await page.keyboard.type("lantern");
  await until("the screen echoes", async () => (await litTyped(page)) > before + 100);
  await until("the serial console echoes", async () => /lantern/.test(await serialText(serial)));
  await until("the other one sees the same", async () => (await typedPicture(page)) === (await typedPicture(other.page)));
  await serial.click("guest-terminal");
  await serial.keyboard.type(" and moth");
  await until("the serial console echoes", async () => /lantern and moth/.test(await serialText(serial)));
  await until("both screens echo what was typed there", async () => (await litTyped(page)) > before + 250 && (await typedPicture(page)) === (await typedPicture(other.page)));
  await other.close();
  await serial.close();
});

test("the buttons send Ctrl+Alt+Del and other keys to the guest", async () => {
  const sent = wire(page, /\/vnc$/);
  await openScreen(page, "test-guest");
  await page.click("text=Ctrl+Alt+Del");
  const all = () => Buffer.concat(sent.sent);
  await until("the keys are sent", () => all().includes(CTRL_KEYSYM) && all().includes(DELETE_KEYSYM));
  const before = await litTyped(page);
  await page.click('[data-do="type"]');
  await page.fill("#console-text", "WORM!");
  await page.click(".console-typing .primary");
  await until("the text is typed", async () => (await litTyped(page)) > before + 50);
  await page.click(".console-keys summary");
  await page.click('[data-key="cf2"]');
  await until("Ctrl+Alt+F2 is sent", () => all().includes(Buffer.from([0, 0, 0xff, 0xbf])));
  assert.equal(await page.locator(".console-keys details[open]").count(), 0, "the menu is closed again");
});

test("the screen fits the window or is shown 1:1, and the page remembers which", async () => {
  const width = () => page.locator("guest-screen canvas").evaluate((canvas) => [canvas.width, Math.round(canvas.getBoundingClientRect().width)]);
  await openScreen(page, "test-guest");
  const [pixels, fitted] = await width();
  assert.notEqual(fitted, pixels, "720 pixels do not fit this window by chance");
  await page.click('[data-view="one"]');
  await until("one to one", async () => (await width())[1] === pixels);
  await page.reload();
  await page.waitForSelector('guest-screen[data-link="live"]');
  await until("one to one after a reload", async () => (await width())[1] === pixels);
  await page.click('[data-view="fit"]');
  await until("fitted", async () => (await width())[1] === fitted);
});

test("full screen takes the console alone, and Ctrl+Alt+Shift gives the keyboard back", async () => {
  await openScreen(page, "test-guest");
  await page.click('[data-do="full"]');
  await until("full screen", () => page.evaluate(() => document.fullscreenElement?.localName === "guest-screen"));
  await page.keyboard.press("Control+Alt+Shift");
  await until("a button has the focus", () => page.evaluate(() => document.activeElement.matches(".console-bar button")));
  await page.click('[data-do="full"]');
  await until("out of it", () => page.evaluate(() => !document.fullscreenElement));
});

test("the serial console has what was said before it was opened, and says when the guest was reset", async () => {
  await openSerial(page, "test-guest");
  await until("the greeting", async () => /Welcome to Innkeeper/.test(await serialText(page)));
  await page.reload();
  await until("the greeting again", async () => /Welcome to Innkeeper[\s\S]*lantern/.test(await serialText(page)));
  const { id } = await house.guest("test-guest");
  await page.click("#guest-head details.menu summary");
  await page.click("text=Reset…");
  await page.click(`#ask-reset-${id} .danger`);
  await page.waitForURL(/guests/);
  await openSerial(page, "test-guest");
  await until("a mark between the two starts", async () => /Welcome[\s\S]*--- reset at[\s\S]*Welcome/.test(await serialText(page)));
});

test("24-bit colours and marks of a terminal work under the policy of the page", async () => {
  await openSerial(page, "test-guest");
  const colour = await page.evaluate(async () => {
    const { term } = document.querySelector("guest-terminal");
    await new Promise((done) => term.write("\r\n\x1b[38;2;12;200;99mGREEN\x1b[0m\r\n", done));
    await new Promise((done) => setTimeout(done, 300));
    const span = [...document.querySelectorAll(".xterm-rows span")].find((part) => part.textContent.includes("GREEN"));
    return getComputedStyle(span).color;
  });
  assert.equal(colour, "rgb(12, 200, 99)");
});

test("when the server of the pages is killed the console says so, comes back by itself, and no text is lost", async () => {
  expectComplaints(...LOST_CONNECTION);
  const heard = wire(page, /\/serial/);
  await openSerial(page, "test-guest");
  const screen = await boss.tab();
  await openScreen(screen, "test-guest");
  await sleep(1500);
  process.kill(house.webProcess(), "SIGKILL");
  await page.waitForSelector('guest-terminal[data-link="lost"]');
  assert.match(await page.locator(".console-said").innerText(), /lost since/);
  await screen.waitForSelector('guest-screen[data-link="lost"]');
  assert.equal(await screen.locator(".last-picture canvas").count(), 1, "the last picture stays");
  await page.waitForSelector('guest-terminal[data-link="live"]', { timeout: 20_000 });
  await screen.waitForSelector('guest-screen[data-link="live"]', { timeout: 20_000 });
  assert.equal(await screen.locator(".last-picture").count(), 0);
  await page.click("guest-terminal");
  await page.keyboard.type("still here");
  await until("keys arrive again", async () => /still here/.test(await serialText(page)));
  assert.ok(heard.sockets >= 2);
  const said = Buffer.from(await house.command(["guest", "console", "test-guest", "--dump"]), "latin1");
  const got = heard.received;
  assert.ok(got.length > 200);
  assert.ok(said.subarray(0, got.length).equals(got) || got.subarray(0, said.length).equals(said), "the page got every byte once and in order");
  await until("the page is live again", async () => /live/.test(await page.locator("#live-state").getAttribute("data-state")), 20_000);
  await screen.close();
});

test("a console that missed text says how much", async () => {
  const tab = await boss.tab();
  // The server says what its hub says to a viewer that was too slow.
  await tab.routeWebSocket(/\/serial/, (socket) => {
    socket.send('{"offset":1000,"skipped":1000}');
    socket.send(Buffer.from("first part"));
    socket.send('{"offset":5010,"skipped":4000}');
    socket.send(Buffer.from("second part"));
  });
  await openSerial(tab, "test-guest");
  await until("both marks", async () => /--- 1,000 bytes before this are gone ---\s+first part\s+--- 4,000 bytes skipped ---\s+second part/.test(await serialText(tab)));
  await tab.close();
});

test("a log-out in one tab ends the consoles in the others, and they say why", async () => {
  expectComplaints(...LOST_CONNECTION, /status of 401/);
  await openSerial(page, "test-guest");
  const screen = await boss.tab();
  await openScreen(screen, "test-guest");
  const elsewhere = await boss.tab();
  await elsewhere.goto("/guests");
  await elsewhere.click(".user-menu summary");
  await elsewhere.click("text=Log out");
  await elsewhere.waitForURL((url) => url.pathname === "/login");
  for (const console of [page.locator("guest-terminal"), screen.locator("guest-screen")]) {
    await until("the console has ended", async () => (await console.getAttribute("data-link")) === "out");
    assert.match(await console.locator(".console-said").innerText(), /logged out/i);
  }
  assert.ok(await page.locator('main a[href^="/login"]').isVisible(), "there is a way back in");
  await boss.close();
});

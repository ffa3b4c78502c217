// Visitors: browsers, and pages that note everything the browser complains about.

import { createRequire } from "node:module";
import { join } from "node:path";
import { BOSS } from "./house.mjs";

const need = createRequire(join(process.env.INNKEEPER_MODULES, "package.json"));
const { chromium } = need("playwright-core");
export const axeSource = need("axe-core").source;

const ARGS = ["--disable-gpu", "--disable-background-networking", "--no-first-run"];
if (process.getuid() === 0) ARGS.push("--no-sandbox");

let shared = null;
const browsers = new Set();
const contexts = new Set();
/**
 * What the tests themselves cause: by looking at canvases, by guests whose networks come and go on the machine of the browser, by leaving a page
 * in the instant in which it asks for its stream (whether a page is live is tested by its #live-state), and by ending guests in the instant in
 * which an open page asks for their picture.
 */
const OURS = [
  /willReadFrequently/,
  /ERR_NETWORK_CHANGED/,
  /htmx:sse:error: network error/,
  /htmx:error: Failed to fetch TypeError: Failed to fetch[\s\S]*elt: div#stream/,
  /status of 404 .*\/screenshot\.png/,
];
let complaints = [];
let expected = [];

export async function launch(options = {}) {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGS, ...options });
  browsers.add(browser);
  return browser;
}

/** Somebody with a browser of their own: cookies are not shared between visitors. */
export class Visitor {
  static async to(house, options = {}, browser) {
    const visitor = new Visitor();
    visitor.house = house;
    browser ??= shared ??= await launch();
    const settings = { ignoreHTTPSErrors: true, viewport: { width: 1280, height: 800 }, locale: "en-GB", ...options };
    visitor.context = await browser.newContext({ baseURL: house.url, ...settings });
    contexts.add(visitor.context);
    if (settings.javaScriptEnabled !== false) await visitor.context.addInitScript(noteViolations);
    visitor.page = await visitor.tab();
    return visitor;
  }

  /** As `to`, logged in as the administrator. */
  static async in(house, options = {}) {
    const visitor = await Visitor.to(house, options);
    await visitor.login();
    return visitor;
  }

  /** One more page of the same browser. */
  async tab() {
    const page = await this.context.newPage();
    page.setDefaultTimeout(10_000);
    page.goto = outlasting(page);
    page.on("console", (message) => {
      if (["error", "warning"].includes(message.type())) complain(`${message.type()}: ${message.text()} (${message.location().url}, on ${page.url()})`);
    });
    page.on("pageerror", (error) => complain(`uncaught: ${error.message} (on ${page.url()})`));
    page.on("response", (answer) => answer.status() >= 500 && complain(`${answer.status()} from ${answer.url()}`));
    return page;
  }

  async login({ name, password } = BOSS) {
    await this.page.goto("/login");
    await this.page.fill("[name=name]", name);
    await this.page.fill("[name=password]", password);
    await this.page.press("[name=password]", "Enter");
    await this.page.waitForURL((url) => url.pathname !== "/login");
    await this.page.waitForSelector('#live-state[data-state="live"]', { state: "attached" });
  }

  async close() {
    contexts.delete(this.context);
    await this.context.close();
  }
}

/**
 * Chromium breaks off what it loads when an interface of its machine comes or goes, as the server's bridges do here, and loads it again by
 * itself for a person who waits. The tests do not wait for that.
 */
function outlasting(page) {
  const goto = page.goto.bind(page);
  return async (...where) => {
    try {
      return await goto(...where);
    } catch (error) {
      if (!/ERR_NETWORK_CHANGED/.test(String(error))) throw error;
      console.log(`  loaded again, as the machine's interfaces changed: ${where[0]}`);
      return goto(...where);
    }
  };
}

/** Complaints that a test causes on purpose, until the end of that test. */
export function expectComplaints(...patterns) {
  expected.push(...patterns);
}

/** What was complained about since the last call, without what was expected. */
export function complaintsOf() {
  const found = complaints.filter((text) => ![...OURS, ...expected].some((pattern) => pattern.test(text)));
  complaints = [];
  expected = [];
  return [...new Set(found)];
}

export function openPages() {
  return [...contexts].flatMap((context) => context.pages());
}

export async function closeBrowsers() {
  shared = null;
  contexts.clear();
  for (const browser of browsers) await browser.close();
  browsers.clear();
}

function complain(text) {
  complaints.push(text);
}

function noteViolations() {
  document.addEventListener("securitypolicyviolation", (event) => {
    console.error(`Content-Security-Policy: ${event.violatedDirective} ${event.blockedURI} ${event.sourceFile}:${event.lineNumber}`);
  });
}

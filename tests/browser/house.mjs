// A house: one `innkeeper serve` with a state of its own, on a free port.

import { execFile, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { until } from "./test.mjs";

const program = process.env.INNKEEPER_BINARY;
const START_MS = 20_000;
const END_MS = 10_000;
const houses = new Set();

export const BOSS = { name: "boss", password: "correct horse battery" };

export class House {
  /** With `noKvm` the server finds no KVM behind /dev/kvm; only root can do that to it. */
  static async open({ noKvm = false } = {}) {
    const house = new House();
    houses.add(house);
    house.noKvm = noKvm;
    house.state = mkdtempSync(join(tmpdir(), "innkeeper-browser-"));
    house.port = await freePort();
    house.url = `https://localhost:${house.port}`;
    await house.serve();
    return house;
  }

  /** A house that has its administrator already. */
  static async withBoss(options) {
    const house = await House.open(options);
    await house.command(["admin", "create-user", BOSS.name, "--role", "administrator", "--password-stdin"], `${BOSS.password}\n`);
    return house;
  }

  async serve() {
    this.said = "";
    const command = [program, "serve", "--listen", `127.0.0.1:${this.port}`, "--state", this.state];
    if (this.noKvm) command.unshift("unshare", "--mount", "sh", "-c", 'mount --bind /dev/null /dev/kvm && exec "$@"', "sh");
    const server = (this.server = spawn(command[0], command.slice(1)));
    for (const stream of [server.stdout, server.stderr]) stream.setEncoding("utf8").on("data", (text) => (this.said += text));
    this.ended = new Promise((done) => server.once("exit", done));
    await until(`the server is there, it said: ${this.said}`, () => answers(this.port), START_MS);
  }

  /** The one-time link that the start printed. */
  setupLink() {
    return until("the set-up link", () => /https:\S+\/setup\?token=\S+/.exec(this.said)?.[0]);
  }

  /** Runs a command of the program on this state; its output. */
  command(args, input = "") {
    return new Promise((done, no) => {
      const child = execFile(program, [...args, "--state", this.state], { maxBuffer: 64 << 20, encoding: "latin1" }, (error, out, err) => {
        if (error) no(new Error(`${args.join(" ")}: ${err || error}`));
        else done(out);
      });
      child.stdin.on("error", () => {}).end(input); // a command that fails does not read
    });
  }

  async guest(name) {
    return JSON.parse(await this.command(["guest", "show", name, "--json"]));
  }

  /** Makes a guest that shows that all works, and starts it. */
  async testGuest(name) {
    await this.command(["guest", "create", name, "--test-guest", "--memory", "16M", "--network", "none"]);
    await this.command(["guest", "start", name]);
  }

  /** The process that serves the pages: the child of the server with that role. */
  webProcess() {
    const children = readFileSync(`/proc/${this.server.pid}/task/${this.server.pid}/children`, "utf8").trim().split(" ");
    const role = (pid) => readFileSync(`/proc/${pid}/cmdline`, "utf8").split("\0");
    return Number(children.find((pid) => role(pid).includes("web")));
  }

  async close() {
    houses.delete(this);
    for (const guest of JSON.parse(await this.command(["guest", "ls", "--json"]).catch(() => "[]"))) {
      await this.command(["guest", "poweroff", guest.name]).catch(() => {});
    }
    this.server.kill("SIGTERM");
    const late = setTimeout(() => this.server.kill("SIGKILL"), END_MS);
    await this.ended;
    clearTimeout(late);
    await this.command(["admin", "remove-networks"]).catch(() => {});
    rmSync(this.state, { recursive: true, force: true });
  }
}

export async function closeHouses() {
  for (const house of houses) await house.close();
}

/** Processes that are there and are called this. */
export function alive(pid) {
  return readdirSync("/proc").includes(String(pid));
}

function freePort() {
  return new Promise((done, no) => {
    const server = createServer().on("error", no);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => done(port));
    });
  });
}

async function answers(port) {
  const { get } = await import("node:https");
  return new Promise((done) => {
    get({ host: "127.0.0.1", port, path: "/login", rejectUnauthorized: false }, (answer) => done(answer.resume().statusCode > 0)).on("error", () => done(false));
  });
}

// Builds the front end: `node build.mjs OUT [CACHE]`.
//
// Bundles js/ and css/, writes one sprite of the icons in icons.txt, hashes every name by its content, compresses each file
// twice, and describes it all in OUT/manifest.rs (see src/web/assets.rs). The packages of package-lock.json are installed
// into CACHE/<hash of the lock>, once; without CACHE they are taken from node_modules beside this file.

import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { brotliCompressSync, constants, gzipSync } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const out = resolve(process.argv[2] ?? "dist");
const modules = process.argv[3] ? installed(resolve(process.argv[3])) : join(here, "node_modules");
const need = createRequire(join(modules, "anchor.js"));

const TYPES = { ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml" };

const assets = [];
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
bundle();
add("icons.svg", Buffer.from(sprite()));
add("mark.svg", readFileSync(join(here, "mark.svg")));
writeFileSync(join(out, "manifest.rs"), manifest());

/** The node_modules of this package-lock.json, installed when they are not there yet. */
function installed(cache) {
  const lock = readFileSync(join(here, "package-lock.json"));
  const home = join(cache, hash(lock));
  if (!existsSync(join(home, "node_modules"))) {
    const fresh = `${home}.${process.pid}`;
    mkdirSync(fresh, { recursive: true });
    for (const name of ["package.json", "package-lock.json"]) cpSync(join(here, name), join(fresh, name));
    execFileSync("npm", ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], { cwd: fresh, stdio: ["ignore", 2, 2] });
    try {
      renameSync(fresh, home); // whoever comes second finds it there
    } catch (error) {
      if (!existsSync(join(home, "node_modules"))) throw error;
      rmSync(fresh, { recursive: true, force: true });
    }
  }
  return join(home, "node_modules");
}

/** Bundles the entries. The names stay plain here; `add` hashes them, since no bundle names another. */
function bundle() {
  const esbuild = need("esbuild");
  const common = { bundle: true, minify: true, write: false, legalComments: "none", outdir: out, nodePaths: [modules], logLevel: "warning" };
  const js = esbuild.buildSync({ ...common, entryPoints: ["app", "screen", "serial"].map((name) => join(here, "js", `${name}.js`)), format: "esm", target: "es2022" });
  const css = esbuild.buildSync({ ...common, entryPoints: [join(here, "css", "app.css")], target: ["chrome123", "firefox121", "safari17.5"] });
  for (const file of [...js.outputFiles, ...css.outputFiles]) add(basename(file.path), Buffer.from(file.contents));
}

function sprite() {
  const lucide = JSON.parse(readFileSync(join(modules, "@iconify-json/lucide/icons.json")));
  const names = readFileSync(join(here, "icons.txt"), "utf8").split("\n").filter((line) => line && !line.startsWith("#"));
  const symbols = names.map((name) => {
    const icon = lucide.icons[name] ?? lucide.icons[lucide.aliases?.[name]?.parent];
    if (!icon) throw new Error(`icons.txt names "${name}", which Lucide does not have`);
    return `<symbol id="${name}" viewBox="0 0 ${lucide.width ?? 24} ${lucide.height ?? 24}">${icon.body}</symbol>`;
  });
  return `<svg xmlns="http://www.w3.org/2000/svg">${symbols.join("")}</svg>`;
}

/** Writes one file under its hashed name, and compressed where that helps. */
function add(name, bytes) {
  const type = extname(name);
  const file = `${basename(name, type)}-${hash(bytes)}${type}`;
  const packed = {
    br: brotliCompressSync(bytes, { params: { [constants.BROTLI_PARAM_QUALITY]: 11, [constants.BROTLI_PARAM_SIZE_HINT]: bytes.length } }),
    gz: gzipSync(bytes, { level: 9 }),
  };
  writeFileSync(join(out, file), bytes);
  const worth = Object.keys(packed).filter((way) => packed[way].length < bytes.length * 0.9);
  for (const way of worth) writeFileSync(join(out, `${file}.${way}`), packed[way]);
  assets.push({ name, file, type: TYPES[type], worth });
}

function hash(bytes) {
  return createHash("sha256").update(bytes).digest("hex").slice(0, 12);
}

/** Every package that ends up in what a browser gets, with the text of its licence. */
function packages() {
  const shipped = ["htmx.org", "@novnc/novnc", "@novnc/novnc/vendor/pako", "@xterm/xterm", "@xterm/addon-fit", "@iconify-json/lucide"];
  return shipped.map((name) => {
    const folder = join(modules, name);
    const info = existsSync(join(folder, "package.json")) ? JSON.parse(readFileSync(join(folder, "package.json"))) : {};
    const file = readdirSync(folder).find((entry) => /^licen[cs]e/i.test(entry));
    const source = (info.repository?.url ?? info.repository ?? "").replace(/^git\+/, "").replace(/\.git$/, "");
    const vendored = name.includes("/vendor/");
    // An icon set has no licence file; its info says whose it is and where the licence is.
    const set = existsSync(join(folder, "info.json")) ? JSON.parse(readFileSync(join(folder, "info.json"))) : null;
    const said = set ? `Copyright (c) ${set.author.name}, under the ${set.license.title} licence: ${set.license.url}` : "";
    return {
      name: vendored ? `${basename(name)} (inside ${name.split("/vendor/")[0]})` : name,
      version: info.version ?? "",
      licence: info.license ?? "MIT",
      source: source.startsWith("https://") ? source : "",
      text: file ? readFileSync(join(folder, file), "utf8") : said,
    };
  });
}

function manifest() {
  const rust = (text) => JSON.stringify(text).replace(/\\u([0-9a-f]{4})/gi, "\\u{$1}").replace(/\\[bf]/g, " ");
  const bytes = (file) => `include_bytes!(concat!(env!("INNKEEPER_UI"), ${rust(`/${file}`)}))`;
  const entries = assets.map(({ name, file, type, worth }) => {
    const [br, gz] = ["br", "gz"].map((way) => (worth.includes(way) ? bytes(`${file}.${way}`) : "&[]"));
    return `    Asset { name: ${rust(name)}, file: ${rust(file)}, content_type: ${rust(type)}, bytes: ${bytes(file)}, br: ${br}, gz: ${gz} },`;
  });
  const urls = assets.map(({ name, file }) => `    (${rust(name)}, ${rust(`/assets/${file}`)}),`);
  const owed = packages().map((p) => `    Package { name: ${rust(p.name)}, version: ${rust(p.version)}, licence: ${rust(p.licence)}, source: ${rust(p.source)}, text: ${rust(p.text)} },`);
  return [
    "pub(super) static URLS: &[(&str, &str)] = &[", ...urls, "];",
    "pub(super) static ASSETS: &[Asset] = &[", ...entries, "];",
    "pub(super) static PACKAGES: &[Package] = &[", ...owed, "];", "",
  ].join("\n");
}
